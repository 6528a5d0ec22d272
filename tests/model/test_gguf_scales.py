"""Scales of whole tensors beside them, as NVFP4 and BitNet models have them."""

import numpy as np
import pytest

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.gguf_types import TENSOR_TYPES, decode

from .gguf_bytes import model_bytes
from .test_gguf_models import SHAPES, metadata, random_blocks

NVFP4 = TENSOR_TYPES[40]
DOWN = "model.layers.0.mlp.down_proj.weight"


def written(folder, rng, **scales):
    """(path, weights of ffn_down) of a model whose ffn_down has these tensors beside it."""
    tensors, down = {"output_norm.weight": (0, np.ones(256, np.float32))}, None
    for name, shape in SHAPES.items():
        blocks = random_blocks(rng, NVFP4, shape)
        tensors[f"{name}.weight"] = (40, blocks.reshape(shape[0], -1))
        down = decode(blocks.reshape(-1), NVFP4).reshape(shape) if "ffn_down" in name else down
    tensors |= {f"blk.0.ffn_down.{name}": (0, np.float32(value)) for name, value in scales.items()}
    path = folder / "model.gguf"
    path.write_bytes(model_bytes(metadata(), tensors))
    return path, down


def test_a_scale_multiplies_its_tensor(tmp_path, rng):
    path, down = written(tmp_path, rng, scale=[0.375], input_scale=[5.0])
    with open_checkpoint(path) as checkpoint:
        names = checkpoint.names()
        assert len(names) == len(SHAPES) + 1 and not [name for name in names if "scale" in name]
        np.testing.assert_array_equal(checkpoint.read(DOWN), down * np.float32(0.375))
        matrix = checkpoint.matrix(DOWN)
        np.testing.assert_allclose(matrix.dequantize(), checkpoint.read(DOWN), rtol=3e-7)
        assert matrix.terms[0].tensor_scale == 0.375 * NVFP4.unit
        gate = DOWN.replace("down", "gate")
        np.testing.assert_array_equal(checkpoint.matrix(gate).dequantize(), checkpoint.read(gate))


@pytest.mark.parametrize(
    ("values", "message"), [([1.0, 2.0], "has 2 numbers"), ([np.nan], "not finite"), ([np.inf], "not finite")]
)
def test_damaged_scales_are_named(values, message, tmp_path, rng):
    path, _ = written(tmp_path, rng, scale=values)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_floats_have_no_scales(tmp_path, rng):
    tensors = {
        "output_norm.weight": (0, np.ones(256, np.float32)),
        "blk.0.ffn_down.weight": (0, np.ones((256, 512), np.float32)),
        "blk.0.ffn_down.scale": (0, np.float32([2])),
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(model_bytes(metadata(), tensors))
    with pytest.raises(UnsupportedError, match="no scales to multiply; do it"):
        open_checkpoint(path)
