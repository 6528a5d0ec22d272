"""What the tests of readers share: arrays into a real file, and the matrix that a reader makes of them."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from lowbit.model.sources import Source  # noqa: E402
from lowbit.model.stored.tensors import StoredTensors  # noqa: E402
from lowbit.packed import TensorFile  # noqa: E402


def stored_tensors(folder, tensors, quantization):
    """The tensors of a checkpoint of one file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "m.safetensors")
    file = TensorFile(folder / "m.safetensors")
    fields = {"quantization_config": quantization}
    return StoredTensors(dict.fromkeys(file.names(), file), fields, "config.json")


def read_matrix(folder, arrays, quantization, stem="model.layers.0.mlp.up_proj"):
    """The PackedMatrix of `arrays`, name after the stem -> tensor."""
    tensors = {f"{stem}.{name}": tensor for name, tensor in arrays.items()}
    stored = stored_tensors(folder, tensors, quantization)
    assert stored.names() == [f"{stem}.weight"]
    matrix = stored.matrix(Source(f"{stem}.weight"))
    assert tuple(stored.shape(f"{stem}.weight")) == matrix.shape
    return matrix


def equal(matrix, expected):
    """Do all weights agree to the bit, the sign of zeros aside?"""
    expected = expected.detach().float().numpy()
    np.testing.assert_array_equal(matrix.dequantize(), expected)
    assert expected.any()


def scales_of(generator, *shape, dtype=torch.float32):
    """Scales with a zero, a tiny and a large one."""
    scales = torch.rand(*shape, generator=generator) * 0.1 + 0.001
    flat = scales.reshape(-1)
    flat[0] = 0
    flat[-1] = 2.0**-14 if dtype == torch.float16 else 2.0**-100
    flat[len(flat) // 2] = 1000.0 if dtype == torch.float16 else 2.0**60
    return scales.to(dtype)
