"""Bytes: weights as they are packed, keys and values as the cache stores them, rows of a pass, the process.

Weights are exact: the arrays that packed/planned.py lists for every matrix, and float32 for vectors. Keys and
values follow native/kv_pool.h, byte for byte; other engines' caches are plain numbers (`plain_kv_bytes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format, Scheme
from lowbit.formats.format import CODED_BITS
from lowbit.model.tensors import EMBEDDING, HEAD
from lowbit.packed.planned import planned_arrays
from lowbit.plan.network import Network

SEGMENT, PAGE, KEY_GROUP = 256, 64, 64  # native/kv_pool.h, native/kv_pages.h
FLOAT = 4
TOKENIZER_BYTES = (
    110  # per token of the vocabulary; what `lowbit run` of SmolLM2-135M takes beyond all else here
)
SYSTEM_PAGE = 4096  # a block of the pool is of whole pages


@lru_cache(maxsize=4096)
def stored_bytes(fmt: Format, out_features: int, in_features: int) -> int:
    """Bytes of a packed matrix. Raises FormatError if the format's group does not divide in_features.

    What coded weights take depends on them; for these it is the usual number.
    """
    if fmt.coded:
        return int(out_features * in_features * CODED_BITS / 8)
    arrays = planned_arrays(fmt, out_features, in_features)
    return sum(np.dtype(kind).itemsize * prod(shape) for kind, shape in arrays.values())


def fits(fmt: Format, out_features: int, in_features: int) -> bool:
    try:
        stored_bytes(fmt, out_features, in_features)
    except FormatError:
        return False
    return True


def weight_bytes(network: Network, scheme: Scheme) -> int:
    """All that `lowbit quantize` writes to model.safetensors and `load` holds: every expert, tables,
    padding.
    """
    from lowbit.plan.work import tensor_name

    total = FLOAT * network.vectors + FLOAT * network.positions * network.hidden
    for number, layer in enumerate(network.layers):
        for matrix in layer.matrices:
            fmt = scheme.format_for(tensor_name(number, matrix.name))
            total += matrix.copies * stored_bytes(fmt, matrix.out_features, matrix.in_features)
    total += stored_bytes(scheme.format_for(EMBEDDING), network.vocab, network.hidden)
    if not network.tied:
        total += stored_bytes(scheme.format_for(HEAD), network.vocab, network.hidden)
    return total


def kv_head_bytes(head_dim: int, bits: int) -> int:
    """One key-value head of a block of 256 positions (KvShape::head_bytes)."""
    stride = -(-head_dim // 16) * 16
    numbers = head_dim + stride
    if bits == 16:
        return SEGMENT * numbers * 2
    if bits == 8:
        return SEGMENT * (numbers + (-(-head_dim // KEY_GROUP) + 2) * FLOAT)
    # A page: codes of 64 keys and values, a byte of scale and fp16 of least value per channel, a byte per
    # value.
    page = PAGE * numbers * bits // 8 + 3 * head_dim + PAGE
    return head_dim * 2 + SEGMENT // PAGE * page


def kv_bytes(network: Network, bits: int, positions: int) -> int:
    """What one sequence of so many positions takes in lowbit: whole blocks, and the 16-bit page of few
    bits.
    """
    head = kv_head_bytes(network.head_dim, bits) * network.kv_heads * network.n_layers
    slot = 0
    if bits < 8:
        numbers = network.head_dim + -(-network.head_dim // 16) * 16
        slot = network.n_layers * network.kv_heads * PAGE * numbers * 2
        slot = -(-slot // SYSTEM_PAGE) * SYSTEM_PAGE
    block = -(-head // SYSTEM_PAGE) * SYSTEM_PAGE
    return -(-positions // SEGMENT) * block + slot


def plain_kv_bytes(network: Network, bits: float) -> float:
    """Keys and values of one token as plain numbers: 2 L H_kv d b / 8, or L (r + d_rope) b / 8 with
    latents.
    """
    if network.latent:
        return network.n_layers * network.latent * bits / 8
    return network.n_layers * network.kv_heads * (network.head_dim + network.value_dim) * bits / 8


@dataclass(frozen=True)
class Memory:
    """What a server of a plan takes, in bytes."""

    weights: int
    keys_values: int
    rows: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.keys_values + self.rows + self.runtime


def rows_bytes(network: Network, pass_tokens: int, activation_bits: int = 8, wanted: int = 1) -> int:
    """Rows of a pass (DecoderWorkspace): the stream, halves, integers, and logits of wanted rows."""
    n = network
    q, kv = n.heads * n.head_dim, n.kv_heads * n.head_dim
    halves = max(q + 2 * kv + q, n.intermediate)
    floats = n.hidden + halves + max(n.intermediate, n.hidden) + n.head_dim
    codes = (n.hidden + q + n.intermediate) * activation_bits // 8
    return pass_tokens * (FLOAT * floats + 2 * codes) + min(wanted, 64) * n.vocab * FLOAT
