"""Did the calibration text reach every expert?

The statistics of an expert come from the tokens that its router sends to it. Where these are too few, they
say little about what it will read, so the expert is rounded by its weights alone, or the run ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowbit.errors import RequestError

if TYPE_CHECKING:
    from lowbit.model.config import ModelConfig
    from lowbit.quantize.statistics import Statistics

EXPERT_TOKENS = 128  # with the usual 65,536 tokens and 8 of 128 experts, one expert sees 4,096 on average
FEW = ("weights", "error")
_EXPERT = re.compile(r"(?:model\.layers\.(\d+)\.)?mlp\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Coverage:
    """tokens: how many an expert must see.

    few: what happens to one that sees fewer, "weights": it is rounded by its weights alone; "error":
        RequestError names it
    """

    tokens: int = EXPERT_TOKENS
    few: str = "weights"

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.few not in FEW:
            raise RequestError(
                f"quantize: expert_tokens={self.tokens}, few_tokens={self.few!r}; give a number from 0 on, "
                f"and one of {', '.join(FEW)}"
            )

    def check(
        self, config: ModelConfig, layer: int, statistics: dict[str, Statistics]
    ) -> tuple[dict[str, Statistics], dict[int, int]]:
        """Statistics without those of experts that saw too few tokens, and the tokens of every expert."""
        counts = expert_counts(config, layer, statistics)
        few = {expert: count for expert, count in counts.items() if count < self.tokens}
        if few and self.few == "error":
            named = ", ".join(f"expert {expert} ({count})" for expert, count in list(few.items())[:8])
            raise RequestError(
                f"quantize: layer {layer}: {len(few)} of {len(counts)} experts saw fewer than {self.tokens} "
                f"tokens of the calibration text: {named}; give more text, or let them be rounded by their "
                "weights alone (few_tokens='weights')"
            )
        kept = {name: seen for name, seen in statistics.items() if expert_of(name)[1] not in few}
        return kept, counts


USUAL = Coverage()


def expert_counts(config: ModelConfig, layer: int, statistics: Mapping[str, Statistics]) -> dict[int, int]:
    """How many tokens came to each expert of a layer; nothing for a layer without."""
    if not config.sparse(layer):
        return {}
    names = {expert: f"mlp.experts.{expert}.gate_proj" for expert in range(config.n_experts)}
    return {e: statistics[name].tokens if name in statistics else 0 for e, name in names.items()}


def expert_of(name: str) -> tuple[int | None, int | None]:
    """(layer, expert) of a tensor or matrix name; None where it has none."""
    found = _EXPERT.match(name)
    if found is None:
        return None, None
    return None if found[1] is None else int(found[1]), int(found[2])


def summary(layers: Iterable[Mapping[str, Any]], limit: int) -> dict[str, Any] | None:
    """Of the reports of all matrices, {"limit", "tokens": {layer: [of each expert]}, "few": [{"layer",
    "expert", "tokens"}]}; None where no expert was counted.
    """
    tokens: dict[int, dict[int, int]] = {}
    for report in layers:
        layer, expert = expert_of(report["name"])
        if layer is not None and expert is not None and "tokens" in report:
            tokens.setdefault(layer, {})[expert] = report["tokens"]
    if not tokens:
        return None
    few = [
        {"layer": layer, "expert": expert, "tokens": count}
        for layer, counts in sorted(tokens.items())
        for expert, count in sorted(counts.items())
        if count < limit
    ]
    table = {str(layer): [counts[e] for e in sorted(counts)] for layer, counts in sorted(tokens.items())}
    return {"limit": limit, "tokens": table, "few": few}
