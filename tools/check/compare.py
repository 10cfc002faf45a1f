"""How far two arrays are apart, and whether that is more than rounding explains."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir.dtypes import DType, of_numpy

Array = NDArray[Any]


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do to a tensor: `relative` to its largest finite magnitude (to 1 where all of it is 0), and for
    integers whole `steps`.

    Relative 0 and no steps: every element must be the same.
    """

    relative: float = 0.0
    steps: int = 0

    def __str__(self) -> str:
        return f"{self.relative:.1e}" if self.relative else f"{self.steps} step{'s' * (self.steps > 1)}"


EXACT = Tolerance()


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of an array; of a sequence its length."""
    return (len(value),) if isinstance(value, list | tuple) else np.shape(value)


@dataclass(frozen=True)
class Difference:
    """An array compared with what was expected.

    `max_abs`, `max_rel` (over expected elements that are not 0) and `max_ulp` (in units of the last place of the
    expected element) are the largest over all elements, None where the arrays cannot be compared element by element;
    `noise_db` is the signal-to-noise ratio 10 log10(sum expected^2 / sum difference^2), infinite where nothing differs;
    `count` elements of `size` differ at all, the worst at `index` where `actual` stands for `expected`. `limit` is the
    largest absolute difference that is allowed, `excess` the largest difference over it: above 1 the arrays differ.
    `reason` says in words what no number tells (another shape, a NaN).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    max_abs: float | None = None
    max_rel: float | None = None
    max_ulp: float | None = None
    noise_db: float = math.inf
    size: int = 0
    count: int = 0
    index: tuple[int, ...] = ()
    actual: Any = None
    expected: Any = None
    limit: float = 0.0
    excess: float = 0.0
    reason: str = ""

    @property
    def same(self) -> bool:
        return self.excess <= 1.0

    @property
    def severity(self) -> tuple[float, float]:
        """Orders differences: those that are not explained first, then by noise."""
        return -self.excess if self.excess > 1 else 0.0, self.noise_db


def compare(name: str, actual: Any, expected: Any, tolerance: Tolerance = EXACT) -> Difference:
    """Compares `actual` with `expected`, element by element.

    NaN agrees with NaN only, an infinity with the same one. Arrays of text, and lists of arrays (sequences), must be
    equal in every element.
    """
    if isinstance(expected, list | tuple) or isinstance(actual, list | tuple):
        return _compare_sequences(name, actual, expected, tolerance)
    actual, expected = np.asarray(actual), np.asarray(expected)
    dtype = of_numpy(expected.dtype)
    found = Difference(name, dtype.name, expected.shape, size=expected.size)
    if of_numpy(actual.dtype) != dtype or actual.shape != expected.shape:
        what = f"{of_numpy(actual.dtype)}{list(actual.shape)} instead of {dtype}{list(expected.shape)}"
        return replace(found, excess=math.inf, noise_db=-math.inf, reason=what)
    if not expected.size:
        return found
    if dtype.kind == "string":
        unlike = _texts(actual) != _texts(expected)
        worst = int(np.argmax(unlike))
        return _at(found, actual, expected, worst, int(unlike.sum()), math.inf if unlike.any() else 0.0)
    return _compare_numbers(found, actual, expected, dtype, tolerance)


def _texts(array: Array) -> Array:
    return np.array([x.decode() if isinstance(x, bytes) else str(x) for x in array.reshape(-1)], object)


def _at(found: Difference, actual: Array, expected: Array, flat: int, count: int, excess: float) -> Difference:
    index = tuple(int(i) for i in np.unravel_index(flat, expected.shape))
    pair = (array[index].item() if hasattr(array[index], "item") else array[index] for array in (actual, expected))
    return replace(found, count=count, index=index, actual=next(pair), expected=next(pair), excess=excess)


def _compare_numbers(
    found: Difference, actual: Array, expected: Array, dtype: DType, tolerance: Tolerance
) -> Difference:
    wide: Any = np.complex128 if dtype.kind == "complex" else np.float64
    if dtype.is_integer and dtype.bits == 64:
        wide = np.longdouble  # holds every 64-bit integer where the machine has one of 80 bits
    a, e = actual.reshape(-1).astype(wide), expected.reshape(-1).astype(wide)
    with np.errstate(all="ignore"):
        equal = (a == e) | (np.isnan(a) & np.isnan(e))
        finite = np.isfinite(a) & np.isfinite(e)
        gap = np.where(equal, 0.0, np.where(finite, np.abs(a - e), np.inf)).astype(np.float64)
        size = np.abs(e).astype(np.float64)
        largest = float(np.max(size, where=np.isfinite(size), initial=0.0))
        limit = tolerance.relative * largest + tolerance.steps
        if dtype.kind in ("float", "complex") and tolerance.relative:
            # What cancels to nothing is measured by the 1 that such terms are of.
            limit = limit + 4 * _smallest(dtype) if largest else tolerance.relative
        relative = gap / size
        ulps = gap / _spacing(np.where(np.isfinite(size), size, 0), dtype)
        signal, noise = float(np.sum(size[finite] ** 2)), float(np.sum(gap[finite] ** 2))
    worst = int(np.argmax(gap))
    top = float(gap[worst])
    excess = 0.0 if top == 0 else top / limit if limit and np.isfinite(top) else math.inf
    nonzero = relative[(size > 0) & finite]
    found = _at(found, actual, expected, worst, int(np.count_nonzero(gap)), excess)
    reason = ""
    if not np.isfinite(top):
        kinds = {True: "NaN", False: "an infinity"}
        odd = a if not np.isfinite(a[worst]) else e
        reason = f"{kinds[bool(np.isnan(odd[worst]))]} on one side only, {int(np.isinf(gap).sum())} times"
    decibels = math.inf if not noise else 10 * math.log10(signal / noise) if signal else -math.inf
    return replace(
        found,
        max_abs=top,
        max_rel=float(nonzero.max(initial=0.0)),
        max_ulp=float(ulps.max(initial=0.0)),
        noise_db=decibels if np.isfinite(top) else -math.inf,
        limit=limit,
        reason=reason,
    )


def _compare_sequences(name: str, actual: Any, expected: Any, tolerance: Tolerance) -> Difference:
    pairs = list(actual), list(expected)
    found = Difference(name, "seq", (len(pairs[1]),), size=len(pairs[1]))
    if len(pairs[0]) != len(pairs[1]):
        reason = f"{len(pairs[0])} elements instead of {len(pairs[1])}"
        return replace(found, excess=math.inf, noise_db=-math.inf, reason=reason)
    parts = [compare(f"{name}[{i}]", a, e, tolerance) for i, (a, e) in enumerate(zip(*pairs, strict=True))]
    worst = min(parts, key=lambda part: part.severity, default=found)
    return replace(worst, name=name, reason=worst.reason or (f"in {worst.name}" if parts else ""))


def _smallest(dtype: DType) -> float:
    """The least positive number of a float type."""
    return float(_info(dtype).smallest_subnormal)


def _info(dtype: DType) -> Any:
    import ml_dtypes

    plain = {"c64": np.float32, "c128": np.float64}.get(dtype.name, dtype.numpy)
    return ml_dtypes.finfo(plain)  # type: ignore[no-untyped-call]


def unit_roundoff(dtype: DType) -> float:
    """Half the distance from 1 to the next number of a float type; 0 for the others."""
    return float(_info(dtype).eps) / 2 if dtype.kind in ("float", "complex") else 0.0


def _spacing(magnitude: NDArray[np.float64], dtype: DType) -> Any:
    """The distance from each magnitude to the next number of the type."""
    if dtype.kind not in ("float", "complex"):
        return 1.0
    info = _info(dtype)
    _, exponent = np.frexp(magnitude)
    return np.maximum(np.ldexp(float(info.eps), exponent - 1), float(info.smallest_subnormal))
