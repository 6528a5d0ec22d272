"""Arrays in, PackedMatrix out: one algorithm per file."""

from lowbit.quantize.round_to_nearest import quantize_array, round_to_nearest

__all__ = ["quantize_array", "round_to_nearest"]
