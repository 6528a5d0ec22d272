"""A view in which the residual stream and the values of each head are turned by orthogonal matrices.

Rotations spread loud channels over all before anything is rounded. An RMS norm commutes with a rotation once
its weight is folded into the matrices that follow; so the head, which takes that of the last norm, is no
longer the embedding. In layers with a norm before the output projection its weight is folded too. The input
of down_proj is not turned, for what precedes it is no linear map. Networks with layer norms, or with norms on
what is added to the stream, are refused: their weights stand between two rotations.
Source: QuaRot, arXiv:2404.00456, the rotations that cost nothing at run time.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lowbit.compress.view import View, split
from lowbit.errors import UnsupportedError
from lowbit.model.tensors import EMBEDDING, FINAL_NORM, HEAD
from lowbit.quantize.rotation import Rotation, make_rotation

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint

_ROWS = 4096  # rows of a matrix that are turned at a time

# Matrices that read the stream -> the norm before them, whose weight is folded into them.
_READ = (
    (re.compile(r"self_attn\.[qkv]_proj\.weight"), "input_layernorm.weight"),
    (re.compile(r"mlp\.(experts\.\d+\.)?(gate|up)_proj\.weight"), "post_attention_layernorm.weight"),
    (re.compile(r"mlp\.router\.weight"), "post_attention_layernorm.weight"),
)
_WRITE = re.compile(r"(self_attn\.o_proj|mlp\.(experts\.\d+\.)?down_proj)\.(weight|bias)")
_SUB_NORM = "self_attn.attn_sub_norm.weight"
_FOLDED = {*(norm for _, norm in _READ), _SUB_NORM}


def _norm_before(part: str) -> str | None:
    return next((norm for pattern, norm in _READ if pattern.fullmatch(part)), None)


class Rotated(View):
    def __init__(self, checkpoint: Checkpoint, seed: int):
        config = checkpoint.config
        if config.norm != "rms" or config.norm_place != "pre":
            kind = "layer norms" if config.norm != "rms" else "norms on what is added to the stream"
            raise UnsupportedError(
                f"hadamard: {config.family} networks have {kind}, which do not commute with a rotation; "
                "quantize without hadamard"
            )
        super().__init__(checkpoint, replace(config, tied=False))
        self._stream = make_rotation(self.config.hidden_size, seed)
        self._head = make_rotation(self.config.head_dim, seed + 1)

    def read(self, name: str) -> np.ndarray:
        tensor = self._source.read(self._stored(name))
        prefix, part = split(name)
        if name == FINAL_NORM or part in _FOLDED:
            return np.full_like(tensor, 1 - self.config.norm_offset)
        norm = _norm_before(part)
        if name == HEAD:
            tensor *= self._gain(FINAL_NORM)
        elif norm is not None:
            tensor *= self._gain(prefix + norm)
        elif part == "self_attn.o_proj.weight":
            if self.config.sub_norm:
                tensor *= self._gain(prefix + _SUB_NORM)
            tensor = self._turn_heads(tensor)
        if part in ("self_attn.v_proj.weight", "self_attn.v_proj.bias"):
            tensor = self._turn_heads(tensor.T).T
        if name in (EMBEDDING, HEAD) or norm is not None:
            return _turned(tensor, self._stream)
        if _WRITE.fullmatch(part):  # they write into the stream
            return np.ascontiguousarray(self._stream(np.ascontiguousarray(tensor.T)).T)
        return tensor

    def _gain(self, norm: str) -> np.ndarray:
        return self._source.read(norm) + np.float32(self.config.norm_offset)

    def _turn_heads(self, x: np.ndarray) -> np.ndarray:
        """The features of each head turned; x [.., heads * head_dim]."""
        heads = np.ascontiguousarray(x).reshape(*x.shape[:-1], -1, self.config.head_dim)
        return self._head(heads).reshape(x.shape)


def _turned(tensor: np.ndarray, rotation: Rotation) -> np.ndarray:
    """Rows turned in place, so that a large embedding is in memory once."""
    tensor = np.ascontiguousarray(tensor)
    for start in range(0, len(tensor), _ROWS):
        tensor[start : start + _ROWS] = rotation(tensor[start : start + _ROWS])
    return tensor
