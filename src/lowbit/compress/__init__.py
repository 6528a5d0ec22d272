"""Walk a checkpoint and write a small model."""

from lowbit.compress.walk import quantize_checkpoint

__all__ = ["quantize_checkpoint"]
