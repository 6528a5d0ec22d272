"""The GGUF parser: values of every type, tensors where they lie, and every kind of damage an error."""

import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model import gguf_cursor
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
    "unknown type of former times": (assemble([], [entry("t", (8,), 4, 0)], F32), "Q4_2, which ggml removed"),
    "split": (assemble([pair("split.count", "u16", 3)]), "one of 3 parts .* NAME-00001-of-00003.gguf"),
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
    monkeypatch.setattr(gguf_cursor, "MAX_ITEMS", 10)
    opened(assemble([pair("a", "[str]", [""] * 9)]))
    with pytest.raises(CheckpointError, match="more than 10 items"):
        opened(assemble([pair("a", "[str]", [""] * 10)]))
    monkeypatch.setattr(gguf_cursor, "MAX_ARRAY_BYTES", 64)
    with pytest.raises(CheckpointError, match="takes 80 bytes, 64 are allowed"):
        opened(assemble([pair("a", "[u64]", [0] * 10)]))


def test_metadata_takes_little_more_memory_than_bytes(opened):
    """Of many small items: strings, truth values, numbers, and arrays in arrays, each a mebibyte."""
    for kind, value in (("[str]", [""] * 131072), ("[bool]", [1] * 2**20), ("[u8]", [0] * 2**20)):
        raw = assemble([pair("k", kind, value)])
        tracemalloc.start()
        try:
            file = opened(raw)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 3 * len(raw), kind
        file.close()
    nested = string("k") + struct.pack("<IIQ", 9, 9, 70000) + struct.pack("<IQ", 0, 0) * 70000
    with pytest.raises(CheckpointError, match="more than 65536 arrays in arrays"):
        opened(assemble([nested]))


def split_files(folder, count=3, **changes):
    """A model of `count` parts with one tensor each; changes: part number -> its metadata instead."""
    paths = []
    for number in range(count):
        pairs = [pair("split.no", "u16", number), pair("split.count", "u16", count)]
        pairs += [pair("split.tensors.count", "i32", count)]
        if number == 0:
            pairs += [pair("general.architecture", "str", "llama")]
        values = np.full(8, number, "<f4")
        raw = assemble(
            changes.get(f"part{number}", pairs), [entry(f"t{number}", (8,), 0, 0)], values.tobytes()
        )
        paths.append(folder / f"big model-{number + 1:05}-of-{count:05}.gguf")
        paths[-1].write_bytes(raw)
    return paths


def test_split_files_open_by_any_part(tmp_path):
    paths = split_files(tmp_path)
    for path in paths:
        with GGUFFile(path) as file:
            assert file.paths == paths and file.metadata["general.architecture"] == "llama"
            assert [file.data(f"t{n}").view("<f4")[0] for n in range(3)] == [0, 1, 2]
            file.forget("t2")


def test_split_files_that_do_not_fit_are_named(tmp_path):
    paths = split_files(tmp_path)
    content = paths[1].read_bytes()
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"big model-00002-of-00003.gguf is not beside it"):
        GGUFFile(paths[0])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(CheckpointError, match="part 3 of 3, its name says 2 of 3"):
        GGUFFile(paths[0])
    paths[1].write_bytes(content)
    paths[0].rename(tmp_path / "other.gguf")
    with pytest.raises(UnsupportedError, match="by its name the others cannot be found"):
        GGUFFile(tmp_path / "other.gguf")
    header = [pair("split.no", "u16", 0), pair("split.count", "u16", 2)]
    for pairs, message in (
        ([*header, pair("split.tensors.count", "i32", 7)], "hold 2 tensors, split.tensors.count says 7"),
        ([*header[:1], pair("split.count", "u16", 3)], "be found"),
    ):
        with pytest.raises((CheckpointError, UnsupportedError), match=message):
            GGUFFile(split_files(tmp_path, 2, part0=pairs)[0])
    paths = split_files(tmp_path, 2)
    paths[1].write_bytes(paths[1].read_bytes().replace(b"t1", b"t0"))
    with pytest.raises(CheckpointError, match="'t0' is in another part, too"):
        GGUFFile(paths[0])


def test_unknown_types_can_be_listed(tmp_path):
    """For whoever explains a file that cannot run."""
    path = tmp_path / "new.gguf"
    path.write_bytes(assemble([], [entry("a", (8,), 0, 0), entry("b", (64,), 777, 32)], F32 + b"?" * 40))
    with GGUFFile(path, unknown_types=True) as file:
        assert (file.tensors["b"].type, file.tensors["b"].nbytes, file.tensors["b"].shape) == (777, 0, (64,))
    with pytest.raises(UnsupportedError, match="unknown type 777"):
        GGUFFile(path)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(CheckpointError, match="check the path"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match="check the path"):
        GGUFFile(tmp_path)
