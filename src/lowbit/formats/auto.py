"""Auto: the request to choose a format for each matrix so that a model fits a budget with least damage."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.errors import FormatError
from lowbit.formats.format import Format
from lowbit.formats.parse import parse_format
from lowbit.formats.scheme import Scheme

CHOICES = ("int2-g32", "int3-g32", "int4-g32", "int6-g32", "int8-g32")
# How damage is known; see compress/sensitivity.py.
SENSITIVITIES = ("fisher", "kl", "hawq", "output")
# Which matrices take one format together.
TOGETHER = ("matrix", "group", "layer")
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Auto:
    """Choose among `choices` for every matrix of the layers. Names become Formats; everything is checked.

    bits: budget per weight of the layers' matrices (all but embedding and output head), in bits as stored:
        codes, scales, tables and padding
    bytes: budget of everything in model.safetensors: the layers, embedding and head, norms and biases; a
        number, or text such as "60MB" (10^6) or "60MiB" (2^20). One of bits and bytes must be given
    choices: formats, or their names
    embedding: formats among which token embedding and output head choose; none: the one that a Scheme gives
        them. The embedding's bytes count in `bytes` and not in `bits`, where one format must be given
    sensitivity: "fisher": the divergence of the output, estimated from gradients in one pass; "kl": measured
        for each matrix and format, which takes many times longer; "hawq", "output": coarser estimates
    together: "matrix": each its own format; "group": those that read the same input (q, k, v) share one;
        "layer": all of a layer do
    samples: windows of the calibration text on which damage is measured
    seconds: most that all products of one token may take
    timings: (format name, out_features, in_features) -> measured seconds of its product with one token, where
        seconds are limited; `timings_of` makes it from what `lowbit bench kernels --json` prints
    activations, kv_bits: those of the Scheme
    """

    bits: float | None = None
    bytes: int | str | None = None
    choices: Sequence[Format | str] = CHOICES
    embedding: Sequence[Format | str] = ()
    sensitivity: str = "fisher"
    together: str = "matrix"
    samples: int = 8
    seconds: float | None = None
    timings: Mapping[tuple[str, int, int], float] | None = None
    activations: str = "int8"
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.bytes is None):
            raise FormatError(f"Auto: bits={self.bits}, bytes={self.bytes}; give one of them")
        if self.bits is not None and not (math.isfinite(self.bits) and self.bits > 0):
            raise FormatError(f"Auto: bits={self.bits}; give a number above 0, such as 3.2")
        if self.bytes is not None:
            object.__setattr__(self, "bytes", parse_bytes(self.bytes))
        for name in ("choices", "embedding"):
            given = getattr(self, name)
            if isinstance(given, (str, Format)):
                given = given.split(",") if isinstance(given, str) else (given,)
            formats = tuple(dict.fromkeys(parse_format(f) for f in given))
            for format in formats:
                if format.coded:
                    raise FormatError(
                        f"Auto: {name} has {format.name}, whose size is known when weights are coded; leave "
                        "it out"
                    )
            object.__setattr__(self, name, formats)
        if not self.choices:
            raise FormatError("Auto: no choices; give formats such as int2-g32, int3-g32, int4-g32")
        if self.bits is not None and len(self.embedding) > 1:
            raise FormatError(
                "Auto: bits count the layers' weights and not the embedding; give one embedding format, or "
                "a budget in bytes"
            )
        if self.sensitivity == "output" and len(self.embedding) > 1:
            raise FormatError(
                "Auto: sensitivity 'output' compares no layer with the embedding; use fisher, or give one "
                "embedding format"
            )
        for name, allowed in (("sensitivity", SENSITIVITIES), ("together", TOGETHER)):
            if getattr(self, name) not in allowed:
                raise FormatError(f"Auto: {name}={getattr(self, name)!r}; use one of {', '.join(allowed)}")
        if self.samples < 1:
            raise FormatError(f"Auto: samples={self.samples}; give at least 1 (usual: 8)")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise FormatError(f"Auto: seconds={self.seconds}; give a number above 0")
        if (self.seconds is None) != (self.timings is None):
            raise FormatError("Auto: a limit of seconds and timings belong together; give both or none")
        self.scheme(self.formats[0], {})  # checks activations and kv_bits

    @property
    def formats(self) -> tuple[Format, ...]:
        """The choices."""
        return tuple(parse_format(f) for f in self.choices)

    @property
    def embedding_formats(self) -> tuple[Format, ...]:
        """The formats among which embedding and head choose: at least one."""
        if self.embedding:
            return tuple(parse_format(f) for f in self.embedding)
        usual = Scheme(min(self.formats, key=lambda f: f.bits)).embedding
        assert usual is not None
        return (usual,)

    def scheme(self, weights: Format, layers: dict[str, Format]) -> Scheme:
        """The Scheme with these formats."""
        return Scheme(weights, self.embedding_formats[0], self.activations, self.kv_bits, layers)


def timings_of(measured: Mapping[str, Any]) -> dict[tuple[str, int, int], float]:
    """Seconds of products with one token, the fastest of several, from the object of `lowbit bench kernels`.

    Raises FormatError if it holds none.
    """
    found: dict[tuple[str, int, int], float] = {}
    try:
        for entry in measured["kernels"]:
            if entry["batch"] == 1:
                key = (str(entry["format"]), int(entry["out_features"]), int(entry["in_features"]))
                found[key] = min(float(entry["seconds"]), found.get(key, math.inf))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"Auto: timings are not what lowbit bench kernels --json prints ({error!r}); make them with that"
        ) from error
    if not found:
        raise FormatError("Auto: timings hold no product with one token; measure with --batch 1")
    return found


def parse_bytes(value: int | str) -> int:
    """60000000, "60MB", "57.2 MiB" -> whole bytes. Raises FormatError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNITS or isinstance(value, bool):
        raise FormatError(f"Auto: bytes={value!r}; give a number such as 60000000, 60MB or 57MiB")
    count = int(float(match[1]) * _UNITS[match[2].lower()])
    if count < 1:
        raise FormatError(f"Auto: bytes={value!r}; give at least 1")
    return count
