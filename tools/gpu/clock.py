"""Time on the GPU, by CUDA events; what is compared is timed in rounds that alternate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...backends.cuda.runtime.driver import Device, Stream

Function = Callable[[], Any]
"""Queues work on the GPU."""
MOST = 1000
"""Calls of a function in a round."""


@dataclass(frozen=True)
class Times:
    """Seconds of one run: the median of all rounds, the least and the most."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Times:
        return Times(statistics.median(seconds), min(seconds), max(seconds))

    def per(self, repeats: int) -> Times:
        """Of what is done so often in one run."""
        return Times(self.median / repeats, self.least / repeats, self.most / repeats)

    def figures(self) -> dict[str, float]:
        """For the report, in microseconds."""
        named = {"median_us": self.median, "least_us": self.least, "most_us": self.most}
        return {name: round(seconds * 1e6, 3) for name, seconds in named.items()}


class Clock:
    """CUDA events around work of the default stream, with which all streams are in order that libraries use."""

    def __init__(self, device: Device) -> None:
        self._device = device
        with device:
            self._begin, self._end = device.driver.Event(), device.driver.Event()

    def seconds(self, function: Function, repeats: int, stream: Stream | None = None) -> float:
        """Of one call on average; `stream` is the only one that the function queues work at."""
        queue = stream.pycuda if stream is not None else None
        with self._device:
            self._device.driver.Context.synchronize()
            self._begin.record(queue)
        for _ in range(repeats):
            function()
        with self._device:
            self._end.record(queue)
            self._end.synchronize()
            milliseconds: float = self._end.time_since(self._begin)
        return max(milliseconds / 1e3 / repeats, 1e-9)

    def latency(self, function: Function) -> float:
        """Of one call by the host's clock, until the GPU has done it."""
        with self._device:
            self._device.driver.Context.synchronize()
            start = time.perf_counter()
            function()
            self._device.driver.Context.synchronize()
            return time.perf_counter() - start


def interleaved(
    clock: Clock, functions: Mapping[str, tuple[Function, Stream | None]], rounds: int, seconds: float
) -> dict[str, Times]:
    """The time of each function, which queues work at its stream: rounds of all of them alternate, so that all see the
    same clocks of the GPU; in each a function runs for about `seconds`, once at least."""
    repeats = {}
    for name, (function, stream) in functions.items():
        clock.seconds(function, 1, stream)
        once = clock.seconds(function, 1, stream)
        # The first calls are slow: a few more tell better.
        once = clock.seconds(function, max(1, min(10, int(seconds / once))), stream)
        repeats[name] = max(1, min(MOST, int(seconds / once)))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, (function, stream) in functions.items():
            found[name].append(clock.seconds(function, repeats[name], stream))
    return {name: Times.of(times) for name, times in found.items()}
