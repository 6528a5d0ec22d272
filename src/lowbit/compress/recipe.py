"""What is done to a model before and while its matrices are rounded: `FOLD+FOLD+METHOD:option=value`.

Each part but the last changes the weights without changing the model's function (folds.py); the last rounds
them. A fold at the end rounds to nearest: `awq` is `awq+rtn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lowbit.compress.folds import FOLDS
from lowbit.errors import RequestError
from lowbit.formats import Format
from lowbit.quantize.methods import METHODS, Choice, Value, parse_method, parse_options, spelled
from lowbit.quantize.statistics import Statistics

if TYPE_CHECKING:
    from lowbit.model.config import ModelConfig


@dataclass(frozen=True)
class FoldChoice:
    """A fold and the options that differ from its defaults."""

    name: str
    options: dict[str, Value]

    def __str__(self) -> str:
        return spelled(self.name, self.options)


@dataclass(frozen=True)
class Recipe:
    """folds: in the order in which they are applied; method: how matrices are rounded then."""

    folds: tuple[FoldChoice, ...]
    method: Choice

    @property
    def calibrated(self) -> bool:
        """Must text run through the model?"""
        return bool(self.folds) or self.method.method.calibrated

    @property
    def plain(self) -> bool:
        """Rounding to nearest and nothing else: every tensor by itself, its layout known beforehand."""
        return not self.folds and self.method.name == "rtn"

    def __str__(self) -> str:
        return "+".join(map(str, (*self.folds, self.method)))

    def fold(
        self,
        config: ModelConfig,
        weights: dict[str, np.ndarray],
        statistics: dict[str, Statistics],
        formats: Mapping[str, Format],
    ) -> dict[str, Statistics]:
        """Apply the folds to the weights of one layer, in place; returns what its inputs have become."""
        for choice in self.folds:
            found = FOLDS[choice.name].apply(config, weights, statistics, formats, **choice.options)
            statistics = {name: seen.divided(found.get(name)) for name, seen in statistics.items()}
        return statistics


def parse_recipe(text: str, search: str | None = None) -> Recipe:
    """The recipe that `text` names; `search` becomes an option of the method if it has one and none is given.

    Raises RequestError for parts and options that are unknown.
    """
    *folds, last = text.strip().split("+")
    if last.partition(":")[0] in FOLDS:
        folds, last = [*folds, last], "rtn"
    choice = parse_method(last) if last else None
    if choice is None or any(part.partition(":")[0] not in FOLDS for part in folds):
        raise RequestError(
            f"quantize: method {text[:80]!r}: give FOLD+FOLD+METHOD; folds: {', '.join(FOLDS)}; "
            f"methods: {', '.join(METHODS)}"
        )
    chosen = []
    for part in folds:
        name, _, rest = part.partition(":")
        chosen.append(FoldChoice(name, parse_options(name, rest, FOLDS[name].options())))
    return Recipe(tuple(chosen), choice if search is None else choice.searching(search))
