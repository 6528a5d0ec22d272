"""What is compared: methods and formats at about 4, 3, 2 and 1.6 bits.

A case is what `lowbit quantize MODEL FORMAT --method METHOD` takes. Every method, fold and view that lowbit
knows is tried at every width; one that has number formats of its own names them in OWN, and one that is about
something else than bits (activations, keys and values) in ELSEWHERE. What refuses a format says so in the
result, so nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

WIDTHS = ("8", "4", "3", "2", "1.6")
PLAIN = {"4": "int4-g32", "3": "int3-g32", "2": "int2-g32", "1.6": "ternary"}

# Formats of others at the same widths, rounded to nearest: what the number format alone is worth.
FORMATS = {
    "8": ("int8-row", "int8-g32", "e4m3fn-row", "mxfp8_e4m3"),
    "4": ("int4a-g32", "int4-g16-m4", "nf4-g32", "e2m1-g32", "mxfp4", "nvfp4", "bitmod4-g32", "shift4-g32"),
    "3": ("int3a-g32", "int3-g16-m4", "int3-g32-m4", "int3-row", "bitmod3-g32", "shift3-g32", "bcq3-g96"),
    "2": ("int2a-g32", "int2-g16-m4", "bcq2-g96"),
    "1.6": ("int1-g32",),
}
OWN: dict[str, dict[str, tuple[str, ...]]] = {
    "bcq": {"4": ("bcq4-g96",), "3": ("bcq3-g96",), "2": ("bcq2-g96",), "1.6": ("bcq1-g32",)},
    "shiftadd": {
        "4": ("bcq3-g32-e8m0",),
        "3": ("bcq3-g96-e8m0",),
        "2": ("bcq2-g96-e8m0",),
        "1.6": ("bcq1-g32-e8m0",),
    },
    "dbllm": {"2": ("dual-g96",)},
    "ptqtp": {"4": ("trit2-g96",), "3": ("trit2-row",)},
    # What these keep beside the codes takes the bits that smaller groups would take.
    "lorc": {"4": ("int3-g96",), "3": ("int2-g96",)},
    "salient": {"4": ("int4-g96",), "3": ("int3-g96",), "2": ("int2-g96",), "1.6": ("ternary",)},
    "spqr": {"4": ("int4-g96",), "3": ("int3-g96",), "2": ("int2-g96",), "1.6": ("ternary",)},
    "llmfp4": {"4": ("e2m1-g32",)},
    "llmfp4+llmfp4": {"4": ("e2m1-g32",)},
    "zqfp": {"4": ("e2m1-g32",)},
    "finequant": {"4": ("int4-g96",), "3": ("int3-g96",), "2": ("int2-g96",)},
    "absmax": {"8": ("int8-row",), "4": ("int4-g32",)},
    "hqq": {"4": ("int4a-g32",), "3": ("int3a-g32",), "2": ("int2a-g32",)},
    "kmeans": {"4": ("int4-g32",), "3": ("int3-g32",), "2": ("int2-g32",)},
    "gptq+mixllm": {"4": ("int4-g96",), "3": ("int3-g96",), "2": ("int2-g96",)},
    "llmint8": {"8": ("int8-row",)},
    "smoothquant": {"8": ("int8-row",), "4": ("int4-g32",)},
}
ELSEWHERE: frozenset[str] = frozenset({"ksort", "lossless"})  # for caches of keys, and without any loss
# What papers recommend together, beside each alone.
PAIRS = (
    "awq+kmeans:compensate=yes,refit=4",
    "gptq:order=activation",
    "gptq:order=activation,refit=4",
    "awq+gptq",
    "hadamard+gptq",
    "awq+descent",
    "kmeans:compensate=yes,refit=4",
    "gptq+mixllm",
    "llmfp4+llmfp4",
)
# Budgets of the mixed allocation, by width: 3.0 bits, and those of uniform formats. At 3 bits fp16 scales of
# groups of 32 take too much: int3-row has 3.05 bits and int3-g32-m4 has 3.18, so these are to choose from.
CHEAP = ("--choices", "int2-g32-m4,int2-g16-m4,int3-row,int3-g32-m4,int3-g16-m4,int4-row,int4-g32-m4")
BUDGETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "4": (("--bits", "4.5"),),
    "3": (("--bits", "3.0", *CHEAP), ("--bits", "3.05", *CHEAP), ("--bits", "3.18", *CHEAP)),
    "2": (("--bits", "2.7"),),
}
MIXED = ("rtn", "descent")
UNIFORM = (("gptq", "int3-row"), ("descent", "int3-row"), ("gptq", "int3-g32-m4"), ("descent", "int3-g32-m4"))
# SmolLM2: width, method, format, and options. llama.cpp's files keep the embedding in 8.5 bits, which leaves
# less for the layers: budgets in bytes of everything are just below those of Q3_K_M and Q2_K.
LIGHT = ("--embedding", "int6-g32", "--choices", "int4-g16-m4,int4-g32,int5-g32,int6-g32,int8-g32")
SMALL: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("4", "rtn", "int4-g32", ()),
    ("4", "gptq", "int4-g32", ()),
    ("4", "hqq:start=minmax", "int4a-g32", ("--embedding", "int6-g32")),  # offsets hold what Q4_1 holds
    ("4", "hqq:start=minmax", "int4a-g32", ("--embedding", "int5-g32")),
    ("4", "rtn", "auto", ("--bytes", "88MB", *LIGHT)),
    ("4", "gptq", "auto", ("--bytes", "83MB", *LIGHT)),
    ("3", "rtn", "int3-g32", ()),
    ("3", "gptq", "int3-g32", ()),
)


@dataclass(frozen=True)
class Case:
    """width: the heading under which it stands; options: more of `lowbit quantize`."""

    width: str
    method: str
    format: str
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return " ".join([f"{self.method}@{self.format}", *self.options])


def stories_cases() -> list[Case]:
    """All methods at all widths, each once."""
    found: dict[str, Case] = {}
    for width in WIDTHS:
        for method in _methods(pairs=width != "1.6"):
            name = method.partition(":")[0]
            for format in OWN.get(name, {}).get(
                width, () if name in OWN or width not in PLAIN else (PLAIN[width],)
            ):
                case = Case(width, method, format)
                found.setdefault(case.key, case)
        for format in FORMATS[width]:
            case = Case(width, "rtn", format)
            found.setdefault(case.key, case)
        for budget in BUDGETS.get(width, ()):
            for method in MIXED:
                case = Case(width, method, "auto", budget)
                found.setdefault(case.key, case)
        for method, format in UNIFORM if width == "3" else ():
            case = Case(width, method, format)
            found.setdefault(case.key, case)
    return list(found.values())


def smollm_cases() -> list[Case]:
    return [Case(*one) for one in SMALL]


def _methods(pairs: bool) -> Iterator[str]:
    from lowbit.compress.folds import FOLDS
    from lowbit.compress.views import VIEWS
    from lowbit.quantize.methods import METHODS

    for name in (*METHODS, *FOLDS, *VIEWS, *(PAIRS if pairs else ())):
        if name not in ELSEWHERE:
            yield name


def chosen(cases: list[Case], patterns: list[str] | None) -> list[Case]:
    """Those whose `method@format` matches one of the patterns; all without patterns."""
    if not patterns:
        return cases
    return [case for case in cases if any(fnmatchcase(case.key, pattern) for pattern in patterns)]
