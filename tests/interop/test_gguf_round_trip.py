"""What is read from GGUF is written again without loss, wherever there is a writer of the type."""

import numpy as np
import pytest

from lowbit.interop.gguf_exact import QUANTIZED, exact_rows
from lowbit.model.gguf_matrix import matrix_from_gguf
from lowbit.model.gguf_types import TENSOR_TYPES, decode

KINDS = [kind for kind in TENSOR_TYPES.values() if kind.name in QUANTIZED]
HALVES = {
    "Q4_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,),
    "TQ2_0": (64,), "MXFP4": (),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_round_trip(kind, rng):
    """Random codes and factors; of K types the same products come back, if not the same factors."""
    blocks = rng.integers(0, 256, (64 * 512 // kind.block, kind.nbytes), dtype=np.uint8)
    for at in HALVES.get(kind.name, (0,)):
        scales = rng.normal(size=(len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    if kind.name == "MXFP4":
        blocks[:, 0] %= 255
    if kind.name == "TQ2_0":
        blocks[:, :64] &= 0x55
    matrix = matrix_from_gguf(blocks.reshape(-1), kind, 64, 512)
    rows = exact_rows(matrix, kind.name)
    assert rows is not None
    again = np.concatenate([rows(0, 32).reshape(-1), rows(32, 32).reshape(-1)])
    np.testing.assert_array_equal(decode(again, kind), decode(blocks.reshape(-1), kind))
