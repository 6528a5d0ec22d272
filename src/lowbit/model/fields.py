"""Typed, checked reading of the fields of a configuration file.

A configuration is data from strangers: every field is checked for its type and range here, once, so
that the rest of the package works with numbers that it can trust.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from lowbit.errors import CheckpointError


class Fields:
    """The fields of one JSON object, with the defaults of its family, and a record of which were read.

    A field that is present is taken as it is, also when it is null; null then means "not given" to the
    readers below. `unread()` names what nobody asked for.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        defaults: Mapping[str, Any] | None = None,
        names: Mapping[str, str] | None = None,
    ):
        """names: what the file calls some of the keys that readers ask for; defaults use its names."""
        self.where = where
        self._names = names or {}
        self._given = values
        self._values = {**(defaults or {}), **values}
        self._read: set[str] = set()

    def key(self, key: str) -> str:
        """What the file calls `key`."""
        return self._names.get(key, key)

    def raw(self, key: str) -> Any:
        """The value of `key` as it is, None when absent."""
        key = self.key(key)
        self._read.add(key)
        return self._values.get(key)

    def ignore(self, keys: Iterable[str]) -> None:
        """Take keys of the file, under its own names, as read and absent."""
        for key in keys:
            self._read.add(key)
            self._values.pop(key, None)

    def unread(self) -> list[str]:
        """Keys that the file gives and that no reader asked for, in file order."""
        return [key for key in self._given if key not in self._read]

    def fail(
        self, key: str, received: Any, required: str, remedy: str = "repair the file"
    ) -> CheckpointError:
        shown = reprlib.repr(received)  # short, whatever the file holds
        return CheckpointError(f"{self.where}: {self.key(key)}={shown}, but it must be {required}; {remedy}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.raw(key)
        value = default if value is None else value
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # some writers store every number as a float
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.raw(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(key, value, f"a number from {low:g} to {high:g}")
        if not low <= value <= high:  # also where value is NaN
            raise self.fail(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        value = self.raw(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.raw(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.fail(key, value, "a string")
        return value

    def items(self, key: str, kind: type, limit: int) -> list | None:
        """A list of at most `limit` values of one type, or None when not given."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > limit or any(type(item) is not kind for item in value):
            raise self.fail(key, value, f"a list of at most {limit} values of type {kind.__name__}")
        return value

    def ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids from an integer, a list of integers or null."""
        value = self.raw(key)
        if value is None:
            return ()
        listed = value if isinstance(value, list) else [value]
        if len(listed) > 4096 or any(type(item) is not int or not 0 <= item < vocab_size for item in listed):
            raise self.fail(key, value, f"a token id below vocab_size={vocab_size}, or a list of them")
        return tuple(dict.fromkeys(listed))
