"""Comparing arrays, and how far rounding is allowed to carry a model: `onnxc.tools.check.compare` and `tolerance`."""

import math

import ml_dtypes
import numpy as np
import pytest
from onnxc.compiler.importer import import_model
from onnxc.tools.check.compare import EXACT, Tolerance, compare
from onnxc.tools.check.tolerance import tolerances
from small_models import model_of_text


def test_numbers_of_a_difference() -> None:
    expected = np.array([[1.0, 2.0], [4.0, -8.0]], np.float32)
    actual = expected.copy()
    actual[1, 0] = np.nextafter(np.nextafter(np.float32(4), np.float32(5)), np.float32(5))
    found = compare("y", actual, expected, Tolerance(1e-6))
    assert found.same and found.index == (1, 0) and found.count == 1
    assert found.max_abs == pytest.approx(2 * 2**-21)
    assert found.max_rel == pytest.approx(2 * 2**-23)
    assert found.max_ulp == pytest.approx(2)
    assert found.noise_db == pytest.approx(10 * math.log10(85 / (2 * 2**-21) ** 2))
    assert not compare("y", actual, expected).same, "no tolerance: every bit counts"


def test_nan_and_infinity_agree_with_themselves_only() -> None:
    odd = np.array([np.nan, np.inf, -np.inf, 1], np.float16)
    assert compare("y", odd, odd).same
    for replaced, position in ((1.0, 0), (-np.inf, 1), (np.nan, 3)):
        other = odd.copy()
        other[position] = replaced
        for pair in ((odd, other), (other, odd)):
            found = compare("y", *pair, Tolerance(1e9))
            assert not found.same and found.index == (position,) and "one side" in found.reason


def test_shapes_and_types_must_agree() -> None:
    assert "f32[2] instead of f64[2]" in compare("y", np.zeros(2, np.float32), np.zeros(2)).reason
    assert "f64[1, 2] instead of f64[2]" in compare("y", np.zeros((1, 2)), np.zeros(2)).reason
    assert compare("y", np.zeros((0, 2)), np.zeros((0, 2))).same


def test_integers_are_exact_to_the_last_bit_and_may_be_a_step_apart_where_that_is_said() -> None:
    expected = np.array([2**62, 5], np.int64)
    assert not compare("y", expected + 1, expected, EXACT).same
    assert compare("y", expected + 1, expected, Tolerance(steps=1)).same
    assert not compare("y", expected + 2, expected, Tolerance(steps=1)).same


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.complex64])
def test_types_that_numpy_knows_little_of(dtype: type) -> None:
    expected = np.array([1, 2, 3], dtype)
    assert compare("y", expected, expected).same
    found = compare("y", np.array([1, 2, 3.5], dtype), expected)
    assert not found.same and found.max_abs == 0.5


def test_texts_and_sequences() -> None:
    texts = np.array(["a", "b"], object)
    assert compare("y", texts, np.array(["a", "b"])).same
    assert compare("y", np.array(["a", "c"], object), texts).index == (1,)
    parts = [np.zeros(2), np.ones(3)]
    assert compare("y", parts, parts).same
    assert "1 elements instead of 2" in compare("y", parts[:1], parts).reason
    assert not compare("y", [parts[0], parts[1] + 1], parts).same


def test_tolerance_grows_with_the_length_of_sums_and_with_depth() -> None:
    def of(length: int, depth: int) -> float:
        lines = [f"v{i + 1} = MatMul (v{i}, w)" for i in range(depth)]
        text = f"g (float[2, {length}] v0, float[{length}, {length}] w) => (float[2, {length}] v{depth})"
        graph = import_model(model_of_text(f"{text} {{ {' '.join(lines)} }}"))
        return tolerances(graph)[f"v{depth}"].relative

    assert of(1024, 1) == pytest.approx(4 * of(64, 1), rel=0.05), "as the square root of the length"
    assert of(64, 8) == pytest.approx(8 * of(64, 1)), "errors of one layer after the other add up"
    assert 4e-7 < of(64, 1) < 4e-6


def test_tolerance_follows_the_type_and_integers_are_exact() -> None:
    text = """g (T[8] x) => (T[8] y, int64[1] k, bool[8] b) {
        y = Exp (x)
        k = Shape (x)
        b = Greater (x, x)
    }"""
    found = {t: tolerances(import_model(model_of_text(text.replace("T[", f"{t}["))))
             for t in ("double", "float", "float16")}  # fmt: skip
    assert found["double"]["y"].relative < 1e-14 < found["float"]["y"].relative < 1e-5 < found["float16"]["y"].relative
    assert found["float"]["k"] == found["float"]["b"] == EXACT
    narrow = tolerances(import_model(model_of_text(text.replace("T[", "float["))), precision="f16")
    assert narrow["y"].relative == pytest.approx(found["float16"]["y"].relative, rel=0.1)


def test_what_is_rounded_to_integers_may_be_a_step_off() -> None:
    graph = import_model(
        model_of_text(
            """g (float[4, 64] x, float[64, 4] w) => (uint8[4, 4] q, int32[4, 4] i, float[4, 4] r) {
                y = MatMul (x, w)
                q = QuantizeLinear (y, scale, zero)
                i = Cast <to = 6> (y)
                r = Round (y)
            }""",
            scale=np.float32(0.1),
            zero=np.uint8(3),
        )
    )
    found = tolerances(graph)
    assert found["q"] == found["i"] == Tolerance(steps=1)
    assert found["r"].relative > 0


def test_bodies_of_loops_count_as_often_as_they_run() -> None:
    graph = import_model(
        model_of_text(
            """g (float[4, 4] x) => (float[4, 4] y) {
                y = Loop (trips, yes, x) <body = b (int64 i, bool c, float[4, 4] s) => (bool d, float[4, 4] t) {
                    d = Identity (c)
                    t = MatMul (s, s)
                }>
            }""",
            trips=np.int64(10),
            yes=np.bool_(True),
        )
    )
    once = import_model(model_of_text("g (float[4, 4] x) => (float[4, 4] y) { y = MatMul (x, x) }"))
    assert tolerances(graph)["y"].relative == pytest.approx(10 * tolerances(once)["y"].relative)
