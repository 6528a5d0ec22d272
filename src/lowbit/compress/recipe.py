"""What is done to a model before and while its matrices are rounded: `VIEW+FOLD+METHOD+REFINEMENT`.

Views (views.py) and folds (folds.py), any number of each, change the weights without changing the model's
function; the method rounds them; a refinement (refinements.py) gives a few rows more bits. Without a method
they are rounded to nearest: `awq` is `awq+rtn`. Each part may have options: `gptq:order=activation+mixllm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lowbit.compress.folds import FOLDS, Fold
from lowbit.compress.refinements import REFINEMENTS, Rows
from lowbit.compress.views import VIEWS, View
from lowbit.errors import RequestError
from lowbit.formats import Format
from lowbit.quantize.methods import Choice, Value, parse_method, parse_options, spelled
from lowbit.quantize.statistics import Statistics

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint
    from lowbit.model.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """A view, fold or refinement, and the options that differ from its defaults."""

    name: str
    options: dict[str, Value]

    def __str__(self) -> str:
        return spelled(self.name, self.options)


@dataclass(frozen=True)
class Recipe:
    """views: how the checkpoint is seen; folds: done to each layer then; method: how it is rounded;
    refinement: which rows have more bits.
    """

    views: tuple[Part, ...]
    folds: tuple[Part, ...]
    method: Choice
    refinement: Part | None = None

    @property
    def calibrated(self) -> bool:
        """Must text run through the model?"""
        return bool(self.folds) or self.refinement is not None or self.method.method.calibrated

    @property
    def plain(self) -> bool:
        """Rounding to nearest and nothing else: every tensor by itself, its layout known beforehand."""
        return not self.folds and self.refinement is None and self.method.name == "rtn"

    def __str__(self) -> str:
        last = () if self.refinement is None else (self.refinement,)
        return "+".join(map(str, (*self.views, *self.folds, self.method, *last)))

    def view(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint through the views, the first one first."""
        for part in self.views:
            checkpoint = VIEWS[part.name].apply(checkpoint, **part.options)
        return checkpoint

    def rows(
        self, checkpoint: Checkpoint, tokens: np.ndarray | None, formats: Mapping[str, Format | None]
    ) -> Rows:
        """Tensor name -> the rows that have more bits."""
        if self.refinement is None:
            return {}
        refinement = REFINEMENTS[self.refinement.name]
        return refinement.apply(checkpoint, tokens, formats, **self.refinement.options)

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
    *before, last = text.strip().split("+")
    refinement = None
    name, _, rest = last.partition(":")
    if name in REFINEMENTS:
        refinement = Part(name, parse_options(name, rest, REFINEMENTS[name].options()))
        *before, last = before or ["rtn"]
    changes: dict[str, View | Fold] = {**VIEWS, **FOLDS}
    if last.partition(":")[0] in changes:
        before, last = [*before, last], "rtn"
    views: list[Part] = []
    folds: list[Part] = []
    for number, part in enumerate(before):
        name, _, rest = part.partition(":")
        if name not in changes:
            raise RequestError(
                f"quantize: method {text[:80]!r}: {name[:60]!r} cannot stand before +; give "
                f"VIEW+FOLD+METHOD, views: {', '.join(VIEWS)}; folds: {', '.join(FOLDS)}"
            )
        if name in VIEWS and folds:
            raise RequestError(
                f"quantize: method {text[:80]!r}: {name} changes the whole model, so it comes first: "
                f"{'+'.join([part, *before[:number], *before[number + 1 :], last])}"
            )
        chosen = Part(name, parse_options(name, rest, changes[name].options()))
        (views if name in VIEWS else folds).append(chosen)
    choice = parse_method(last)
    if search is not None:
        choice = choice.searching(search)
    return Recipe(tuple(views), tuple(folds), choice, refinement)
