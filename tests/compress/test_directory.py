"""A directory appears whole or not at all."""

import pytest

from lowbit.compress.directory import atomic_directory
from lowbit.errors import CheckpointError


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_it_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "model"
    with atomic_directory(target) as folder:
        (folder / "lowbit.json").write_text("{}")
        assert not target.exists()
    assert names(target) == ["lowbit.json"]
    assert names(target.parent) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_leaves_nothing(tmp_path, error):
    expected = CheckpointError if error is OSError else error
    with pytest.raises(expected), atomic_directory(tmp_path / "model") as folder:
        (folder / "half").write_text("half")
        raise error(28, "No space left on device")
    assert names(tmp_path) == []


def test_what_is_there_stays(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "precious").write_text("precious")
    for force in (False, True):
        with (
            pytest.raises(CheckpointError, match="it exists already; choose another name"),
            atomic_directory(target, force),
        ):
            raise AssertionError("never entered")
    assert names(tmp_path) == ["model"] and names(target) == ["precious"]
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(file, force=True):
        pass
    assert file.read_text() == "x"


def test_a_lowbit_model_is_replaced_with_force_only(tmp_path):
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        (folder / "lowbit.json").write_text("old")
    with pytest.raises(CheckpointError, match="force"), atomic_directory(target):
        pass
    with pytest.raises(RuntimeError), atomic_directory(target, force=True):
        raise RuntimeError
    assert (target / "lowbit.json").read_text() == "old"
    with atomic_directory(target, force=True) as folder:
        (folder / "lowbit.json").write_text("new")
    assert (target / "lowbit.json").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "model").mkdir()
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "lowbit.json").write_text("x")
    assert names(tmp_path / "model") == ["lowbit.json"]
