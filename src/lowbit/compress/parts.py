"""The finished parts of a run that can be interrupted: one file for each layer, beside the output.

A killed run leaves them; the same command finds them and goes on where it ended, and because every part is a
function of the request alone, what comes out is what an uninterrupted run would have written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError
from lowbit.packed import PackedMatrix, TensorFile, TensorWriter

Tensors = Mapping[str, PackedMatrix | np.ndarray]


class Parts:
    """The folder `.NAME.unfinished` beside the output NAME; use it in a `with` block, which locks it.

    request: everything that the result depends on, as JSON. A folder of another request is an error that says
        what differs, or is thrown away with `restart`.
    """

    def __init__(self, target: Path, request: dict[str, Any], restart: bool = False):
        self.folder = target.parent / f".{target.name}.unfinished"
        self._target, self._restart = target, restart
        self._request = json.loads(json.dumps(request))
        self._lock: int | None = None

    def __enter__(self) -> Parts:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise self._failure(error) from error
        try:
            self._open()
        except BaseException:
            os.close(self._lock)
            self._lock = None
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
        if not any(self.folder.glob("*.safetensors")):  # nothing that would be missed
            shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self) -> None:
        self._take_lock()
        known = self.folder / "request.json"
        if known.is_file() and not self._restart:
            self._compare(_json(known))
        else:
            for file in self.folder.iterdir():
                file.unlink()
            try:
                partial = self.folder / "request.json.partial"
                partial.write_text(json.dumps(self._request, indent=1), encoding="utf-8")
                os.replace(partial, known)
            except OSError as error:
                raise self._failure(error) from error

    def finished(self, part: str) -> bool:
        return self._path(part).is_file()

    def write(self, part: str, tensors: Tensors, report: dict[str, Any]) -> None:
        """Store a part at once or not at all. report: JSON by tensor name, kept with it."""
        arrays: dict[str, np.ndarray] = {}
        metas: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, PackedMatrix):
                metas[name], stored = tensor.state()
                arrays.update({f"{name}.{entry}": array for entry, array in stored.items()})
            else:
                arrays[name] = tensor
        layout = {name: (array.dtype.type, array.shape) for name, array in arrays.items()}
        text = json.dumps(
            {"tensors": metas, "report": report, "plain": [n for n in tensors if n not in metas]}
        )
        with TensorWriter(self._path(part), layout, {"part": text}) as writer:
            for name, array in arrays.items():
                writer.write(name, array)

    def read(self, part: str) -> tuple[dict[str, PackedMatrix | np.ndarray], dict[str, Any]]:
        """What `write` stored; arrays are mapped, not copied."""
        file = TensorFile(self._path(part))
        known = json.loads(file.metadata["part"])
        tensors: dict[str, PackedMatrix | np.ndarray] = {name: file.array(name) for name in known["plain"]}
        for name, meta in known["tensors"].items():
            prefix = f"{name}."
            arrays = {n[len(prefix) :]: file.array(n) for n in file.names() if n.startswith(prefix)}
            tensors[name] = PackedMatrix.from_state(meta, arrays)
        return tensors, known["report"]

    def discard(self) -> None:
        """Remove the folder: the output is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # a system without: two runs to one output are the user's to avoid
            return
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"quantize: another process is writing {self._target}; wait for it or choose another name"
            ) from None

    def _compare(self, known: Any) -> None:
        if known == self._request:
            return
        keys = {*self._request, *(known if isinstance(known, dict) else {})}
        changed = [
            k for k in sorted(keys) if not isinstance(known, dict) or known.get(k) != self._request.get(k)
        ]
        raise CheckpointError(
            f"quantize: {self.folder} holds an unfinished run with another {', '.join(changed)}; give "
            "the same arguments to finish it, or restart=True (--restart) to throw it away"
        )

    def _failure(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"write {self.folder}: {error.strerror or error}; free space or choose another folder"
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
