"""All parts of a benchmark run, in order, and the headings under which their rows stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import part_generation
import part_kernels
import part_model
import part_serving
import part_speed
from context import Bench
from targets import LARGE, OPENVINO, SMALL, Row

Section = Callable[[Bench], tuple[list[Row], Any]]
SECTIONS: Mapping[str, Section] = {
    "accuracy": part_model.accuracy_section,
    "quality": part_model.quality_section,
    "kernels": part_kernels.kernels_section,
    "curve": part_kernels.curve_section,
    "lossless": part_kernels.lossless_section,
    SMALL: part_speed.small_section,
    LARGE: part_speed.large_section,
    "avx2": part_speed.avx2_section,
    "long": part_speed.long_section,
    "start": part_model.start_section,
    "memory": part_model.memory_section,
    "quantize": part_model.quantize_section,
    "load": part_serving.load_section,
    "arrival": part_serving.arrival_section,
    "prefix": part_serving.prefix_section,
    "kv": part_generation.kv_section,
    "lookup": part_generation.lookup_section,
    "overhead": part_serving.overhead_section,
    "soak": part_serving.soak_section,
}
SERVING = ("load", "arrival", "prefix", "kv", "lookup", "overhead", "soak")  # docs/serving.md shows these
LLAMA, LLAMA_AVX2, LLAMA_SERVER = "llama.cpp", "llama.cpp for AVX2", "llama-server"
# The other programs that a part runs.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "quality": (LLAMA, OPENVINO),
    SMALL: (LLAMA, OPENVINO),
    LARGE: (LLAMA, OPENVINO),
    "avx2": (LLAMA, LLAMA_AVX2),
    "load": (LLAMA, LLAMA_SERVER),
    "arrival": (LLAMA, LLAMA_SERVER),
}
HEADINGS = {
    "accuracy": "Right results",
    "quality": "Right results",
    "kernels": "Single products",
    "curve": "Single products",
    "lossless": "Single products",
    SMALL: "SmolLM2-135M",
    LARGE: "The 1.1B shape",
    "avx2": "AVX2 only",
    "long": "Long prompts",
    "start": "Around it",
    "memory": "Around it",
    "quantize": "Around it",
    **dict.fromkeys(SERVING, "Serving"),
}
