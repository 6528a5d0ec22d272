"""Safetensors files: whole or absent when written, checked before anything is mapped when read."""

import io
import json
import resource
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lowbit.errors import CheckpointError
from lowbit.packed import TensorFile, TensorWriter, whole_file


def write(path, arrays, **options):
    layout = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with TensorWriter(path, layout, **options) as writer:
        for name in reversed(arrays):  # any order
            writer.write(name, arrays[name])


def some_arrays(rng):
    return {
        "small": rng.standard_normal(3).astype(np.float32),
        "codes": rng.integers(0, 256, (2, 3, 64), dtype=np.uint8),
        "scales": rng.standard_normal((4, 32)).astype(np.float16),
        "bits": rng.integers(0, 65536, (2, 32), dtype=np.uint16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(1.5, np.float32),
    }


def test_the_library_reads_what_is_written(tmp_path, rng):
    arrays = some_arrays(rng)
    write(tmp_path / "m.safetensors", arrays, metadata={"format": "lowbit"})
    loaded = load_file(tmp_path / "m.safetensors")
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o444 == 0o444


def test_arrays_are_mapped_aligned_and_not_copied(tmp_path, rng):
    arrays = some_arrays(rng)
    write(tmp_path / "m.safetensors", arrays, metadata={"format": "lowbit"})
    file = TensorFile(tmp_path / "m.safetensors")
    assert file.metadata == {"format": "lowbit"}
    assert sorted(file.names()) == sorted(arrays)
    for name, array in arrays.items():
        found = file.array(name)
        np.testing.assert_array_equal(found, array)
        assert not found.flags.writeable and not found.flags.owndata
        if array.nbytes and array.nbytes % 64 == 0:
            assert found.ctypes.data % 64 == 0
    assert file.dtype("bits") == "U16" and file.shape("codes") == (2, 3, 64)
    mapped = file.array("codes")
    del file
    np.testing.assert_array_equal(mapped, arrays["codes"])  # the view keeps the mapping alive


def test_files_of_others_are_read(tmp_path, rng):
    save_file({"a": rng.standard_normal((3, 5)).astype(np.float32)}, tmp_path / "a.safetensors")
    assert TensorFile(tmp_path / "a.safetensors").array("a").shape == (3, 5)
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    values = torch.randn(3, 5, dtype=torch.bfloat16)
    save_torch({"b": values}, tmp_path / "b.safetensors")
    file = TensorFile(tmp_path / "b.safetensors")
    assert file.dtype("b") == "BF16"
    widened = (file.array("b").astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(widened, values.float().numpy())


def test_an_error_leaves_nothing_behind(tmp_path, rng):
    arrays = some_arrays(rng)
    layout = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    target = tmp_path / "m.safetensors"
    with pytest.raises(KeyboardInterrupt), TensorWriter(target, layout) as writer:
        writer.write("codes", arrays["codes"])
        raise KeyboardInterrupt
    with pytest.raises(CheckpointError, match="6 tensors never came"), TensorWriter(target, layout):
        pass
    with pytest.raises(CheckpointError, match="the layout announced"), TensorWriter(target, layout) as writer:
        writer.write("codes", arrays["codes"][:1])
    with pytest.raises(CheckpointError, match="is not in the layout"), TensorWriter(target, layout) as writer:
        writer.write("other", arrays["codes"])
    with pytest.raises(CheckpointError, match="was written already"), TensorWriter(target, layout) as writer:
        writer.write("codes", arrays["codes"])
        writer.write("codes", arrays["codes"])
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_survives_a_failed_write(tmp_path, rng):
    target = tmp_path / "m.safetensors"
    write(target, {"a": np.ones(3, np.float32)})
    with pytest.raises(RuntimeError), TensorWriter(target, {"a": (np.float32, (3,))}):
        raise RuntimeError
    np.testing.assert_array_equal(TensorFile(target).array("a"), np.ones(3))


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A limit on file size stands for the full disk: the space is claimed when the writer opens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        layout = {"big": (np.uint8, (1 << 20,))}
        with pytest.raises(CheckpointError, match="nothing was left behind"):
            TensorWriter(tmp_path / "m.safetensors", layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    class Filling(io.FileIO):
        """Takes the header and no more."""

        def write(self, data):
            if self.tell():
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(whole_file.os, "fdopen", lambda number, mode, buffering: Filling(number, mode))
    with (
        pytest.raises(CheckpointError, match="No space left"),
        TensorWriter(tmp_path / "m.safetensors", {"a": (np.uint8, (64,))}) as writer,
    ):
        writer.write("a", np.zeros(64, np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        TensorWriter(tmp_path / "no" / "m.safetensors", {"a": (np.uint8, (64,))})
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        TensorFile(tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        TensorFile(tmp_path)


def valid_file(tmp_path):
    path = tmp_path / "valid.safetensors"
    if not path.exists():
        save_file({"a": np.arange(6, dtype=np.float32), "b": np.arange(8, dtype=np.uint8)}, path)
    return path.read_bytes()


HOSTILE = {
    "empty": b"",
    "short": b"\x08\x00",
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "huge header": struct.pack("<Q", 1 << 62) + b"{}",
    "not JSON": struct.pack("<Q", 4) + b"{{{{",
    "an array": struct.pack("<Q", 2) + b"[]",
    "deep JSON": struct.pack("<Q", 200000) + b'{"a":' + b"[" * 199995,
}
HEADERS = {
    "beyond the data": {"a": {"dtype": "U8", "shape": [100], "data_offsets": [0, 100]}},
    "overlap": {
        "a": {"dtype": "U8", "shape": [6], "data_offsets": [0, 6]},
        "b": {"dtype": "U8", "shape": [6], "data_offsets": [2, 8]},
    },
    "negative": {"a": {"dtype": "U8", "shape": [-8], "data_offsets": [0, 8]}},
    "size differs": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    "backwards": {"a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 0]}},
    "overflow": {"a": {"dtype": "U8", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}},
    "no shape": {"a": {"dtype": "U8", "data_offsets": [0, 8]}},
    "unknown type": {"a": {"dtype": "X9", "shape": [8], "data_offsets": [0, 8]}},
    "a hole": {"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}},
}


@pytest.mark.parametrize("name", [*HOSTILE, *HEADERS])
def test_hostile_files_are_refused(name, tmp_path):
    data = HOSTILE.get(name)
    if data is None:
        header = json.dumps(HEADERS[name]).encode()
        data = struct.pack("<Q", len(header)) + header + bytes(8)
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        TensorFile(tmp_path / "x.safetensors")


def test_every_truncation_is_refused(tmp_path):
    data = valid_file(tmp_path)
    for length in range(len(data)):
        (tmp_path / "x.safetensors").write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            TensorFile(tmp_path / "x.safetensors")


@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_a_changed_byte_never_does_worse_than_an_error(tmp_path_factory, position, value):
    folder = tmp_path_factory.getbasetemp()
    data = bytearray(valid_file(folder))
    data[position % len(data)] = value
    path = folder / "changed.safetensors"
    path.write_bytes(bytes(data))
    try:
        file = TensorFile(path)
        for name in file.names():
            file.array(name).sum()
    except CheckpointError:
        pass


def test_an_unknown_tensor_is_named(tmp_path):
    write(tmp_path / "m.safetensors", {"a": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        TensorFile(tmp_path / "m.safetensors").array("b")
