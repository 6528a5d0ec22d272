"""How codes lie in memory: the PackedMatrix, its layout, and the files that hold it."""

from lowbit.packed.base3 import base3_shape, pack_base3, unpack_base3
from lowbit.packed.columns_term import ColumnsTerm
from lowbit.packed.entries_term import EntriesTerm
from lowbit.packed.entropy_term import EntropyTerm
from lowbit.packed.float_term import FloatTerm
from lowbit.packed.gathered_term import NO_INPUT, GatheredTerm
from lowbit.packed.layout import (
    BLOCK_ROWS,
    CHUNK,
    check_group_size,
    codes_shape,
    group_count,
    pack_codes,
    pack_groups,
    pack_multipliers,
    pack_values,
    unpack_codes,
    unpack_groups,
    unpack_multipliers,
    unpack_values,
)
from lowbit.packed.low_rank_term import LowRankTerm
from lowbit.packed.matrix import KINDS, PackedMatrix
from lowbit.packed.planned import planned_arrays
from lowbit.packed.rows_term import RowsTerm
from lowbit.packed.sparse_term import SparseTerm
from lowbit.packed.storage import TensorFile, TensorWriter
from lowbit.packed.term import Term
from lowbit.packed.terms import CodeTerm

__all__ = [
    "BLOCK_ROWS",
    "CHUNK",
    "KINDS",
    "NO_INPUT",
    "CodeTerm",
    "ColumnsTerm",
    "EntriesTerm",
    "EntropyTerm",
    "FloatTerm",
    "GatheredTerm",
    "LowRankTerm",
    "PackedMatrix",
    "RowsTerm",
    "SparseTerm",
    "TensorFile",
    "TensorWriter",
    "Term",
    "base3_shape",
    "check_group_size",
    "codes_shape",
    "group_count",
    "pack_base3",
    "pack_codes",
    "pack_groups",
    "pack_multipliers",
    "pack_values",
    "planned_arrays",
    "unpack_base3",
    "unpack_codes",
    "unpack_groups",
    "unpack_multipliers",
    "unpack_values",
]
