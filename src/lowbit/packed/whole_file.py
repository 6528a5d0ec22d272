"""A file that appears whole or not at all: written under a temporary name, its space claimed first."""

import os
from pathlib import Path
from typing import NoReturn

from lowbit.errors import CheckpointError


class WholeFile:
    """Room for `nbytes` bytes that become `path` with `commit`.

    Whatever fails raises CheckpointError, after `discard`: nothing half-written stays, and what was at `path`
    is as it was.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self._temporary: str | None = None
        try:
            import tempfile  # a megabyte of modules that reading a model does not need

            descriptor, self._temporary = tempfile.mkstemp(
                prefix=f".{path.name}.", suffix=".partial", dir=path.parent
            )
            self._file = os.fdopen(descriptor, "wb", buffering=0)
        except OSError as error:
            self._fail(error)
        try:
            _reserve(self._file.fileno(), nbytes)
        except OSError as error:
            self.discard()
            self._fail(error)

    def write(self, data: memoryview, offset: int | None = None) -> None:
        """All of `data`, at `offset` or behind what was written last."""
        try:
            if offset is not None:
                self._file.seek(offset)
            while data.nbytes:
                data = data[self._file.write(data) :]
        except OSError as error:
            self.discard()
            self._fail(error)

    def tell(self) -> int:
        return self._file.tell()

    def commit(self) -> None:
        """Everything is written: give the file its name, for good."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            assert self._temporary is not None
            os.chmod(self._temporary, 0o666 & ~_umask())
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            self.discard()
            self._fail(error)

    def discard(self) -> None:
        self._file.close()
        if self._temporary is not None and os.path.exists(self._temporary):
            os.unlink(self._temporary)

    def _fail(self, error: OSError) -> NoReturn:
        raise CheckpointError(
            f"write {self.path}: {error.strerror or error} (the file needs {self.nbytes} bytes); "
            "nothing was left behind; free space or choose another folder"
        ) from error


def _reserve(descriptor: int, nbytes: int) -> None:
    """Claim the space now, so that a full disk is noticed before hours of work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        os.ftruncate(descriptor, nbytes)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
