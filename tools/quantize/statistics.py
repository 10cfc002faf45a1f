"""What is known of a value from calibration data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ranges import Histogram

Array = NDArray[Any]


@dataclass
class Statistics:
    """Of one value: the histogram of its elements, for each channel their sum, their squares' and the largest size."""

    histogram: Histogram = field(default_factory=Histogram)
    axis: int | None = None
    sums: Array | None = None
    squares: Array | None = None
    largest: Array | None = None
    count: int = 0

    def add(self, array: Array) -> None:
        self.histogram.add(array)
        if self.axis is not None and array.ndim and array.size:
            others = tuple(axis for axis in range(array.ndim) if axis != self.axis % array.ndim)
            sums, squares = array.sum(others, dtype=np.float64), np.square(array).sum(others, dtype=np.float64)
            self.sums = sums if self.sums is None else self.sums + sums
            self.squares = squares if self.squares is None else self.squares + squares
            largest = np.maximum(array.max(others), -array.min(others))
            self.largest = largest if self.largest is None else np.maximum(self.largest, largest)
            self.count += array.size // len(sums)

    @property
    def means(self) -> Array | None:
        """The mean of each channel; None where channels are not looked at."""
        return None if self.sums is None else self.sums / self.count


def merged(parts: list[Statistics]) -> Statistics:
    """The statistics of several values taken as one; channels of the first."""
    histogram = parts[0].histogram
    for part in parts[1:]:
        histogram = histogram.merge(part.histogram)
    return replace(parts[0], histogram=histogram)


__all__ = ["Statistics", "merged"]
