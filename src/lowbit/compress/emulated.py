"""The torch executor with activations and cached keys and values rounded: what a method costs in accuracy.

Rounded numbers are carried as floats, so any method runs on any model, none of them faster. Rounding is done
in front of every matrix of a layer; embedding and head are as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowbit.compress.ksort import key_energy
from lowbit.errors import RequestError
from lowbit.model import torch_executor as executor
from lowbit.model.tensors import EMBEDDING, FINAL_NORM, FINAL_NORM_BIAS, HEAD, POSITIONS, leaders
from lowbit.quantize.activations import ACTIVATIONS, Round
from lowbit.quantize.kv import KV_METHODS, Cache
from lowbit.quantize.methods import parse_options

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint
    from lowbit.model.config import ModelConfig

_KEYS, _VALUES = "self_attn.k_proj", "self_attn.v_proj"
BATCH_TOKENS = 4096  # positions that run through a layer at a time


@dataclass(frozen=True)
class Emulated:
    """logits: float32 [windows, positions, vocab]; bits per number that matrices read, and of the cache."""

    logits: np.ndarray
    activation_bits: float
    kv_bits: float


def emulated_logits(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    activations: str | None = None,
    kv: str | None = None,
    calibration: np.ndarray | None = None,
) -> Emulated:
    """Run token windows through a model whose activations or cache are rounded.

    checkpoint: of any kind, quantized ones included (their weights decoded), or a view
    tokens: int64 [windows, positions]
    activations: `NAME:OPTION=VALUE,..` of quantize.activations.ACTIVATIONS; None: float32, counted as 32 bits
    kv: the same of quantize.kv.KV_METHODS; None: float32
    calibration: int64 [windows, positions] for methods with ranges fixed beforehand; they run unrounded
    Raises RequestError for an unknown method or option, and where calibration is needed and missing.
    """
    config = checkpoint.config
    rounding = _Rounding(activations, kv)
    if rounding.calibrated and calibration is None:
        raise RequestError(f"emulate: activations {activations!r} need calibration; give token windows")
    names = checkpoint.names()
    turn = executor.rotation(config, tokens.shape[1])
    with torch.inference_mode():
        embedding = torch.from_numpy(checkpoint.read(EMBEDDING))
        places = torch.from_numpy(checkpoint.read(POSITIONS)) if POSITIONS in names else None
        streams = _streams(config, embedding, tokens, places)
        watched = []
        if rounding.calibrated and calibration is not None:
            watched = _streams(config, embedding, calibration, places)
        beside = executor.rotation(config, calibration.shape[1]) if calibration is not None else turn
        for layer in range(config.n_layers):
            prefix = f"model.layers.{layer}."
            part = {n[len(prefix) :]: checkpoint.read(n) for n in names if n.startswith(prefix)}
            weights = {name: torch.from_numpy(array) for name, array in part.items()}
            leader = leaders(config, layer)
            inputs: dict[str, list[np.ndarray]] = {name: [] for name in leader.values()}

            def take(name: str, x: torch.Tensor, inputs: dict[str, list[np.ndarray]] = inputs) -> None:
                if name in inputs:
                    inputs[name].append(x.reshape(-1, x.shape[-1]).numpy())

            watched = [executor.block(config, layer, weights, x, beside, take) for x in watched]
            samples = {name: np.concatenate(parts) for name, parts in inputs.items() if parts}
            rounding.enter(
                leader, part, samples, _energy(checkpoint, config, layer) if rounding.rounds_keys else None
            )
            attend = rounding.attend if rounding.rounds_keys else None
            streams = [
                executor.block(config, layer, weights, x, turn, rounding.hook, attend) for x in streams
            ]
        head = embedding if config.tied else torch.from_numpy(checkpoint.read(HEAD))
        norm = torch.from_numpy(checkpoint.read(FINAL_NORM))
        bias = torch.from_numpy(checkpoint.read(FINAL_NORM_BIAS)) if FINAL_NORM_BIAS in names else None
        logits = torch.cat([executor.logits(config, norm, head, x, bias) for x in streams])
    return Emulated(logits.numpy(), *rounding.bits())


def _streams(
    config: ModelConfig, embedding: torch.Tensor, tokens: np.ndarray, positions: torch.Tensor | None
) -> list[torch.Tensor]:
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    parts = torch.from_numpy(np.asarray(tokens)).split(rows)
    return [executor.embed(config, embedding, part, positions) for part in parts]


def _energy(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> np.ndarray:
    """key_energy of the keys as they are cached: a pair that turns together has one energy."""
    energy = key_energy(checkpoint, layer)
    if config.rope_layers[layer]:
        half = config.rope.rotary_dim // 2
        pair = energy[:, :half] + energy[:, half : 2 * half]
        energy[:, : 2 * half] = np.tile(pair, 2) / 2
    return energy


class _Rounding:
    """What is rounded in a layer, and the bits counted."""

    def __init__(self, activations: str | None, kv: str | None):
        self._activation = _parse(activations, ACTIVATIONS, "activations")
        self._kv = _parse(kv, KV_METHODS, "keys and values")
        self.rounds_keys = self._kv is not None and self._kv[0].reads == "keys"
        self._spent, self._count = np.zeros(2), np.zeros(2)  # of activations, of the cache

    @property
    def calibrated(self) -> bool:
        return self._activation is not None and self._activation[0].calibrated

    def bits(self) -> tuple[float, float]:
        activation, kv = np.where(self._count > 0, self._spent / np.maximum(self._count, 1), 32)
        return float(activation), float(kv)

    def enter(
        self,
        leader: Mapping[str, str],
        weights: Mapping[str, np.ndarray],
        samples: Mapping[str, np.ndarray],
        energy: np.ndarray | None,
    ) -> None:
        """Begin a layer."""
        self._leader, self._weights, self._energy = leader, weights, energy
        self._rounds: dict[str, Round] = {}
        if self._activation is not None:
            method, options = self._activation
            for name in set(leader.values()):
                if name in samples or not method.calibrated:
                    self._rounds[name] = method.prepare(samples.get(name), **options)

    def hook(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self._kv is not None and self._kv[0].reads == "input" and name in (_KEYS, _VALUES):
            x = self._from_input(name, x)
        if self._activation is None:
            return x
        if self._leader[name] not in self._rounds:
            raise RequestError(
                f"emulate: no calibration token came to {name.rpartition('.')[0]}; give more calibration text"
            )
        rounded, bits = self._rounds[self._leader[name]](x.reshape(-1, x.shape[-1]).numpy())
        self._add(0, bits, x.numel())
        return torch.from_numpy(rounded).view(x.shape)

    def _from_input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The input of k_proj or v_proj as it is cached; k comes first, and what it finds serves v."""
        assert self._kv is not None
        if name == _VALUES:
            return self._for_values
        method, options = self._kv
        keys, values = (self._weights[f"{n}.weight"] for n in (_KEYS, _VALUES))
        for_keys, for_values, bits = method.apply(x.reshape(-1, x.shape[-1]).numpy(), keys, values, **options)
        self._add(1, bits, 1)
        self._for_values: torch.Tensor = torch.from_numpy(for_values).view(x.shape)
        return torch.from_numpy(for_keys).view(x.shape)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: executor.Scoring
    ) -> torch.Tensor:
        """In the place of executor.attention: q [batch, positions, heads, dim], k and v with kv_heads."""
        assert self._kv is not None
        method, options = self._kv
        rows = []
        for i in range(len(q)):
            cache = method.apply(k[i].numpy(), v[i].numpy(), self._energy, **options)
            self._add(1, cache.bits, 1)
            rows.append(_attention(q[i], k[i], v[i], cache, scoring))
        return torch.stack(rows)

    def _add(self, which: int, bits: float, count: int) -> None:
        self._spent[which] += bits * count
        self._count[which] += count


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Cache, scoring: executor.Scoring
) -> torch.Tensor:
    """Causal attention of one sequence to a cache whose leading positions are rounded; [positions, features].

    q: [positions, heads, dim], k and v: exact, [positions, kv_heads, dim]
    """
    positions, heads, _ = q.shape
    at = torch.arange(positions)
    old_keys, old_values = (
        at < torch.from_numpy(np.ascontiguousarray(counts))[:, None]
        for counts in (cache.rounded_keys, cache.rounded_values)
    )
    q, k, v, rounded_k, rounded_v = (
        t.transpose(0, 1).repeat_interleave(heads // t.shape[1], dim=0)
        for t in (q, k, v, torch.from_numpy(cache.keys), torch.from_numpy(cache.values))
    )
    share = scoring.shares(torch.where(old_keys, q @ rounded_k.mT, q @ k.mT))
    out = (share * old_values) @ rounded_v + (share * ~old_values) @ v
    return out.transpose(0, 1).reshape(positions, -1)


def _parse(text: str | None, table: Mapping[str, Any], what: str) -> tuple[Any, dict[str, Any]] | None:
    """The method that `NAME:OPTION=VALUE,..` names and its options; None: nothing is rounded."""
    if text is None:
        return None
    name, _, rest = text.strip().partition(":")
    if name not in table:
        raise RequestError(
            f"emulate: method {name[:60]!r} of {what} is unknown; use one of {', '.join(table)}"
        )
    return table[name], parse_options(name, rest, table[name].options())
