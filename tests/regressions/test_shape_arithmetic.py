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


def test_shape_that_folding_tells() -> None:
    """[batch, int(e ** c), -1]: known only once constants are folded, then in every type that was told before."""
    model = model_of_text(
        """folded (float[batch, n] x) => (float[batch, 4, rest] y) {
            batch = Shape <start = 0, end = 1> (x)
            power = Exp (exponent)
            side = Cast <to = 7> (power)
            shape = Concat <axis = 0> (batch, side, rest)
            table = Reshape (x, shape)
            y = Add (table, one)
        }""",
        exponent=np.array([1.5], np.float32),
        rest=np.array([-1]),
        one=np.array(1, np.float32),
    )
    random = np.random.default_rng(0)
    assert_agree(model, *({"x": random.random((b, n), np.float32)} for b, n in ((1, 8), (3, 20))))


def test_square_root_of_a_number_of_patches() -> None:
    """int(n ** 0.5), as exporters of vision transformers write it."""
    model = model_of_text(
        """patches (float[batch, 16, c] x) => (float[batch, c, 4, 4] y) {
            batch = Shape <start = 0, end = 1> (x)
            count = Shape <start = 1, end = 2> (x)
            number = Cast <to = 1> (count)
            root = Pow (number, half)
            side = Cast <to = 7> (root)
            shape = Concat <axis = 0> (batch, side, side, rest)
            square = Reshape (x, shape)
            y = Transpose <perm = [0, 3, 1, 2]> (square)
        }""",
        half=np.array(0.5, np.float32),
        rest=np.array([-1]),
    )
    random = np.random.default_rng(0)
    assert_agree(model, *({"x": random.random((b, 16, c), np.float32)} for b, c in ((1, 8), (3, 5))))


def test_last_element_of_an_axis_broadcast_along_it() -> None:
    """x / x[:, -1:], as position embeddings of images are normalised: the slice has min(1, n) elements."""
    model = model_of_text(
        """last (float[batch, n, m] x, float[batch, m, k] w) => (float[batch, n, m] y, float[batch, n, k] z) {
            last = Slice (x, minus_one, end, axis)
            y = Div (x, last)
            batch_of_one = Slice (w, minus_one, end, first)
            z = MatMul (x, batch_of_one)
        }""",
        minus_one=np.array([-1]),
        end=np.array([9223372036854775807]),
        axis=np.array([1]),
        first=np.array([0]),
    )
    random = np.random.default_rng(0)
    sizes = ((1, 8, 3, 2), (3, 5, 4, 7))
    assert_agree(
        model,
        *(
            {"x": random.random((b, n, m), np.float32) + 1, "w": random.random((b, m, k), np.float32)}
            for b, n, m, k in sizes
        ),
    )
