"""Wall-clock time, shared out among the parts of the check."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

PARTS = {"operators": 0.28, "models": 0.48, "speed": 0.74, "whole": 0.97}
"""The parts in order, and by which share of all time each must be done; time that one leaves is the next one's."""


@dataclass(frozen=True)
class Deadline:
    """A moment, by a clock that counts seconds."""

    at: float
    clock: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        """Seconds until then; 0 from then on."""
        return max(0.0, self.at - self.clock())

    def fits(self, seconds: float) -> bool:
        """Whether what takes so long will be done by then."""
        return self.left > seconds


@dataclass(frozen=True)
class Budget:
    """All of the time that there is, from `start` on."""

    minutes: float
    start: float
    clock: Callable[[], float] = time.monotonic

    @staticmethod
    def of(minutes: float, clock: Callable[[], float] = time.monotonic) -> Budget:
        return Budget(minutes, clock(), clock)

    def part(self, name: str) -> Deadline:
        """When a part has to be done."""
        return Deadline(self.start + 60 * self.minutes * PARTS[name], self.clock)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start

    @property
    def left(self) -> float:
        """Seconds until all of it must be done."""
        return max(0.0, 60 * self.minutes - self.seconds)
