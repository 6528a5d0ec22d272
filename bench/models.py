"""The models that are measured, made on first use and kept under the ignored `.cache/models/`.

A model is one network in several files: the GGUF it comes from, llama.cpp quantizations of that file
(which both programs read), and a lowbit directory made by `lowbit quantize`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import process
import random_llama
from peers.llama_cpp import LlamaCpp

VOCABULARY = process.ROOT.parent / "shared" / "data" / "tokenizers" / "ggml-vocab-llama-spm.gguf"


def source_gguf(name: str, cache: Path, say: Callable[[str], None]) -> Path:
    """The file that everything else of the model is made from."""
    if name == "smollm2-135m":
        from lowbit.model.download import pull

        return Path(pull(name))
    if name == "llama-1.1b":
        path = cache / "models" / "llama-1.1b-random.F16.gguf"
        if not path.exists():
            say(f"writing {path.name} (random weights, 2.2 GB, once)")
            random_llama.write(path, random_llama.LLAMA_1B, VOCABULARY if VOCABULARY.exists() else None)
        return path
    raise ValueError(f"unknown model {name!r}; known are smollm2-135m and llama-1.1b")


def peer_gguf(
    name: str, source: Path, kind: str, cache: Path, peer: LlamaCpp, say: Callable[[str], None]
) -> Path:
    """`source` quantized by llama.cpp to `kind`, for example Q4_0."""
    path = cache / "models" / f"{name}.{kind}.gguf"
    if not path.exists() or path.stat().st_mtime < source.stat().st_mtime:
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"making {path.name} (once)")
        peer.quantize(source, path, kind, threads=2)
    return path


def lowbit_directory(
    name: str, source: Path, scheme: str, options: Sequence[str], cache: Path
) -> tuple[Path, dict[str, Any]]:
    """`source` quantized by lowbit, anew. Returns the directory and what `lowbit quantize --json` printed."""
    path = cache / "models" / f"{name}.{scheme}"
    told = process.lowbit_json(
        "quantize", source, scheme, *options, "--output", path, "--force", "--no-verify"
    )
    return path, told


def cached_directory(
    name: str, source: Path, scheme: str, options: Sequence[str], cache: Path, say: Callable[[str], None]
) -> Path:
    """The same, kept as long as neither the source nor any code that could write other bytes has changed."""
    path = cache / "models" / f"{name}.{scheme}"
    stamp, now = path.with_name(f"{path.name}.made-by"), writer_digest(source, options)
    if not path.exists() or not stamp.exists() or stamp.read_text() != now:
        say(f"making {path.name}")
        lowbit_directory(name, source, scheme, options, cache)
        stamp.write_text(now)
    return path


def writer_digest(source: Path, options: Sequence[str]) -> str:
    """Of the code between a checkpoint and a directory, and of the source's size and time."""
    found = source.stat()
    digest = hashlib.sha256(f"{found.st_size} {found.st_mtime_ns} {list(options)}".encode())
    rooms = [process.ROOT / "src" / "lowbit" / room for room in ("formats", "packed", "quantize", "compress")]
    files = [file for room in rooms for file in sorted(room.glob("*.py"))]
    files += sorted((process.ROOT / "native").rglob("*rtn*"))
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def weight_bytes(path: Path) -> int:
    """Bytes of all tensors in a GGUF or a lowbit directory, scales included, tokenizer and headers not."""
    if path.is_dir() and (path / "openvino_model.bin").exists():
        return (path / "openvino_model.bin").stat().st_size
    if path.is_dir():
        return sum(_safetensors_bytes(file) for file in sorted(path.glob("*.safetensors")))
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def _safetensors_bytes(path: Path) -> int:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    spans = [entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"]
    return sum(end - begin for begin, end in spans)


def kv_bytes(config: dict[str, int], tokens: int, bits: int = 8) -> int:
    """Bytes of keys and values of `tokens` tokens; 8 bits come with three float32 scales for 64 channels."""
    head = 2 * config["head_dim"] * bits // 8 + (12 if bits == 8 else 0)
    return config["n_layers"] * config["n_kv_heads"] * head * tokens
