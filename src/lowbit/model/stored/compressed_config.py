"""The quantization_config of compressed-tensors: which scheme each matrix was stored with.

config_groups maps names to schemes with targets: a matrix by its name, by a regular expression ("re:.."), or
by its class. More exact targets go first. Patterns come from strangers and are matched with a machine that
can be made to run for years, so only short ones without nested repetition are taken.
Source: the pydantic models of compressed-tensors 0.9 to 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import UnsupportedError
from lowbit.model.fields import Fields

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
)
STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
CLASSES = ("Linear", "Embedding", "LinearBase", "ParallelLMHead", "VocabParallelEmbedding")
MAX_GROUPS, MAX_TARGETS, MAX_PATTERN, MAX_REPEATS = 256, 4096, 300, 4


@dataclass(frozen=True)
class Scheme:
    """How the matrices of one group are stored."""

    format: str
    bits: int
    floats: bool
    symmetric: bool
    strategy: str
    group_size: int  # -1: the whole input
    block: tuple[int, int] | None
    activations: str  # for people; "" : not rounded


@dataclass(frozen=True)
class Config:
    schemes: tuple[tuple[str, Scheme], ...]  # (target, scheme), more exact targets first
    dense: bool | None  # are 3, 5, 6 and 7 bits packed without gaps; None: the shapes must tell

    def scheme(self, stem: str) -> Scheme | None:
        """The scheme of a matrix; a class stands for all that nothing else names."""
        for target, scheme in self.schemes:
            if target.startswith("re:"):
                if re.match(target[3:], stem[:200]):
                    return scheme
            elif target in (stem, *CLASSES):
                return scheme
        return None


def config(quantization: Mapping[str, Any], where: str) -> Config:
    """Read a quantization_config. Raises UnsupportedError for a kind that is not read here."""
    fields = Fields(quantization, where)
    status = fields.text("quantization_status", default="compressed")
    if status != "compressed":
        raise UnsupportedError(
            f"{where}: quantization_status={status!r:.40}, floats that are to be rounded at every call; "
            "lowbit reads compressed: save the model with save_compressed=True"
        )
    for key in ("sparsity_config", "transform_config"):
        value = quantization.get(key)
        if isinstance(value, Mapping) and value.get("format", "dense") == "dense":
            value = {k: v for k, v in value.items() if k == "config_groups" and v}
        if value:
            raise UnsupportedError(
                f"{where}: compressed-tensors with {key}={str(value)[:80]}; lowbit reads none"
            )
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not 0 < len(groups) <= MAX_GROUPS:
        raise fields.fail("config_groups", groups, f"an object of 1 to {MAX_GROUPS} groups")
    outer = fields.text("format", default="")
    found: list[tuple[str, Scheme]] = []
    for name, group in groups.items():
        at = f"{where}: config_groups[{str(name)[:40]!r}]"
        if not isinstance(group, Mapping):
            raise UnsupportedError(f"{at} is not an object; lowbit reads whole schemes, no preset names")
        scheme = _scheme(group, outer, at)
        targets = Fields(group, at).items("targets", str, MAX_TARGETS) or []
        found += [(_checked(target, at), scheme) for target in targets]
    found.sort(key=lambda entry: entry[0] in CLASSES or 0.5 * entry[0].startswith("re:"))
    return Config(tuple(found), _dense(quantization.get("version")))


def _scheme(group: Mapping[str, Any], outer: str, where: str) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise UnsupportedError(f"{where} has no weights; lowbit reads schemes that store weights")
    fields = Fields(weights, where + ".weights")
    stored = str(group.get("format") or outer)
    if stored not in FORMATS:
        raise UnsupportedError(
            f"{where}: format={stored!r:.60}; lowbit reads {', '.join(FORMATS)}: save the model again with "
            "one"
        )
    bits, kind = fields.integer("num_bits", 1, 64), fields.text("type", default="int")
    strategy = fields.text("strategy", default="tensor")
    size = fields.integer("group_size", -1, 1 << 24, default=-1)
    widths = {"int": range(2, 9), "float": (4, 6, 8)}.get(kind, ())
    if bits not in widths or strategy not in STRATEGIES or size == 0:
        raise UnsupportedError(
            f"{where}: weights of type {kind!r:.20}, num_bits={bits}, strategy={strategy!r:.20}, "
            f"group_size={size}; "
            f"lowbit reads int of 2 to 8 bits and float of 4, 6 and 8 with {', '.join(STRATEGIES)}"
        )
    if "group" in strategy and size < 1:
        raise fields.fail("group_size", size, f"at least 1 with strategy {strategy}")
    block = fields.items("block_structure", int, 2) if strategy == "block" else None
    if strategy == "block" and (block is None or len(block) != 2 or min(block) < 1):
        raise fields.fail("block_structure", block, "two sizes of at least 1")
    return Scheme(
        stored,
        bits,
        kind == "float",
        fields.boolean("symmetric", default=True),
        strategy,
        size if "group" in strategy else -1,
        (block[0], block[1]) if block else None,
        _activations(group.get("input_activations")),
    )


def _activations(given: Any) -> str:
    if not isinstance(given, Mapping):
        return ""
    return (
        f"{str(given.get('type', 'int'))[:5]}{given.get('num_bits')!s:.3} per {given.get('strategy')!s:.12}"
    )


def _checked(target: str, where: str) -> str:
    """A target whose pattern is quick to match on any name."""
    if target.startswith("re:"):
        pattern = target[3:]
        repeats = len(re.findall(r"[*+{]", pattern))
        nested = re.search(r"\)[*+{?]|\\\d", pattern)
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UnsupportedError(
                f"{where}: target {target[:80]!r} is no regular expression that lowbit can read: {error}"
            ) from error
        if len(pattern) > MAX_PATTERN or repeats > MAX_REPEATS or nested:
            raise UnsupportedError(
                f"{where}: target {target[:80]!r} could take very long to match; lowbit takes patterns of up "
                f"to {MAX_PATTERN} characters and {MAX_REPEATS} repetitions, none of a group: name the "
                "matrices"
            )
    return target


def _dense(version: Any) -> bool | None:
    """compressed-tensors packs 3, 5, 6 and 7 bits without gaps since 0.18."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
    return (int(found[1]), int(found[2])) >= (0, 18) if found else None
