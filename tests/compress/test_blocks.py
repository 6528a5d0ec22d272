"""The walk over blocks: statistics are those of the inputs, later layers see what earlier ones became."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lowbit.compress.blocks import walk_blocks  # noqa: E402
from lowbit.formats import parse_format  # noqa: E402
from lowbit.model.checkpoint import open_checkpoint  # noqa: E402
from lowbit.quantize import round_to_nearest  # noqa: E402

TOKENS = np.random.default_rng(0).integers(0, 64, (3, 16))


def walk(folder, format_name):
    seen = {}
    with open_checkpoint(folder) as checkpoint:

        def quantize(name, weight, statistics):
            seen[name] = statistics
            return round_to_nearest(weight, parse_format(format_name))

        matrices = dict(walk_blocks(checkpoint, TOKENS, quantize))
        shapes = {name: checkpoint.shape(name) for name in matrices}
    return matrices, seen, shapes


def test_every_matrix_of_every_layer_is_walked(tiny_model):
    matrices, seen, shapes = walk(tiny_model, "int8-g32")
    assert len(matrices) % 7 == 0 and matrices
    for name, matrix in matrices.items():
        assert matrix.shape == shapes[name]
        s = seen[name].checked(matrix.shape[1], name)
        assert s.tokens == TOKENS.size
        np.testing.assert_allclose(s.hessian, s.hessian.T, rtol=1e-5, atol=1e-6)
        # the mean of squares is at most the largest square
        assert (s.magnitudes <= s.largest * (1 + 1e-5)).all() and s.largest.any()


def test_later_layers_see_the_errors_of_earlier_ones(tiny_model):
    _, fine, _ = walk(tiny_model, "fp32")
    _, coarse, _ = walk(tiny_model, "int2-g32")
    first = "model.layers.0.self_attn.q_proj.weight"
    later = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(fine[first].hessian, coarse[first].hessian)
    assert np.abs(fine[later].hessian - coarse[later].hessian).max() > 0
