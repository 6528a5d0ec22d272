"""A directory that appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowbit.errors import CheckpointError
from lowbit.packed.whole_file import sync_folder

# A directory that holds one of them was written by lowbit and may be replaced.
MARKS = ("lowbit.json", "lowbit_export.json")


def check_target(target: Path, force: bool) -> None:
    """Raise CheckpointError if `target` exists and may not be replaced."""
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and not target.is_symlink():
        if not any(target.iterdir()):
            return
        if force and _is_ours(target):
            return
    remedy = "choose another name or remove it"
    if target.is_dir() and _is_ours(target):
        remedy = "give force=True (--force) to replace this lowbit model, or choose another name"
    raise CheckpointError(f"write {target}: it exists already; {remedy}")


def _is_ours(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


@contextmanager
def atomic_directory(target: Path, force: bool = False) -> Iterator[Path]:
    """Give an empty temporary directory beside `target`, renamed to it when the block ends well.

    Any error removes the temporary directory and leaves `target` as it was. `force` replaces a model that
    lowbit wrote. OSError (disk full, no permission) becomes CheckpointError.
    """
    check_target(target, force)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        os.chmod(temporary, 0o755)
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        sync_folder(temporary)
        _replace(temporary, target, force)
        temporary = None
    except OSError as error:
        raise CheckpointError(
            f"write {target}: {error.strerror or error}; nothing was left behind; free space or choose "
            "another folder"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, target: Path, force: bool) -> None:
    """Rename over nothing, an empty directory, or (with `force`) a lowbit model that is moved away first."""
    check_target(target, force)
    old: Path | None = None
    if target.exists() and any(target.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
