"""Fits the polynomials of `passes.math`: prints the tables of `passes.math_tables`.

Minimax fits by Remez' exchange in many digits, with a weight that makes the error that of the final result. The
coefficients are rounded one by one from the lowest power on, the others fitted again after each (Muller, Elementary
Functions, 2016, chapter 4). Run as `python -m onnxc.tools.fit_polynomials [NAME]`; needs `mpmath`, alone here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpmath import mp, mpf  # type: ignore[import-not-found,import-untyped,unused-ignore]

Function = Callable[[Any], Any]


@dataclass(frozen=True)
class Fit:
    """A polynomial of `terms` coefficients in t in [low, high] for `target`; `weight` times its error is the error of
    the result relative to one (or to the result). `bits` is the precision of the coefficients: 24 or 53."""

    name: str
    target: Function
    weight: Function
    low: float
    high: float
    terms: int
    bits: int


def minimax(fit: Fit, grid: Sequence[Any], targets: Sequence[Any], weights: Sequence[Any], fixed: Sequence[Any]) -> Any:
    """(coefficients, largest weighted error) of the best polynomial whose lowest coefficients are `fixed`."""
    first, count = len(fixed), fit.terms - len(fixed)
    # What the fixed part leaves, divided by t^first: the free part is then a plain polynomial, whose error alternates.
    rest = [(y - mp.polyval(list(fixed[::-1]) or [0], x)) / x**first for x, y in zip(grid, targets, strict=True)]
    weights = [w * abs(x) ** first for x, w in zip(grid, weights, strict=True)]
    if count == 0:
        return [], max(abs(w * y) for w, y in zip(weights, rest, strict=True))
    last = len(grid) - 1
    reference = [round(last * (1 - math.cos(math.pi * k / count)) / 2) for k in range(count + 1)]
    for _ in range(30):
        matrix, right = mp.matrix(count + 1, count + 1), mp.matrix(count + 1, 1)
        for row, at in enumerate(reference):
            for column in range(count):
                matrix[row, column] = weights[at] * grid[at] ** column
            matrix[row, count] = (-1) ** row
            right[row] = weights[at] * rest[at]
        solution = mp.lu_solve(matrix, right)
        coefficients = [solution[k] for k in range(count)]
        errors = [w * (y - mp.polyval(coefficients[::-1], x)) for x, y, w in zip(grid, rest, weights, strict=True)]
        largest = max(map(abs, errors))
        if largest <= abs(solution[count]) * (1 + mpf("1e-3")):
            break
        peaks: list[int] = []
        for at, error in enumerate(errors):
            if peaks and (errors[peaks[-1]] > 0) == (error > 0):
                if abs(error) > abs(errors[peaks[-1]]):
                    peaks[-1] = at
            else:
                peaks.append(at)
        while len(peaks) > count + 1:
            least = min(range(len(peaks)), key=lambda k: abs(errors[peaks[k]]))
            if least in (0, len(peaks) - 1) or len(peaks) == count + 2:
                peaks.pop(0 if abs(errors[peaks[0]]) < abs(errors[peaks[-1]]) else -1)
            else:  # Two neighbours go together, or two of one sign would meet.
                other = least + (1 if abs(errors[peaks[least + 1]]) < abs(errors[peaks[least - 1]]) else -1)
                peaks = [peak for k, peak in enumerate(peaks) if k not in (least, other)]
        if len(peaks) < count + 1:
            break
        reference = peaks
    return coefficients, largest


def rounded(value: Any, bits: int) -> Any:
    """The nearest f32 (24 bits) or f64 (53 bits)."""
    return mpf(float(value)) if bits == 53 else mpf(float(np.float32(float(value))))


def solve(fit: Fit) -> tuple[list[float], float]:
    """The rounded coefficients, lowest power first, and the largest weighted error."""
    count = 60 * fit.terms
    low, high = mpf(fit.low), mpf(fit.high)
    grid = [(low + high) / 2 - (high - low) / 2 * mp.cos(mp.pi * (k + mpf(1) / 2) / count) for k in range(count)]
    targets, weights = [fit.target(t) for t in grid], [fit.weight(t) for t in grid]
    fixed: list[Any] = []
    error = None
    while len(fixed) < fit.terms:
        coefficients, _ = minimax(fit, grid, targets, weights, fixed)
        fixed.append(rounded(coefficients[0], fit.bits))
    _, error = minimax(fit, grid, targets, weights, fixed)
    return [float(c) for c in fixed], float(error)


def _tail(function: Function, leading: Function, power: int) -> Function:
    """t -> (function(t) - leading(t)) / t^power, by series where that cancels."""

    def target(t: Any) -> Any:
        with mp.workdps(120):
            t = t if abs(t) > mpf("1e-40") else mpf("1e-40")
            return (function(t) - leading(t)) / t**power

    return target


def _odd(function: Function) -> Function:
    """t -> function(sqrt t) / sqrt t, for odd functions as polynomials of t = x*x."""
    return lambda t: function(mp.sqrt(t)) / mp.sqrt(t)


HALF_LN2 = 0.34662
LOG = (-0.33334, 0.33334)


def _exp(name: str, terms: int, bits: int) -> Fit:
    return Fit(name, _tail(mp.exp, lambda t: 1 + t, 2), lambda t: t * t / mp.exp(t), -HALF_LN2, HALF_LN2, terms, bits)


def _log(name: str, span: tuple[float, float], terms: int, bits: int) -> Fit:
    def weight(t: Any) -> Any:
        return t**2 * t / mp.log1p(t) if abs(t) > mpf("1e-30") else mpf(0)

    return Fit(name, _tail(mp.log1p, lambda t: t - t * t / 2, 3), weight, *span, terms, bits)


def _tanh(name: str, split: float, terms: int, bits: int) -> Fit:
    odd = _odd(mp.tanh)
    return Fit(name, _tail(odd, lambda t: mpf(1), 1), lambda t: t / odd(t), 1e-12, split**2, terms, bits)


def _erf(name: str, split: float, terms: int, bits: int) -> Fit:
    odd = _odd(mp.erf)
    return Fit(name, lambda t: odd(t) - 1, lambda t: 1 / odd(t), 1e-12, split**2, terms, bits)


def _erf_tail(name: str, split: float, top: float, terms: int, bits: int) -> Fit:
    """-log(1 - erf(a)) = a + a*p(a)."""

    def target(a: Any) -> Any:
        return -mp.log(mp.erfc(a)) / a - 1

    return Fit(name, target, lambda a: a * mp.erfc(a) / mp.erf(a), split, top, terms, bits)


def _sin(name: str, terms: int, bits: int) -> Fit:
    odd = _odd(mp.sin)
    return Fit(name, _tail(odd, lambda t: mpf(1), 1), lambda t: t / odd(t), 1e-12, 0.617, terms, bits)


def _cos(name: str, terms: int, bits: int) -> Fit:
    def even(t: Any) -> Any:
        return mp.cos(mp.sqrt(t))

    return Fit(name, _tail(even, lambda t: 1 - t / 2, 2), lambda t: t * t / even(t), 1e-12, 0.617, terms, bits)


def _atan(name: str, terms: int, bits: int) -> Fit:
    odd = _odd(mp.atan)
    return Fit(name, _tail(odd, lambda t: mpf(1), 1), lambda t: t / odd(t), 1e-12, 0.1717, terms, bits)


def _pow(name: str, terms: int, bits: int) -> Fit:
    """log((1 + s) / (1 - s)) = 2s + 2/3 s^3 + s^5 p(s*s)."""

    def odd(t: Any) -> Any:
        return 2 * mp.atanh(mp.sqrt(t)) / mp.sqrt(t)

    return Fit(name, _tail(odd, lambda t: 2 + 2 * t / 3, 2), lambda t: t * t / odd(t), 1e-12, 0.0295, terms, bits)


FITS: tuple[Fit, ...] = (
    _exp("F32 exp", 5, 24),
    _exp("F64 exp", 10, 53),
    Fit(
        "F32 exp2",
        _tail(lambda t: mpf(2) ** t, lambda t: mpf(1), 1),
        lambda t: t / mpf(2) ** t,
        -0.50001,
        0.50001,
        6,
        24,
    ),
    _log("F32 log", LOG, 8, 24),
    _log("F64 log", LOG, 19, 53),
    _tanh("F32 tanh", 0.55, 5, 24),
    _tanh("F64 tanh", 0.55, 12, 53),
    _erf("F32 erf", 0.9275, 6, 24),
    _erf("F64 erf", 1.0, 13, 53),
    _erf_tail("F32 erf tail", 0.9275, 4.0, 6, 24),
    _erf_tail("F64 erf tail", 1.0, 6.0, 20, 53),
    _sin("F32 sin", 3, 24),
    _sin("F64 sin", 6, 53),
    _cos("F32 cos", 3, 24),
    _cos("F64 cos", 6, 53),
    _atan("F64 atan", 11, 53),
    _pow("F64 pow", 7, 53),
)


def main() -> None:
    mp.dps = 45
    wanted = sys.argv[1:]
    for fit in FITS:
        if not wanted or any(word in fit.name for word in wanted):
            coefficients, error = solve(fit)
            print(f"{fit.name}: error 2^{math.log2(error):.1f}")
            print("    " + ", ".join(f"{c:.9g}" if fit.bits == 24 else repr(c) for c in coefficients))


if __name__ == "__main__":
    main()
