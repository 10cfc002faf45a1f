"""The phases of a transposed convolution as one convolution, whose batches are the phases of each group.

Phases differ in where their windows begin and in how many taps they have; those that a phase lacks have no weight and
are never inside the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, divide_exactly, product
from ....ir.ops.windows import Windows
from ....ir.scalars import Scalar
from ....ir.tensors import Indices, Tensor, all_of, unflatten
from ...kernels.convolution import Convolution, Phase, Transposed

WORTH = 2.0
"""Products, of those that there are, up to which phases of different sizes are computed as one."""


@dataclass(frozen=True)
class Together:
    """All phases: `found` with the phases as groups of groups (phases outermost), its windows those of the phase with
    the number `phase`, which has `taps` along each axis."""

    found: Convolution
    taps: tuple[Dim, ...]


def together(transposed: Transposed, phase: Dim) -> Together | None:
    """The phases as one convolution, `phase` being which of them; None where their outputs differ in number, or their
    taps by too much."""
    whole, steps = transposed.whole, transposed.strides
    extents = [divide_exactly(extent, step) for extent, step in zip(whole.windows.output, steps, strict=True)]
    kernel = tuple(max(1, *(len(entry.taps) for entry in axis)) for axis in transposed.axes)
    places = transposed.places
    used = int(np.prod([sum(len(entry.taps) for entry in axis) for axis in transposed.axes]))
    if None in extents or len(places) * int(np.prod(kernel)) > WORTH * used or len(places) == 1:
        return None
    dilations = [next((entry.dilation for entry in axis if len(entry.taps) > 1), 1) for axis in transposed.axes]
    own = unflatten(phase, steps)
    windows = Windows(
        whole.windows.input,
        kernel,
        (1,) * len(steps),
        tuple(dilations),
        tuple(_chosen(p, [entry.before for entry in axis]) for p, axis in zip(own, transposed.axes, strict=True)),
        (1,) * len(steps),
        tuple(ceildiv(extent, step) for extent, step in zip(whole.windows.output, steps, strict=True)),
    )

    def pixel(where: Sequence[Dim]) -> Mapping[str, Dim]:
        image, *at = where
        return whole.pixel((image, *(a * step + p for a, step, p in zip(at, steps, own, strict=True))))

    count = len(places)
    array = whole.array
    if array is not None:
        array = np.concatenate([_padded(transposed.at(place).array, kernel) for place in places])
    found = replace(
        whole,
        windows=windows,
        group=count * whole.group,
        weights=_weights(transposed, kernel),
        array=array,
        pixel=pixel,
    )
    taps = tuple(_chosen(p, [len(entry.taps) for entry in axis]) for p, axis in zip(own, transposed.axes, strict=True))
    return Together(found, taps)


def _chosen(which: Dim, values: Sequence[int]) -> Dim:
    """The value of this number."""
    steps = {after - before for before, after in pairwise(values)}
    if len(steps) < 2:
        return values[0] + which * sum(steps)
    found = s.index(values[-1])
    for number, value in reversed(list(enumerate(values[:-1]))):
        found = s.select(s.index(which).equal(s.index(number)), s.index(value), found)
    return s.as_dim(found, min(values), max(values))


def _padded(array: np.ndarray | None, kernel: Sequence[int]) -> np.ndarray:
    """Weights of one phase with zeros for the taps that it lacks."""
    assert array is not None
    missing = [(0, extent - own) for extent, own in zip(kernel, array.shape[2:], strict=True)]
    return np.pad(array, [(0, 0), (0, 0), *missing])


def _weights(transposed: Transposed, kernel: Sequence[int]) -> Tensor:
    """The weights of all phases, of a model that brings them."""
    whole, steps = transposed.whole, transposed.strides
    own = whole.weights.shape[0]

    def element(indices: Indices) -> Scalar:
        filter_, channel, *taps = indices
        conditions: list[Scalar] = []
        where: list[Dim] = []
        for p, tap, axis in zip(unflatten(filter_ // own, steps), taps, transposed.axes, strict=True):
            conditions.append(s.index(tap) < s.index(_chosen(p, [len(entry.taps) for entry in axis])))
            first, apart = _chosen(p, [_first(entry) for entry in axis]), _chosen(p, [_apart(entry) for entry in axis])
            where.append(first + tap * apart)
        value = whole.weights.at((filter_ % own, channel, *where))
        return s.select(all_of(conditions), value, s.const(0, value.dtype))

    shape = (product([own, len(transposed.places)]), whole.weights.shape[1], *kernel)
    return Tensor(shape, whole.weights.dtype, element, "map", (whole.weights,))


def _first(phase: Phase) -> int:
    return phase.taps[0] if phase.taps else 0


def _apart(phase: Phase) -> int:
    return phase.taps[1] - phase.taps[0] if len(phase.taps) > 1 else 0
