"""Open a checkpoint of any kind, and what can be asked of it.

    transformers directory   config.json, *.safetensors in F32, F16 or BF16, or quantized by another tool and
                             read as they are stored (stored/); tokenizer.json
    lowbit directory         the same with lowbit.json: packed matrices, mapped as they are
    GGUF file                every type of weights, in one file or in parts, tokenizer inside
    llama2.c file            float32, Q8_0 or ternary; tokenizer.bin beside it

Tensors have transformers' Llama names whatever the container calls them, for example
`model.layers.0.self_attn.q_proj.weight`, and their rows are in transformers' order.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lowbit.errors import CheckpointError

if TYPE_CHECKING:
    from lowbit.model.config import ModelConfig
    from lowbit.model.tokenizer import Tokenizer
    from lowbit.packed import PackedMatrix


class Checkpoint(Protocol):
    """Weights, description and tokenizer of one model; usable in a `with` block."""

    path: Path
    kind: str  # "transformers" | "lowbit" | "gguf" | "llama2c"

    @property
    def config(self) -> ModelConfig: ...

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """How the tensor is stored: "BF16", "Q4_1", or the format of a packed matrix such as "int4-g64"."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor decoded to a fresh float32 array."""
        ...

    def matrix(self, name: str) -> PackedMatrix:
        """A tensor of two dimensions as it is stored, without rounding anything."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None where the checkpoint has none."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Checkpoint: ...

    def __exit__(self, *exc: object) -> None: ...


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a GGUF or llama2.c file, a lowbit directory or a transformers directory.

    Raises CheckpointError for a path that is neither, or whose files are damaged, and UnsupportedError for
    a network or a tensor type that lowbit cannot run.
    """
    from lowbit.model.lowbit_checkpoint import LowbitCheckpoint
    from lowbit.model.transformers_checkpoint import TransformersCheckpoint

    path = Path(path)
    try:
        if path.is_dir():
            return (
                LowbitCheckpoint(path) if (path / "lowbit.json").is_file() else TransformersCheckpoint(path)
            )
        if not path.exists():
            raise CheckpointError(
                f"open {path}: there is no such file or directory; give a model directory or a .gguf file, "
                "or fetch a model with `lowbit pull`"
            )
        with open(path, "rb") as file:
            head = file.read(256)
            magic, size = head[:4], os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise CheckpointError(f"open {path}: {error}; check the path and its permissions") from error
    if magic == b"GGUF":
        from lowbit.model.gguf_checkpoint import GGUFCheckpoint

        return GGUFCheckpoint(path)
    from lowbit.model.llama2c_checkpoint import Llama2cCheckpoint, is_llama2c

    if is_llama2c(head, size):
        return Llama2cCheckpoint(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"open {path}: give the directory {path.parent}, which has config.json as well")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise CheckpointError(
            f"open {path}: pickled weights may run code when opened, and it is no whole llama2.c file; give "
            "safetensors or GGUF"
        )
    raise CheckpointError(
        f"open {path}: begins with {magic!r}, which is no GGUF or llama2.c file; give a directory or a .gguf"
    )
