"""What the values of a model look like on calibration data: onnxc runs it with them as outputs, a portion at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from ...compiler.driver import compile_model
from ...compiler.options import Options
from .data import Samples
from .model import Draft
from .ranges import Histogram
from .settings import QuantizationError, Settings

Array = NDArray[Any]
PORTION = 256 << 20
"""Bytes of values that one run may give, if a sample alone gives no more."""
MOST_AT_ONCE = 64


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


def calibrate(
    draft: Draft, channels: Mapping[str, int | None], samples: Samples, settings: Settings
) -> dict[str, Statistics]:
    """Statistics of values by name, with means along an axis for those that have one in `channels`.

    The model is compiled with these values as outputs, and runs once on each portion of the samples; nothing of a
    portion is kept. Raises QuantizationError for values that are not finite, and where there are no samples.
    """
    found = {name: Statistics(axis=axis) for name, axis in channels.items()}
    inputs = {port.name for port in samples.ports}
    shown = [name for name in channels if name not in inputs]
    settings.progress("compiling", 0, None)
    # Who watches the passes gets them run: a model that is needed once does not go into the cache.
    options = Options(threads=settings.threads, folder=draft.folder, after=lambda *_: None)
    run = compile_model(with_outputs(draft.proto, shown), options).run
    for feed in samples:
        values = run(feed) if shown else {}
        for name, statistics in found.items():
            array = feed[name] if name in inputs else values[name]
            statistics.add(np.asarray(array, np.float32))
            if not _finite(array):
                raise QuantizationError(
                    f'the value "{name}" of the node "{_definer(draft, name)}" has NaN in it on sample {samples.taken}'
                    ": check the data, or keep the nodes that read it in float (--keep)"
                )
        if settings.batch is None and samples.batch == 1 and samples.taken == 1:
            size = sum(np.asarray(array).nbytes for array in values.values())
            samples.batch = max(1, min(MOST_AT_ONCE, PORTION // max(size, 1)))
        settings.progress("calibrating", samples.taken, samples.total)
    if not samples.taken:
        raise QuantizationError("the data holds no sample: ranges cannot be estimated without any")
    return found


def _finite(array: Any) -> bool:
    """Infinities are left out of ranges; NaN has none."""
    return not bool(np.isnan(np.sum(np.asarray(array), dtype=np.float64))) or not bool(np.isnan(array).any())


def _definer(draft: Draft, name: str) -> str:
    node = draft.definers().get(name)
    return name if node is None else node.name


def with_outputs(proto: ModelProto, names: list[str]) -> ModelProto:
    """The model with these values as its only outputs."""
    model = ModelProto()
    model.CopyFrom(proto)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return model


def merged(parts: list[Statistics]) -> Statistics:
    """The statistics of several values taken as one; channels of the first."""
    histogram = parts[0].histogram
    for part in parts[1:]:
        histogram = histogram.merge(part.histogram)
    return replace(parts[0], histogram=histogram)


__all__ = ["Statistics", "calibrate", "merged"]
