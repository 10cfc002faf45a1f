"""What rounding does to a model on given inputs, measured: the model evaluated in f64 with roundings put in at random.

Stochastic arithmetic (Parker 1997, "Monte Carlo arithmetic"; Vignes 1993, "A stochastic arithmetic for reliable
scientific computation"): an operator that rounds N times is taken to give the exact result for operands, and then to
change this result, each element by LAMBDA sqrt(N) u of its size, up or down. What is exact in the type itself (sizes,
counts, copies) is left as it is. How far the outputs move in a few such runs is what no fault is needed for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from ...ir.dtypes import of_numpy
from .compare import Difference, Tolerance, shape_of
from .evaluate import RANDOM, Evaluation, Evaluator
from .subject import Subject

Array = NDArray[Any]
RUNS = 4
SAFETY = 2.0
"""How much further than in these runs rounding may carry a value."""


@dataclass(frozen=True)
class Noise:
    """The exact values of a model (evaluated in f64), and how far each element moved under rounding, by name.

    A value whose shape changed, or that could not be computed, has no spread.
    """

    exact: Mapping[str, Any]
    spread: Mapping[str, Array]

    def explains(self, name: str, found: Difference, actual: Any, expected: Any) -> Difference:
        """The difference, judged by the spread: floats by the largest of it, integers by whether they moved at all."""
        moved = self.spread.get(name)
        if moved is None or shape_of(actual) != shape_of(expected) or shape_of(actual) != moved.shape or found.same:
            return found
        if of_numpy(np.asarray(expected).dtype).kind != "float":
            unlike = np.asarray(actual) != np.asarray(expected)
            return found if np.any(unlike & ~(moved > 0)) else replace(found, excess=1.0, reason="near a tie")
        limit = SAFETY * float(np.max(moved[np.isfinite(moved)], initial=0.0))
        if found.max_abs is None or not np.isfinite(found.max_abs) or limit <= found.limit:
            return found
        reason = "rounding moves it as far" if found.max_abs <= limit else found.reason
        return replace(found, limit=limit, excess=found.max_abs / limit, reason=reason)


def measure(
    subject: Subject,
    inputs: Mapping[str, Any],
    known: Evaluation,
    tolerances: Mapping[str, Tolerance],
    keep: Collection[str],
    runs: int = RUNS,
) -> Noise:
    """The noise of the values to `keep`. `known` is the model as evaluated before; `tolerances` the
    error model's, of which a node's own part is what its outputs have more than its operands."""
    evaluator = Evaluator(subject, wide=True, known=known)
    random = np.random.default_rng(0)
    exact = evaluator(inputs, keep).values
    spread: dict[str, Array] = {}

    def perturbed(node: NodeProto, feeds: dict[str, Any]) -> tuple[list[Any], str]:
        results, engine = evaluator.node(node, feeds)
        names = [name for name in node.output if name]
        incoming = max((tolerances[name].relative for name in feeds if name in tolerances), default=0.0)
        own = max((tolerances[name].relative for name in names if name in tolerances), default=incoming) - incoming
        inexact = [_inexact(result, known.values.get(name)) for name, result in zip(names, results, strict=False)]
        if own <= 0 or node.op_type in RANDOM or not any(np.any(where) for where in inexact):
            return results, engine
        moved = {name: _moved(array, own, random) for name, array in feeds.items()}
        try:
            others, _ = evaluator.node(node, moved)
        except Exception:  # operands that may not be changed
            others = results
        found = []
        for result, other, where in zip(results, others, inexact, strict=True):
            fits = isinstance(result, np.ndarray) and shape_of(other) == result.shape
            found.append(np.where(where, _moved(other, own, random), result) if fits else result)
        return found, engine

    for _ in range(runs):
        try:
            values = evaluator(inputs, keep, perturbed).values
        except Exception:  # a size that hangs on rounding
            continue
        for name, array in exact.items():
            other = values[name]
            if isinstance(array, np.ndarray) and array.dtype != object and shape_of(other) == array.shape:
                with np.errstate(all="ignore"):
                    gap = (array != other).astype(float) if array.dtype == bool else np.abs(np.subtract(other, array))
                spread[name] = np.fmax(spread.get(name, 0.0), np.asarray(gap, np.float64))
    return Noise(exact, spread)


def _inexact(value: Any, known: Any) -> Any:
    """Which elements are no numbers of the value's own type."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float64 or not isinstance(known, np.ndarray):
        return False
    with np.errstate(all="ignore"):
        return np.isfinite(value) & (value.astype(known.dtype).astype(np.float64) != value)


def _moved(value: Any, by: float, random: np.random.Generator) -> Any:
    """Each element of an array of floats a little larger or smaller."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float64:
        return value
    signs = random.integers(0, 1, value.shape, np.int8, endpoint=True) * 2.0 - 1.0
    return value * (1 + by * signs)
