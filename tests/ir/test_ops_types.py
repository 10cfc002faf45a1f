"""What declarations tell of results: symbolic shapes, ranges of indices, and errors that name what clashes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnxc.ir.dims import Dim, parse_dim, symbol
from onnxc.ir.dtypes import BOOL, BY_NAME, F32, I64
from onnxc.ir.errors import ShapeError, UnsupportedError
from onnxc.ir.graph import Graph, Node, TensorType, Type, Value, constant_node
from onnxc.ir.infer import Inference
from onnxc.ir.ops import REGISTRY
from onnxc.ir.ops.declare import Context
from onnxc.ir.scalars import Select, walk
from onnxc.ir.tensors import Tensor, buffer_tensor


def tensor(text: str, name: str = "x") -> Tensor:
    """A buffer of a type like "f32[n, 3, h, w]"."""
    dtype, _, extents = text.rstrip("]").partition("[")
    shape = [parse_dim(extent) for extent in extents.split(",") if extent.strip()]
    return buffer_tensor(name, BY_NAME[dtype], shape)


def results(op: str, operands: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
    given = [tensor(o, f"x{k}") if isinstance(o, str) else o for k, o in enumerate(operands)]
    found = REGISTRY[op](given, attributes, Context(("a", "b", "c")))
    return [t for t in found if isinstance(t, Tensor)]


def types(op: str, operands: list[Any], attributes: dict[str, Any]) -> str:
    return ", ".join(f"{t.dtype}[{', '.join(map(str, t.shape))}]" for t in results(op, operands, attributes))


n, h, w = symbol("n"), symbol("h"), symbol("w")
END = (1 << 63) - 1

TYPES: list[tuple[str, list[Any], dict[str, Any], str]] = [
    ("Reshape", ["f32[n, 6, h]", (0, -1)], {}, "f32[n, 6*h]"),
    ("Reshape", ["f32[n, 6*h]", (n, h, -1)], {}, "f32[n, h, 6]"),
    ("Reshape", ["f32[0, 4]", (0, 5)], {"allowzero": 1}, "f32[0, 5]"),
    ("Slice", ["f32[n, 8]", (-1,), (END,), (1,)], {}, "f32[n, 1]"),
    ("Slice", ["f32[n]", (-1,), (-END,), (0,), (-2,)], {}, "f32[floordiv(n+1, 2)]"),
    ("Slice", ["f32[n]", (-3,), (END,)], {}, "f32[min(3, n)]"),
    ("Slice", ["f32[2*n]", (n,), (2 * n,)], {}, "f32[n]"),
    ("Concat", ["f32[n, 3]", "f32[n, h]"], {"axis": -1}, "f32[n, h+3]"),
    ("Split", ["f32[n, 3*h]"], {"axis": 1, "num_outputs": 3}, "f32[n, h], f32[n, h], f32[n, h]"),
    ("Pad", ["f32[n, h]", (0, 1, 0, 2)], {}, "f32[n, h+3]"),
    ("Tile", ["f32[n, 2]", (1, 3)], {}, "f32[n, 6]"),
    ("Gather", ["f32[n, 5]", "i64[h, w]"], {"axis": 1}, "f32[n, h, w]"),
    ("Conv", ["f32[n, 3, h, w]", "f32[8, 3, 3, 3]"], {"pads": (1, 1, 1, 1)}, "f32[n, 8, h, w]"),
    ("Conv", ["f32[n, 3, h]", "f32[8, 3, 3]"], {"strides": (2,), "auto_pad": "SAME_LOWER"},
     "f32[n, 8, floordiv(h+1, 2)]"),
    ("ConvTranspose", ["f32[n, 3, h]", "f32[3, 4, 2]"], {"strides": (2,)}, "f32[n, 4, 2*h]"),
    ("MaxPool", ["f32[n, 3, 2*h]"], {"kernel_shape": (2,), "strides": (2,)}, "f32[n, 3, h], i64[n, 3, h]"),
    ("MatMul", ["f32[n, 1, 4, 5]", "f32[h, 5, w]"], {}, "f32[n, h, 4, w]"),
    ("MatMul", ["f16[5]", "f16[n, 5, w]"], {}, "f16[n, w]"),
    ("Einsum", ["f32[n, h, 4]", "f32[n, w, 4]"], {"equation": "bid,bjd->bij"}, "f32[n, h, w]"),
    ("ReduceMean", ["f32[n, h, w]", (-1, 1)], {"keepdims": 0}, "f32[n]"),
    ("ReduceSum", ["f32[n, h]"], {"noop_with_empty_axes": 1}, "f32[n, h]"),
    ("ArgMax", ["f32[n, h]"], {"axis": 1, "keepdims": 0}, "i64[n]"),
    ("Resize", ["f32[n, 3, h, w]", None, (1.0, 1.0, 2.0, 0.5)], {}, "f32[n, 3, 2*h, floordiv(w, 2)]"),
    ("Range", [(0,), (2 * n,), (2,)], {}, "i64[n]"),
    ("TopK", ["f32[n, h]", (3,)], {}, "f32[n, 3], i64[n, 3]"),
    ("NonZero", ["bool[n, h]"], {}, "i64[2, a_count]"),
    ("LSTM", ["f32[h, n, 4]", "f32[2, 32, 4]", "f32[2, 32, 8]"], {"direction": "bidirectional", "hidden_size": 8},
     "f32[h, 2, n, 8], f32[2, n, 8], f32[2, n, 8]"),
    ("LayerNormalization", ["f16[n, 4]", "f16[4]"], {}, "f16[n, 4], f32[n, 1], f32[n, 1]"),
    ("DynamicQuantizeLinear", ["f32[n]"], {}, "u8[n], f32[], u8[]"),
    ("DFT", ["f32[n, 8, 1]"], {"onesided": 1}, "f32[n, 5, 2]"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "operands", "attributes", "expected"), TYPES, ids=lambda value: str(value)[:40])
def test_types(op: str, operands: list[Any], attributes: dict[str, Any], expected: str) -> None:
    assert types(op, operands, attributes) == expected


ERRORS: list[tuple[str, list[Any], dict[str, Any], type[Exception], str]] = [
    ("MatMul", ["f32[2, 3]", "f32[4, 5]"], {}, ShapeError, "inner dimensions of the product: 3 and 4 differ"),
    ("Reshape", ["f32[2, 3]", (4, 2)], {}, ShapeError, "6 and 8 differ"),
    ("Reshape", ["f32[2, 3]", (-1, -1)], {}, ShapeError, "more than one -1"),
    ("Concat", ["f32[2, 3]", "f32[4, 3]"], {"axis": 1}, ShapeError, "axis 0 of parts 0 and 1.*2 and 4 differ"),
    ("Conv", ["f32[1, 4, 9]", "f32[8, 3, 3]"], {}, ShapeError, "channels.*4 and 3 differ"),
    ("Conv", ["f32[1, 3, 2]", "f32[8, 3, 3]"], {}, ShapeError, "window of 3 is larger than axis 0 of 2"),
    ("Transpose", ["f32[1, 2]"], {"perm": (0, 0)}, ShapeError, "no permutation"),
    ("Softmax", ["f32[1, 2]"], {"axis": 2}, ShapeError, "axis 2 is out of range for rank 2"),
    ("Slice", ["f32[4]", (0,), (1,), (0,), (0,)], {}, ShapeError, "step of axis 0 is 0"),
    ("Squeeze", ["f32[4, 2]", (1,)], {}, ShapeError, "2 and 1 differ"),
    ("Einsum", ["f32[4, 2]"], {"equation": "ijk->i"}, ShapeError, "'ijk'.*rank 2"),
    ("Gemm", ["f32[2, 3]", "f32[3, 4]", "f32[5]"], {}, ShapeError, r"\(5,\)|4 and 5|do not broadcast"),
    ("TopK", ["f32[4]", (9,)], {}, ShapeError, "9 elements wanted of axis 0 of extent 4"),
    ("Dropout", ["f32[4]", (0.5,), (True,)], {}, UnsupportedError, "training"),
    ("Resize", ["f32[1, 1, 4, 4]"], {}, ShapeError, "neither scales nor sizes"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "operands", "attributes", "error", "message"), ERRORS, ids=lambda v: str(v)[:40])
def test_errors(op: str, operands: list[Any], attributes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        results(op, operands, attributes)


def element(t: Tensor) -> str:
    return str(t.at([symbol(f"i{axis}", 0, extent - 1) for axis, extent in enumerate(t.shape)]))


ELEMENTS: list[tuple[str, list[Any], dict[str, Any], str]] = [
    ("Transpose", ["f32[n, h]"], {}, "x0[h*i1+i0]"),
    ("Resize", ["f32[1, 1, h, w]", None, (1.0, 1.0, 2.0, 2.0)], {}, "x0[floordiv(i2, 2)*w+floordiv(i3, 2)]"),
    ("Resize", ["f32[1, 1, h, w]", None, None, (1, 1, 2 * h, 2 * w)], {}, "x0[floordiv(i2, 2)*w+floordiv(i3, 2)]"),
    ("Softmax", ["f32[n]"], {},
     "(exp((x0[i0] - reduce_max(r0_0 < n: x0[r0_0]))) / "
     "reduce_add(r0_0 < n: exp((x0[r0_0] - reduce_max(r0_0 < n: x0[r0_0])))))"),
    ("Conv", ["f32[1, 1, h]", "f32[1, 1, 3]"], {}, "reduce_add(r0_1 < 3: (x0[i2+r0_1] * x1[r0_1]))"),
    ("AveragePool", ["f32[1, 1, h]"], {"kernel_shape": (2,)}, "(reduce_add(r0_0 < 2: x0[i2+r0_0]) / 2.0)"),
    ("ReduceSum", ["f32[n, 1]", (1,)], {}, "x0[i0]"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "operands", "attributes", "expected"), ELEMENTS, ids=lambda v: str(v)[:40])
def test_elements(op: str, operands: list[Any], attributes: dict[str, Any], expected: str) -> None:
    result = results(op, operands, attributes)[0]
    assert element(result) == expected


def gathered(inference: Inference, indices: Value) -> Tensor:
    x = Value("x", TensorType(F32, (n, 10)))
    found = inference.definition("Gather", [x, indices], {"axis": 1})[0]
    assert isinstance(found, Tensor)
    return found


def test_gather_trusts_only_indices_it_knows() -> None:
    indices = Value("indices", TensorType(I64, (4,)))
    known = Inference()
    known.define(indices, np.array([0, 3, 9, 2]))
    assert element(gathered(known, indices)) == "x[[indices[i1]]+10*i0]"
    unknown = gathered(Inference(), indices)
    parts = list(walk(unknown.at([symbol("i0", 0, n - 1), symbol("i1", 0, 3)])))
    assert any(isinstance(part, Select) for part in parts), "a negative index counts from the end"
    assert "min(max(" in element(unknown), "an index outside of the axis must not read outside of the memory"


def test_ranges_of_indices_pass_through_movement() -> None:
    inference = Inference()
    x = Value("x", TensorType(F32, (3, 10)))
    inference.outputs("ArgMax", [x], {"axis": 1, "keepdims": 1}, output_names=["best"])
    best = Value("best", TensorType(I64, (3, 1)))
    inference.outputs("Reshape", [best], {"shape": (3,)}, output_names=["flat"])
    assert inference.ranges["flat"] == (0, 9)
    flat = Value("flat", TensorType(I64, (3,)))
    assert element(gathered(inference, flat)) == "x[[flat[i1]]+10*i0]"


def body(name: str, inputs: list[Value], outputs: list[Value], nodes: list[Node]) -> Graph:
    return Graph(name, tuple(inputs), tuple(outputs), tuple(nodes))


def value(name: str, *shape: Dim, dtype: Any = F32) -> Value:
    return Value(name, TensorType(dtype, shape))


def control(op: str, inputs: list[Value | None], regions: dict[str, Graph], **attributes: Any) -> list[str]:
    known: list[Type | None] = [None if v is None else v.type for v in inputs]
    contents: tuple[Any, ...] = tuple((7,) if v is not None and v.name == "seven" else None for v in inputs)
    context = Context(("y",), regions, tuple(known), contents)
    return [str(found) for found in REGISTRY[op](inputs, attributes, context)]


def test_if_keeps_the_sizes_on_which_its_branches_agree() -> None:
    a, b, condition = value("a", n, 4), value("b", n, h), value("condition", dtype=BOOL)
    regions = {"then_branch": body("then", [], [a], []), "else_branch": body("else", [], [b], [])}
    assert control("If", [condition], regions) == ["f32[n, y_size1]"]
    regions["else_branch"] = body("else", [], [value("c", 4)], [])
    with pytest.raises(UnsupportedError, match=r"rank of output 0.*f32\[n, 4\] or f32\[4\]"):
        control("If", [condition], regions)


def loop_body(always: bool) -> Graph:
    trip, go_on, state = value("trip", dtype=I64), value("go_on", dtype=BOOL), value("state", n, symbol("grows"))
    true = constant_node("true", np.array(True), TensorType(BOOL, ()))
    grown = Node("Concat", (state, state), (value("grown", n, 2 * symbol("grows")),), {"axis": 1})
    scanned = value("scanned", n)
    row = Node("ReduceSum", (state,), (scanned,), {"axes": (1,), "keepdims": 0})
    leaves = true.output if always else value("other", dtype=BOOL)
    return body("body", [trip, go_on, state], [leaves, grown.output, scanned], [true, grown, row])


def test_loop_stacks_as_many_results_as_it_has_iterations() -> None:
    start = value("start", n, 1)
    regions = {"body": loop_body(always=True)}
    assert control("Loop", [value("seven", dtype=I64), None, start], regions) == ["f32[n, y_size1]", "f32[7, n]"]
    regions = {"body": loop_body(always=False)}
    found = control("Loop", [value("seven", dtype=I64), None, start], regions)
    assert found == ["f32[n, y_size1]", "f32[y_size2, n]"]


def test_scan_stacks_along_the_given_axis() -> None:
    state, item = value("state", 3), value("item", 3)
    total = Node("Add", (state, item), (value("total", 3),))
    regions = {"body": body("body", [state, item], [total.output, total.output], [total])}
    operands = [value("start", 3), value("items", n, 3)]
    assert control("Scan", operands, regions, num_scan_inputs=1) == ["f32[3]", "f32[n, 3]"]
    assert control("Scan", operands, regions, num_scan_inputs=1, scan_output_axes=(1,)) == ["f32[3]", "f32[3, n]"]
