"""A view in which the channels of the keys are ordered by magnitude, and those of the queries alike.

In a cache of keys whose neighbouring channels share a scale, those of one scale are then of one kind. Where
keys are rotated by position, a pair of features turns at the speed of its place; so whole pairs move, in one
order for all layers and heads, and their speeds in the description with them. In layers without rotation each
head has its own order.
Source: Accurate Block Quantization, arXiv:2403.20137.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lowbit.compress.view import View, split
from lowbit.errors import UnsupportedError
from lowbit.model.rope import Rope, inverse_frequencies

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint
    from lowbit.model.config import ModelConfig


class Sorted(View):
    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint, checkpoint.config)
        config = self.config
        self._pairs = np.arange(0)
        if config.rope_local is not None:
            raise UnsupportedError(
                f"ksort: layers of a {config.family} network rotate at two speeds, which one order of pairs "
                "cannot serve; quantize without ksort"
            )
        if any(config.rope_layers):
            self._pairs = self._order_of_pairs()
            self.config = replace(config, rope=_reordered(config, self._pairs))

    def read(self, name: str) -> np.ndarray:
        tensor = self._source.read(name)
        _, part = split(name)
        kind = part.removeprefix("self_attn.").partition("_")[0]
        if not part.startswith("self_attn.") or kind not in ("q", "k"):
            return tensor
        order = self._orders[int(name.split(".")[2])]
        if part.endswith("_norm.weight") and not self.config.qk_norm_whole:
            return np.ascontiguousarray(tensor[order[0]])
        heads = tensor.reshape(-1, self.config.head_dim, *tensor.shape[1:])
        order = order.repeat(len(heads) // len(order), axis=0)
        rows = order.reshape(*order.shape, *[1] * (heads.ndim - 2))
        return np.ascontiguousarray(np.take_along_axis(heads, rows, axis=1).reshape(tensor.shape))

    @cached_property
    def _orders(self) -> list[np.ndarray]:
        """int [kv_heads, head_dim] for each layer: the channel that comes to each place."""
        config = self.config
        orders = []
        for layer, rotated in enumerate(config.rope_layers):
            if rotated:
                half = config.rope.rotary_dim // 2
                rest = np.arange(2 * half, config.head_dim)
                order = np.concatenate([self._pairs, self._pairs + half, rest])
                orders.append(np.broadcast_to(order, (config.n_kv_heads, config.head_dim)))
            else:
                energy = self._energy(layer)
                if config.qk_norm and not config.qk_norm_whole:  # one weight for all heads, and so one order
                    energy = np.broadcast_to(energy.mean(0), energy.shape)
                orders.append(np.argsort(-energy, axis=1, kind="stable"))
        return orders

    def _order_of_pairs(self) -> np.ndarray:
        """int [rotary_dim / 2]: pairs by falling energy over all rotated layers and heads."""
        half = self.config.rope.rotary_dim // 2
        total = np.zeros(half)
        for layer, rotated in enumerate(self.config.rope_layers):
            if rotated:
                energy = self._energy(layer)
                total += (energy[:, :half] + energy[:, half : 2 * half]).sum(0)
        return np.argsort(-total, kind="stable")

    def _energy(self, layer: int) -> np.ndarray:
        return key_energy(self._source, layer)


def key_energy(checkpoint: Checkpoint, layer: int) -> np.ndarray:
    """Mean square of each channel of the keys, float64 [kv_heads, head_dim], for inputs like white noise.

    The squared norm of its row of W_k, the weight of the norm before it included, and of its bias; where keys
    are normalized, the square of that norm's weight times the row's share of its head.
    """
    config, at = checkpoint.config, f"model.layers.{layer}."
    rows = checkpoint.read(f"{at}self_attn.k_proj.weight")
    offset = np.float32(config.norm_offset)
    if config.norm_place != "post":
        rows *= checkpoint.read(f"{at}input_layernorm.weight") + offset
    energy = np.square(rows, dtype=np.float64).sum(1)
    if config.qkv_bias:
        energy += np.square(checkpoint.read(f"{at}self_attn.k_proj.bias"), dtype=np.float64)
    energy = energy.reshape(config.n_kv_heads, config.head_dim)
    if config.qk_norm:
        gain = (checkpoint.read(f"{at}self_attn.k_norm.weight") + offset).reshape(-1, config.head_dim)
        mean = energy.mean() if config.qk_norm_whole else energy.mean(1, keepdims=True)
        energy *= np.square(gain, dtype=np.float64) / np.maximum(mean, 1e-30)
    return np.asarray(energy)


def _reordered(config: ModelConfig, pairs: np.ndarray) -> Rope:
    """The rotary description with speeds in the order of `pairs`."""
    rope = config.rope
    if rope.kind in ("dynamic", "yarn", "longrope"):
        raise UnsupportedError(
            f"ksort: rope scaling {rope.kind!r} cannot be written with its pairs in another order; "
            "quantize without ksort"
        )
    speeds = inverse_frequencies(config, config.max_position)[0][pairs].astype(np.float64)
    factors = tuple(float(f) for f in 1 / speeds)  # of theta = 1, at which every pair has speed 1
    if not 1e-6 <= min(factors) <= max(factors) <= 1e6:
        raise UnsupportedError(
            f"ksort: rotation speeds down to {speeds.min():.1e} cannot be written in another order (at least "
            "1e-6 can); quantize without ksort"
        )
    return replace(
        rope, theta=1.0, kind="factors", factors=factors, original_max_position=config.max_context, factor=1.0
    )
