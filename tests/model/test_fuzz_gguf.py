"""Damaged GGUF files of every type, whole and split: an error of ours, or weights; and always explained."""

import os
import random

import numpy as np
import pytest

from lowbit.errors import LowbitError
from lowbit.model.gguf_file import GGUFFile
from lowbit.model.gguf_matrix import matrix_from_gguf
from lowbit.model.gguf_types import TENSOR_TYPES, decode
from lowbit.model.inspection import inspect_model

from .fuzz_seeds import mutate_bytes
from .gguf_bytes import assemble, entry, pair

CASES = int(os.environ.get("LOWBIT_FUZZ_CASES", "250"))
MOST_WEIGHTS = 1 << 20  # a damaged shape may claim many of the few bytes there are


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def every_type(parts=1):
    """Files with a tensor of each type, rows of 256, distributed over `parts` files."""
    rng = np.random.default_rng(9)
    files = []
    kinds = list(TENSOR_TYPES.values())
    for part in range(parts):
        pairs = [pair("general.architecture", "str", "llama"), pair("llama.block_count", "u32", 1)]
        if parts > 1:
            pairs += [pair("split.no", "u16", part), pair("split.count", "u16", parts)]
            pairs += [pair("split.tensors.count", "i32", len(kinds))]
        entries, data = [], b""
        for kind in kinds[part::parts]:
            raw = rng.integers(0, 256, 2 * 256 // kind.block * kind.nbytes, dtype=np.uint8).tobytes()
            entries.append(entry(f"blk.0.{kind.name}.weight", (256, 2), kind.number, len(data)))
            data += raw + bytes(-len(raw) % 32)
        files.append(assemble(pairs, entries, data))
    return files


def exercise(path):
    """Take everything out of a file; True if it opens. Only our own errors may come out."""
    try:
        inspect_model(path)
        file = GGUFFile(path)
    except LowbitError:
        return False
    with file:
        for name, tensor in file.tensors.items():
            kind, weights = TENSOR_TYPES[tensor.type], int(np.prod(tensor.shape))
            assert tensor.nbytes == weights // kind.block * kind.nbytes
            if not kind.readable or weights > MOST_WEIGHTS:
                continue
            raw = file.data(name)
            assert decode(raw, kind).shape == (weights,)
            if len(tensor.shape) == 2:
                try:
                    matrix = matrix_from_gguf(raw, kind, *tensor.shape)
                    assert matrix.dequantize().shape == tensor.shape
                except LowbitError:  # scales of e8m0 and e4m3 may be no numbers
                    assert kind.scale_type in ("e8m0", "e4m3")
    return True


def test_mutated_files_of_every_type(tmp_path):
    (seed,) = every_type()
    path = tmp_path / "seed.gguf"
    path.write_bytes(seed)
    assert exercise(path)
    opened = 0
    for case in range(CASES):
        path = tmp_path / f"{case % 2}.gguf"  # a mapped file must not change under its reader
        path.write_bytes(mutate_bytes(seed, random.Random(case)))
        opened += exercise(path)
    assert 0 < opened < CASES


def test_mutated_parts(tmp_path):
    seeds = every_type(3)
    opened = 0
    for case in range(-1, CASES // 2):
        folder = tmp_path / str(case % 2)
        folder.mkdir(exist_ok=True)
        chance = random.Random(case)
        damaged = chance.randrange(3) if case >= 0 else None
        for part, seed in enumerate(seeds):
            path = folder / f"model-{part + 1:05}-of-00003.gguf"
            path.unlink(missing_ok=True)
            if part == damaged and chance.random() < 0.1:
                continue
            path.write_bytes(mutate_bytes(seed, chance) if part == damaged else seed)
        opened += exercise(folder / f"model-{chance.randrange(3) + 1:05}-of-00003.gguf")
        assert opened or case >= 0
    assert 1 < opened < CASES // 2


@pytest.mark.parametrize("kind", TENSOR_TYPES.values(), ids=lambda kind: kind.name)
def test_every_truncation_of_a_tensor(kind, tmp_path):
    raw = bytes(2 * 256 // kind.block * kind.nbytes)
    whole = assemble([], [entry("t", (256, 2), kind.number, 0)], raw)
    path = tmp_path / "t.gguf"
    path.write_bytes(whole)
    assert exercise(path)
    for short in (1, kind.nbytes, len(raw) - 1, len(raw)):
        path = tmp_path / f"{short}.gguf"
        path.write_bytes(whole[:-short])
        assert not exercise(path)
