"""The described decoder on a GPU: torch for norms, rotations and activations, Triton for every matrix and for
attention over paged keys and values.

The same description and the same code of a block as torch_executor.py; here the matrices stay packed and
tokens of many sequences come together in one step. Products and attention give a token the same bits whatever
comes with it; between them torch's norms and activations may not (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lowbit.errors import RequestError, UnsupportedError
from lowbit.kernels.triton import check_device, lookup, matmul, to_device
from lowbit.model.tensors import EMBEDDING, HEAD, POSITIONS
from lowbit.model.torch_executor import Turn, block, normed, rotation

if TYPE_CHECKING:
    from lowbit.kernels.triton.order import DeviceMatrix
    from lowbit.model.config import ModelConfig
    from lowbit.model.torch_attention import Scoring
    from lowbit.packed import PackedMatrix

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class CudaDecoder:
    """A network whose weights lie on a GPU, with room for the keys and values of `sequences` at a time.

    matrices: PackedMatrix by canonical name ("model.layers.0.self_attn.q_proj.weight", ..), the embedding too
    vectors: norms, biases and learned positions by canonical name, floats
    context: positions of one sequence, at most; every sequence has memory for all of them
    dtype: of the stream, of keys and values and of weights as they are multiplied: "bf16" | "fp16" | "fp32"
    activations: "float" | "int8" | "fp8", as lowbit.kernels.triton.matmul takes it
    """

    def __init__(
        self,
        config: ModelConfig,
        matrices: Mapping[str, PackedMatrix],
        vectors: Mapping[str, np.ndarray],
        device: str | torch.device = "cuda",
        context: int = 2048,
        sequences: int = 1,
        dtype: str = "bf16",
        activations: str = "float",
    ):
        from lowbit.kernels.triton.attention import PAGE

        if dtype not in DTYPES:
            raise RequestError(f"CudaDecoder: dtype={dtype!r}; choose one of {', '.join(DTYPES)}")
        if not 1 <= context <= config.max_position or sequences < 1:
            raise RequestError(
                f"CudaDecoder: context={context}, sequences={sequences}; the network has "
                f"{config.max_position} positions, and there is one sequence at least"
            )
        self.config, self.context, self.dtype, self.activations = config, context, DTYPES[dtype], activations
        self.device = check_device(device, "CudaDecoder")
        self.matrices: dict[str, DeviceMatrix] = {n: to_device(m, self.device) for n, m in matrices.items()}
        self.vectors = {
            name: torch.from_numpy(np.array(value, np.float32)).to(self.device, self.dtype)
            for name, value in vectors.items()
        }
        missing = {EMBEDDING, *([] if config.tied else [HEAD])} - {*self.matrices}
        if missing:
            raise RequestError(f"CudaDecoder: there is no matrix {', '.join(sorted(missing))}")
        self.layers = [self._layer(layer) for layer in range(config.n_layers)]
        self.turns: list[Turn] = [
            (cosine.to(self.device), sine.to(self.device))
            for cosine, sine in rotation(config, context, context)
        ]
        pages = -(-context // PAGE)
        self.page = PAGE
        self.tables = torch.arange(sequences * pages, dtype=torch.int32, device=self.device)
        self.tables = self.tables.view(sequences, pages)
        shape = (config.n_layers, sequences * pages * PAGE, config.n_kv_heads, config.head_dim)
        try:
            self.keys, self.values = (
                torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)
            )
        except torch.OutOfMemoryError as error:
            needed = 2 * int(np.prod(shape)) * self.dtype.itemsize / 1e9
            raise UnsupportedError(
                f"CudaDecoder: keys and values of {sequences} sequences of {context} positions need "
                f"{needed:,.2f} GB, more than is free on {self.device}; ask for less of either"
            ) from error
        self.lengths = [0] * sequences

    def reset(self, sequence: int) -> None:
        """Forget a sequence: its next token is at position 0."""
        self.lengths[sequence] = 0

    def step(self, batch: Sequence[tuple[int, Sequence[int]]]) -> torch.Tensor:
        """Continue sequences with tokens: logits float32 [tokens of all, vocab], in the order given.

        batch: (sequence, token ids), a prompt, a part of one or a single token; no sequence twice
        """
        ids, sequences, positions = self._laid_out(batch)
        x = self._embed(ids, positions)[None]
        at = positions.to(torch.int32)
        pages = self.tables[sequences, positions // self.page].to(torch.int64)
        slots = pages * self.page + positions % self.page
        of = sequences.to(torch.int32)
        for layer in range(self.config.n_layers):
            x = self._block(layer, x, at, of, slots)
        for sequence, tokens in batch:
            self.lengths[sequence] += len(tokens)
        norm_bias = self.vectors.get("model.norm.bias")
        x = normed(self.config, x[0], self.vectors["model.norm.weight"], norm_bias)
        head = self.matrices[EMBEDDING if self.config.tied else HEAD]
        result = matmul(x, head, self.activations).float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(result / cap) if cap else result

    def _laid_out(
        self, batch: Sequence[tuple[int, Sequence[int]]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not batch or len({sequence for sequence, _ in batch}) < len(batch):
            raise RequestError("step: give one sequence or more, each of them once")
        ids: list[int] = []
        sequences: list[int] = []
        positions: list[int] = []
        for sequence, tokens in batch:
            if not 0 <= sequence < len(self.lengths) or not len(tokens):
                raise RequestError(
                    f"step: sequence {sequence} with {len(tokens)} tokens; sequences are 0 to "
                    f"{len(self.lengths) - 1}, with a token at least"
                )
            begin = self.lengths[sequence]
            if begin + len(tokens) > self.context:
                raise RequestError(
                    f"step: sequence {sequence} would have {begin + len(tokens)} positions; the context is "
                    f"{self.context}"
                )
            ids += [int(token) for token in tokens]
            sequences += [sequence] * len(tokens)
            positions += range(begin, begin + len(tokens))
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise RequestError(f"step: token ids must be 0 to {self.config.vocab_size - 1}")
        laid = torch.tensor([ids, sequences, positions], dtype=torch.int64).to(self.device)
        return laid[0], laid[1], laid[2]

    def _embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = lookup(self.matrices[EMBEDDING], ids)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        if self.config.positions == "learned":
            x = x + self.vectors[POSITIONS][positions + self.config.position_offset].float()
        return x.to(self.dtype)

    def _layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Vectors of a layer without their prefix, and its matrices' names: block() looks for routers."""
        prefix = f"model.layers.{layer}."
        return {n[len(prefix) :]: v for n, v in self.vectors.items() if n.startswith(prefix)} | {
            n[len(prefix) :]: torch.empty(0) for n in self.matrices if n.startswith(prefix)
        }

    def _block(
        self,
        layer: int,
        x: torch.Tensor,
        positions: torch.Tensor,
        sequences: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        from lowbit.kernels.triton import attention

        keys, values = self.keys[layer], self.values[layer]
        prefix = f"model.layers.{layer}."

        def product(name: str, value: torch.Tensor) -> torch.Tensor:
            flat = value.reshape(-1, value.shape[-1])
            y = matmul(flat, self.matrices[f"{prefix}{name}.weight"], self.activations)
            return y.view(*value.shape[:-1], -1)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring) -> torch.Tensor:
            attention.write(k[0], v[0], keys, values, slots)
            y = attention.attend(
                q[0], keys, values, self.tables, sequences, positions, scoring.scale, scoring.window,
                scoring.softcap, scoring.sinks,
            )  # fmt: skip
            return y.view(1, len(y), -1)

        turns = list(self.turns)
        turns[layer] = (self.turns[layer][0][positions], self.turns[layer][1][positions])
        return block(self.config, layer, self.layers[layer], x, turns, attend=attend, product=product)
