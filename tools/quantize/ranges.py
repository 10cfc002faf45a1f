"""Ranges of values: histograms that grow with what they are shown, and four ways to choose a range from one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .settings import Settings

Array = NDArray[Any]
BINS: Final = 8192
CHUNK: Final = 1 << 20
"""Elements that are sorted into bins at once: their indices stay in the cache."""
SMALLEST: Final = -100
"""Exponent below which bins are not made narrower: f32 has no larger factors."""
SHRINKS: Final = np.linspace(1.0, 0.2, 41)
"""Shares of the whole range that are tried as a range."""
ROUNDS: Final = 2
KL_BINS: Final = 2048
KL_STEP: Final = 16
KL_COUNT: Final = 8
"""Values in a bin, on average, from which on their distribution can be told."""


class Histogram:
    """How often values occur: bins of one width around zero, over [-2^exponent, 2^exponent).

    A value beyond them makes all bins twice as wide, which adds up pairs of them: one pass over the values, in bounded
    memory and the same result in whatever portions they come (after PyTorch's HistogramObserver). At least a quarter
    of the bins are between zero and the largest value. Infinities and NaN are left out.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.exponent: int | None = None
        self.low, self.high = math.inf, -math.inf

    def add(self, values: Array) -> None:
        """Takes in an array of any shape."""
        flat = values.reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            flat = flat[np.isfinite(flat)]
            if not flat.size:
                return
            low, high = float(flat.min()), float(flat.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        if largest > 0 and (self.exponent is None or largest >= 2.0**self.exponent):
            self._widen(max(math.frexp(largest)[1], SMALLEST))
        if self.exponent is None:  # nothing but zeros until now
            self.counts[BINS // 2] += flat.size
            return
        scale = np.float32(BINS / 2 / 2.0**self.exponent) if self.exponent < 100 else BINS / 2 / 2.0**self.exponent
        for start in range(0, flat.size, CHUNK):
            place = np.floor(flat[start : start + CHUNK] * scale).astype(np.int32) + BINS // 2
            self.counts += np.bincount(np.clip(place, 0, BINS - 1), minlength=BINS)

    def _widen(self, exponent: int) -> None:
        """Bins up to 2^exponent."""
        times = 0 if self.exponent is None else exponent - self.exponent
        for _ in range(min(times, BINS.bit_length())):
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.zeros(BINS, np.int64)
            self.counts[BINS // 4 : 3 * BINS // 4] = pairs
        self.exponent = exponent

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of the values of both."""
        result = Histogram()
        result.low, result.high = min(self.low, other.low), max(self.high, other.high)
        known = [one.exponent for one in (self, other) if one.exponent is not None]
        for one in (self, other):
            part = Histogram()
            part.counts, part.exponent = one.counts.copy(), one.exponent
            if known and part.exponent is not None:
                part._widen(max(known))
            result.counts = result.counts + part.counts
        result.exponent = max(known) if known else None
        return result

    @property
    def seen(self) -> bool:
        return self.low <= self.high

    def points(self) -> tuple[Array, Array]:
        """The centres of the bins that are not empty, within the smallest and largest value, and their counts."""
        width = 2.0 ** (self.exponent or 0) / (BINS / 2)
        filled = np.flatnonzero(self.counts)
        centres = (filled - BINS // 2 + 0.5) * width
        return np.clip(centres, self.low, self.high), self.counts[filled]


@dataclass(frozen=True)
class Grid:
    """The values that an 8-bit integer stands for: scale * (q - zero), q from `least` to `most`."""

    scale: np.float32
    zero: int
    least: int
    most: int

    @property
    def low(self) -> float:
        return float(self.scale) * (self.least - self.zero)

    @property
    def high(self) -> float:
        return float(self.scale) * (self.most - self.zero)

    @property
    def dtype(self) -> type[np.integer[Any]]:
        return np.uint8 if self.least == 0 else np.int8

    def rounded(self, values: Array) -> Array:
        """Values as they are after quantising and dequantising."""
        q = np.clip(np.rint(values / float(self.scale)) + self.zero, self.least, self.most)
        return np.asarray((q - self.zero) * float(self.scale))


def grid_of(low: float, high: float, settings: Settings) -> Grid:
    """The grid that covers [low, high] and zero, which is one of its points."""
    least, most = (0, 255) if settings.activations == "u8" else (-128, 127)
    low, high = min(low, 0.0), max(high, 0.0)
    if settings.symmetric:
        zero, extent = (least + most + 1) // 2, max(-low, high) / 127
    else:
        zero, extent = 0, (high - low) / 255
    scale = np.float32(extent)
    if not (np.isfinite(scale) and scale >= np.finfo(np.float32).tiny):  # nothing but zeros, or next to nothing
        scale = np.float32(1)
    if not settings.symmetric:
        zero = int(np.clip(np.rint(least - low / float(scale)), least, most))
    return Grid(scale, zero, least, most)


def range_of(histogram: Histogram, settings: Settings) -> Grid:
    """The grid for values with this histogram, by the method of the settings."""
    if not histogram.seen:
        return grid_of(0.0, 0.0, settings)
    low, high = {"minmax": _all, "percentile": _percentile, "entropy": _entropy, "mse": _least_squares}[
        settings.method
    ](histogram, settings)
    return grid_of(max(low, histogram.low), min(high, histogram.high), settings)


def _all(histogram: Histogram, settings: Settings) -> tuple[float, float]:
    return histogram.low, histogram.high


def _percentile(histogram: Histogram, settings: Settings) -> tuple[float, float]:
    """Without the largest and the smallest values, of each the share that is beyond the percentile."""
    centres, counts = histogram.points()
    below = np.cumsum(counts)
    beyond = (1 - settings.percentile / 100) * below[-1]
    least = int(np.searchsorted(below, beyond, side="right"))
    most = int(np.searchsorted(below, below[-1] - beyond, side="left"))
    half = 2.0 ** (histogram.exponent or 0) / BINS
    return float(centres[min(least, len(centres) - 1)] - half), float(centres[min(most, len(centres) - 1)] + half)


def _least_squares(histogram: Histogram, settings: Settings) -> tuple[float, float]:
    """The range whose grid changes the values least in the mean of squares (Sung et al. 2015, "Resiliency of deep
    neural networks under quantization"; found end by end)."""
    centres, counts = histogram.points()

    def error(low: float, high: float) -> float:
        grid = grid_of(low, high, settings)
        return float(np.dot((grid.rounded(centres) - centres) ** 2, counts))

    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    best = min(SHRINKS, key=lambda share: error(low * share, high * share))
    found = low * best, high * best
    for _ in range(ROUNDS if low < 0 < high and not settings.symmetric else 0):
        found = found[0], high * min(SHRINKS, key=lambda share: error(found[0], high * share))
        found = low * min(SHRINKS, key=lambda share: error(low * share, found[1])), found[1]
    return found


def _entropy(histogram: Histogram, settings: Settings) -> tuple[float, float]:
    """The threshold for |x| that loses least information: the smallest Kullback-Leibler divergence between the values,
    those beyond the threshold at it, and their quantised form (Migacz 2017, "8-bit inference with TensorRT")."""
    two_sided = histogram.low < 0 or settings.symmetric
    levels = 128 if two_sided else 256
    folded = histogram.counts[BINS // 2 :] + histogram.counts[BINS // 2 - 1 :: -1]
    used = int(np.flatnonzero(folded)[-1]) + 1
    wanted = min(KL_BINS, int(folded.sum()) // KL_COUNT)
    if wanted < 2 * levels:  # too few values for a distribution
        return histogram.low, histogram.high
    group = -(-used // wanted)
    padded = np.concatenate([folded[:used], np.zeros(-used % group, np.int64)]).reshape(-1, group).sum(1).astype(float)
    padded[0] = padded[1] if len(padded) > 1 else padded[0]  # zeros are exact in any range
    total, best, bins = padded.sum(), math.inf, len(padded)
    for end in range(min(levels, bins), bins + 1, KL_STEP if bins > levels + KL_STEP else 1):
        reference = padded[:end].copy()
        filled = reference > 0
        starts = np.arange(levels) * end // levels if end > levels else np.arange(end)
        sums, members = np.add.reduceat(padded[:end], starts), np.add.reduceat(filled.astype(float), starts)
        spread = np.repeat(sums / np.maximum(members, 1), np.diff(np.append(starts, end))) * filled
        reference[-1] += total - reference.sum()
        p, q = reference / total, spread / max(spread.sum(), 1e-30)
        both = p > 0
        divergence = float(np.sum(p[both] * np.log(p[both] / np.maximum(q[both], 1e-9))))
        if divergence <= best:
            best, chosen = divergence, end
    threshold = chosen * group * 2.0 ** (histogram.exponent or 0) / (BINS / 2)
    return -threshold, threshold


def signal_to_noise(histogram: Histogram, grid: Grid) -> float:
    """Decibels between values with this histogram and what rounding them to the grid changes; infinite for zeros."""
    if not histogram.seen:
        return math.inf
    centres, counts = histogram.points()
    signal, noise = np.dot(centres**2, counts), np.dot((grid.rounded(centres) - centres) ** 2, counts)
    return float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else math.inf


__all__ = ["Grid", "Histogram", "grid_of", "range_of", "signal_to_noise"]
