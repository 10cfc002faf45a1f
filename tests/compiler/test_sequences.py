"""Sequences and optionals that are known while a model is read: compiled wholly, no step of Python is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxc
import pytest
from onnx.reference import ReferenceEvaluator
from onnxc.compiler.interface import Interface
from onnxc.ir.errors import ModelError, ShapeError
from small_models import model_of_text

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def assert_compiled(text: str, **constants: np.ndarray) -> onnxc.Executable:
    """The model is compiled wholly and agrees with the reference on its input x."""
    model = model_of_text(text, **constants)
    executable = onnxc.compile(model)
    assert isinstance(executable, Interface)
    expected = ReferenceEvaluator(model).run(None, {"x": X})
    for found, wanted in zip(executable.run({"x": X}).values(), expected, strict=True):
        np.testing.assert_array_equal(found, wanted, strict=True)
    return executable


def test_elements_by_position() -> None:
    assert_compiled(
        """sequence (float[2, 3, 4] x) => (float[2, 3, 4] first, float[2, 3, 4] last, int64 count) {
            negated = Neg (x)
            doubled = Add (x, x)
            all = SequenceConstruct (x, negated, doubled)
            fewer = SequenceErase (all, one)
            first = SequenceAt (fewer, zero)
            last = SequenceAt (fewer, end)
            count = SequenceLength (fewer)
        }""",
        zero=np.array(0),
        one=np.array(1),
        end=np.array(-1),
    )


@pytest.mark.parametrize(("position", "order"), [(0, "nab"), (1, "anb"), (-1, "anb"), (-2, "nab"), (2, "abn")])
def test_insertion_from_both_ends(position: int, order: str) -> None:
    model = model_of_text(
        """insertion (float[2] a, float[2] b, float[2] n) => (float[6] y) {
            pair = SequenceConstruct (a, b)
            three = SequenceInsert (pair, n, position)
            y = ConcatFromSequence <axis = 0> (three)
        }""",
        position=np.array(position),
    )
    inputs = {name: np.full(2, ord(name), np.float32) for name in "abn"}
    y = onnxc.compile(model)(**inputs)
    assert "".join(chr(int(letter)) for letter in y[::2]) == order


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("new_axis", [0, 1])
def test_joining(axis: int, new_axis: int) -> None:
    assert_compiled(
        f"""joining (float[2, 3, 4] x) => (float[...] y) {{
        negated = Neg (x)
        pair = SequenceConstruct (x, negated)
        y = ConcatFromSequence <axis = {axis}, new_axis = {new_axis}> (pair)
    }}""".replace("float[...]", "float[a, b, c]" if not new_axis else "float[a, b, c, d]")
    )


@pytest.mark.parametrize(
    ("attributes", "split"),
    [
        ("axis = 1", None),
        ("axis = -1, keepdims = 0", None),
        ("axis = 2", np.array(3)),
        ("axis = 2", np.array([1, 3])),
        ("axis = 0, keepdims = 0", np.array(1)),
    ],
)
def test_splitting(attributes: str, split: np.ndarray | None) -> None:
    constants = {"zero": np.array(0)} | ({} if split is None else {"split": split})
    operands = "x" if split is None else "x, split"
    assert_compiled(
        f"""splitting (float[2, 3, 4] x) => (float[...] y, int64 count) {{
            parts = SplitToSequence <{attributes}> ({operands})
            y = SequenceAt (parts, zero)
            count = SequenceLength (parts)
        }}""".replace("float[...]", "float[a, b]" if "keepdims" in attributes and split is None else "float[a, b, c]"),
        **constants,
    )


def test_map_over_two_sequences_and_a_tensor() -> None:
    model = model_of_text(
        """mapping (float[2, 3, 4] x) => (float[4, 3, 4] y, float[2, 3, 4] z) {
            negated = Neg (x)
            ones = SequenceConstruct (x, negated)
            others = SequenceConstruct (negated, x)
            sums, products = SequenceMap <body = body (float[2,3,4] a, float[2,3,4] b, float[2,3,4] c)
                => (float[2,3,4] sum, float[2,3,4] product) {
                difference = Sub (a, b)
                sum = Add (difference, c)
                product = Mul (a, negated)
            }> (ones, others, x)
            y = ConcatFromSequence <axis = 0> (sums)
            z = SequenceAt (products, one)
        }""",
        one=np.array(1),
    )
    executable = onnxc.compile(model)
    assert isinstance(executable, Interface)
    y, z = executable(X)
    np.testing.assert_array_equal(y, np.concatenate([X + X + X, -X - X + X]))
    np.testing.assert_array_equal(z, X * X)


def test_optionals() -> None:
    """By numbers: the reference wraps an optional's value in a list."""
    model = model_of_text(
        """optionals (float[2, 3, 4] x) => (float[2, 3, 4] y, bool there, bool absent, float[2, 3, 4] z) {
            some = Optional (x)
            none = Optional <type = float[2]> ()
            there = OptionalHasElement (some)
            absent = OptionalHasElement (none)
            y = OptionalGetElement (some)
            z = If (absent) <then_branch = then () => (float[2] chosen) { chosen = OptionalGetElement (none) },
                else_branch = otherwise () => (float[2, 3, 4] other) { other = Neg (x) }>
        }"""
    )
    executable = onnxc.compile(model)
    assert isinstance(executable, Interface)
    y, there, absent, z = executable(X)
    np.testing.assert_array_equal(y, X)
    np.testing.assert_array_equal(z, -X)
    assert (there, absent) == (True, False)


def test_branches_that_give_sequences_by_a_known_condition() -> None:
    assert_compiled(
        """branches (float[2, 3, 4] x) => (float[4, 3, 4] y) {
            many = If (yes) <then_branch = then () => (seq(float[2, 3, 4]) pair) { pair = SequenceConstruct (x, x) },
                else_branch = otherwise () => (seq(float[2, 3, 4]) one) { one = SequenceConstruct (x) }>
            y = ConcatFromSequence <axis = 0> (many)
        }""",
        yes=np.array(True),
    )


def test_a_position_that_the_run_tells_among_equal_elements() -> None:
    model = model_of_text("""position (float[n, 4] x, int64 place) => (float[n, 4] y) {
        negated = Neg (x)
        doubled = Add (x, x)
        all = SequenceConstruct (x, negated, doubled)
        y = SequenceAt (all, place)
    }""")
    executable = onnxc.compile(model)
    assert isinstance(executable, Interface)
    for place, factor in ((0, 1), (1, -1), (2, 2), (-1, 2), (-3, 1)):
        np.testing.assert_array_equal(executable(X[0], np.array(place)), X[0] * factor)


def test_functions_take_and_give_sequences() -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        outer (float[2, 3, 4] x) => (float[4, 3, 4] y) {
            parts = local.pair (x)
            y = local.joined (parts)
        }
        <domain: "local", opset_import: ["" : 21]>
        pair (x) => (parts) {
            negated = Neg (x)
            parts = SequenceConstruct (x, negated)
        }
        <domain: "local", opset_import: ["" : 21]>
        joined (parts) => (y) { y = ConcatFromSequence <axis = 0> (parts) }
    """)
    executable = onnxc.compile(model)
    assert isinstance(executable, Interface)
    np.testing.assert_array_equal(executable(X), np.concatenate([X, -X]))


def test_saved_ahead_of_time(tmp_path: Path) -> None:
    executable = assert_compiled("""saved (float[2, 3, 4] x) => (float[2, 6, 4] y) {
        negated = Neg (x)
        pair = SequenceConstruct (x, negated)
        y = ConcatFromSequence <axis = 1> (pair)
    }""")
    loaded = onnxc.load(executable.save(tmp_path / "model.onnxc"))
    np.testing.assert_array_equal(loaded(X), executable(X))


def test_wrong_positions_and_lengths_are_told() -> None:
    head = "wrong (float[2, 3, 4] x) => (float[2, 3, 4] y) { pair = SequenceConstruct (x, x) "
    with pytest.raises(ShapeError, match=r'"SequenceAt_1".*position 2 in a sequence of 2'):
        onnxc.compile(model_of_text(head + "y = SequenceAt (pair, two) }", two=np.array(2)))
    with pytest.raises(ShapeError, match=r"parts of the sizes \[1, 2\] do not make up axis 2"):
        text = (
            "wrong (float[2, 3, 4] x) => (int64 n) { s = SplitToSequence <axis = 2> (x, sizes) n = SequenceLength (s) }"
        )
        onnxc.compile(model_of_text(text, sizes=np.array([1, 2])))
    with pytest.raises(ModelError, match="several types"):
        text = "wrong (float[2] x) => (int64 n) { c = Shape (x) s = SequenceConstruct (x, c) n = SequenceLength (s) }"
        onnxc.compile(model_of_text(text))
    with pytest.raises(ShapeError, match="without elements"):
        text = "wrong (float[2] x) => (float[2] y) { s = SequenceEmpty () y = ConcatFromSequence <axis = 0> (s) }"
        onnxc.compile(model_of_text(text))


def test_elements_may_be_outputs() -> None:
    """An output has its own name, whatever the element is called."""
    executable = assert_compiled(
        """outputs (float[2, 3, 4] x) => (float[2, 3, 4] y, float[2, 3, 4] z) {
            all = SequenceConstruct (x, x)
            y = SequenceAt (all, zero)
            z = SequenceAt (all, zero)
        }""",
        zero=np.array(0),
    )
    assert [port.name for port in executable.outputs] == ["y", "z"]


LOOP = """loop (float[2, 3, 4] x) => (float[a, 3, 4] y, float[b] rows, int64 length) {
    empty = SequenceEmpty ()
    parts, last, rows = Loop (count, yes, empty, x) <body =
        body (int64 i, bool c, seq(float[2, 3, 4]) so_far, float[2, 3, 4] state)
            => (bool go, seq(float[2, 3, 4]) more, float[2, 3, 4] next, float sum) {
        go = Less (i, limit)
        next = Neg (state)
        moved = Add (next, x)
        more = SequenceInsert (so_far, moved)
        sum = ReduceSum <keepdims = 0> (moved)
    }>
    y = ConcatFromSequence <axis = 0> (parts)
    length = SequenceLength (parts)
}"""


@pytest.mark.parametrize(("count", "limit"), [(1, 9), (5, 9), (5, 2)])
def test_loops_of_known_length_grow_sequences(count: int, limit: int) -> None:
    model = model_of_text(LOOP, count=np.array(count), yes=np.array(True), limit=np.array(limit))
    executable = onnxc.compile(model)
    assert isinstance(executable, Interface)
    y, rows, length = executable(X)
    trips = min(count, limit + 1)
    parts = [X - X if i % 2 == 0 else X + X for i in range(trips)]
    np.testing.assert_array_equal(y, np.concatenate(parts))
    np.testing.assert_allclose(rows, [part.sum() for part in parts])
    assert length == trips


def test_longer_loops_are_left_to_python() -> None:
    model = model_of_text(LOOP, count=np.array(100), yes=np.array(True), limit=np.array(99))
    executable = onnxc.compile(model)
    assert not isinstance(executable, Interface)
    assert executable(X)[2] == 100
