"""Rotary position embedding: its description, and the rotation speed of every pair of features.

Feature i of a head turns together with feature i + rotary_dim / 2 by position * inverse_frequency[i];
cosine and sine are both multiplied by the attention factor.

Sources: rotation arXiv:2104.09864; linear arXiv:2306.15595; dynamic NTK as in transformers; yarn
arXiv:2309.00071; llama3 as published with Llama 3.1. The tests hold all of them against transformers.
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
    attention_factor: float | None = None  # yarn from here on; None: from factor and mscale
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    factors: tuple[float, ...] = ()  # kind "factors": [rotary_dim / 2] divisors

    def max_context(self, max_position: int) -> int:
        """The longest context that the scaling is meant for, given max_position_embeddings."""
        if self.kind in ("linear", "dynamic"):
            return int(max_position * max(self.factor, 1.0))
        return max(max_position, int(self.original_max_position * max(self.factor, 1.0)))


def parse_rope(fields: Fields, head_dim: int, max_position: int) -> Rope:
    """Read the rotary settings of a config.json.

    transformers 5 writes them as `rope_parameters`; before, `rope_theta` stood beside `rope_scaling`. Where
    both are given `rope_scaling` wins, as in transformers. Unknown kinds and parameters are refused.
    """
    newer, older = fields.raw("rope_parameters"), fields.raw("rope_scaling")
    top_theta, outer = fields.raw("rope_theta"), fields.raw("original_max_position_embeddings")
    given = older or newer or {}
    if not isinstance(given, Mapping):
        raise fields.fail("rope_scaling" if older else "rope_parameters", given, "an object")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise UnsupportedError(
            f"{fields.where}: rotary settings differ by layer type ({', '.join(map(str, list(given)[:4]))}); "
            "lowbit runs one setting for all layers"
        )
    kind = given.get("rope_type") or given.get("type") or "default"
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
    share = {key: fields.raw(key) for key in ("partial_rotary_factor", "rotary_pct")}
    share["rope partial_rotary_factor"] = given.get("partial_rotary_factor")
    for key, value in share.items():
        if value is not None and (isinstance(value, bool) or value != 1):
            raise UnsupportedError(
                f"{fields.where}: {key}={reprlib.repr(value)}; lowbit rotates whole heads, so only 1.0 runs"
            )

    settings: dict[str, Any] = dict(given)
    if settings.get("rope_theta") is None:
        settings["rope_theta"] = top_theta
    if outer is not None and kind in ("llama3", "yarn"):
        settings["original_max_position_embeddings"] = outer  # transformers gives the outer one priority
    reader = Fields(settings, f"{fields.where} (rope {kind})")
    theta = reader.number("rope_theta", 1e-3, 1e15)
    original = reader.integer("original_max_position_embeddings", 1, 1 << 30, default=max_position)
    return Rope(
        theta, head_dim, kind, original, **_parameters(reader, kind, head_dim, max_position, original)
    )


def _parameters(reader: Fields, kind: str, dim: int, max_position: int, original: int) -> dict[str, Any]:
    """The parameters of one scaling, checked."""
    if kind == "default":
        return {}
    if kind == "factors":
        factors = reader.items("factors", float, dim // 2)
        if factors is None or len(factors) != dim // 2 or not all(1e-6 <= f <= 1e6 for f in factors):
            raise reader.fail("factors", factors, f"{dim // 2} numbers from 1e-6 to 1e6")
        return {"factors": tuple(factors)}
    if kind == "yarn" and reader.raw("factor") is None:
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


def inverse_frequencies(config: ModelConfig, context: int) -> tuple[np.ndarray, float]:
    """The rotation speeds of a network that is loaded for `context` positions.

    Returns (float32 [rotary_dim / 2] radians per position, attention factor).

    The dynamic scaling is defined by the context that the network is loaded with, not by how much of it
    is filled: within the original maximum it is the plain rotation, beyond it the NTK base for exactly
    `context` positions. So a token's result never depends on what comes after it.

    The steps are those of transformers in float32 (the exponent is rounded before the power), with each
    power exact to the last bit, so that values differ from it by the rounding of its power function only.
    """
    rope = config.rope
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
