"""Attention over paged keys and values, one program for a token and a head.

A program walks the keys of its sequence from position 0 in blocks of 32 and keeps a running softmax, so what
a token gets depends on its position and the keys before it, not on the batch or on how a prompt was cut. Keys
of one kv head are read once for each query head that shares it, and no tensor core is used: right for
decoding, slow for long prompts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PAGE = 16  # positions of a page
_BLOCK = 32  # keys of a step


@triton.jit
def store_pages(k, v, keys, values, slots, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """keys[slots[t]] = k[t], and values; k, v [tokens, WIDTH], keys, values [slots, WIDTH]."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    slot = tl.load(slots + token)
    new_key = tl.load(k + token * WIDTH + at, mask=at < WIDTH)
    new_value = tl.load(v + token * WIDTH + at, mask=at < WIDTH)
    tl.store(keys + slot * WIDTH + at, new_key.to(keys.dtype.element_ty), mask=at < WIDTH)
    tl.store(values + slot * WIDTH + at, new_value.to(values.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def paged_attention(
    q, keys, values, y, tables, sequences, positions, sinks, heads, shared, table_width, window, scale,
    softcap,
    DIM: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """y [tokens, heads, DIM] of q of the same shape; keys, values [pages * PAGE, kv heads, DIM].

    tables int32 [sequences, table_width]: pages; sequences, positions int32 [tokens]; window 0: all keys.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, PADDED)
    real = d < DIM
    query = tl.load(q + (token * heads + head) * DIM + d, mask=real, other=0).to(tl.float32)
    sequence = tl.load(sequences + token).to(tl.int64)
    position = tl.load(positions + token)
    first = 0
    if window > 0:
        first = tl.maximum(position - window + 1, 0)
    row = (heads // shared) * DIM
    peak = -1e30 + tl.zeros((1,), tl.float32)
    total = tl.zeros((1,), tl.float32)
    if SINKS:
        peak = tl.load(sinks + head + tl.arange(0, 1)).to(tl.float32)
        total += 1
    sums = tl.zeros((PADDED,), tl.float32)
    for begin in range(first // BLOCK * BLOCK, position + 1, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        seen = (at <= position) & (at >= first)
        page = tl.load(tables + sequence * table_width + at // PAGE, mask=seen, other=0).to(tl.int64)
        places = (page * PAGE + at % PAGE) * row + (head // shared) * DIM
        inside = seen[:, None] & real[None, :]
        key = tl.load(keys + places[:, None] + d[None, :], mask=inside, other=0).to(tl.float32)
        scores = tl.sum(key * query[None, :], axis=1) * scale
        if CAPPED:
            e = tl.exp(-2 * tl.abs(scores / softcap))
            tanh = (1 - e) / (1 + e)
            scores = softcap * tl.where(scores < 0, -tanh, tanh)
        scores = tl.where(seen, scores, -1e30)
        new_peak = tl.maximum(peak, tl.max(scores, axis=0))
        shrink = tl.exp(peak - new_peak)
        shares = tl.where(seen, tl.exp(scores - new_peak), 0.0)
        value = tl.load(values + places[:, None] + d[None, :], mask=inside, other=0).to(tl.float32)
        sums = sums * shrink + tl.sum(shares[:, None] * value, axis=0)
        total = total * shrink + tl.sum(shares, axis=0)
        peak = new_peak
    tl.store(y + (token * heads + head) * DIM + d, sums / total, mask=real)


def write(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store keys and values of tokens [tokens, kv heads, dim] at int64 slots of [slots, kv heads, dim]."""
    width = k[0].numel()
    store_pages[(len(k),)](
        k.contiguous(), v.contiguous(), keys, values, slots, WIDTH=width, PADDED=triton.next_power_of_2(width)
    )


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[tokens, heads, dim] of q of the same shape, in its type; see `paged_attention`."""
    tokens, heads, dim = q.shape
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    paged_attention[(tokens, heads)](
        q.contiguous(), keys, values, y, tables, sequences, positions, q if sinks is None else sinks, heads,
        heads // keys.shape[1], tables.shape[1], window, float(scale), float(softcap or 1.0), DIM=dim,
        PADDED=triton.next_power_of_2(dim), PAGE=PAGE, BLOCK=_BLOCK, CAPPED=bool(softcap),
        SINKS=sinks is not None,
    )  # fmt: skip
    return y
