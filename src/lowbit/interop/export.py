"""Write a model for another tool: the targets, and what all of them check first.

gguf[:TYPE]                  llama.cpp: one file with tokenizer and chat template
compressed-tensors[:FORMAT]  vLLM, SGLang, transformers: a directory
gptq[:FORMAT], awq[:FORMAT], bitnet
safetensors[:FLOAT]          floats alone
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit.compress.directory import check_target
from lowbit.errors import CheckpointError, RequestError
from lowbit.interop.directory_export import export_directory
from lowbit.interop.gguf_export import export_gguf
from lowbit.model.checkpoint import Checkpoint, open_checkpoint
from lowbit.model.tensors import HEAD, expected_tensors

Progress = Callable[[float, float, str], None]
# Name -> what it is, for help and errors.
TARGETS = {
    "gguf": "llama.cpp: gguf:q4_0, gguf:q4_k ..",
    "compressed-tensors": "vLLM, transformers: compressed-tensors:int4-g128, :w8a8, :fp8 ..",
    "gptq": "gptq:int4-g128, :int4a-g64 ..",
    "awq": "awq:int4a-g128 ..",
    "bitnet": "transformers' BitNet layers",
    "safetensors": "floats: safetensors:bf16, :fp16, :fp32",
}


def export(
    source: str | os.PathLike[str],
    target: str,
    output: str | os.PathLike[str],
    *,
    lossy: bool = False,
    force: bool = False,
    embedding: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model for another tool.

    source: any checkpoint that lowbit opens
    target: a name of TARGETS, with a format behind a colon where it has several
    output: the file or directory to write; it appears when everything is done, or not at all
    lossy: round stored codes that the target cannot hold; without it such an export is refused
    force: replace `output`
    embedding: the type of token embedding and output head, such as q8_0, or for a directory fp16; None: the
        target's choice
    progress: called as progress(weights done, weights in all, tensor name)

    Returns {"output", "target", "exact", "bits_per_weight", "seconds", "tensors": [{"name", "shape", "from",
    "type", "exact"; "changed" and "relative_error", on a sample, where something was rounded; "why" where the
    type is not the wanted one}]}.
    """
    started = time.perf_counter()
    kind, _, format = target.partition(":")
    if kind not in TARGETS:
        raise RequestError(f"export: {target!r} is not a target; choose one of {', '.join(TARGETS)}")
    path = Path(output)
    with open_checkpoint(source) as checkpoint:
        names = tensor_names(checkpoint)
        tell = progress or (lambda *_: None)
        wanted = format or None
        if kind == "gguf":
            check_output(path, Path(source), force)
            tensors = export_gguf(checkpoint, names, path, wanted, embedding, lossy, tell)
        else:
            check_other(path, Path(source))
            check_target(path, force)
            tensors = export_directory(checkpoint, names, path, kind, wanted, embedding, lossy, force, tell)
    weights = sum(tensor["shape"][0] * tensor["shape"][1] for tensor in tensors)
    bits = sum(t["bits_per_weight"] * t["shape"][0] * t["shape"][1] for t in tensors)
    return {
        "output": str(path),
        "target": target,
        "exact": all(tensor["exact"] for tensor in tensors),
        "bits_per_weight": bits / weights,
        "seconds": time.perf_counter() - started,
        "tensors": tensors,
    }


def tensor_names(checkpoint: Checkpoint) -> list[str]:
    """Canonical names of all tensors of the network, in the order of use; a head of its own is among them.

    Raises CheckpointError if one is missing.
    """
    present = set(checkpoint.names())
    names = [tensor.name for tensor in expected_tensors(checkpoint.config)]
    if HEAD in present and HEAD not in names:
        names.append(HEAD)
    missing = [name for name in names if name not in present]
    if missing:
        raise CheckpointError(
            f"export {checkpoint.path}: {len(missing)} of {len(names)} tensors are missing: "
            f"{', '.join(missing[:4])}; the checkpoint is incomplete"
        )
    return names


def check_output(output: Path, source: Path, force: bool) -> None:
    """Raise CheckpointError if the file `output` exists and may not be replaced."""
    if not output.exists() and not output.is_symlink():
        return
    check_other(output, source)
    if output.is_dir():
        raise CheckpointError(f"write {output}: it is a directory; choose another name")
    if not force:
        raise CheckpointError(f"write {output}: it exists already; give --force to replace it")


def check_other(output: Path, source: Path) -> None:
    """Raise CheckpointError if both are the same file or directory."""
    if output.exists() and source.exists() and output.resolve() == source.resolve():
        raise CheckpointError(f"write {output}: it is the model that is read; choose another name")
