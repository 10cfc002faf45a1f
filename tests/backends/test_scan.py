"""CumSum and CumProd against numpy; they stay alone, where fusion would make them quadratic."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options, resolve_target
from onnxc.ir import loops
from single_node import Array, assert_equal, compiled, model_of, run_node


def expected(op: str, x: Array, axis: int, exclusive: int, reverse: int) -> Array:
    wide = x.astype(np.float64) if x.dtype.kind == "f" else x
    wide = np.flip(wide, axis) if reverse else wide
    total = (np.cumsum if op == "CumSum" else np.cumprod)(wide, axis, wide.dtype)
    if exclusive:
        start = np.full_like(np.take(total, [0], axis), 0 if op == "CumSum" else 1)
        total = np.concatenate([start, np.take(total, range(x.shape[axis] - 1), axis)], axis)
    return (np.flip(total, axis) if reverse else total).astype(x.dtype)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["CumSum", "CumProd"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    st.sampled_from(["float32", "float64", "float16", "int32", "int64", "uint32"]),
    st.integers(0, 1),
    st.integers(0, 1),
    st.booleans(),
    st.data(),
)
def test_scans(
    op: str, shape: tuple[int, ...], dtype: str, exclusive: int, reverse: int, symbolic: bool, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 3, shape).astype(dtype)
    operands = {"x": x, "axis": np.array(axis)}
    found = run_node(op, operands, constant=["axis"], symbolic=symbolic, exclusive=exclusive, reverse=reverse)
    assert_equal(found, [expected(op, x, axis, exclusive, reverse)])


@pytest.mark.parametrize(("shape", "axis"), [((3, 2000), 1), ((2000, 37), 0), ((4, 50, 33), 1), ((3, 40, 700), 1)])
def test_long_lines(shape: tuple[int, ...], axis: int) -> None:
    """A running sum in the wide type: rounded once for each result, not at each step."""
    for dtype, tolerance in (("float32", 1e-4), ("float16", 1e-3)):
        x = np.random.default_rng(0).random(shape).astype(dtype)
        (found,) = run_node("CumSum", {"x": x, "axis": np.array(axis)}, constant=["axis"])
        np.testing.assert_allclose(found, expected("CumSum", x, axis, 0, 0), rtol=tolerance)


def test_a_scan_among_elementwise_operators_is_one_walk() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("CumSum", ["a", "axis"], ["b"]),
        helper.make_node("Sqrt", ["b"], ["y"]),
    ]
    x = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)
    model = model_of(nodes, {"x": x}, {"axis": np.array(1)}, ["y"])
    (found,) = compiled(model, {"x": x})
    np.testing.assert_allclose(found, np.sqrt(np.maximum(x, 0).cumsum(1)), rtol=1e-4)
    program = program_of(graph_of(model, Options()), resolve_target(None))
    for kernel in program.kernels.values():
        depth = [s for s in loops.walk(kernel.body) if isinstance(s, loops.For) and s.extent == 300]
        assert len(depth) <= 1, f"two loops over the axis:\n{kernel}"


def test_an_axis_that_is_an_input_is_compiled_when_it_is_known() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    model = model_of([helper.make_node("CumSum", ["x", "axis"], ["y"])], {"x": x, "axis": np.array(1)}, {}, ["y"])
    executable = onnxc.compile(model)
    for axis in (0, 1, -1):
        np.testing.assert_array_equal(executable(x, np.array(axis)), x.cumsum(axis))
