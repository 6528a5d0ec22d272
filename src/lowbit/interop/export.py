"""Write a model for another tool: the targets, and what all of them check first.

gguf[:TYPE]                  llama.cpp: one file with tokenizer and chat template
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, RequestError
from lowbit.interop.gguf_export import export_gguf
from lowbit.model.checkpoint import Checkpoint, open_checkpoint
from lowbit.model.tensors import HEAD, expected_tensors

Progress = Callable[[float, float, str], None]
# Name -> what it is, for help and errors.
TARGETS = {"gguf": "llama.cpp: gguf:q4_0, gguf:q8_0 ..; gguf alone keeps every matrix as it is stored"}


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
    embedding: the format of token embedding and output head, in the target's words; None: the target's choice
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
        check_output(path, Path(source), force)
        tell = progress or (lambda *_: None)
        tensors = export_gguf(checkpoint, names, path, format or None, embedding, lossy, tell)
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
    """Raise CheckpointError if `output` exists and may not be replaced."""
    if not output.exists() and not output.is_symlink():
        return
    if output.exists() and source.exists() and output.resolve() == source.resolve():
        raise CheckpointError(f"write {output}: it is the model that is read; choose another name")
    if output.is_dir():
        raise CheckpointError(f"write {output}: it is a directory; choose another name")
    if not force:
        raise CheckpointError(f"write {output}: it exists already; give --force to replace it")
