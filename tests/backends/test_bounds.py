"""Indices and sizes that only the run tells: what cannot be is raised with the node's name, on every target."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from onnx import helper
from onnxc.compiler.native import FIRST_CHECK, write_native
from single_node import Array, model_of

X = np.arange(24, dtype=np.float32).reshape(4, 6)
IMAGES = np.arange(32, dtype=np.float32).reshape(2, 1, 4, 4)
ROIS = np.array([[0, 0, 2, 2], [1, 1, 3, 3]], np.float32)


def i64(*values: Any) -> Array:
    return np.array(values, np.int64)


CASES: dict[str, tuple[str, dict[str, Array], str, Array, int, dict[str, Any]]] = {
    # name: operator, operands, the one that indexes, what it must not be, the number to be named, attributes
    "gather": ("Gather", {"x": X, "i": i64(0, 3, -4)}, "i", i64(0, 4, -4), 4, {}),
    "gather_below": ("Gather", {"x": X, "i": i64(0, 3, -4)}, "i", i64(0, -5, 0), -5, {}),
    "gather_axis": ("Gather", {"x": X, "i": i64([5, -6])}, "i", i64([5, 6]), 6, {"axis": 1}),
    "gather_i32": ("Gather", {"x": X, "i": np.int32([3])}, "i", np.int32([1 << 30]), 1 << 30, {}),
    "gather_scalar": ("Gather", {"x": X, "i": np.array(3)}, "i", np.array(-9), -9, {}),
    "gather_elements": ("GatherElements", {"x": X, "i": i64([0, -1], [1, 5])}, "i", i64([0, -1], [1, 6]), 6,
                        {"axis": 1}),
    "gather_nd": ("GatherND", {"x": X, "i": i64([0, 5], [-4, -6])}, "i", i64([0, 5], [3, -7]), -7, {}),
    "gather_nd_batch": ("GatherND", {"x": X, "i": i64([5], [0], [-6], [1])}, "i", i64([5], [0], [6], [1]), 6,
                        {"batch_dims": 1}),
    "scatter_elements": ("ScatterElements", {"x": X, "i": i64([3, -4]), "u": X[:1, :2]}, "i", i64([4, 0]), 4, {}),
    "scatter_nd": ("ScatterND", {"x": X, "i": i64([3], [-4]), "u": X[:2]}, "i", i64([3], [-5]), -5, {}),
    "scatter_nd_add": ("ScatterND", {"x": X, "i": i64([3, 5]), "u": X[0, :1]}, "i", i64([3, 6]), 6,
                       {"reduction": "add"}),
    "reverse_sequence": ("ReverseSequence", {"x": X, "i": i64(4, 1, 2, 3, 0, 4)}, "i", i64(4, 1, 2, 3, 0, 5), 5,
                         {"time_axis": 0, "batch_axis": 1}),
    "tensor_scatter": ("TensorScatter", {"x": X[None], "u": X[None, :2], "i": i64(2)}, "i", i64(3), 3, {"axis": 1}),
    "max_unpool": ("MaxUnpool", {"x": IMAGES[:1, :, :2, :2], "i": i64([[[5, 7], [13, 15]]])}, "i",
                   i64([[[5, 7], [13, 16]]]), 16, {"kernel_shape": [2, 2], "strides": [2, 2]}),
    "roi_align": ("RoiAlign", {"x": IMAGES, "r": ROIS, "i": i64(0, 1)}, "i", i64(0, 2), 2, {}),
    "max_roi_pool": ("MaxRoiPool", {"x": IMAGES, "i": np.hstack([np.float32([[0], [1]]), ROIS])}, "i",
                     np.hstack([np.float32([[0], [7]]), ROIS]), 7, {"pooled_shape": [2, 2]}),
}  # fmt: skip


def case_of(name: str) -> tuple[onnx.ModelProto, Mapping[str, Array], Mapping[str, Array], int]:
    """The model, operands that are fine, operands that are not, and the number that must be named."""
    op, operands, which, bad, number, attributes = CASES[name]
    node = helper.make_node(op, list(operands), ["y"], name="the node", **attributes)
    return model_of([node], operands, {}, ["y"]), operands, {**operands, which: bad}, number


@pytest.mark.parametrize("name", CASES)
def test_an_index_out_of_range_is_raised(name: str) -> None:
    model, good, bad, number = case_of(name)
    executable = onnxc.compile(model)
    before = executable.run(good)["y"]
    for _ in range(2):
        with pytest.raises(onnxc.IndexRangeError, match=re.escape(f'the node"): index {number} is out of range')):
            executable.run(bad)
        np.testing.assert_array_equal(executable.run(good)["y"], before)


@pytest.mark.parametrize("name", ["gather", "gather_nd", "scatter_elements", "scatter_nd", "max_unpool", "roi_align"])
def test_on_a_gpu(name: str, gpu: None) -> None:
    model, good, bad, number = case_of(name)
    executable = onnxc.compile(model, target="cuda")
    before = executable.run(good)["y"]
    for _ in range(3):  # launched, then recorded as a graph, then by the graph
        with pytest.raises(onnxc.IndexRangeError, match=f"index {number} is out of range"):
            executable.run(bad)
        np.testing.assert_array_equal(executable.run(good)["y"], before)


def refused(model: onnx.ModelProto, operands: Mapping[str, Array]) -> str:
    """The message of what a run raises."""
    with pytest.raises(onnxc.IndexRangeError) as error:
        onnxc.compile(model).run(operands)
    return str(error.value)


def test_symbolic_sizes() -> None:
    node = helper.make_node("Gather", ["x", "i"], ["y"], name="pick")
    model = model_of([node], {"x": X, "i": i64(0)}, {}, ["y"], symbolic=True)
    executable = onnxc.compile(model)
    assert executable(X, i64(0, -4, 3)).shape == (3, 6)
    assert executable(X, i64()).shape == (0, 6)
    with pytest.raises(onnxc.IndexRangeError, match='Gather \\("pick"\\): index 4 is out of range for an axis of 4'):
        executable(X, i64(0, 4))
    assert executable(np.vstack([X, X]), i64(4)).shape == (1, 6)
    with pytest.raises(IndexError):
        executable(X[:0], i64(0))
    many = np.zeros(100_000, np.int64)
    assert executable(X, many).shape == (100_000, 6)
    many[77_777] = -5
    with pytest.raises(onnxc.IndexRangeError, match="index -5"):
        executable(X, many)


def test_what_is_proved_is_not_checked() -> None:
    """Constants in range, positions that another operator finds, and sizes: such programs have no records."""

    def checks(*nodes: onnx.NodeProto, constants: Mapping[str, Array]) -> tuple[str, ...]:
        return onnxc.compile(model_of(nodes, {"x": X}, constants, ["y"])).compiled.checks

    gather = helper.make_node("Gather", ["x", "i"], ["y"])
    assert checks(gather, constants={"i": i64(3, -4)}) == ()
    assert checks(helper.make_node("ArgMax", ["x"], ["i"], axis=0, keepdims=0), gather, constants={}) == ()
    assert checks(helper.make_node("Relu", ["x"], ["y"]), constants={}) == ()
    top = [
        helper.make_node("TopK", ["x", "k"], ["v", "i"], axis=0),
        helper.make_node("GatherElements", ["x", "i"], ["y"]),
    ]
    assert checks(*top, constants={"k": i64(2)}) == ()
    whole = {"c": np.array(3, np.int64), "zero": np.array(0, np.int64), "i32": np.array(4, np.int32)}
    floats = helper.make_node("Cast", ["x"], ["j"], to=onnx.TensorProto.INT64)
    for between in (
        helper.make_node("Mod", ["j", "c"], ["i"]),
        helper.make_node("Clip", ["j", "zero", "c"], ["i"]),
        helper.make_node("Clip", ["j", "minus", "c"], ["i"]),
    ):
        assert checks(floats, between, gather, constants={**whole, "minus": np.array(-4, np.int64)}) == ()
        assert (
            len(
                checks(
                    floats,
                    between,
                    gather,
                    constants={**whole, "c": np.array(5, np.int64), "minus": np.array(-4, np.int64)},
                )
            )
            == 1
        )
    small = helper.make_node("Cast", ["x"], ["u"], to=onnx.TensorProto.UINT8)
    nodes = [small, helper.make_node("Cast", ["u"], ["i"], to=onnx.TensorProto.INT64), gather]
    assert len(checks(*nodes, constants={})) == 1
    nodes[2:] = [helper.make_node("Gather", ["table", "i"], ["y"])]
    assert checks(*nodes, constants={"table": np.zeros((256, 2), np.float32)}) == ()
    assert len(checks(*nodes, constants={"table": np.zeros((255, 2), np.float32)})) == 1
    cast = [helper.make_node("Cast", ["x"], ["i"], to=onnx.TensorProto.INT64), gather]
    assert len(checks(*cast, constants={})) == 1


def test_constants_out_of_range_do_not_compile() -> None:
    for index in (i64(0, 4), np.array(-5), i64(99)):
        model = model_of([helper.make_node("Gather", ["x", "i"], ["y"], name="pick")], {"x": X}, {"i": index}, ["y"])
        with pytest.raises(onnxc.IndexRangeError, match=r'Gather \("pick"\): index (4|-5|99) is out of range'):
            onnxc.compile(model)
    nodes = [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Gather", ["s", "i"], ["y"], name="size")]
    with pytest.raises(onnxc.IndexRangeError, match='"size"'):
        onnxc.compile(model_of(nodes, {"x": X}, {"i": i64(2)}, ["y"]))


def test_a_constant_and_a_symbolic_axis() -> None:
    nodes = [helper.make_node("Gather", ["x", "i"], ["y"], name="pick")]
    for index in (i64(1, 5), i64(5), np.array(-6)):
        executable = onnxc.compile(model_of(nodes, {"x": X}, {"i": index}, ["y"], symbolic=True))
        assert executable(np.vstack([X, X])) is not None
        with pytest.raises(onnxc.IndexRangeError, match="pick"):
            executable(X)


def test_indices_that_the_group_computes() -> None:
    nodes = [
        helper.make_node("Add", ["i", "one"], ["j"]),
        helper.make_node("Gather", ["x", "j"], ["g"], name="pick"),
        helper.make_node("Exp", ["g"], ["y"]),
    ]
    model = model_of(nodes, {"x": X, "i": i64(0)}, {"one": i64(1)}, ["y"], symbolic=True)
    executable = onnxc.compile(model)
    np.testing.assert_allclose(executable(X / 9, i64(2)), np.exp(X[3:] / 9), rtol=1e-6)
    with pytest.raises(onnxc.IndexRangeError, match=r'"pick".*index 4'):
        executable(X, i64(3))


def test_index_tuples_that_the_group_computes() -> None:
    nodes = [
        helper.make_node("Add", ["i", "one"], ["j"]),
        helper.make_node("GatherND", ["x", "j"], ["y"], name="pick"),
    ]
    executable = onnxc.compile(model_of(nodes, {"x": X, "i": i64([0, 0], [0, 0])}, {"one": i64(1)}, ["y"]))
    np.testing.assert_array_equal(executable(X, i64([2, 4], [-2, -2])), [X[3, 5], X[-1, -1]])
    for wrong in (i64([0, 0], [3, 0]), i64([0, 0], [0, 5])):
        with pytest.raises(onnxc.IndexRangeError, match=r'"pick".*index (4|6)'):
            executable(X, wrong)


def test_in_a_branch_only_what_is_run_is_checked() -> None:
    for constant in (False, True):

        def branch(name: str, index: int, constant: bool = constant) -> onnx.GraphProto:
            result = helper.make_empty_tensor_value_info(f"{name}_y")
            nodes = [helper.make_node("Gather", ["x", f"{name}_i"], [f"{name}_y"], name=f"{name}_pick")]
            here = [onnx.numpy_helper.from_array(i64(index), f"{name}_i")]
            if not constant:
                nodes.insert(0, helper.make_node("Add", ["zero", f"{name}_c"], [f"{name}_i"]))
                here[0].name = f"{name}_c"
            return helper.make_graph(nodes, name, [], [result], here)

        node = helper.make_node("If", ["c"], ["y"], then_branch=branch("then", 9), else_branch=branch("else", 1))
        model = model_of([node], {"x": X, "c": np.array(False), "zero": i64(0)}, {}, ["y"])
        executable = onnxc.compile(model)
        np.testing.assert_array_equal(executable(X, np.array(False), i64(0)), X[1:2])
        with pytest.raises(onnxc.IndexRangeError, match='"then_pick"'):
            executable(X, np.array(True), i64(0))


def test_the_first_fault_is_named() -> None:
    nodes = [
        helper.make_node("Gather", ["x", "i"], ["a"], name="first"),
        helper.make_node("Gather", ["a", "j"], ["y"], name="second", axis=1),
    ]
    model = model_of(nodes, {"x": X, "i": i64(0), "j": i64(0)}, {}, ["y"])
    assert '"first"' in refused(model, {"x": X, "i": i64(9), "j": i64(9)})
    assert '"second"' in refused(model, {"x": X, "i": i64(1), "j": i64(9)})


SIZES: dict[str, tuple[str, dict[str, Array], Array]] = {
    "reshape": ("Reshape", {"x": X, "s": i64(6, 4)}, i64(5, 5)),
    "reshape_negative": ("Reshape", {"x": X, "s": i64(6, 4)}, i64(-6, -4)),
    "constant_of_shape": ("ConstantOfShape", {"s": i64(2, 3)}, i64(-2, -3)),
    "expand": ("Expand", {"x": X[:1], "s": i64(5, 6)}, i64(-5, 6)),
    "expand_clash": ("Expand", {"x": X, "s": i64(4, 6)}, i64(3, 6)),
    "tile": ("Tile", {"x": X, "s": i64(2, 1)}, i64(-2, -1)),
    "top_k": ("TopK", {"x": X, "s": i64(3)}, i64(7)),
    "top_k_negative": ("TopK", {"x": X, "s": i64(3)}, i64(-1)),
    "col2im": ("Col2Im", {"x": np.ones((1, 5, 5), np.float32), "im": i64(5, 5), "s": i64(1, 5)}, i64(0, 5)),
    "split": ("Split", {"x": X.T.copy(), "s": i64(2, 4)}, i64(4, 4)),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_cannot_be(name: str) -> None:
    op, operands, bad = SIZES[name]
    outputs = ["y", "z"] if op in ("TopK", "Split") else ["y"]
    model = model_of([helper.make_node(op, list(operands), outputs, name="the node")], operands, {}, outputs)
    executable = onnxc.compile(model)
    executable.run(operands)
    with pytest.raises(onnxc.ShapeError) as error:
        executable.run({**operands, "s": bad})
    if isinstance(error.value, onnxc.IndexRangeError):
        assert f'{op} ("the node"): ' in str(error.value)
    executable.run(operands)


def picking() -> onnx.ModelProto:
    node = helper.make_node("Gather", ["x", "i"], ["y"], name="pick")
    return model_of([node], {"x": X, "i": i64(0)}, {}, ["y"], symbolic=True)


def test_an_artifact_holds_the_messages(tmp_path: Path) -> None:
    executable = onnxc.load(onnxc.compile(picking()).save(tmp_path / "pick.onnxc"))
    np.testing.assert_array_equal(executable(X, i64(-1)), X[3:])
    with pytest.raises(onnxc.IndexRangeError, match=r'Gather \("pick"\): index 9 is out of range for an axis of 4'):
        executable(X, i64(9))


def test_native_code_returns_the_number_of_the_check(tmp_path: Path) -> None:
    library, header = write_native(onnxc.compile(picking()).compiled, tmp_path / "pick.so")
    assert f'{FIRST_CHECK}: Gather ("pick"): index (value) is out of range for an axis of (limit)' in header.read_text()
    run = ctypes.CDLL(str(library)).pick_run
    found = np.zeros((2, 6), np.float32)
    sizes = (ctypes.c_int64 * 3)(4, 6, 2)
    for index, status in ((i64(3, -4), 0), (i64(3, 4), FIRST_CHECK), (i64(-5, 0), FIRST_CHECK), (i64(3, -4), 0)):
        inputs = (ctypes.c_void_p * 2)(X.ctypes.data, index.ctypes.data)
        assert run(inputs, (ctypes.c_void_p * 1)(found.ctypes.data), sizes, None, 1) == status
    np.testing.assert_array_equal(found, X[[3, 0]])


def test_calls_from_several_threads() -> None:
    """Each call has records of its own."""
    executable = onnxc.compile(picking())

    def call(number: int) -> bool:
        for _ in range(200):
            try:
                executable(X, i64(number % 8))
            except onnxc.IndexRangeError:
                assert number % 8 >= 4
            else:
                assert number % 8 < 4
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(8)))


def test_arrays_that_stay_on_a_gpu(gpu: None) -> None:
    """Nothing waits for such a call: its error comes with the content, or with the next call."""
    executable = onnxc.compile(picking(), target="cuda")
    x = executable.run({"x": X, "i": i64(0, 1, 2, 3)}, on_device=True)["y"]
    wrong = executable(x, i64(4))
    with pytest.raises(onnxc.IndexRangeError, match='"pick"'):
        wrong.numpy()
    np.testing.assert_array_equal(executable(x, i64(1)).numpy(), X[1:2])
    wrong = executable(x, i64(-5))
    with wrong.device:
        wrong.stream.pycuda.synchronize()
    with pytest.raises(onnxc.IndexRangeError, match='"pick"'):
        executable(x, i64(1))
    np.testing.assert_array_equal(executable(x, i64(1)).numpy(), X[1:2])
