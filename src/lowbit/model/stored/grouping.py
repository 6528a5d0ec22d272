"""Which inputs share a scale: as terms of codes have it, or by gathering the inputs of a group first.

A CodeTerm has groups of a multiple of 16 inputs that lie side by side and fill the row. Files also have
groups in any order (g_idx of GPTQ's act-order), a last group that is not full, and groups of other sizes. For
these the inputs of each group are gathered and filled up to a multiple of 16 (GatheredTerm).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowbit.packed import NO_INPUT

UNIT = 16  # inputs: groups of codes are a multiple of it


@dataclass(frozen=True, eq=False)
class Grouping:
    """size: inputs of a group of the CodeTerm, 0: the whole row
    stored: int64 [groups]: which of the stored groups each of them is; None: the same ones
    inputs: uint32 [groups * size]: the input that each place reads; None: the inputs in their order
    """

    size: int
    stored: np.ndarray | None = None
    inputs: np.ndarray | None = None

    def parameters(self, values: np.ndarray) -> np.ndarray:
        """Scales or the like [rows, stored groups] of the groups of the CodeTerm."""
        return values if self.stored is None else values[:, self.stored]

    def codes(self, codes: np.ndarray, fill: int = 0) -> np.ndarray:
        """Codes [rows, in_features] in the order of the CodeTerm; `fill` where no input is read."""
        if self.inputs is None:
            return codes
        read = self.inputs != NO_INPUT
        if read.all():
            return np.take(codes, self.inputs, axis=1)
        gathered = np.full((len(codes), len(self.inputs)), fill, np.uint8)
        gathered[:, read] = np.take(codes, self.inputs[read], axis=1)
        return gathered


def grouping(in_features: int, group_size: int, group_of: np.ndarray | None = None) -> Grouping:
    """How weights in groups of `group_size` inputs become a term.

    group_size: of the file; at least in_features: one group. group_of: int [in_features], the stored group of
    each input, checked by the caller; None: input i is in group i // group_size.
    """
    natural = np.arange(in_features) // group_size
    if group_of is None or np.array_equal(group_of, natural):
        if group_size >= in_features:
            return Grouping(0)
        if group_size % UNIT == 0 and in_features % group_size == 0:
            return Grouping(group_size)
        group_of = natural
    elif (group_of == group_of[0]).all():
        return Grouping(0, stored=np.array([int(group_of[0])]))
    size = -(-min(group_size, in_features) // UNIT) * UNIT
    order = np.argsort(group_of, kind="stable")
    counts = np.bincount(group_of)
    pieces = -(-counts // size)  # a group with more inputs than its size takes several
    stored = np.repeat(np.arange(len(counts)), pieces)
    starts = np.cumsum(pieces) - pieces  # first piece of each group
    rank = np.arange(in_features) - np.repeat(np.cumsum(counts) - counts, counts)
    inputs = np.full(len(stored) * size, NO_INPUT, np.uint32)
    inputs[np.repeat(starts, counts) * size + rank] = order
    if len(inputs) == in_features and np.array_equal(inputs, np.arange(in_features)):
        return Grouping(size, stored=stored)
    return Grouping(size, stored, inputs)
