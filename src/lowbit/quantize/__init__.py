"""Arrays in, PackedMatrix out: one algorithm per file."""

from lowbit.quantize.low_rank import low_rank
from lowbit.quantize.methods import quantize_array
from lowbit.quantize.outliers import split_columns, split_entries
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.rows import refine_rows
from lowbit.quantize.sparse import sparse

__all__ = [
    "low_rank",
    "quantize_array",
    "refine_rows",
    "round_to_nearest",
    "sparse",
    "split_columns",
    "split_entries",
]
