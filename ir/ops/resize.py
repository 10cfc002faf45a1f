"""Resize: interpolation along each axis in turn, at coordinates that are exact ratios of integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ..dims import Dim, Sum, ceildiv, dim_max, dim_min, divide_exactly, floordiv, known_le, symbol
from ..errors import ShapeError, UnsupportedError
from ..functions import absolute, cast, maximum, minimum, round_even, where
from ..scalars import Scalar, index
from ..symbolic import Ratio
from ..tensors import Tensor, compute, normalize_axis, reduction, view
from .declare import Registry, Static
from .movement import replaced
from .reduction import blending_type

declare = Registry()

Rational = tuple[Dim, Dim]
"""Numerator and positive denominator."""


def rational(number: object) -> Rational:
    """A scale as the simplest ratio that f32 does not tell from it; symbolic ratios as they are."""
    if isinstance(number, Ratio):
        return number.numerator, number.denominator
    if isinstance(number, int | Sum):
        return number, 1
    assert isinstance(number, float)
    simple = Fraction(number).limit_denominator(4096)
    exact = simple if np.float32(float(simple)) == np.float32(number) else Fraction(number)
    return exact.numerator, exact.denominator


def ratio(a: Dim, b: Dim) -> Rational:
    """a / b, simplified where one divides the other."""
    if isinstance(a, int) and isinstance(b, int):
        return Fraction(a, b).as_integer_ratio() if b else (1, 1)
    whole, part = divide_exactly(a, b), divide_exactly(b, a)
    return (whole, 1) if whole is not None else (1, part) if part is not None else (a, b)


@dataclass(frozen=True)
class Axis:
    """One resized axis: `extent` elements become `output`; `scale` is output/extent as far as that is whole."""

    axis: int
    extent: Dim
    output: Dim
    scale: Rational
    roi: tuple[Rational, Rational]

    def coordinate(self, x: Dim, mode: str) -> Rational:
        """The place in the input of output element x; the denominator is positive."""
        p, q = self.scale
        length = self.extent * p  # of the output, times q; the output is its floor
        if mode == "align_corners":
            return (0, 1) if length == q else (x * (self.extent - 1) * q, dim_max(1, length - q))
        if mode == "asymmetric":
            return x * q, p
        if mode == "tf_half_pixel_for_nn":
            return (2 * x + 1) * q, 2 * p
        if mode == "half_pixel_symmetric":
            return (2 * x + 1) * q - p + length - self.output * q, 2 * p
        if mode == "tf_crop_and_resize":
            (first, a), (last, b) = self.roi
            span = length - q
            crop = (first * b * span + x * q * (last * a - first * b)) * (self.extent - 1), a * b * dim_max(1, span)
            return self._unless_single(crop, ((first * b + last * a) * (self.extent - 1), 2 * a * b))
        if mode == "half_pixel":
            return (2 * x + 1) * q - p, 2 * p
        if mode == "pytorch_half_pixel":
            return self._unless_single(((2 * x + 1) * q - p, 2 * p), (0, 1))
        raise UnsupportedError(f"coordinate_transformation_mode {mode!r}")

    def _unless_single(self, usual: Rational, single: Rational) -> Rational:
        """`single` where the output has one element, which only the run may tell; else `usual`."""
        p, q = self.scale
        length = self.extent * p
        if length == q:
            return single
        grows = isinstance(p, int) and isinstance(q, int) and p > q  # then no extent gives one element
        if (isinstance(length, int) and isinstance(q, int)) or grows or known_le(q + 1, length):
            return usual
        several = dim_min(1, dim_max(length - q, q - length))
        (a, b), (c, d) = usual, single
        return a * d * several + c * b * (1 - several), b * d


_ROUNDING: dict[str, Callable[[Dim, Dim], Dim]] = {
    "floor": floordiv,
    "ceil": ceildiv,
    "round_prefer_floor": lambda n, d: ceildiv(2 * n - d, 2 * d),
    "round_prefer_ceil": lambda n, d: floordiv(2 * n + d, 2 * d),
}


def clamped(position: Callable[[Dim], Dim], plan: Axis) -> Callable[[Dim], Dim]:
    """`position`, which grows with the output index, taken to the borders of the input where it can pass them."""
    below, above = not known_le(0, position(0)), not known_le(position(plan.output - 1) + 1, plan.extent)

    def inside(i: Dim) -> Dim:
        place = dim_min(position(i), plan.extent - 1) if above else position(i)
        return dim_max(0, place) if below else place

    return inside


def nearest(x: Tensor, plan: Axis, mode: str, rounding: str) -> Tensor:
    """Each element is the nearest one of the input."""
    if rounding not in _ROUNDING:
        raise UnsupportedError(f"nearest_mode {rounding!r}")
    source = clamped(lambda i: _ROUNDING[rounding](*plan.coordinate(i, mode)), plan)
    axis = plan.axis
    return view(x, replaced(x.shape, {axis: plan.output}), lambda *i: replaced(i, {axis: source(i[axis])}))


def distance_to(offset: int, part: Scalar) -> Scalar:
    """How far the neighbour at `offset` is from a coordinate that lies `part` above the one at 0."""
    return part if offset == 0 else part - offset if offset < 0 else offset - part


def linear_weight(offset: int, part: Scalar) -> Scalar:
    """The triangle of width 2 over the two neighbours."""
    return part if offset else 1 - part


def cubic_weight(a: float) -> Callable[[Scalar, bool], Scalar]:
    """Keys' cubic convolution kernel, for a distance in [0, 1] (near) or in [1, 2]."""

    def weight(d: Scalar, near: bool) -> Scalar:
        if near:
            return ((d * (a + 2)) - (a + 3)) * d * d + 1
        return ((d * a - 5 * a) * d + 8 * a) * d - 4 * a

    return weight


def interpolated(x: Tensor, plan: Axis, mode: str, cubic: float | None, antialias: bool, exclude: bool) -> Tensor:
    """Each element is a weighted mean of its neighbours: linear, or cubic with the given coefficient.

    `antialias` widens the weights where the axis shrinks; `exclude` gives none to what lies outside the input.
    """
    p, q = plan.scale
    shrink = 1.0
    if antialias:
        if not isinstance(p, int) or not isinstance(q, int):
            raise UnsupportedError(f"antialiasing with a scale {p}/{q} that is known only at run time")
        shrink = min(1.0, p / q)
    radius = 1 if cubic is None else 2
    first = math.floor(-radius / shrink) + 1
    taps = 2 - 2 * first
    kernel = None if cubic is None else cubic_weight(cubic)
    real = x.dtype.part

    def weight(offset: Dim, part: Scalar) -> Scalar:
        """Of the neighbour at `offset` from the one below the coordinate, which lies `part` above that."""
        if shrink == 1 and isinstance(offset, int):
            if kernel is None:
                return linear_weight(offset, part)
            return kernel(distance_to(offset, part), offset in (0, 1))
        distance = absolute((cast(index(offset), real) - part) * shrink)
        if kernel is None:
            return maximum(1 - distance, 0)
        return where(distance <= 1, kernel(distance, True), where(distance < 2, kernel(distance, False), 0))

    def base(i: Dim) -> Dim:
        return floordiv(*plan.coordinate(i, mode))

    def element(*i: Dim) -> Scalar:
        numerator, denominator = plan.coordinate(i[plan.axis], mode)
        rest = cast(index(numerator - base(i[plan.axis]) * denominator), real)
        part = rest * (1 / denominator) if isinstance(denominator, int) else rest / cast(index(denominator), real)

        def tap(k: Dim) -> tuple[Scalar, Scalar]:
            place = clamped(lambda j: base(j) + first + k, plan)(i[plan.axis])
            size = weight(first + k, part)
            if exclude:
                size = where(index(base(i[plan.axis]) + first + k).equal(index(place)), size, 0)
            return size, cast(size, x.dtype) * x.at(replaced(i, {plan.axis: place}))

        if taps > 4:
            weights = reduction("add", i, (taps,), lambda k: tap(k)[0])
            return reduction("add", i, (taps,), lambda k: tap(k)[1]) / cast(weights, x.dtype)
        pairs = [tap(k) for k in range(taps)]
        total, weights = pairs[0][1], pairs[0][0]
        for size, value in pairs[1:]:
            total, weights = total + value, weights + size
        return total / cast(weights, x.dtype) if exclude or shrink < 1 else total

    return compute(replaced(x.shape, {plan.axis: plan.output}), x.dtype, element, x)


def _keeps_places(plan: Axis, mode: str) -> bool:
    """Whether the axis stays as it is."""
    probe = symbol("x")
    numerator, denominator = plan.coordinate(probe, mode)
    return plan.output == plan.extent and numerator == probe * denominator


def _sizes(
    x: Tensor, axes: Sequence[int], scales: Static | None, sizes: Static | None, policy: str
) -> tuple[list[Dim], list[Rational]]:
    """(output extents, scales) of the resized axes."""
    if scales:
        ratios = [rational(scale) for scale in scales]
        return [floordiv(x.shape[axis] * p, q) for axis, (p, q) in zip(axes, ratios, strict=True)], ratios
    if not sizes:
        raise ShapeError("neither scales nor sizes are given")
    wanted = list(sizes)
    if policy != "stretch":
        extents = [x.shape[axis] for axis in axes]
        pairs = [(a, b) for a, b in zip(wanted, extents, strict=True) if isinstance(a, int) and isinstance(b, int)]
        if len(pairs) < len(axes):
            raise UnsupportedError(f"keep_aspect_ratio_policy {policy!r} with sizes that are known only at run time")
        fractions = [Fraction(size, extent) for size, extent in pairs]
        common = min(fractions) if policy == "not_larger" else max(fractions)
        return (
            [math.floor(common * extent + Fraction(1, 2)) for _, extent in pairs],
            [(common.numerator, common.denominator)] * len(pairs),
        )
    return wanted, [ratio(size, x.shape[axis]) for size, axis in zip(wanted, axes, strict=True)]


@declare.op("Resize", static=("roi", "scales", "sizes"))
def resize(
    x: Tensor,
    roi: Static | None = None,
    scales: Static | None = None,
    sizes: Static | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """`x` with some axes resized by nearest, linear or cubic interpolation."""
    chosen = list(range(x.rank)) if axes is None else [normalize_axis(axis, x.rank) for axis in axes]
    outputs, ratios = _sizes(x, chosen, scales, sizes, keep_aspect_ratio_policy)
    crops = coordinate_transformation_mode == "tf_crop_and_resize"
    if crops and (not roi or len(roi) != 2 * len(chosen)):
        raise ShapeError(f"a roi of {2 * len(chosen)} numbers is wanted, found {roi}")
    borders = [rational(float(edge)) for edge in roi] if crops and roi else [(0, 1)] * (2 * len(chosen))
    plans = [
        Axis(axis, x.shape[axis], outputs[k], ratios[k], (borders[k], borders[k + len(chosen)]))
        for k, axis in enumerate(chosen)
    ]
    plans = [plan for plan in plans if not _keeps_places(plan, coordinate_transformation_mode)]
    result = x if mode == "nearest" else cast(x, blending_type(x.dtype))
    for plan in plans:
        if mode == "nearest":
            result = nearest(result, plan, coordinate_transformation_mode, nearest_mode)
        else:
            cubic = None if mode == "linear" else cubic_coeff_a
            result = interpolated(
                result, plan, coordinate_transformation_mode, cubic, bool(antialias), bool(exclude_outside)
            )
    if crops:
        result = _extrapolated(result, plans, extrapolation_value)
    if result.dtype.is_float and x.dtype.is_integer:
        result = minimum(maximum(round_even(result), x.dtype.limits[0]), x.dtype.limits[1])
    return cast(result, x.dtype)


def _extrapolated(x: Tensor, plans: Sequence[Axis], value: float) -> Tensor:
    """`value` where a coordinate lies outside the input."""

    def element(*i: Dim) -> Scalar:
        result = x.at(i)
        for plan in plans:
            numerator, denominator = plan.coordinate(i[plan.axis], "tf_crop_and_resize")
            outside = (index(numerator) < 0) | (index((plan.extent - 1) * denominator) < index(numerator))
            result = where(outside, value, result)
        return result

    return compute(x.shape, x.dtype, element, x)
