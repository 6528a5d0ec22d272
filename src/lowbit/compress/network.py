"""A checkpoint in torch, one layer in memory at a time: forward from any layer, and backward through all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from lowbit.errors import RequestError
from lowbit.model import torch_executor as executor
from lowbit.model.tensors import EMBEDDING, FINAL_NORM, FINAL_NORM_BIAS, HEAD, POSITIONS, groups

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint

Tensors = dict[str, torch.Tensor]
# visit(layer, matrix name without ".weight", weight [out, in], its inputs [rows, in] of each window, the
# gradients of its outputs [rows, out] of each window); a matrix of an expert has the rows that came to it,
# and no window of which none did
Visit = Callable[[int, str, torch.Tensor, list[torch.Tensor], list[torch.Tensor]], None]


class Network:
    """tokens: int64 [windows, positions]; streams are float32 [windows, positions, hidden]."""

    def __init__(self, checkpoint: Checkpoint, tokens: np.ndarray):
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise RequestError(
                f"network: tokens are {list(tokens.shape)}; give windows of 2 positions or more"
            )
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.tokens = torch.from_numpy(np.ascontiguousarray(tokens, np.int64))
        self._turn = executor.rotation(self.config, tokens.shape[1])
        self._names = sorted(checkpoint.names())
        self._norm = torch.from_numpy(checkpoint.read(FINAL_NORM))
        self._norm_bias = self._optional(FINAL_NORM_BIAS)
        self._positions = self._optional(POSITIONS)

    def layer(self, layer: int) -> Tensors:
        """The layer's tensors by name without their prefix."""
        prefix = f"model.layers.{layer}."
        return {
            name.removeprefix(prefix): torch.from_numpy(self.checkpoint.read(name))
            for name in self._names
            if name.startswith(prefix)
        }

    def matrices(self, layer: int) -> list[str]:
        """Names of the layer's matrices, without prefix and ".weight", in order of use."""
        have = set(self._names)
        every = (name for group in groups(self.config, layer) for name in group)
        return [name for name in every if f"model.layers.{layer}.{name}.weight" in have]

    def embed(self, embedding: torch.Tensor | None = None) -> torch.Tensor:
        table = torch.from_numpy(self.checkpoint.read(EMBEDDING)) if embedding is None else embedding
        return executor.embed(self.config, table, self.tokens, self._positions)

    def run(self, layer: int, weights: Tensors, x: torch.Tensor) -> torch.Tensor:
        return executor.block(self.config, layer, weights, x, self._turn)

    def head(self) -> torch.Tensor:
        return torch.from_numpy(self.checkpoint.read(EMBEDDING if self.config.tied else HEAD))

    def logits(self, head: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return executor.logits(self.config, self._norm, head, x, self._norm_bias)

    def _optional(self, name: str) -> torch.Tensor | None:
        return torch.from_numpy(self.checkpoint.read(name)) if name in self._names else None

    def backward(self, visit: Visit, labels: str = "text", seed: int = 0) -> None:
        """Gradients of the loss with respect to every matrix's outputs, from the last layer to the first.

        labels: "text": the cross-entropy of the tokens that follow, averaged over the positions of a window;
            "model": of tokens drawn from the model's own distribution (`seed`), summed. The mean of g g^T is
            then the Fisher information, the Hessian of the output's divergence
        Kept in memory: the streams before every layer; weights, inputs and gradients of one layer.
        """
        with torch.inference_mode():
            streams = [self.embed()]
            for layer in range(self.config.n_layers):
                streams.append(self.run(layer, self.layer(layer), streams[-1]))
        gradient = self._loss_gradient(streams.pop().clone(), labels, seed)
        for layer in reversed(range(self.config.n_layers)):
            weights = self.layer(layer)
            before = streams.pop().clone()
            seen: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
            for window in range(len(before)):
                part = slice(window, window + 1)
                inputs: Tensors = {}
                outputs: Tensors = {}
                with torch.enable_grad():
                    x = before[part].requires_grad_()
                    product = _keeping(weights, inputs, outputs)
                    y = executor.block(self.config, layer, weights, x, self._turn, product=product)
                    # A copy: the gradient of the last matrix's output is the one given, which changes below.
                    found = torch.autograd.grad(y, [x, *outputs.values()], gradient[part].clone())
                gradient[part] = found[0]
                for name, of_output in zip(outputs, found[1:]):
                    kept = seen.setdefault(name, ([], []))
                    kept[0].append(inputs[name].flatten(0, -2))
                    kept[1].append(of_output.flatten(0, -2))
            with torch.inference_mode():
                for name, kept in seen.items():
                    visit(layer, name, weights[f"{name}.weight"], *kept)

    def _loss_gradient(self, x: torch.Tensor, labels: str, seed: int) -> torch.Tensor:
        """Of the loss with respect to the stream after the last layer."""
        head = self.head()
        generator = torch.Generator().manual_seed(seed)
        gradient = torch.zeros_like(x)
        for window in range(len(x)):
            with torch.enable_grad():
                part = x[window].detach().requires_grad_()
                logits = self.logits(head, part)
                if labels == "model":
                    wanted = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                    loss = F.cross_entropy(logits, wanted, reduction="sum")
                else:
                    loss = F.cross_entropy(logits[:-1], self.tokens[window, 1:])
                gradient[window] = torch.autograd.grad(loss, part)[0]
        return gradient


def _keeping(weights: Tensors, inputs: Tensors, outputs: Tensors) -> executor.Product:
    """Products that leave what they read and gave, by name of their matrix."""

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        inputs[name] = x.detach()
        outputs[name] = result = F.linear(x, weights[f"{name}.weight"])
        return result

    return product
