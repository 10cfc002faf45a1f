"""Sums of squares, channel by channel, and the signal-to-noise ratios that they give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
FAINT = 1e-2
"""Of the median power: a channel that is weaker counts as if it had this, as its errors weigh no more than others'."""


LARGEST = 1e30
"""Elements further from 0 stand for an infinity (masks)."""


@dataclass
class Power:
    """Of a value: the squares of all elements, and of their errors, summed for each channel over all samples."""

    signal: Vector = field(default_factory=lambda: np.zeros(1))
    noise: Vector = field(default_factory=lambda: np.zeros(1))

    def add(self, signal: Any, noise: Any) -> None:
        self.signal = self.signal + np.asarray(signal, np.float64).reshape(-1)
        self.noise = self.noise + np.asarray(noise, np.float64).reshape(-1)

    @property
    def plain(self) -> float:
        """10 log10(sum of squares / sum of squared errors), in dB."""
        return decibels(float(self.signal.sum()), float(self.noise.sum()))

    @property
    def levels(self) -> Vector:
        """What the noise of each channel is measured by: its signal, or a small part of what channels mostly have."""
        floor = FAINT * float(np.median(self.signal))
        return np.maximum(self.signal, floor if floor else FAINT**2 * float(self.signal.mean()))

    @property
    def balanced(self) -> float:
        """The same with every channel counting alike: of the mean over channels of noise / signal. One large channel,
        on which the scale of all hangs, hides nothing here."""
        if not self.noise.any():
            return math.inf
        with np.errstate(all="ignore"):
            return decibels(1.0, float(np.mean(self.noise / self.levels)))

    @property
    def lowest(self) -> float:
        """The lower of the two: by this values are ordered."""
        return min(self.plain, self.balanced)

    @property
    def worst(self) -> tuple[int, float]:
        """The worst channel, and its ratio in dB."""
        with np.errstate(all="ignore"):
            ratios = np.where(self.noise > 0, self.noise / self.levels, 0.0)
        channel = int(np.argmax(ratios))
        return channel, decibels(1.0, float(ratios[channel]))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise, minus infinity without signal."""
    if not noise > 0:
        return math.nan if math.isnan(noise) else math.inf
    if not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


@dataclass(frozen=True)
class Reference:
    """A value in floats that others are compared with, and the sums of its squares by channel, along an axis or none.
    `usual` tells its elements of usual size where there are others, masks, which are left out."""

    value: NDArray[Any]
    axis: int | None
    usual: NDArray[np.bool_] | None
    signal: Vector

    @staticmethod
    def of(value: NDArray[Any], axis: int | None) -> Reference:
        with np.errstate(all="ignore"):
            usual = np.abs(value) < LARGEST
        kept = None if usual.all() else usual
        return Reference(value, axis, kept, _squares(value.astype(np.float64), axis, kept))

    def noise(self, other: Any) -> Vector:
        """The squares of how another value differs, summed by channel."""
        with np.errstate(all="ignore"):
            return _squares(np.subtract(other, self.value, dtype=np.float64), self.axis, self.usual)


def _squares(array: NDArray[np.float64], axis: int | None, kept: NDArray[np.bool_] | None) -> Vector:
    if kept is not None:
        array = np.where(kept, array, 0.0)
    axes = tuple(i for i in range(array.ndim) if axis is None or i != axis % array.ndim)
    return np.asarray(np.sum(np.square(array), axes)).reshape(-1)


@dataclass
class Extent:
    """What the values of a tensor reach: least and largest of all, the largest magnitude of each channel, and how many
    lie outside a range."""

    low: float = math.inf
    high: float = -math.inf
    magnitudes: Vector = field(default_factory=lambda: np.zeros(1))
    outside: int = 0
    count: int = 0

    def add(self, array: NDArray[Any], axis: int | None, limits: tuple[float, float] | None) -> None:
        """Values with channels along an axis; `limits` are the ends of a range."""
        plain = np.asarray(array, np.float32)
        if not plain.size:
            return
        self.low, self.high = min(self.low, float(plain.min())), max(self.high, float(plain.max()))
        axes = tuple(i for i in range(plain.ndim) if axis is None or i != axis % plain.ndim)
        self.magnitudes = np.maximum(self.magnitudes, np.abs(plain).max(axes).astype(np.float64).reshape(-1))
        self.count += plain.size
        if limits is not None:
            self.outside += int(np.count_nonzero((plain < limits[0]) | (plain > limits[1])))

    @property
    def uneven(self) -> tuple[int, float]:
        """The channel that reaches furthest, and how many times as far as the median channel."""
        median = float(np.median(self.magnitudes))
        channel = int(np.argmax(self.magnitudes))
        return channel, float(self.magnitudes[channel]) / median if median else math.inf


@dataclass(frozen=True)
class Grid:
    """The numbers that a quantised tensor can take: its ends and steps, one for all or one for each channel, and the
    zero point."""

    low: Vector
    high: Vector
    step: Vector
    zero: Vector
    steps: int

    @property
    def ends(self) -> tuple[float, float]:
        """What rounds to no more than the ends, the widest of all channels."""
        return float((self.low - self.step / 2).min()), float((self.high + self.step / 2).max())

    @property
    def is_one(self) -> bool:
        return self.step.size == 1


def channel_axis(rank: int, is_image: bool) -> int | None:
    """Along which axis channels are: the second of images, the last of others; none of numbers without axes."""
    if rank == 0:
        return None
    return 1 if is_image and rank > 2 else rank - 1
