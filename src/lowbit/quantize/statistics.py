"""What calibration knows of the inputs of one matrix."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowbit.errors import FormatError


@dataclass(frozen=True)
class Statistics:
    """Sums over all inputs x that a matrix saw.

    hessian: float32 [in_features, in_features], the mean of x x^T
    largest: float32 [in_features], the largest |x| of each channel
    tokens: how many inputs were seen
    """

    hessian: np.ndarray
    largest: np.ndarray
    tokens: int
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once: matrices that read the same input share what follows from it."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def checked(self, in_features: int, what: str) -> "Statistics":
        """Itself, or FormatError if shapes do not fit a weight of `in_features` or a value is not finite."""
        for name, array, shape in (
            ("hessian", self.hessian, (in_features, in_features)),
            ("largest", self.largest, (in_features,)),
        ):
            if array.shape != shape:
                raise FormatError(f"{what}: {name} is {list(array.shape)}; the weight needs {list(shape)}")
            if not np.isfinite(array).all():
                raise FormatError(f"{what}: {name} is not finite; calibrate again, on a model in float32")
        return self

    def divided(self, factors: np.ndarray | None) -> "Statistics":
        """Those of the inputs divided by `factors`, float32 [in_features]; None: itself."""
        if factors is None:
            return self
        return Statistics(
            self.hessian / np.multiply.outer(factors, factors), self.largest / factors, self.tokens
        )

    @property
    def magnitudes(self) -> np.ndarray:
        """float32 [in_features]: root mean square of each channel."""
        return np.sqrt(np.maximum(np.diag(self.hessian), 0))
