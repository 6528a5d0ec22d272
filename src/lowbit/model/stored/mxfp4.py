"""MXFP4 experts of gpt-oss: all experts of a layer in one array.

    ..gate_up_proj_blocks  U8 [experts, out, in / 32, 16]    a byte holds inputs 2 i (low nibble) and 2 i + 1
    ..gate_up_proj_scales  U8 [experts, out, in / 32]        powers of two, 127 meaning 1

Elements are E2M1 (OCP Microscaling Formats v1.0, section 5.3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.model.stored.arrays import Arrays
from lowbit.model.stored.grouping import grouping
from lowbit.model.stored.packing import E2M1, code_matrix
from lowbit.packed import PackedMatrix

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32


@dataclass(frozen=True)
class Config:
    pass


def config(quantization: Mapping[str, Any], where: str) -> Config:
    """There is nothing to choose: which matrices are experts follows from their names."""
    return Config()


def shape(arrays: Arrays) -> tuple[int, int, int]:
    """(experts, out_features, in_features) of an array of blocks."""
    found = arrays.shape(BLOCKS)
    if len(found) != 4 or found[3] != GROUP // 2 or 0 in found:
        raise arrays.damaged(f"{BLOCKS} has shape {list(found)}, not [experts, out, in / 32, 16]")
    return found[0], found[1], found[2] * GROUP


def read(arrays: Arrays, expert: int, rows: slice | np.ndarray | None = None) -> PackedMatrix:
    """The matrix of one expert, or some of its rows, exactly."""
    experts, out_features, in_features = shape(arrays)
    if not 0 <= expert < experts:
        raise arrays.damaged(f"there is no expert {expert} among {experts}")
    arrays.check_size(out_features, in_features)
    n_groups = in_features // GROUP
    blocks = arrays.take(BLOCKS, ("U8",), (experts, out_features, n_groups, GROUP // 2))[expert]
    scales = arrays.take(SCALES, ("U8", "F8_E8M0"), (experts, out_features, n_groups))[expert]
    if rows is not None:
        blocks, scales = blocks[rows], scales[rows]
    if (scales == 255).any():
        raise arrays.damaged(f"{SCALES} hold 255, which is no power of two")
    codes = np.empty((*blocks.shape, 2), np.uint8)
    codes[..., 0], codes[..., 1] = blocks & 15, blocks >> 4
    codes = codes.reshape(len(blocks), in_features)
    return code_matrix(codes, 4, E2M1, scales, grouping(in_features, GROUP), "mxfp4", scale_type="e8m0")
