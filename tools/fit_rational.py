"""Fits the quotients of `backends.kernels.rational`: tanh(x) = x P(x^2) / Q(x^2), its relative error least.

Linearised least squares, each point divided by the last Q there (Sanathanan and Koerner, 1963), with Lawson's weights
(1961), which grow where the error is large until it is level. Run as `python -m onnxc.tools.fit_rational`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Doubles: TypeAlias = NDArray[np.float64]
POINTS, ROUNDS, LEVELLING = 3000, 60, 15


def fit(above: int, below: int, limit: float) -> tuple[Doubles, Doubles, float]:
    """(coefficients of P, of Q with 1 first, largest relative error) for |x| <= `limit`, of these degrees."""
    x = limit * (np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS) + 1) / 2
    x = x[x > 1e-6]
    wanted, u = np.tanh(x), (x / limit) ** 2
    powers = u[:, None] ** np.arange(max(above, below) + 1)
    matrix = np.concatenate([x[:, None] * powers[:, : above + 1], -wanted[:, None] * powers[:, 1 : below + 1]], axis=1)
    weights, divisor = np.ones_like(x), np.ones_like(x)
    best: tuple[Any, Any, float] = ((), (), np.inf)
    for number in range(ROUNDS):
        rows = (np.sqrt(weights) / (divisor * wanted))[:, None]
        sizes = np.linalg.norm(matrix * rows, axis=0)
        solution = np.linalg.lstsq(matrix * rows / sizes, wanted * rows[:, 0], rcond=None)[0] / sizes
        p, q = solution[: above + 1], np.concatenate([[1.0], solution[above + 1 :]])
        divisor = np.abs(powers[:, : below + 1] @ q)
        error = np.abs(x * (powers[:, : above + 1] @ p) / divisor - wanted) / wanted
        if error.max() < best[2]:
            scale = limit ** (-2.0 * np.arange(max(above, below) + 1))
            best = p * scale[: above + 1], q * scale[: below + 1], float(error.max())
        if number > LEVELLING:
            weights *= np.sqrt(error / error.max())
            weights = weights / weights.max() + 1e-30
    return best


def main() -> None:
    from ..backends.kernels.rational import ABOVE, BELOW, LIMIT

    above, below, error = fit(len(ABOVE) - 1, len(BELOW) - 1, LIMIT)
    for name, coefficients in (("ABOVE", above), ("BELOW", below)):
        print(f"{name} = ({', '.join(str(float(np.float32(c))) for c in coefficients)})")
    print(f"relative error {error:.2g}")


if __name__ == "__main__":
    main()
