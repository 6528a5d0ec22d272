"""The GGUF parser: values of every type, tensors where they lie, and every kind of damage an error."""

import struct
import time

import gguf
import numpy as np
import pytest

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model import gguf_file
from lowbit.model.gguf_file import GGUFFile

from .gguf_bytes import NUMBERS, assemble, entry, pair, string, typed


@pytest.fixture
def opened(tmp_path):
    """Write bytes to a file and open it."""

    def open_bytes(raw: bytes) -> GGUFFile:
        path = tmp_path / "model.gguf"
        path.write_bytes(raw)
        return GGUFFile(path)

    return open_bytes


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type(opened, version):
    limits = {"u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31)}
    limits |= {"f32": 1.5, "bool": 1, "u64": 2**64 - 1, "i64": -(2**63), "f64": 1e300}
    pairs = [pair(kind, kind, limits[kind]) for kind in NUMBERS]
    pairs += [
        pair("text", "str", "grüße 🦙"),
        pair("empty", "str", ""),
        pair("words", "[str]", ["a", "", "ß"]),
    ]
    pairs += [pair(f"[{kind}]", f"[{kind}]", [limits[kind]] * 3) for kind in NUMBERS]
    pairs += [pair("nested", "[[u8]]", [[1, 2], [3]]), pair("none", "[str]", [])]
    metadata = opened(assemble(pairs, version=version)).metadata
    for kind in NUMBERS:
        assert metadata[kind] == limits[kind]
        np.testing.assert_array_equal(metadata[f"[{kind}]"], [limits[kind]] * 3)
    assert metadata["bool"] is True and metadata["[bool]"].dtype == bool
    assert metadata["text"] == "grüße 🦙" and metadata["empty"] == ""
    assert metadata["words"] == ["a", "", "ß"] and metadata["none"] == []
    assert [row.tolist() for row in metadata["nested"]] == [[1, 2], [3]]


def test_agrees_with_the_gguf_package(tmp_path, rng):
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 7)
    writer.add_array("list", ["x", "yz"])
    writer.add_custom_alignment(64)
    arrays = {"a": rng.normal(size=(3, 32)).astype(np.float32), "b": rng.normal(size=5).astype(np.float16)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(path) as file:
        assert file.metadata["llama.block_count"] == 7 and file.metadata["list"] == ["x", "yz"]
        assert file.tensors["a"].shape == (3, 32) and file.tensors["b"].shape == (5,)
        for name, array in arrays.items():
            assert file.data(name).tobytes() == array.tobytes()


def test_real_vocabulary_in_little_time(shared_data):
    path = shared_data("tokenizers/ggml-vocab-gpt-2.gguf")
    start = time.process_time()
    file = GGUFFile(path)
    assert time.process_time() - start < 0.5  # 30 ms as a rule; the bound only catches a quadratic loop
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 50257
    assert len(file.metadata["tokenizer.ggml.merges"]) == 50000
    assert file.metadata["tokenizer.ggml.tokens"][15496] == "Hello"


def test_closing_keeps_views_alive(opened):
    file = opened(assemble([], [entry("t", (8,), 0, 0)], np.arange(8, dtype="<f4").tobytes()))
    view = file.data("t")
    file.close()
    assert view.view("<f4").tolist() == list(range(8))
    assert not view.flags.writeable


F32 = np.zeros(8, "<f4").tobytes()
ONE = [entry("t", (8,), 0, 0)]
BAD = {
    "magic": (assemble([], magic=b"GGML"), "begins with b'GGML'"),
    "short": (b"GGUF\3\0\0\0", "24 of a GGUF header"),
    "empty": (b"", "0 bytes"),
    "pair count": (assemble([], counts=(0, 2**63)), "metadata pairs"),
    "tensor count": (assemble([], counts=(2**60, 0)), "tensors need at least"),
    "count just too high": (assemble([pair("a", "u8", 1)], counts=(0, 2))[:38], "truncated"),
    "key length": (assemble([struct.pack("<Q", 2**40) + b"k" * 40]), "65535 are allowed"),
    "key cut": (assemble([struct.pack("<Q", 500) + b"k" * 40]), "truncated"),
    "key not UTF-8": (assemble([string(b"\xff\xfe") + typed("u8", 1)]), "not UTF-8"),
    "key empty": (assemble([pair("", "u8", 1)]), "is empty"),
    "key repeated": (assemble([pair("k", "u8", 1), pair("k", "u8", 2)]), "'k' is repeated"),
    "value type": (assemble([string("k") + struct.pack("<I", 13) + b"\0" * 16]), "value type 13"),
    "array type": (assemble([string("k") + struct.pack("<IIQ", 9, 77, 1) + b"\0" * 16]), "value type 77"),
    "truth value": (assemble([string("k") + struct.pack("<IB", 7, 2)]), "truth value"),
    "truth values": (assemble([string("k") + struct.pack("<IIQ3B", 9, 7, 3, 0, 1, 9)]), "truth value"),
    "string length": (
        assemble([string("k") + struct.pack("<IQ", 8, 2**62) + b"\0" * 32]),
        "16777216 are allowed",
    ),
    "array count": (assemble([string("k") + struct.pack("<IIQ", 9, 6, 2**61)]), "need at least"),
    "strings count": (assemble([string("k") + struct.pack("<IIQ", 9, 8, 2**61)]), "need at least"),
    "strings run out": (
        assemble([string("k") + struct.pack("<IIQQ", 9, 8, 2, 100) + b"x" * 20]),
        "run beyond|truncated",
    ),
    "string of a list too long": (
        assemble([string("k") + struct.pack("<IIQQ", 9, 8, 2, 2**50) + b"x" * 20]),
        "16777216 are allowed",
    ),
    "string of a list not UTF-8": (
        assemble([string("k") + struct.pack("<IIQ", 9, 8, 1) + string(b"\xc3")]),
        "UTF-8",
    ),
    "nesting": (
        assemble([string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 6 + b"\0" * 32]),
        "nests",
    ),
    "tensor name cut": (assemble([], [struct.pack("<Q", 99)], F32), "tensor"),
    "no dimensions": (assemble([], [entry("t", (), 0, 0) + b"\0" * 8], F32), "has 0 dimensions"),
    "dimensions": (assemble([], [entry("t", (1,) * 5, 0, 0)], F32), "has 5 dimensions"),
    "empty dimension": (assemble([], [entry("t", (8, 0), 0, 0)], F32), "no empty dimension"),
    "huge dimension": (assemble([], [entry("t", (2**63, 2**63), 0, 0)], F32), "ends beyond"),
    "block": (assemble([], [entry("t", (33,), 2, 0)], F32), "multiple of 32"),
    "offset": (assemble([], [entry("t", (8,), 0, 2**63 // 32 * 32)], F32), "ends beyond"),
    "offset unaligned": (assemble([], [entry("t", (2,), 0, 8)], F32), "not a multiple of the alignment"),
    "data cut": (assemble([], ONE, F32)[:-1], "ends beyond"),
    "twice": (assemble([], ONE + ONE, F32), "listed twice"),
    "overlap": (assemble([], [entry("a", (8,), 0, 0), entry("b", (4,), 0, 0)], F32), "overlap"),
    "alignment zero": (assemble([pair("general.alignment", "u32", 0)], ONE, F32), "power of two"),
    "alignment odd": (assemble([pair("general.alignment", "u32", 24)], ONE, F32), "power of two"),
    "alignment huge": (assemble([pair("general.alignment", "u32", 2**31)], ONE, F32), "power of two"),
}
UNSUPPORTED = {
    "version 1": (assemble([], version=1), "version 1"),
    "version 4": (assemble([], version=4), "version 4"),
    "big endian": (assemble([], version=3 << 24), "big-endian"),
    "unknown type": (assemble([], [entry("t", (8,), 99, 0)], F32), "unknown type 99"),
    "split": (assemble([pair("split.count", "u16", 3)]), "one of 3 parts"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named(opened, case):
    raw, message = BAD[case]
    with pytest.raises(CheckpointError, match=message):
        opened(raw)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_is_named(opened, case):
    raw, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedError, match=message):
        opened(raw)


def test_every_truncation(opened):
    whole = assemble([pair("a", "[str]", ["x", "y"]), pair("b", "[u16]", [1, 2, 3])], ONE, F32)
    opened(whole)
    for length in range(len(whole)):
        with pytest.raises(CheckpointError):
            opened(whole[:length])


def test_items_are_bounded(opened, monkeypatch):
    monkeypatch.setattr(gguf_file, "MAX_ITEMS", 10)
    opened(assemble([pair("a", "[str]", [""] * 9)]))
    with pytest.raises(CheckpointError, match="more than 10 items"):
        opened(assemble([pair("a", "[str]", [""] * 10)]))
    monkeypatch.setattr(gguf_file, "MAX_ARRAY_BYTES", 64)
    with pytest.raises(CheckpointError, match="takes 80 bytes, 64 are allowed"):
        opened(assemble([pair("a", "[u64]", [0] * 10)]))


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(CheckpointError, match="check the path"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match="check the path"):
        GGUFFile(tmp_path)
