"""What a model and a machine are worth, in numbers."""

from lowbit.measure.compare import Comparison, ComparisonResult, compare
from lowbit.measure.kernels import bench_kernels
from lowbit.measure.machine import describe_machine, find_problems, peak_rss_bytes
from lowbit.measure.perplexity import PerplexityResult, perplexity
from lowbit.measure.speed import bench, first_token_seconds, measure_decode

__all__ = [
    "Comparison",
    "ComparisonResult",
    "PerplexityResult",
    "bench",
    "bench_kernels",
    "compare",
    "describe_machine",
    "find_problems",
    "first_token_seconds",
    "measure_decode",
    "peak_rss_bytes",
    "perplexity",
]
