"""Graphs of operators between quantizations, drawn at random: exactly rewritten, they give the same bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxc.compiler.importer import import_model
from onnxc.ir.verify import verify_graph
from onnxc.passes.pipeline import parse_pipeline, run_pipeline
from pass_checks import agree

BEFORE = "canonicalize,fold{dequantize=False},cleanup"
TYPES = ("uint8", "int8")


@dataclass
class Drawing:
    """A model that grows: real tensors of rank 4 and their shapes."""

    draw: st.DrawFn
    nodes: list = field(default_factory=list)
    constants: list = field(default_factory=list)
    reals: list = field(default_factory=list)
    count: int = 0

    def constant(self, array: np.ndarray) -> str:
        self.count += 1
        self.constants.append(numpy_helper.from_array(np.asarray(array), f"c{self.count}"))
        return f"c{self.count}"

    def node(self, op: str, inputs: list[str], **attributes: object) -> str:
        self.count += 1
        self.nodes.append(helper.make_node(op, inputs, [f"v{self.count}"], **attributes))
        return f"v{self.count}"

    def parameters(self, dtype: str) -> list[str]:
        """One of a few scales, so that some pairs cancel, and a zero point."""
        scale = self.draw(st.sampled_from([0.02, 0.05, 0.013]))
        low = np.iinfo(dtype).min
        zero = self.draw(st.sampled_from([low, low + 128, low + 100]))
        return [self.constant(np.float32(scale)), self.constant(np.array(zero, dtype))]

    def quantized(self, x: str, again: bool = True) -> str:
        """The tensor quantized, and dequantized with the same parameters or others."""
        dtype = self.draw(st.sampled_from(TYPES))
        first = self.parameters(dtype)
        q = self.node("QuantizeLinear", [x, *first])
        if not again:
            return q
        return self.node("DequantizeLinear", [q, *(first if self.draw(st.booleans()) else self.parameters(dtype))])

    def step(self) -> None:
        """One more operator."""
        x, shape = self.draw(st.sampled_from(self.reals))
        op = self.draw(st.sampled_from(sorted(STEPS)))
        result = STEPS[op](self, x, shape)
        if result is not None:
            self.reals.append(result)
            if self.draw(st.booleans()):
                self.reals[-1] = (self.quantized(result[0]), result[1])


Real = tuple[str, tuple[int, ...]]


def transposed(d: Drawing, x: str, shape: tuple[int, ...]) -> Real:
    perm = d.draw(st.permutations(range(4)))
    return d.node("Transpose", [x], perm=perm), tuple(shape[axis] for axis in perm)


def reshaped(d: Drawing, x: str, shape: tuple[int, ...]) -> Real:
    split = d.draw(st.integers(1, 3))
    new = (1, math.prod(shape[:split]), math.prod(shape[split:]), 1)
    return d.node("Reshape", [x, d.constant(np.array(new))]), new


def joined(d: Drawing, x: str, shape: tuple[int, ...]) -> Real | None:
    fitting = [name for name, other in d.reals if other == shape]
    y = d.draw(st.sampled_from(fitting))
    if math.prod(shape) > 400:
        return None
    return d.node("Concat", [x, y], axis=1), (shape[0], 2 * shape[1], *shape[2:])


def added(d: Drawing, x: str, shape: tuple[int, ...]) -> Real:
    fitting = [name for name, other in d.reals if other == shape]
    return d.node("Add", [x, d.draw(st.sampled_from(fitting))]), shape


def padded(d: Drawing, x: str, shape: tuple[int, ...]) -> Real | None:
    if math.prod(shape) > 400:
        return None
    pads = np.array([0, 0, 1, 0, 0, 0, 0, 1])
    fill = [d.constant(np.float32(d.draw(st.sampled_from([0.0, 0.0, 0.7]))))] if d.draw(st.booleans()) else []
    mode = d.draw(st.sampled_from(["constant", "edge"]))
    return d.node("Pad", [x, d.constant(pads), *fill], mode=mode), (*shape[:2], shape[2] + 1, shape[3] + 1)


def sliced(d: Drawing, x: str, shape: tuple[int, ...]) -> Real | None:
    axis = d.draw(st.integers(0, 3))
    if shape[axis] < 2:
        return None
    bounds = [d.constant(np.array([n])) for n in (1, shape[axis], axis)]
    return d.node("Slice", [x, *bounds]), tuple(e - (a == axis) for a, e in enumerate(shape))


def gathered(d: Drawing, x: str, shape: tuple[int, ...]) -> Real:
    axis = d.draw(st.integers(0, 3))
    indices = d.draw(st.lists(st.integers(0, shape[axis] - 1), min_size=1, max_size=3))
    result = d.node("Gather", [x, d.constant(np.array(indices))], axis=axis)
    return result, tuple(len(indices) if a == axis else e for a, e in enumerate(shape))


def clipped(d: Drawing, x: str, shape: tuple[int, ...]) -> Real:
    bounds = d.draw(st.sampled_from([(0.0, 6.0), (-1.0, 1.0), (0.0, 20.0), (-30.0, 30.0)]))
    return d.node("Clip", [x, *(d.constant(np.float32(bound)) for bound in bounds)]), shape


def of_one(op: str, **attributes: object):  # type: ignore[no-untyped-def]
    return lambda d, x, shape: (d.node(op, [x], **attributes), shape)


STEPS = {
    "transpose": transposed, "reshape": reshaped, "join": joined, "add": added, "pad": padded,
    "slice": sliced, "gather": gathered, "clip": clipped, "relu": of_one("Relu"), "sigmoid": of_one("Sigmoid"),
    "negate": of_one("Neg"), "leak": of_one("LeakyRelu", alpha=0.1),
    "scale": lambda d, x, shape: (d.node("Mul", [x, d.constant(np.float32(0.37))]), shape),
    "most": lambda d, x, shape: (d.node("ReduceMax", [x, d.constant(np.array([2]))]), (*shape[:2], 1, shape[3])),
    "space": lambda d, x, shape: (d.node("DepthToSpace", [x], blocksize=1), shape),
}  # fmt: skip


@st.composite
def models(draw: st.DrawFn) -> ModelProto:
    """A chain of quantized operators with branches; what is quantized last is the result, with one real."""
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), 3, 4)
    d = Drawing(draw)
    d.reals.append(("x", shape))
    d.reals[0] = (d.quantized("x"), shape)
    for _ in range(draw(st.integers(1, 7))):
        d.step()
    results = [d.quantized(d.reals[-1][0], again=False), draw(st.sampled_from(d.reals))[0]]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(d.nodes, "g", [x], [onnx.ValueInfoProto(name=name) for name in results], d.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@settings(max_examples=30)
@given(models(), st.integers(0, 1000))
def test_exact_rewriting_gives_the_same_bytes(model: ModelProto, seed: int) -> None:
    before = run_pipeline(import_model(model), parse_pipeline(BEFORE))
    after = run_pipeline(before, parse_pipeline("quantization{exact=True}"))
    verify_graph(after)
    assert run_pipeline(after, parse_pipeline("quantization{exact=True}")) == after
    x = np.random.default_rng(seed).normal(size=[int(d) for d in before.inputs[0].shape]).astype(np.float32) * 4
    agree(before, after, inputs={"x": x})


def integers(draw: st.DrawFn, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    limits = np.iinfo(dtype)
    seed = draw(st.integers(0, 1000))
    return np.random.default_rng(seed).integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)


def scale_and_zero(draw: st.DrawFn, count: int | None, dtype: str) -> list[np.ndarray]:
    """One for all elements (of rank 0 or 1), or `count` of them."""
    shape = draw(st.sampled_from([(), (1,), *([] if count is None else [(count,)])]))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    scale = random.uniform(1e-3, 1e-1, shape).astype(np.float32)
    limits = np.iinfo(dtype)
    zero = random.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)
    return [scale, zero] if draw(st.booleans()) else [scale]


@st.composite
def products(draw: st.DrawFn) -> tuple[ModelProto, str]:
    """A product of dequantized operands with a bias, and what it becomes."""
    op = draw(st.sampled_from(["Conv", "MatMul", "Gemm"]))
    kinds = draw(st.sampled_from(TYPES)), draw(st.sampled_from(TYPES))
    d = Drawing(draw)
    attributes: dict[str, object] = {}
    if op == "Conv":
        group, rank = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
        filters = 2 * draw(st.integers(1, 2))
        x, w, columns, axis = (1, 2 * group, *(5,) * rank), (filters, 2, *(3,) * rank), filters, 0
        attributes = {"group": group, "pads": [1] * 2 * rank, "strides": [draw(st.sampled_from([1, 2]))] * rank}
    else:
        rows, depth, columns, axis = 3, draw(st.integers(1, 9)), draw(st.integers(2, 4)), -1
        x, w = (rows, depth), (depth, columns)
        if op == "Gemm":
            attributes = {name: draw(st.sampled_from([0, 1])) for name in ("transA", "transB")}
            x = x[::-1] if attributes["transA"] else x
            w, axis = (w[::-1], 0) if attributes["transB"] else (w, 1)
            attributes |= {name: draw(st.sampled_from([1.0, 0.5])) for name in ("alpha", "beta")}
        elif draw(st.booleans()):
            x = (2, *x)
    parameters = [scale_and_zero(draw, None, kinds[0]), scale_and_zero(draw, columns, kinds[1])]
    if op == "Conv" and len(x) == 3:  # the reference takes zero points of filters for images only
        parameters[1] = parameters[1][:1]
    inputs = [d.node("DequantizeLinear", ["x", *map(d.constant, parameters[0])])]
    weights = [d.constant(array) for array in (integers(draw, w, kinds[1]), *parameters[1])]
    inputs.append(d.node("DequantizeLinear", weights, axis=axis))
    if op != "MatMul" and draw(st.booleans()):
        scales = (parameters[0][0].reshape(()) * np.broadcast_to(parameters[1][0].reshape(-1), columns)).astype("f4")
        values = np.arange(-40, 40)[:columns].astype(np.int32) * 11
        inputs.append(d.node("DequantizeLinear", [d.constant(values), d.constant(scales)], axis=0))
    result = d.node(op, inputs, **attributes)
    kind = TensorProto.UINT8 if kinds[0] == "uint8" else TensorProto.INT8
    graph = helper.make_graph(
        d.nodes, "g", [helper.make_tensor_value_info("x", kind, x)], [onnx.ValueInfoProto(name=result)], d.constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model, "ConvInteger" if op == "Conv" else "MatMulInteger"


@settings(max_examples=30)
@given(products(), st.integers(0, 1000))
def test_products_of_integers_give_the_same_reals(case: tuple[ModelProto, str], seed: int) -> None:
    model, form = case
    before = run_pipeline(import_model(model), parse_pipeline(BEFORE))
    after = run_pipeline(before, parse_pipeline("quantization"))
    verify_graph(after)
    assert form in {node.op for node in after.nodes}
    value = before.inputs[0]
    low, high = value.dtype.limits
    shape = [int(extent) for extent in value.shape]
    x = np.random.default_rng(seed).integers(low, high, shape, endpoint=True).astype(value.dtype.numpy)
    agree(before, after, inputs={"x": x})
