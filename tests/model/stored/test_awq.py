"""AWQ checkpoints decode to the numbers of AutoAWQ's and GPTQModel's own code."""

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from lowbit.errors import CheckpointError, UnsupportedError  # noqa: E402

from .writing import equal, read_matrix, scales_of  # noqa: E402


def settings(group_size, **more):
    found = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "version": "gemm",
        "zero_point": True,
    }
    return found | more


def random_arrays(out, inputs, size, dtype=torch.float16):
    generator = torch.Generator().manual_seed(out + inputs)
    groups = 1 if size < 0 else inputs // size

    def words(*shape):
        wide = torch.randint(-(1 << 31), (1 << 31) - 1, shape, generator=generator, dtype=torch.int64)
        return wide.to(torch.int32)

    return {
        "qweight": words(inputs, out // 8),
        "qzeros": words(groups, out // 8),
        "scales": scales_of(generator, groups, out, dtype=dtype),
    }


def packing_of(package, file):
    """A file of a package, without the imports of the package around it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"pip install --no-deps {'autoawq' if package == 'awq' else package}")
    path = Path(found.submodule_search_locations[0]) / file
    spec = importlib.util.spec_from_file_location(f"{package}_packing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHAPES = [(64, 128, 32), (8, 96, 96), (72, 64, -1), (32, 256, 64)]


@pytest.mark.interop(type="AWQ gemm", direction="read", against="autoawq")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autoawq(dtype, tmp_path):
    dequantize = packing_of("awq", "utils/packing_utils.py").dequantize_gemm
    for out, inputs, size in SHAPES:
        arrays = random_arrays(out, inputs, size, dtype)
        group = inputs if size < 0 else size
        expected = dequantize(arrays["qweight"], arrays["qzeros"], arrays["scales"].float(), 4, group).T
        equal(read_matrix(tmp_path, arrays, settings(size)), expected)


@pytest.mark.interop(type="AWQ gemm", direction="read", against="the documented layout, written in torch")
def test_the_documented_layout(tmp_path):
    """Nibble j of a word is output (0, 2, 4, 6, 1, 3, 5, 7)[j] of its eight."""
    for out, inputs, size in SHAPES:
        arrays = random_arrays(out, inputs, size)
        group = inputs if size < 0 else size
        codes, zeros = (torch.zeros(len(arrays[n]), out, dtype=torch.long) for n in ("qweight", "qzeros"))
        for target, name in ((codes, "qweight"), (zeros, "qzeros")):
            for j, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                target[:, output::8] = arrays[name].long() >> (4 * j) & 15
        at = torch.arange(inputs) // group
        equal(
            read_matrix(tmp_path, arrays, settings(size)),
            (arrays["scales"].float()[at] * (codes - zeros[at])).T,
        )


@pytest.mark.parametrize("change, named", [({"version": "gemv"}, "gemv"), ({"bits": 3}, "bits=3")])
def test_what_is_not_known_is_refused_by_name(change, named, tmp_path):
    with pytest.raises(UnsupportedError, match=f"{named}.*lowbit reads"):
        read_matrix(tmp_path, random_arrays(64, 128, 32), settings(32) | change)


def test_shapes_that_disagree_are_refused(tmp_path):
    arrays = random_arrays(64, 128, 32)
    for name in arrays:
        with pytest.raises(CheckpointError, match="config and weights disagree"):
            read_matrix(tmp_path, arrays | {name: arrays[name].repeat(2, 1)}, settings(32))
