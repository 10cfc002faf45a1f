"""What the values of a model look like on calibration data: onnxc runs it with them as outputs, a portion at a time."""

from __future__ import annotations

from collections.abc import Mapping

from .data import Samples
from .graph import GraphDraft
from .model import Draft
from .observe import Observed
from .settings import QuantizationError, Settings
from .statistics import Statistics

PORTION = 256 << 20
"""Bytes of values that one run may give, if a sample alone gives no more."""
MOST_AT_ONCE = 64


def calibrate(
    draft: Draft, wanted: Mapping[GraphDraft, Mapping[str, int | None]], samples: Samples, settings: Settings
) -> dict[GraphDraft, dict[str, Statistics]]:
    """Statistics of values by name, with means along an axis for those that have one, in each of the model's graphs.

    The model is compiled with these values as outputs, and runs once on each portion of the samples; nothing of a
    portion is kept. A graph inside a node runs by itself whenever the node would run it. Raises QuantizationError for
    values that are not finite, and where there are no samples.
    """
    settings.progress("compiling", 0, None)
    run = Observed(draft, wanted, settings, draft.folder)
    for feed in samples:
        size = run(feed, samples.taken)
        if settings.batch is None and samples.batch == 1 and samples.taken == 1:
            samples.batch = max(1, min(MOST_AT_ONCE, PORTION // max(size, 1)))
        settings.progress("calibrating", samples.taken, samples.total)
    if not samples.taken:
        raise QuantizationError("the data holds no sample: ranges cannot be estimated without any")
    return run.statistics()


__all__ = ["calibrate"]
