"""What a number is: formats, their levels, rounding to them, and schemes that assign them to tensors.

Names are resolved on first use: running a model needs no catalogue, and it takes two megabytes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.formats.catalogue import DESCRIPTIONS, FORMATS
    from lowbit.formats.emulation import emulate
    from lowbit.formats.format import Format
    from lowbit.formats.parse import parse_format
    from lowbit.formats.scheme import Scheme

__all__ = ["DESCRIPTIONS", "FORMATS", "Format", "Scheme", "emulate", "parse_format"]

_HOME = {
    "DESCRIPTIONS": "catalogue",
    "FORMATS": "catalogue",
    "Format": "format",
    "Scheme": "scheme",
    "emulate": "emulation",
    "parse_format": "parse",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit.formats' has no attribute {name!r}")
    return getattr(import_module(f"lowbit.formats.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
