"""Slices of negative step that are read by the vector loop of what they are part of."""

from __future__ import annotations

import numpy as np
from against_onnxruntime import assert_agree
from small_models import model_of_text


def test_reflected_borders_by_concatenation() -> None:
    """Reflection padding as an exporter spells it: the borders are reversed slices beside the signal."""
    model = model_of_text(
        """reflected (float[batch, n] x) => (float[batch, padded] y) {
            begin = Slice (x, one, four, axis, one)
            left = Slice (begin, minus_one, lowest, axis, minus_one)
            end = Slice (x, minus_four, minus_one, axis, one)
            right = Slice (end, minus_one, lowest, axis, minus_one)
            y = Concat <axis = 1> (left, x, right)
        }""",
        one=np.array([1]),
        four=np.array([4]),
        axis=np.array([1]),
        minus_one=np.array([-1]),
        minus_four=np.array([-4]),
        lowest=np.array([-9223372036854775807]),
    )
    random = np.random.default_rng(0)
    assert_agree(model, *({"x": random.random((b, n), np.float32)} for b, n in ((1, 8), (3, 40), (2, 6))))


def test_select_of_reversed_halves() -> None:
    """Where by position, of a reversed and a plain operand, sizes known: one masked vector each."""
    model = model_of_text(
        """halves (float[11] x) => (float[11] y, float[14] z) {
            reversed = Slice (x, minus_one, lowest, axis, minus_one)
            y = Where (first, reversed, x)
            part = Slice (reversed, zero, three, axis)
            z = Concat <axis = 0> (part, x)
        }""",
        first=np.arange(11) < 5,
        zero=np.array([0]),
        three=np.array([3]),
        axis=np.array([0]),
        minus_one=np.array([-1]),
        lowest=np.array([-9223372036854775807]),
    )
    assert_agree(model, {"x": np.arange(11, dtype=np.float32)})
