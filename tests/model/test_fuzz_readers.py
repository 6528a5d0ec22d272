"""Damaged and hostile checkpoints: whatever the bytes, an error of ours or a model, never anything else.

Seeded mutations of whole files, and a corpus of crafted ones. LOWBIT_FUZZ_CASES sets how many mutations are
tried (the default takes a few seconds); `python -m tests.model.test_fuzz_readers` writes the corpus anew.
"""

import contextlib
import os
import random
from pathlib import Path

import numpy as np
import pytest

from lowbit.errors import LowbitError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.inspection import inspect_model

from . import fuzz_seeds
from .fuzz_seeds import mutate_bytes, mutate_json, mutate_safetensors, safetensors_bytes
from .test_gguf_file import BAD, UNSUPPORTED

CORPUS = Path(__file__).parent / "corpus"
CASES = int(os.environ.get("LOWBIT_FUZZ_CASES", "250"))


def exercise(path: Path) -> bool:
    """Ask everything of a checkpoint; True if it could be opened. Only our own errors may come out."""
    with contextlib.suppress(LowbitError):
        inspect_model(path)
    try:
        checkpoint = open_checkpoint(path)
    except LowbitError:
        return False
    with checkpoint:
        with contextlib.suppress(LowbitError):
            _ = checkpoint.config
        names: list[str] = []
        with contextlib.suppress(LowbitError):
            names = checkpoint.names()
        for name in names:
            for ask in (checkpoint.shape, checkpoint.dtype, checkpoint.read, checkpoint.matrix):
                try:
                    answer = ask(name)
                    if ask == checkpoint.matrix:
                        assert answer.dequantize().shape == checkpoint.shape(name)
                except LowbitError:
                    pass
        try:
            tokenizer = checkpoint.tokenizer()
            if tokenizer is not None:
                tokenizer.decode(tokenizer.encode("ab a\u00e9"))
                tokenizer.apply_chat([{"role": "user", "content": "a"}])
        except LowbitError:
            pass
    return True


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_mutated_gguf(tmp_path, sentencepiece):
    seed = fuzz_seeds.gguf_model(sentencepiece)
    path = tmp_path / "model.gguf"
    path.write_bytes(seed)
    assert exercise(path)
    opened = 0
    for case in range(CASES):
        path = tmp_path / f"{case % 2}.gguf"  # a mapped file must not change under its reader
        path.write_bytes(mutate_bytes(seed, random.Random(case)))
        opened += exercise(path)
    assert 0 < opened < CASES  # the damage is neither always fatal nor never


def mutated_directory(folder: Path, files: dict[str, bytes], case: int) -> None:
    """Write `files` with one to two of them damaged."""
    chance = random.Random(case)
    damaged = dict(files)
    for name in chance.sample(sorted(files), chance.randint(1, 2)):
        if name.endswith(".safetensors"):
            damaged[name] = mutate_safetensors(files[name], chance)
        elif chance.random() < 0.7:
            damaged[name] = mutate_json(files[name], chance)
        else:
            damaged[name] = mutate_bytes(files[name], chance)
        if chance.random() < 0.05:
            del damaged[name]
    for path in folder.iterdir():
        path.unlink()
    for name, content in damaged.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("kind", ["transformers", "lowbit"])
def test_mutated_directories(tmp_path, kind):
    files = fuzz_seeds.lowbit_directory(tmp_path) if kind == "lowbit" else fuzz_seeds.transformers_directory()
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert exercise(folder)
    opened = 0
    for case in range(CASES):
        mutated_directory(folder, files, case)
        opened += exercise(folder)
    assert 0 < opened < CASES


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HOSTILE_SAFETENSORS = {
    "empty": b"",
    "length-only": b"\0" * 8,
    "length-huge": safetensors_bytes({}, b"", 2**63),
    "length-just-too-long": safetensors_bytes({"a": ENTRY}, b"", 80),
    "not-json": safetensors_bytes(b"{'a': 1}", b""),
    "array": safetensors_bytes(b"[]", b""),
    "deep": safetensors_bytes(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", b""),
    "overlap": safetensors_bytes({"a": ENTRY, "b": ENTRY}, bytes(16)),
    "hole": safetensors_bytes({"a": {**ENTRY, "data_offsets": [16, 32]}}, bytes(32)),
    "beyond": safetensors_bytes({"a": {**ENTRY, "data_offsets": [0, 2**62]}}, bytes(16)),
    "backwards": safetensors_bytes({"a": {**ENTRY, "data_offsets": [16, 0]}}, bytes(16)),
    "negative": safetensors_bytes({"a": {**ENTRY, "shape": [-2, -2]}}, bytes(16)),
    "product-wraps": safetensors_bytes({"a": {**ENTRY, "shape": [2**32, 2**32, 4]}}, bytes(16)),
    "no-shape": safetensors_bytes({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16)),
    "unknown-type": safetensors_bytes({"a": {**ENTRY, "dtype": "F128"}}, bytes(16)),
    "four-bit-type": safetensors_bytes(
        {"a": {"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}}, bytes(16)
    ),
    "trailing-data": safetensors_bytes({"a": ENTRY}, bytes(17)),
    "repeated-key": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]}}',
        bytes(16),
    ),
    "metadata-not-text": safetensors_bytes({"__metadata__": {"a": 5}, "t": ENTRY}, bytes(16)),
    "zero-sized": safetensors_bytes({"a": {**ENTRY, "shape": [0, 4], "data_offsets": [0, 0]}}, b""),
    "scalar": safetensors_bytes({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)),
}


def crafted() -> dict[str, bytes]:
    """File name -> content of the corpus that this module and test_gguf_file describe."""
    files = {f"{name.replace(' ', '-')}.gguf": raw for name, (raw, _) in {**BAD, **UNSUPPORTED}.items()}
    return files | {f"{name}.safetensors": raw for name, raw in HOSTILE_SAFETENSORS.items()}


def test_corpus(tmp_path):
    files = {path.name: path.read_bytes() for path in CORPUS.iterdir()}
    assert len(files) > 50 and sum(map(len, files.values())) < 50_000
    for name, raw in files.items():
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        if name.endswith(".gguf"):
            (folder / name).write_bytes(raw)
            exercise(folder / name)
        else:
            (folder / "model.safetensors").write_bytes(raw)
            (folder / "config.json").write_bytes(fuzz_seeds.transformers_directory()["config.json"])
            exercise(folder)


def test_corpus_is_what_the_tests_describe():
    for name, raw in crafted().items():
        assert (CORPUS / name).read_bytes() == raw, f"{name}: write the corpus anew"


def test_every_json_file_nested_too_deeply(tmp_path):
    files = fuzz_seeds.lowbit_directory(tmp_path)
    for name in (name for name in files if name.endswith(".json")):
        for content in (b"[" * 200_000, b'{"a":' * 200_000, b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"):
            folder = tmp_path / "deep"
            folder.mkdir(exist_ok=True)
            for other, good in files.items():
                (folder / other).write_bytes(content if other == name else good)
            exercise(folder)


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for file_name, raw_bytes in crafted().items():
        (CORPUS / file_name).write_bytes(raw_bytes)
