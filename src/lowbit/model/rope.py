"""Rotary position embedding: its description, and the rotation speed of every pair of features.

Feature i of a head turns together with feature i + rotary_dim / 2 by position * inverse_frequency[i];
cosine and sine are both multiplied by the attention factor.

Sources: rotation arXiv:2104.09864; linear arXiv:2306.15595; dynamic NTK as in transformers; yarn
arXiv:2309.00071; longrope arXiv:2402.13753; llama3 as published with Llama 3.1. The tests hold all of
them against transformers.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.model.fields import Fields

if TYPE_CHECKING:
    from lowbit.model.config import ModelConfig

# Keys that every kind may have; `finetuned` tells how a yarn checkpoint was made and changes nothing.
_PLAIN = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"})

# rope_type -> the parameters that it reads besides rope_theta. Anything else is refused.
SCALINGS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset(
        {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
    # One divisor per frequency, which is how GGUF stores the llama3 scaling (tensor rope_freqs).
    "factors": frozenset({"factors", "original_max_position_embeddings"}),
    # One divisor per frequency, other ones for contexts beyond the original (Phi-3, arXiv:2402.13753).
    "longrope": frozenset(
        {"short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings"}
    ),
}


@dataclass(frozen=True)
class Rope:
    """theta and rotary_dim, then the scaling and its parameters; unused parameters keep their defaults."""

    theta: float
    rotary_dim: int
    kind: str = "default"  # a key of SCALINGS
    original_max_position: int = 0  # positions before any scaling
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    attention_factor: float | None = None  # yarn and longrope; None: from factor (and mscale)
    beta_fast: float = 32.0  # yarn, down to truncate
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    factors: tuple[float, ...] = ()  # kinds "factors" and "longrope": [rotary_dim / 2] divisors
    long_factors: tuple[float, ...] = ()  # longrope: those of a context beyond original_max_position

    def max_context(self, max_position: int) -> int:
        """The longest context that the scaling is meant for, given max_position_embeddings."""
        if self.kind in ("linear", "dynamic"):
            return int(max_position * max(self.factor, 1.0))
        return max(max_position, int(self.original_max_position * max(self.factor, 1.0)))


def parse_rope(fields: Fields, head_dim: int, max_position: int, partial: bool = False) -> Rope:
    """Read the rotary settings of a config.json.

    transformers 5 writes them as `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`. Where
    both are given `rope_scaling` wins, as in transformers. Unknown kinds and parameters are refused.
    partial: the family may rotate the first features of a head only.
    """
    newer, older = fields.raw("rope_parameters"), fields.raw("rope_scaling")
    given = older or newer or {}
    if not isinstance(given, Mapping):
        raise fields.fail("rope_scaling" if older else "rope_parameters", given, "an object")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise UnsupportedError(
            f"{fields.where}: rotary settings differ by layer type ({', '.join(map(str, list(given)[:4]))}); "
            "lowbit runs one setting for all layers"
        )
    share = {fields.key("partial_rotary_factor"): fields.raw("partial_rotary_factor")}
    if not partial:
        share["rotary_pct"] = fields.raw("rotary_pct")
    share["rope partial_rotary_factor"] = given.get("partial_rotary_factor")
    rotary_dim = _rotary_dim(fields, share, head_dim, partial)
    return _rope(fields, given, fields.raw("rope_theta"), rotary_dim, max_position)


def parse_local_rope(fields: Fields, head_dim: int, max_position: int) -> tuple[Rope, Rope]:
    """The rotations of layers that see everything and of those with a window.

    transformers 5 writes `rope_parameters` by layer type; before, `rope_theta` and `rope_scaling` were those
    of the first, and `rope_local_base_freq` that of the second, which was never scaled.
    """
    kinds: dict[str, Mapping[str, Any]] = {"full_attention": {}, "sliding_attention": {}}
    newer, older = fields.raw("rope_parameters"), fields.raw("rope_scaling")
    for key, given in (("rope_parameters", newer), ("rope_scaling", older)):
        if given is not None and not isinstance(given, Mapping):
            raise fields.fail(key, given, "an object")
    for kind, given in (newer or {}).items():
        if kind not in kinds or not isinstance(given, (Mapping, type(None))):
            raise fields.fail("rope_parameters", newer, f"objects under {' and '.join(kinds)}")
        kinds[kind] = given or {}
    if older:
        kinds["full_attention"] = {**kinds["full_attention"], **older}
    theta, local = fields.raw("rope_theta"), fields.raw("rope_local_base_freq")
    return (
        _rope(fields, kinds["full_attention"], theta, head_dim, max_position),
        _rope(fields, kinds["sliding_attention"], local, head_dim, max_position),
    )


def _rotary_dim(fields: Fields, share: Mapping[str, Any], head_dim: int, partial: bool) -> int:
    """How many features of a head rotate; the last of `share` that is given counts."""
    rotary_dim = head_dim
    for key, value in share.items():
        if value is None:
            continue
        number = not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value <= 1
        if not partial and (not number or value != 1):
            raise UnsupportedError(
                f"{fields.where}: {key}={reprlib.repr(value)}; this family rotates whole heads, so only 1.0 "
                "runs"
            )
        rotary_dim = int(head_dim * value) if number else 0
        if rotary_dim < 2 or rotary_dim % 2:
            raise fields.fail(key, value, f"a share of head_dim={head_dim} that is even and not 0")
    return rotary_dim


def _rope(fields: Fields, given: Mapping[str, Any], theta: Any, rotary_dim: int, max_position: int) -> Rope:
    """One rotation. theta: its base where `given` has none."""
    outer = fields.raw("original_max_position_embeddings")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind in ("su", "yarn") and "short_factor" in given:
        kind = "longrope"  # its earlier names
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise UnsupportedError(
            f"{fields.where}: rope scaling {reprlib.repr(kind)} is unknown; lowbit runs "
            f"{', '.join(sorted(SCALINGS))}"
        )
    for key, value in given.items():
        if key not in SCALINGS[kind] and key not in _PLAIN and value is not None:
            raise UnsupportedError(
                f"{fields.where}: rope scaling {kind!r} does not read {key}={reprlib.repr(value)}; "
                f"known parameters: {', '.join(sorted(SCALINGS[kind])) or 'none'}"
            )
    settings: dict[str, Any] = dict(given)
    if settings.get("rope_theta") is None:
        settings["rope_theta"] = theta
    if outer is not None and kind in ("llama3", "yarn", "longrope"):
        settings["original_max_position_embeddings"] = outer  # transformers gives the outer one priority
    reader = Fields(settings, f"{fields.where} (rope {kind})")
    theta = reader.number("rope_theta", 1e-3, 1e15)
    original = reader.integer("original_max_position_embeddings", 1, 1 << 30, default=max_position)
    return Rope(
        theta, rotary_dim, kind, original, **_parameters(reader, kind, rotary_dim, max_position, original)
    )


def _divisors(reader: Fields, key: str, dim: int) -> tuple[float, ...]:
    given = reader.raw(key)
    if (
        not isinstance(given, list)
        or len(given) != dim // 2
        or any(isinstance(f, bool) or not isinstance(f, (int, float)) or not 1e-6 <= f <= 1e6 for f in given)
    ):
        raise reader.fail(key, given, f"{dim // 2} numbers from 1e-6 to 1e6")
    return tuple(float(f) for f in given)


def _parameters(reader: Fields, kind: str, dim: int, max_position: int, original: int) -> dict[str, Any]:
    """The parameters of one scaling, checked."""
    if kind == "default":
        return {}
    if kind == "factors":
        return {"factors": _divisors(reader, "factors", dim)}
    if kind in ("yarn", "longrope") and reader.raw("factor") is None:
        factor = max_position / original
    else:
        factor = reader.number("factor", 1e-3, 1e6)
    if kind == "linear":
        return {"factor": factor}
    if kind == "dynamic":
        if original != max_position:
            raise reader.fail(
                "original_max_position_embeddings", original, f"max_position_embeddings={max_position}"
            )
        if factor < 1:
            raise reader.fail("factor", factor, "at least 1")
        if dim <= 2:
            raise reader.fail("head_dim", dim, "more than 2")
        return {"factor": factor}
    if kind == "llama3":
        low = reader.number("low_freq_factor", 1e-6, 1e6)
        high = reader.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            raise reader.fail("high_freq_factor", high, f"above low_freq_factor={low:g}")
        return {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    if kind == "longrope":
        if original < 2:
            raise reader.fail("original_max_position_embeddings", original, "at least 2")
        attention = reader.raw("attention_factor")
        return {
            "factor": factor,
            "attention_factor": None if attention is None else reader.number("attention_factor", 0.0, 1e6),
            "factors": _divisors(reader, "short_factor", dim),
            "long_factors": _divisors(reader, "long_factor", dim),
        }
    if reader.number("rope_theta", 1e-3, 1e15) <= 1:
        raise reader.fail("rope_theta", reader.raw("rope_theta"), "above 1")
    attention = reader.raw("attention_factor")
    return {
        "factor": factor,
        "attention_factor": None if attention is None else reader.number("attention_factor", 0.0, 1e6),
        "beta_fast": reader.number("beta_fast", 0.0, 1e6, default=32.0) or 32.0,
        "beta_slow": reader.number("beta_slow", 0.0, 1e6, default=1.0) or 1.0,
        "mscale": reader.number("mscale", 0.0, 1e6, default=0.0),
        "mscale_all_dim": reader.number("mscale_all_dim", 0.0, 1e6, default=0.0),
        "truncate": reader.boolean("truncate", default=True),
    }


def inverse_frequencies(
    config: ModelConfig, context: int, rope: Rope | None = None
) -> tuple[np.ndarray, float]:
    """The rotation speeds of a network that is loaded for `context` positions.

    rope: one of the rotations of `config`; None: `config.rope`.
    Returns (float32 [rotary_dim / 2] radians per position, attention factor).

    The dynamic scaling is defined by the context that the network is loaded with, not by how much of it
    is filled: within the original maximum it is the plain rotation, beyond it the NTK base for exactly
    `context` positions. So a token's result never depends on what comes after it. Likewise longrope: the
    short divisors within the original maximum, the long ones for every token of a longer context.

    The steps are those of transformers in float32 (the exponent is rounded before the power), with each
    power exact to the last bit, so that values differ from it by the rounding of its power function only.
    """
    rope = config.rope if rope is None else rope
    theta = rope.theta
    if rope.kind == "dynamic" and context > rope.original_max_position:
        stretch = rope.factor * context / rope.original_max_position - (rope.factor - 1)
        theta *= stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
    powers = _powers(theta, rope.rotary_dim)
    plain = np.float32(1) / powers
    if rope.kind == "linear":
        return plain / np.float32(rope.factor), 1.0
    if rope.kind == "factors":
        return plain / np.array(rope.factors, np.float32), 1.0
    if rope.kind == "longrope":
        factors = rope.long_factors if context > rope.original_max_position else rope.factors
        return np.float32(1) / (np.array(factors, np.float32) * powers), _longrope_attention_factor(rope)
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, powers, plain), _yarn_attention_factor(rope)
    return plain, 1.0


def _powers(theta: float, dim: int) -> np.ndarray:
    """theta ** (2 i / dim), float32 [dim / 2]."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths slowed down by `factor`, short ones kept, a smooth passage between them."""
    wavelength = (2 * math.pi) / plain.astype(np.float64)
    low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position
    kept = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)  # 1: high frequency, as it is
    return ((1 - kept) * plain / rope.factor + kept * plain).astype(np.float32)


def _yarn(rope: Rope, powers: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Frequencies of few turns within the original context interpolated, the others kept, a ramp between."""
    dim = rope.rotary_dim

    def turning(rotations: float) -> float:
        """The feature pair that makes `rotations` turns within the original context."""
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = turning(rope.beta_fast), turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    interpolated = np.float32(1) / (np.float32(rope.factor) * powers)
    return (interpolated * ramp + plain * (1 - ramp)).astype(np.float32)


def _yarn_attention_factor(rope: Rope) -> float:
    """arXiv:2309.00071, eq. 22, and the two-sided form with mscale that DeepSeek introduced."""

    def growth(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return growth(rope.mscale) / growth(rope.mscale_all_dim)
    return growth(1.0)


def _longrope_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))
