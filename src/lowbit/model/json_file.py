"""Read a JSON file from a stranger: of bounded size and depth, an object at the top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError

MAX_JSON_BYTES = 1 << 26


def read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in `path`; `missing` when there is no such file and it is given.

    Raises CheckpointError for a file that is absent, too large, not JSON, too deep or no object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"open {path}: {size} bytes, {MAX_JSON_BYTES} are allowed; the file is damaged"
            )
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if missing is not None:
            return missing
        raise CheckpointError(f"open {path}: there is no such file; the directory is incomplete") from error
    except OSError as error:
        raise CheckpointError(f"open {path}: {error.strerror or error}; check the path") from error
    except RecursionError as error:
        raise CheckpointError(f"open {path}: nested too deeply; the file is damaged or hostile") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of too many digits
        raise CheckpointError(f"open {path}: not JSON ({str(error)[:200]}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"open {path}: holds a {type(value).__name__}, not an object; fetch it again")
    return value
