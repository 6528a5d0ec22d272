"""What is done to a model before and while its matrices are rounded: `FOLD+FOLD+METHOD:option=value`.

Each part but the last changes the weights without changing the model's function; the last rounds them. A fold
alone rounds to nearest: `awq` is `awq+rtn`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.errors import RequestError
from lowbit.quantize.methods import METHODS, Choice, parse_method


@dataclass(frozen=True)
class Recipe:
    """method: how matrices are rounded."""

    method: Choice

    @property
    def calibrated(self) -> bool:
        """Must text run through the model?"""
        return self.method.method.calibrated

    @property
    def plain(self) -> bool:
        """Rounding to nearest and nothing else: every tensor by itself, its layout known beforehand."""
        return self.method.name == "rtn"

    def __str__(self) -> str:
        return str(self.method)


def parse_recipe(text: str, search: str | None = None) -> Recipe:
    """The recipe that `text` names; `search` becomes an option of the method if it has one and none is given.

    Raises RequestError for parts and options that are unknown.
    """
    *folds, last = text.strip().split("+")
    if folds:
        raise RequestError(
            f"quantize: {folds[0][:60]!r} cannot stand before +; methods: {', '.join(METHODS)}"
        )
    choice = parse_method(last)
    return Recipe(choice if search is None else choice.searching(search))
