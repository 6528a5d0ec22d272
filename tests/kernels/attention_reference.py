"""Attention in NumPy in float64, as the kernels for keys and values of 16, 8, 4 and 2 bits define it."""

import numpy as np

if __package__:
    from .kv_pages import PAGE, as_codes
else:  # beside a script
    from kv_pages import PAGE, as_codes


def seen_keys(n: int, window: int) -> np.ndarray:
    """Which key (column) each query (row) sees."""
    distance = np.arange(n)[:, None] - np.arange(n)
    return (distance >= 0) & ((window == 0) | (distance < window))


def capped(x: np.ndarray, cap: float) -> np.ndarray:
    return cap * np.tanh(x / cap) if cap else x


def shares(scores: np.ndarray, sinks: np.ndarray | None) -> np.ndarray:
    """Softmax over the last axis of [heads, n, keys], in which a score without a key takes part per head."""
    sink = np.full((len(scores), 1, 1), -np.inf) if sinks is None else sinks[:, None, None]
    peak = np.maximum(scores.max(-1, keepdims=True), sink)
    p = np.exp(scores - peak)
    return p / (p.sum(-1, keepdims=True) + np.exp(sink - peak))


def attend_floats(net, q, k, v, window: int, sinks=None) -> np.ndarray:
    """Attention [n, heads, dim] with keys and values rounded to float16; sinks [heads] or None."""
    k, v = (
        np.repeat(a.astype(np.float16).astype(np.float64), net.n_heads // net.n_kv_heads, 1) for a in (k, v)
    )
    scores = capped(np.einsum("ihd,jhd->hij", q, k) * net.head_dim**-0.5, net.attention_softcap)
    scores = np.where(seen_keys(len(q), window), scores, -np.inf)
    return np.einsum("hij,jhd->ihd", shares(scores, sinks), v)


def round_groups(x: np.ndarray, size: int) -> np.ndarray:
    """x with each run of `size` channels rounded to 127 steps of its largest magnitude either way."""
    out = np.empty_like(x)
    for at in range(0, x.shape[-1], size):
        part = x[..., at : at + size]
        scale = np.maximum(np.abs(part).max(-1, keepdims=True), 1e-18) / 127
        out[..., at : at + size] = np.rint(part / scale) * scale
    return out


def attend_integers(net, q, k, v, window: int, sinks=None) -> np.ndarray:
    """Attention [n, heads, dim] as attention_integer.cc defines it.

    Queries and keys have 8 bits per 64 channels, values per head; in each segment of 256 keys the weights
    times the values' scales have 8 bits of the largest.
    """
    n, group = len(q), net.n_heads // net.n_kv_heads
    scales = np.maximum(np.abs(v).max(-1), 1e-18) / 127  # [n, kv heads]
    q, k = round_groups(q * net.head_dim**-0.5, 64), round_groups(k, 64)
    v, scales = (np.repeat(a, group, 1) for a in (round_groups(v, net.head_dim), scales))
    scores = capped(np.einsum("ihd,jhd->hij", q, np.repeat(k, group, 1)), net.attention_softcap)
    scores = scores + np.log(scales).T[:, None]
    scores = np.where(seen_keys(n, window), scores, -np.inf)
    mixed, total = np.zeros((n, net.n_heads, net.head_dim)), np.zeros((n, net.n_heads))
    top = scores.max(-1, keepdims=True)  # folding segments multiplies by exp(their own maximum - this)
    for at in range(0, n, 256):
        part = scores[..., at : at + 256]
        peak = part.max(-1, keepdims=True)
        weights = 255 * np.exp(part - np.where(np.isfinite(peak), peak, 0))
        fade = np.exp(peak - top)
        values, inverses = v[at : at + 256] / scales[at : at + 256, :, None], 1 / scales[at : at + 256]
        mixed += np.einsum("hij,jhd->ihd", np.rint(weights) * fade, values)
        total += np.einsum("hij,jh->ih", weights * fade, inverses)
    if sinks is not None:
        total += 255 * np.exp(sinks[:, None, None] - top)[..., 0].T
    return mixed / total[..., None]


def attend_pages(net, q, k, v, window: int, sinks=None) -> np.ndarray:
    """Attention [n, heads, dim]: earlier pages of 64 positions as codes, a query's own page in float16."""
    n, group = len(q), net.n_heads // net.n_kv_heads
    pages = np.arange(n) // PAGE
    own = pages[:, None] == pages
    seen_k, seen_v = as_codes(k, v, net.kv_bits)
    near_k, near_v = (a.astype(np.float16).astype(np.float64) for a in (k, v))
    seen_k, seen_v, near_k, near_v = (np.repeat(a, group, 1) for a in (seen_k, seen_v, near_k, near_v))
    scores = (
        np.where(own, np.einsum("ihd,jhd->hij", q, near_k), np.einsum("ihd,jhd->hij", q, seen_k))
        * net.head_dim**-0.5
    )
    scores = np.where(seen_keys(n, window), capped(scores, net.attention_softcap), -np.inf)
    p = shares(scores, sinks)
    return np.einsum("hij,jhd->ihd", p * own, near_v) + np.einsum("hij,jhd->ihd", p * ~own, seen_v)


ATTEND = {16: attend_floats, 8: attend_integers, 4: attend_pages, 2: attend_pages}
