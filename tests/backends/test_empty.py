"""Operators with schedules of their own on tensors without elements, of fixed and of symbolic shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from single_node import run_node

F = np.float32
NOTHING, EMPTY_ROWS = np.zeros(0, F), np.zeros((0, 5), F)
INDEX, MOST = np.zeros((0, 1), np.int64), np.array([3])
CASES: list[tuple[str, dict[str, Any], list[str], dict[str, Any], list[tuple[int, ...]]]] = [
    ("NonZero", {"x": EMPTY_ROWS}, [], {}, [(2, 0)]),
    ("Compress", {"x": EMPTY_ROWS, "c": np.zeros(0, bool)}, [], {"axis": 0}, [(0, 5)]),
    ("Compress", {"x": np.zeros((3, 5), F), "c": np.zeros(3, bool)}, [], {"axis": 0}, [(0, 5)]),
    ("Unique", {"x": NOTHING}, [], {}, [(0,), (0,), (0,), (0,)]),
    ("Unique", {"x": NOTHING}, [], {"sorted": 0}, [(0,), (0,), (0,), (0,)]),
    ("Unique", {"x": EMPTY_ROWS}, [], {"axis": 0}, [(0, 5), (0,), (0,), (0,)]),
    ("TopK", {"x": EMPTY_ROWS, "k": np.array([2])}, ["k"], {}, [(0, 2), (0, 2)]),
    ("TopK", {"x": np.zeros((3, 5), F), "k": np.array([0])}, ["k"], {}, [(3, 0), (3, 0)]),
    ("ScatterElements", {"x": np.ones((3, 5), F), "i": np.zeros((0, 5), np.int64), "u": EMPTY_ROWS}, [], {}, [(3, 5)]),
    ("ScatterND", {"x": np.ones((3, 5), F), "i": INDEX, "u": EMPTY_ROWS}, ["i"], {}, [(3, 5)]),
    ("CumSum", {"x": EMPTY_ROWS, "a": np.array(0)}, ["a"], {}, [(0, 5)]),
    ("CumSum", {"x": EMPTY_ROWS, "a": np.array(1)}, ["a"], {}, [(0, 5)]),
    ("Det", {"x": np.zeros((0, 3, 3), F)}, [], {}, [(0,)]),
    ("DFT", {"x": np.zeros((0, 8, 1), F), "n": np.array(8), "a": np.array(1)}, ["n", "a"], {}, [(0, 8, 2)]),
    ("NonMaxSuppression", {"b": np.zeros((1, 0, 4), F), "s": np.zeros((1, 2, 0), F), "m": MOST}, [], {}, [(0, 3)]),
    (
        "LSTM",
        {"X": np.zeros((4, 0, 3), F), "W": np.ones((1, 20, 3), F), "R": np.ones((1, 20, 5), F)},
        ["W", "R"],
        {"hidden_size": 5},
        [(4, 1, 0, 5), (1, 0, 5), (1, 0, 5)],
    ),
    ("Multinomial", {"x": np.zeros((0, 3), F)}, [], {"sample_size": 4}, [(0, 4)]),
]  # fmt: skip


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_without_elements(case: Any, symbolic: bool) -> None:
    op, operands, constant, attributes, shapes = case
    found = run_node(op, operands, len(shapes), constant, symbolic, **attributes)
    assert [array.shape for array in found] == shapes
    if op.startswith("Scatter"):
        np.testing.assert_array_equal(found[0], operands["x"])
