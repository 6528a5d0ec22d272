"""What an export would change: how many weights, and how far. Refused unless the user allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from lowbit.errors import UnsupportedError

SAMPLE_WEIGHTS = 1 << 20  # of a matrix, on which its loss is measured


class Loss:
    """The difference between a matrix and what is stored of it, on a sample of its rows."""

    def __init__(self, weights: int):
        self._share = min(1.0, SAMPLE_WEIGHTS / weights)
        self._counted = self._changed = 0
        self._error = self._square = 0.0

    def sample(self, rows: int, columns: int) -> int:
        """How many of the first rows of a part are to be measured; whole blocks of 32."""
        wanted = -(-int(rows * self._share) // 32) * 32
        return min(rows, max(32, wanted))

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """float32 arrays of one shape."""
        rest = after - before
        self._counted += before.size
        self._changed += int(np.count_nonzero(rest))
        self._error += float(np.vdot(rest, rest))
        self._square += float(np.vdot(before, before))

    @property
    def changed(self) -> float:
        """Share of the weights that become other numbers."""
        return self._changed / self._counted if self._counted else 0.0

    @property
    def relative_error(self) -> float:
        """Root of squared error over squared weights."""
        return (self._error / self._square) ** 0.5 if self._square else 0.0

    def report(self) -> dict[str, Any]:
        if not self._counted:
            return {}
        return {"changed": self.changed, "relative_error": self.relative_error}


def refuse(target: str, lost: Sequence[tuple[str, str, str, Loss]], keeping: str | None) -> NoReturn:
    """Raise UnsupportedError that says what would be lost.

    lost: (tensor, how it is stored, what it would become, its loss) of each.
    keeping: a target that keeps what is stored where it can, None: there is no other
    """
    pairs: dict[tuple[str, str], list[tuple[str, Loss]]] = {}
    for name, stored, becomes, loss in lost:
        pairs.setdefault((stored, becomes), []).append((name, loss))
    parts = []
    for (stored, becomes), found in pairs.items():
        name, worst = max(found, key=lambda item: item[1].relative_error)
        changed = sum(loss.changed for _, loss in found) / len(found)
        matrices = f"{len(found)} matrices" if len(found) > 1 else name
        parts.append(
            f"{matrices} of {stored} would be rounded to {becomes}: {changed:.1%} of the weights change, "
            f"relative error up to {worst.relative_error:.2g} ({name})"
        )
    other = f"take {keeping}, which keeps what it can hold" if keeping else "take another target"
    raise UnsupportedError(
        f"export to {target}: not everything can be stored exactly. {'; '.join(parts)}. Give --lossy to "
        f"accept that, or {other}"
    )
