"""What a step of the native decoder does, in amounts: products by format and tokens, and everything else.

A step of several runs is cut into passes (native/decoder_step.cc); each pass walks all layers. Its time is a
sum of amounts times seconds for each, and the same function gives the amounts for fitting those seconds to
measurements and for predicting from them. Nothing here knows a machine.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lowbit.formats import Format, Scheme
from lowbit.model.tensors import EMBEDDING, HEAD
from lowbit.packed.layout import BLOCK_ROWS
from lowbit.plan.memory import stored_bytes
from lowbit.plan.network import Layer, Network

# As in native/decoder_step.cc.
PASS_STEP, LARGEST_PASS, PASS_SLACK, COLUMNS, FEW_TOKENS = 96, 480, 24, 6, 2
PASS_SHARE, LARGE_WEIGHTS, TILE_QUERIES, HEAD_ROWS = 32, 128 << 20, 72, 64
BARRIERS_FEW, BARRIERS_MANY = 5, 9.5  # of a layer
HEAD_BITS = 16  # the head reads two limbs whatever the layers do

# What a second is spent on beside products. Those with a number are for keys and values of so many bits.
AMOUNTS = (
    "step",  # calls
    "barrier",
    "block",  # 32 rows of a product
    "hidden",  # numbers of the stream that are normed and rounded, twice per layer and token
    "inner",  # numbers that are activated
    "heads",  # numbers of queries, keys and values that are rotated and stored
    "token",  # sampled: choosing from `vocabulary` logits
    "vocabulary",
    *(f"decode_key{bits}" for bits in (16, 8, 4, 2)),  # key-value heads x positions x dimensions, one query
    *(f"decode_query{bits}" for bits in (16, 8, 4, 2)),  # query heads x positions x dimensions, one query
    *(f"prompt_query{bits}" for bits in (16, 8, 4, 2)),  # the same, of many queries
    *(f"write{bits}" for bits in (4, 2)),  # numbers of pages that are rounded
)


@dataclass(frozen=True)
class Product:
    """`count` products of a matrix in `format` with `tokens` rows of activations of `bits` bits."""

    format: Format
    bits: int
    tokens: float
    weights: float


@dataclass
class Amounts:
    """of: AMOUNTS; products: weights by (format, activation bits, tokens)."""

    of: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    products: dict[tuple[Format, int, float], float] = field(default_factory=lambda: defaultdict(float))

    def product(self, format: Format, bits: int, tokens: float, weights: float) -> None:
        self.products[format, bits, tokens] += weights

    def add(self, other: Amounts) -> None:
        for name, amount in other.of.items():
            self.of[name] += amount
        for key, weights in other.products.items():
            self.products[key] += weights


@dataclass(frozen=True)
class Runs:
    """prompts: (tokens, positions before them, is the token after them wanted); contexts: of decoding
    runs.
    """

    prompts: tuple[tuple[int, int, bool], ...] = ()
    contexts: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(count for count, _, _ in self.prompts) + len(self.contexts)


def distinct_experts(experts: int, active: int, tokens: float) -> float:
    """How many of `experts` are chosen by any of `tokens` tokens that choose `active` each, if all are as
    likely: E (1 - (1 - k/E)^T)."""
    return experts * (1 - (1 - active / experts) ** tokens)


class Workload:
    """A network in a scheme, ready to be counted again and again."""

    def __init__(
        self, network: Network, scheme: Scheme, kv_bits: int | None = None, threads: int = 1
    ) -> None:
        self.network, self.scheme, self.threads = network, scheme, threads
        self.kv_bits = kv_bits or scheme.kv_bits or 8
        self.activation_bits = 8 if scheme.activations == "int8" else 16
        self.layers: Counter[tuple[Layer, tuple[Format, ...]]] = Counter()
        for number, layer in enumerate(network.layers):
            formats = tuple(scheme.format_for(tensor_name(number, matrix.name)) for matrix in layer.matrices)
            self.layers[layer, formats] += 1
            self._last = (layer, formats)
        self.head = scheme.format_for(EMBEDDING if network.tied else HEAD)
        self.pass_tokens = self._pass_tokens()
        self._cached: dict[tuple[int, int], Amounts] = {}

    def _pass_tokens(self) -> int:
        """See DecoderWorkspace: rows of a pass take a share of the weights' memory."""
        n = self.network
        q, kv = n.heads * n.head_dim, n.kv_heads * n.head_dim

        def stride(size: int) -> int:
            return (-(-size // BLOCK_ROWS) | 1) * BLOCK_ROWS

        inner, hidden = stride(n.intermediate), stride(n.hidden)
        floats = n.hidden + max(stride(q + 2 * kv) + q, inner) + max(inner, hidden) + n.head_dim
        codes = n.hidden + q + n.intermediate
        weights = sum(
            count * stored_bytes(fmt, m.out_features, m.in_features) * m.copies
            for (layer, formats), count in self.layers.items()
            for m, fmt in zip(layer.matrices, formats)
        ) + stored_bytes(self.head, n.vocab, n.hidden)
        allowed = (weights + max(weights, LARGE_WEIGHTS) - LARGE_WEIGHTS) // PASS_SHARE
        fitting = allowed // (4 * floats + 2 * codes * self.activation_bits // 8)
        return min(max(fitting // PASS_STEP * PASS_STEP, PASS_STEP), LARGEST_PASS)

    def amounts(self, runs: Runs) -> Amounts:
        """Everything that a step of `runs` does."""
        found = Amounts()
        found.of["step"] += 1
        for tokens, wanted, slices in self._passes(runs):
            part = self._cached.get((tokens, wanted))
            if part is None:
                part = self._cached[tokens, wanted] = self._pass(tokens, wanted)
            found.add(part)
            self._attention(found.of, slices)
        return found

    def _passes(self, runs: Runs) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """(tokens, wanted rows, [(queries, positions before)]) of each pass."""
        sequence = [*runs.prompts, *((1, context, True) for context in runs.contexts)]
        total = sum(count for count, _, _ in sequence)
        if total <= self.pass_tokens + PASS_SLACK:
            if total:
                yield total, sum(w for _, _, w in sequence), [(c, before) for c, before, _ in sequence]
            return
        n_passes = -(-(total - PASS_SLACK) // self.pass_tokens)
        each = math.ceil(total / n_passes)
        size = math.ceil(each / COLUMNS) * COLUMNS
        queue, used = list(reversed(sequence)), 0
        while queue:
            tokens = wanted = 0
            slices = []
            while queue and tokens < size:
                count, before, is_wanted = queue.pop()
                taken = min(count - used, size - tokens)
                slices.append((taken, before + used))
                tokens += taken
                if used + taken < count:
                    queue.append((count, before, is_wanted))
                    used += taken
                else:
                    wanted, used = wanted + is_wanted, 0
            yield tokens, wanted, slices

    def _pass(self, tokens: int, wanted: int) -> Amounts:
        """All but attention of a pass."""
        found, n = Amounts(), self.network
        of, bits = found.of, self.activation_bits
        few = tokens <= FEW_TOKENS
        shared = float(tokens) if few else tokens / self.threads
        last_left = 1
        for (layer, formats), count in self.layers.items():
            for matrix, fmt in zip(layer.matrices, formats):
                rows, copies = float(tokens), float(count)
                if matrix.experts:
                    hit = distinct_experts(matrix.experts, matrix.active, tokens)
                    rows, copies = max(1.0, tokens * matrix.active / hit), count * hit
                in_mlp = matrix.item not in ("qkv", "o")
                if in_mlp and (layer, formats) == self._last and last_left and not matrix.experts:
                    copies -= 1  # of the last layer only wanted rows pass the MLP
                    if wanted:
                        found.product(fmt, bits, float(wanted), matrix.weights)
                        of["block"] += matrix.out_features / BLOCK_ROWS
                if copies > 0:
                    found.product(fmt, bits, rows, copies * matrix.weights)
                    of["block"] += copies * matrix.out_features / BLOCK_ROWS
            of["barrier"] += count * (BARRIERS_FEW if few else BARRIERS_MANY)
            of["hidden"] += count * 2 * shared * n.hidden
            of["inner"] += count * shared * n.intermediate
            of["heads"] += count * tokens / self.threads * n.head_dim * (n.heads + 2 * n.kv_heads)
            if self.kv_bits < 8:
                of[f"write{self.kv_bits}"] += count * tokens * n.head_dim * n.kv_heads / self.threads
        for first in range(0, wanted, HEAD_ROWS):
            rows = min(HEAD_ROWS, wanted - first)
            found.product(self.head, HEAD_BITS, float(rows), n.vocab * n.hidden)
            of["block"] += n.vocab / BLOCK_ROWS
            of["token"] += rows
            of["vocabulary"] += rows * n.vocab
        return found

    def _attention(self, of: dict[str, float], slices: Sequence[tuple[int, int]]) -> None:
        n, bits = self.network, self.kv_bits
        tile = max(1, TILE_QUERIES // max(1, n.heads // n.kv_heads))
        windows = Counter(layer.window for layer in n.layers)
        dims = n.head_dim
        for window, layers in windows.items():
            decoded = prompted = 0.0
            for queries, before in slices:
                if queries == 1:
                    decoded += min(before + 1, window) if window else before + 1
                else:
                    prompted += visited(queries, before, window, tile)
            of[f"decode_key{bits}"] += layers * n.kv_heads * dims * decoded
            of[f"decode_query{bits}"] += layers * n.heads * dims * decoded
            of[f"prompt_query{bits}"] += layers * n.heads * dims * prompted


def visited(queries: int, before: int, window: int = 0, tile: int = 1) -> float:
    """Keys that `queries` queries after `before` positions visit, those of a tile all that its last one
    sees.
    """
    tile = min(tile, queries)
    if not window:
        return queries * before + queries * (queries + tile) / 2
    free = max(0, min(queries, window - before))  # queries that still see everything
    return free * before + free * (free + min(tile, free)) / 2 + (queries - free) * float(window + tile - 1)


def tensor_name(layer: int, matrix: str) -> str:
    """Canonical name of a matrix of a layer, for Scheme.format_for; of experts that of the first."""
    return f"model.layers.{layer}.{matrix.replace('mlp.experts.', 'mlp.experts.0.')}.weight"
