"""What a model's files hold and what of it runs, explained even where it cannot run.

Everything that would stop a model from loading is collected as a line of `problems` instead of being raised,
as far as the file can be read at all. Nothing is loaded: tensors are counted from headers, and where only
their content says how they would run, one of each kind is read.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import CheckpointError, LowbitError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.gguf_file import GGUFFile
from lowbit.model.gguf_types import TENSOR_TYPES, TensorType
from lowbit.model.json_file import read_json
from lowbit.model.transformers_checkpoint import quantization_beside
from lowbit.packed import CodeTerm, FloatTerm, GatheredTerm, PackedMatrix, TensorFile

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint

FLOAT_BITS = {"F32": 32, "F16": 16, "BF16": 16}
_VECTOR = ("float32 vector", "vector")
_FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_FLOATS |= {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass
class Entry:
    """One tensor. bytes: in the file. run_bytes: as it runs, None where it does not. runs_as and kernel: in
    words; kernel is "codes" (integer products), "floats", "vector" or "none"."""

    name: str
    format: str
    shape: list[int]
    weights: int
    bytes: int
    run_bytes: float | None
    runs_as: str
    kernel: str

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights if self.weights else 0.0


@dataclass
class Inspection:
    """kind: "gguf" | "transformers" | "lowbit" | "llama2c" | "safetensors". files: with weights.
    problems: why it would not run. notes: what else is worth knowing. quantization: as the source says."""

    path: Path
    kind: str
    entries: list[Entry] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    tokenizer_size: int | None = None
    chat_template: bool = False

    def problem(self, error: LowbitError) -> None:
        if str(error) not in self.problems:
            self.problems.append(str(error))


def inspect_model(path: Path) -> Inspection:
    """Explain a GGUF file, a directory of transformers or lowbit, a llama2.c file or a .safetensors file.

    Raises CheckpointError and UnsupportedError only where nothing of the file can be read: it is absent,
    damaged before its tensors are listed, of an unknown version, or pickled.
    """
    if path.is_file():
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            return _gguf(path)
        if path.suffix == ".safetensors":
            return _safetensors(path)
    if path.is_dir():
        return _directory(path)
    with open_checkpoint(path) as checkpoint:
        found = Inspection(path, checkpoint.kind)
        _describe(found, checkpoint)
        _list_checkpoint(found, checkpoint)
        return found


def _describe(found: Inspection, checkpoint: Checkpoint) -> None:
    """The network, its tokenizer, and whether all its tensors are there."""
    from lowbit.model.loader import check_coverage

    try:
        config = checkpoint.config
        found.config = asdict(config)
        check_coverage(checkpoint, config)
    except LowbitError as error:
        found.problem(error)
    try:
        tokenizer = checkpoint.tokenizer()
    except LowbitError as error:
        found.problem(error)
        return
    if tokenizer is None:
        found.notes.append("there is no tokenizer: prompts have to be token ids")
    else:
        found.tokenizer_size = tokenizer.vocab_size
        found.chat_template = bool(tokenizer.chat_template)


# --- GGUF ---
_ALWAYS = ("general.architecture", "general.name", "general.file_type", "general.quantization_version")


def _gguf(path: Path) -> Inspection:
    from lowbit.model.gguf_checkpoint import GGUFCheckpoint

    found = Inspection(path, "gguf")
    with GGUFFile(path, unknown_types=True) as file:
        found.files = [part.name for part in file.paths]
        found.metadata = {key: file.metadata[key] for key in _ALWAYS if key in file.metadata}
        found.chat_template = "tokenizer.chat_template" in file.metadata
        words = file.metadata.get("tokenizer.ggml.tokens")
        found.tokenizer_size = len(words) if isinstance(words, list) else None
        for tensor in file.tensors.values():
            kind = TENSOR_TYPES.get(tensor.type)
            name = kind.name if kind else f"type {tensor.type}"
            entry = Entry(
                tensor.name, name, list(tensor.shape), math.prod(tensor.shape), tensor.nbytes, None, "", ""
            )
            entry.run_bytes, entry.runs_as, entry.kernel = _type_runs(kind, entry)
            found.entries.append(entry)
    try:
        with GGUFCheckpoint(path) as checkpoint:
            _describe(found, checkpoint)
    except LowbitError as error:
        found.problem(error)
    for name in sorted({entry.format for entry in found.entries if entry.run_bytes is None}):
        which = [entry.name for entry in found.entries if entry.format == name]
        listed = ", ".join(which[:3]) + (", .." if len(which) > 3 else "")
        found.problems.append(f"{len(which)} tensors of {name} have no decoder: {listed}")
    return found


def _type_runs(kind: TensorType | None, entry: Entry) -> tuple[float | None, str, str]:
    """(bytes, words, kernel) of a GGUF tensor as it runs."""
    if kind is None or not kind.readable:
        return None, "not at all", "none"
    if len(entry.shape) < 2:
        return 4.0 * entry.weights, *_VECTOR
    size = entry.weights * kind.run_bits / 8
    if kind.float_type is not None:
        return size, _FLOATS[kind.float_type], "floats"
    words = _code_words(
        kind.bits, kind.packing, len(kind.levels), kind.scale_type, kind.group, kind.has_offsets
    )
    return size, words, "codes"


def _code_words(
    bits: int, packing: str, levels: int, scale_type: str, group: int, offsets: bool = False
) -> str:
    width = "base-3 codes" if packing == "base3" else f"{bits}-bit codes"
    scales = {"m4": "4-bit multipliers", "m8": "8-bit factors"}.get(scale_type, f"{scale_type} scales")
    of = f"of {group}" if group else "of rows"
    return f"{width}, {levels} levels, {scales}{' and offsets' if offsets else ''} {of}"


# --- directories ---
def _directory(path: Path) -> Inspection:
    found = Inspection(path, "lowbit" if (path / "lowbit.json").is_file() else "transformers")
    fields = {}
    try:
        fields = {**quantization_beside(path), **read_json(path / "config.json")}
    except CheckpointError as error:
        found.problem(error)
    stated = fields.get("quantization_config", fields.get("compression_config"))
    found.quantization = stated if isinstance(stated, dict) else None
    architectures = fields.get("architectures")
    if isinstance(architectures, list):
        found.metadata["architectures"] = [str(name)[:100] for name in architectures[:4]]
    files = sorted(path.glob("*.safetensors"))
    found.files = [file.name for file in files]
    held = _headers(found, files)
    try:
        with open_checkpoint(path) as checkpoint:
            found.kind = checkpoint.kind
            _describe(found, checkpoint)
            _list_checkpoint(found, checkpoint, held if checkpoint.kind == "transformers" else None)
            return found
    except LowbitError as error:
        found.problem(error)
    found.entries = [_plain_entry(name, dtype, shape, size) for name, (dtype, shape, size) in held.items()]
    if not files and not found.config and not fields:
        raise CheckpointError(f"inspect {path}: neither config.json nor .safetensors files are there")
    return found


def _safetensors(path: Path) -> Inspection:
    found = Inspection(path, "safetensors", files=[path.name])
    found.problems.append(
        f"one file of weights is no model: give the directory {path.parent}, with config.json"
    )
    held = _headers(found, [path])
    found.entries = [_plain_entry(name, dtype, shape, size) for name, (dtype, shape, size) in held.items()]
    return found


def _headers(found: Inspection, files: list[Path]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Stored name -> (type, shape, bytes) of the arrays in safetensors files."""
    held = {}
    for path in files:
        try:
            file = TensorFile(path)
            for name in file.names():
                held[name] = (file.dtype(name), file.shape(name), file.array(name).nbytes)
        except LowbitError as error:
            found.problem(error)
    return held


def _plain_entry(name: str, dtype: str, shape: tuple[int, ...], size: int) -> Entry:
    weights = math.prod(shape)
    known = dtype in FLOAT_BITS
    if known and len(shape) == 1:
        return Entry(name, dtype, list(shape), weights, size, 4.0 * weights, *_VECTOR)
    words = (_FLOATS[dtype], "floats") if known else ("an array of this type alone is no matrix", "none")
    return Entry(name, dtype, list(shape), weights, size, float(size) if known else None, *words)


def _list_checkpoint(
    found: Inspection,
    checkpoint: Checkpoint,
    held: dict[str, tuple[str, tuple[int, ...], int]] | None = None,
) -> None:
    """Tensors under canonical names; how a kind of matrix runs is read off its first one.

    held: the arrays of the files, from which the size of a quantized matrix in them is known; None: a matrix
        is mapped as it runs, so each can be asked."""
    kinds: dict[tuple[str | None, str, tuple[int, ...]], tuple[float, str, str]] = {}
    in_files = 0
    for name in checkpoint.names():
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        weights = math.prod(shape)
        if dtype in FLOAT_BITS:
            entry = _plain_entry(name, dtype, shape, weights * FLOAT_BITS[dtype] // 8)
        elif len(shape) != 2:
            entry = Entry(name, dtype, list(shape), weights, 0, None, "not at all", "none")
        else:
            key = (None if held else name, dtype, shape)
            if key not in kinds:
                matrix = checkpoint.matrix(name)
                kinds[key] = (float(matrix.nbytes), *_matrix_words(matrix))
            entry = Entry(name, dtype, list(shape), weights, round(kinds[key][0]), *kinds[key])
        in_files += entry.bytes
        found.entries.append(entry)
    if held:
        _stored_sizes(found, held)
    found.notes += [line for line in getattr(checkpoint, "notes", list)() if line not in found.notes]


def _stored_sizes(found: Inspection, held: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    """Bytes in the files of matrices that are stored as several arrays: what plain tensors leave, shared out
    by their weights."""
    packed = [entry for entry in found.entries if entry.format not in FLOAT_BITS]
    left = sum(size for _, _, size in held.values())
    left -= sum(entry.bytes for entry in found.entries if entry.format in FLOAT_BITS)
    weights = sum(entry.weights for entry in packed)
    for entry in packed:
        entry.bytes = round(max(0, left) * entry.weights / weights)


def _matrix_words(matrix: PackedMatrix) -> tuple[str, str]:
    """(words, kernel) for the terms of a matrix."""
    words, kernel = [], "codes"
    for whole in matrix.terms:
        term = whole.codes if isinstance(whole, GatheredTerm) else whole
        if isinstance(term, CodeTerm):
            words.append(
                _code_words(
                    term.bits,
                    term.packing,
                    term.levels.shape[1],
                    term.scale_type,
                    term.group_size,
                    term.offsets is not None,
                )
            )
        elif isinstance(term, FloatTerm):
            words.append(_FLOATS[term.type])
        else:
            words.append(term.kind.replace("_", " "))
        if isinstance(whole, GatheredTerm):
            words[-1] += ", inputs gathered"
    if all(not term.quantized for term in matrix.terms):
        kernel = "floats"
    return " + ".join(words), kernel
