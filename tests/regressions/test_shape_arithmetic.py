"""Shapes that models compute by integer arithmetic of their inputs' sizes."""

from __future__ import annotations

import numpy as np
from against_onnxruntime import assert_agree
from small_models import model_of_text


def test_quotient_of_a_difference_of_sizes() -> None:
    """The number of frames that a convolution leaves, computed again for a Reshape: (n - 3) / 4 + 1."""
    model = model_of_text(
        """frames (float[batch, 1, n] x) => (float[batch, q, 2, 4] y) {
            convolved = Conv <strides = [4]> (x, kernel)
            rows = Transpose <perm = [0, 2, 1]> (convolved)
            batch = Shape <start = 0, end = 1> (x)
            size = Shape <start = 2, end = 3> (x)
            less = Add (size, minus_three)
            quarter = Div (less, four)
            frames = Add (quarter, one)
            shape = Concat <axis = 0> (batch, frames, rest, four)
            y = Reshape <allowzero = 1> (rows, shape)
        }""",
        kernel=np.arange(24, dtype=np.float32).reshape(8, 1, 3),
        minus_three=np.array([-3]),
        four=np.array([4]),
        one=np.array([1]),
        rest=np.array([-1]),
    )
    random = np.random.default_rng(0)
    assert_agree(model, *({"x": random.random((b, 1, n), np.float32)} for b, n in ((1, 7), (3, 36))))


def test_quotient_of_a_negative_size() -> None:
    """Integers are divided towards zero: the start of a slice, -n / 2, of an odd n."""
    model = model_of_text(
        """half (float[n] x) => (float[h] y) {
            size = Shape (x)
            negative = Neg (size)
            start = Div (negative, two)
            y = Slice (x, start, end)
        }""",
        two=np.array([2]),
        end=np.array([1000]),
    )
    assert_agree(model, *({"x": np.arange(n, dtype=np.float32)} for n in (7, 8)))
