"""KV-cache methods: what rounding does to the keys and values of one sequence, on arrays.

A method that reads keys and values is a function

    (keys, values, energy, *, options) -> Cache

    keys (rotated), values: float32 [positions, kv_heads, head_dim]
    energy: [kv_heads, head_dim], the expected square of each channel of the keys; orders channels only

and one that reads the input of the layer, from which keys and values are computed again, is

    (x, key_weight, value_weight, *, options) -> (x for keys, x for values, bits)

    x: float32 [positions, in_features]; weights float32 [kv_heads * head_dim, in_features]

Bits are per number of keys and values, scales and windows in 16 bits included. What is rounded is a function
of positions only, never of how a prompt was cut; a query sees the cache as it stands when its token is fed.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from lowbit.errors import RequestError
from lowbit.quantize.activations import F32, SCALE_BITS, round_ranges
from lowbit.quantize.methods import Value

EXPONENT_BITS = 8  # shared by a block of floating point


@dataclass(frozen=True)
class Cache:
    """keys, values: as rounded, shaped like the originals; bits: per number, at the end of the sequence.

    rounded_keys, rounded_values: int [positions]; the query at position t sees that many leading keys and
        values rounded, those after them exactly
    """

    keys: np.ndarray
    values: np.ndarray
    rounded_keys: np.ndarray
    rounded_values: np.ndarray
    bits: float


@dataclass(frozen=True)
class KVMethod:
    """apply: see the head of this file; reads: "keys" or "input"; source: where it was published."""

    apply: Callable[..., Any]
    reads: str
    summary: str
    source: str

    def options(self) -> dict[str, Value]:
        """Names and defaults of its options."""
        parameters = inspect.signature(self.apply).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise RequestError(f"round keys and values: bits={bits}; give 1 to 8")


def _ranges(x: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, float]:
    """The last axis in groups, each with an fp16 scale and an fp16 minimum; (rounded, bits per number).

    group: at most; the largest divisor in common with the axis is taken. 0: the whole axis
    """
    size = gcd(group, x.shape[-1]) if group else x.shape[-1]
    return round_ranges(x.reshape(-1, size), bits).reshape(x.shape), bits + 2 * SCALE_BITS / size


def _whole(keys: np.ndarray, values: np.ndarray, bits: float) -> Cache:
    """A cache that holds every position rounded."""
    counts = np.arange(1, len(keys) + 1)
    return Cache(keys, values, counts, counts, bits)


def _token(
    keys: np.ndarray, values: np.ndarray, energy: np.ndarray, *, bits: int = 8, group: int = 0
) -> Cache:
    """A scale and a minimum for each token, head and group of channels (0: the whole head)."""
    _check(bits)
    (k, spent), (v, _) = (_ranges(x, bits, group) for x in (keys, values))
    return _whole(k, v, spent)


def _kivi(
    keys: np.ndarray,
    values: np.ndarray,
    energy: np.ndarray,
    *,
    bits: int = 2,
    group: int = 32,
    window: int = 128,
) -> Cache:
    """Keys by channel in groups of tokens, values by token in groups of channels, the latest in 16 bits.

    Keys wait in the window until it is full, then all of it is rounded; of values the latest `window` stay.
    """
    _check(bits)
    if group < 1 or window < group or window % group:
        raise RequestError(f"kivi: window={window}, group={group}; give a window that is whole groups")
    positions, heads, dim = keys.shape
    counts = np.arange(1, positions + 1)
    in_keys, in_values = counts - counts % window, np.maximum(counts - window, 0)
    done = int(in_keys[-1])
    k = keys.copy()
    columns = keys[:done].reshape(-1, group, heads * dim).swapaxes(1, 2)
    k[:done] = round_ranges(columns, bits).swapaxes(1, 2).reshape(done, heads, dim)
    v, value_bits = _ranges(values, bits, group)
    rounded = done * (bits + 2 * SCALE_BITS / group) + int(in_values[-1]) * value_bits
    exact = 16 * (2 * positions - done - int(in_values[-1]))
    return Cache(k, v, in_keys, in_values, (rounded + exact) / (2 * positions))


def _bfp(
    keys: np.ndarray,
    values: np.ndarray,
    energy: np.ndarray,
    *,
    bits: int = 4,
    block: int = 32,
    sort: bool = False,
) -> Cache:
    """Blocks of channels that share an exponent; bits: of a mantissa, its sign included.

    sort: channels of the keys in the order of their energy, so that loud ones share blocks with loud ones.
        Keys then err less, but on SmolLM2 and stories15M the scores err more: queries are loud in the same
        channels, and those next to the loudest lose.
    """
    if not 2 <= bits <= 16:
        raise RequestError(f"bfp: bits={bits}; give 2 to 16")
    size = gcd(block, keys.shape[-1])
    k = keys.copy()
    order = np.argsort(-energy, axis=-1, kind="stable") if sort else np.arange(keys.shape[-1])
    places = np.broadcast_to(order, keys.shape)
    np.put_along_axis(k, places, _blocks(np.take_along_axis(keys, places, -1), bits, size), -1)
    return _whole(k, _blocks(values, bits, size), bits + EXPONENT_BITS / size)


def _blocks(x: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Block floating point of float32 x [.., n] in blocks of `size` channels."""
    blocks = x.reshape(-1, size)
    exponent = np.frexp(np.abs(blocks).max(axis=1, keepdims=True))[1]  # the largest is below 2**exponent
    step = np.ldexp(F32(1), np.maximum(exponent, -100) + 1 - bits).astype(F32)
    top = F32(2 ** (bits - 1) - 1)
    return np.asarray((np.clip(np.rint(blocks / step), -top, top) * step).reshape(x.shape), F32)


def _xquant(
    x: np.ndarray,
    key_weight: np.ndarray,
    value_weight: np.ndarray,
    *,
    bits: int = 4,
    group: int = 32,
    latent: bool = False,
) -> tuple[np.ndarray, np.ndarray, float]:
    """The input is kept, by token in groups of channels, and keys and values are computed from it again.

    One x stands for a key and a value: half the numbers where every query head has its own, but more where
    heads share keys. latent: the input is kept twice, in the bases in which W_k and W_v read it (their right
    singular vectors): as many numbers as keys and values, at any number of heads.
    """
    _check(bits)
    if not latent:
        rounded, spent = _ranges(x, bits, group)
        return rounded, rounded, spent * x.shape[1] / (len(key_weight) + len(value_weight))
    kept = []
    total = 0.0
    for weight in (key_weight, value_weight):
        basis = np.linalg.svd(weight, full_matrices=False)[2]
        rounded, spent = _ranges(x @ basis.T, bits, group)
        kept.append(rounded @ basis)
        total += spent * len(basis)
    return kept[0], kept[1], total / (len(key_weight) + len(value_weight))


KV_METHODS: dict[str, KVMethod] = {
    "token": KVMethod(_token, "keys", "a scale for each token and head", "-"),
    "kivi": KVMethod(_kivi, "keys", "keys by channel, values by token, a window", "arXiv:2402.02750"),
    "bfp": KVMethod(_bfp, "keys", "block floating point, keys sorted or not", "arXiv:2403.20137"),
    "xquant": KVMethod(_xquant, "input", "the layer's input, keys and values again", "arXiv:2508.10395"),
}
