"""Attention as exporters of frameworks spell it, found and run on the emulator, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cuda_lowered import run_program
from emulator import harness
from onnx import TensorProto, helper, numpy_helper
from onnxc.backends.cuda.source import render_kernel
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options, target_of

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="the emulator needs g++")

LEAST = float(np.finfo(np.float32).min)
WIDTH = 16
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Shape = list[Any]


class Builder:
    """Nodes of a model one after the other; numbers and arrays as operands become constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def operand(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        dtype = np.float32 if np.asarray(value).dtype.kind == "f" else None
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), f"c{len(self.constants)}"))
        return self.constants[-1].name

    def __call__(self, op: str, *operands: Any, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{op}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, [self.operand(value) for value in operands], names, **attributes))
        return names if outputs > 1 else names[0]

    def result(self, value: str, name: str) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))

    def weights(self, *shape: int) -> np.ndarray:
        return self.random.normal(size=shape) / np.sqrt(shape[0])

    def size(self, value: str, axis: int) -> str:
        """The extent of an axis, as a vector of one element."""
        return self("Unsqueeze", self("Gather", self("Shape", value), axis, axis=0), [0])

    def heads(self, value: str, heads: int, perm: tuple[int, ...] = (0, 2, 1, 3)) -> str:
        """[batch, length, heads * WIDTH] with the heads as an axis in front, by sizes found at run time."""
        shape = self("Concat", self.size(value, 0), self.size(value, 1), [heads], [WIDTH], axis=0)
        return self("Transpose", self("Reshape", value, shape), perm=perm)

    def joined(self, heads: str) -> str:
        return self("Reshape", self("Transpose", heads, perm=[0, 2, 1, 3]), [0, 0, -1])

    def model(self, inputs: dict[str, Shape], outputs: dict[str, Shape | None]) -> onnx.ModelProto:
        kinds = {"mask": INT64}
        declared = [helper.make_tensor_value_info(n, kinds.get(n, FLOAT), shape) for n, shape in inputs.items()]
        results = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs.items()]
        graph = helper.make_graph(self.nodes, "g", declared, results, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def encoder() -> onnx.ModelProto:
    """A padding mask of integers, made a bias; scores divided."""
    g, heads, width = Builder(), 3, 3 * WIDTH
    q, k, v = (g("Add", g("MatMul", "x", g.weights(width, width)), g.weights(width)) for _ in range(3))
    mask = g("Cast", g("Unsqueeze", g("Unsqueeze", "mask", [1]), [2]), to=FLOAT)
    bias = g("Mul", g("Sub", 1.0, mask), LEAST)
    products = g("MatMul", g.heads(q, heads), g.heads(k, heads, (0, 2, 3, 1)))
    weights = g("Softmax", g("Add", g("Div", products, float(np.sqrt(WIDTH))), bias), axis=-1)
    g.result(g.joined(g("MatMul", weights, g.heads(v, heads))), "y")
    return g.model({"x": ["b", "l", width], "mask": ["b", "l"]}, {"y": ["b", "l", width]})


def decoder_with_buffer() -> onnx.ModelProto:
    """Queries, keys and values from one product; what is seen is cut out of a constant triangle."""
    g, heads, width = Builder(), 3, 3 * WIDTH
    parts = g("Split", g("MatMul", "x", g.weights(width, 3 * width)), [width] * 3, outputs=3, axis=2)
    q, k, v = (g.heads(part, heads) for part in parts)
    k, v = g("Concat", "past_k", k, axis=2), g("Concat", "past_v", v, axis=2)
    keys, queries = g.size(k, 2), g.size(q, 2)
    seen = g("Slice", np.tri(64, dtype=bool).reshape(1, 1, 64, 64), g("Sub", keys, queries), keys, [2])
    seen = g("Slice", seen, [0], keys, [3])
    products = g("Div", g("MatMul", q, g("Transpose", k, perm=[0, 1, 3, 2])), float(np.sqrt(WIDTH)))
    weights = g("Softmax", g("Where", seen, products, LEAST), axis=-1)
    g.result(g.joined(g("MatMul", weights, v)), "y")
    g.result(k, "k")
    g.result(v, "v")
    past = ["b", heads, "p", WIDTH]
    inputs: dict[str, Shape] = {"x": ["b", "l", width], "past_k": past, "past_v": past}
    return g.model(inputs, {"y": ["b", "l", width], "k": None, "v": None})


def grouped_decoder(padded: bool) -> onnx.ModelProto:
    """Fewer heads of keys, repeated; a mask by positions times a triangle; both operands scaled; rows without a score
    made zero."""
    g, heads, groups, width = Builder(), 4, 2, 4 * WIDTH
    q, k, v = (g.heads(g("MatMul", "x", g.weights(width, n * WIDTH)), n) for n in (heads, groups, groups))
    k, v = g("Concat", "past_k", k, axis=2), g("Concat", "past_v", v, axis=2)
    g.result(k, "k")
    g.result(v, "v")
    b, queries, keys, past = g.size("x", 0), g.size("x", 1), g.size(k, 2), g.size("past_k", 2)
    wide = g("Concat", b, [groups], [heads // groups], keys, [WIDTH], axis=0)
    flat = g("Concat", b, [heads], keys, [WIDTH], axis=0)
    k, v = (g("Reshape", g("Expand", g("Unsqueeze", part, [2]), wide), flat) for part in (k, v))
    bias = g("Trilu", g("Expand", LEAST, g("Concat", queries, keys, axis=0)), 1, upper=1)
    places = g("Range", g("Squeeze", past), g("Squeeze", g("Add", past, queries)), 1)
    late = g("Greater", g("Range", 0, g("Squeeze", keys), 1), g("Reshape", places, [-1, 1]))
    bias = g("Unsqueeze", g("Mul", bias, g("Cast", late, to=FLOAT)), [0, 1])
    if padded:
        there = g("Cast", g("Unsqueeze", "mask", [1, 2]), to=FLOAT)
        bias = g("Where", g("Equal", g("Add", bias, there), 0.0), LEAST, bias)
    root = float(WIDTH**-0.25)
    scores = g("MatMul", g("Mul", q, root), g("Mul", g("Transpose", k, perm=[0, 1, 3, 2]), root))
    weights = g("Softmax", g("Add", scores, bias), axis=-1)
    weights = g("Where", g("IsNaN", weights), 0.0, weights)
    g.result(g.joined(g("MatMul", weights, v)), "y")
    shape = ["b", groups, "p", WIDTH]
    inputs: dict[str, Shape] = {"x": ["b", "l", width], "past_k": shape, "past_v": shape}
    inputs |= {"mask": ["b", "s"]} if padded else {}
    return g.model(inputs, {"y": ["b", "l", width], "k": None, "v": None})


def windows() -> onnx.ModelProto:
    """Windows of images: parts of one tensor, a bias of each head, masks of windows that share a batch axis."""
    g, heads, count, length = Builder(), 2, 4, 16
    width = heads * WIDTH
    both = g("Reshape", g("MatMul", "x", g.weights(width, 3 * width)), [0, 0, 3, heads, WIDTH])
    both = g("Transpose", both, perm=[2, 0, 3, 1, 4])
    q, k, v = (g("Gather", both, number, axis=0) for number in range(3))
    scores = g("MatMul", g("Mul", q, WIDTH**-0.5), g("Transpose", k, perm=[0, 1, 3, 2]))
    scores = g("Add", scores, g.weights(1, heads, length, length))
    scores = g("Add", g("Reshape", scores, [-1, count, heads, length, length]), "bias")
    weights = g("Softmax", g("Reshape", scores, [-1, heads, length, length]), axis=-1)
    g.result(g.joined(g("MatMul", weights, v)), "y")
    inputs: dict[str, Shape] = {"x": ["w", length, width], "bias": [1, count, 1, length, length]}
    return g.model(inputs, {"y": ["w", length, width]})


def batched_products() -> onnx.ModelProto:
    """Heads and batch in one axis, but for the bias."""
    g, heads, width = Builder(), 3, 3 * WIDTH

    def folded(value: str) -> str:
        shape = g("Concat", [-1], g.size(value, 1), [WIDTH], axis=0)
        return g("Reshape", g.heads(value, heads), shape)

    q, k, v = (folded(g("MatMul", "x", g.weights(width, width))) for _ in range(3))
    products = g("MatMul", q, g("Transpose", k, perm=[0, 2, 1]))
    b, length = g.size("x", 0), g.size("x", 1)
    four = g("Concat", b, [heads], length, length, axis=0)
    scores = g("Add", g("Reshape", products, four), "bias")
    weights = g("Softmax", g("Reshape", scores, g("Concat", [-1], length, length, axis=0)), axis=-1)
    result = g("Reshape", g("MatMul", weights, v), g("Concat", b, [heads], length, [WIDTH], axis=0))
    g.result(g.joined(result), "y")
    return g.model({"x": ["b", "l", width], "bias": ["b", 1, "l", "l"]}, {"y": ["b", "l", width]})


MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], bool]] = {
    "encoder": (encoder, False),
    "decoder with a buffer": (decoder_with_buffer, True),
    "grouped decoder": (lambda: grouped_decoder(False), True),
    "grouped decoder, padded": (lambda: grouped_decoder(True), False),
    "windows": (windows, False),
    "batched products": (batched_products, False),
}
"""Models, and whether tiles of hidden scores are known to be that."""
SIZES = (
    {"b": 2, "l": 9, "p": 0, "s": 9, "w": 8},
    {"b": 1, "l": 1, "p": 12, "s": 13, "w": 4},
    {"b": 1, "l": 20, "p": 30, "s": 50, "w": 4},
)


def inputs_of(model: onnx.ModelProto, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    found: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        shape = [sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim]
        found[value.name] = random.normal(size=shape).astype(np.float32)
        if value.name == "mask":
            found[value.name] = (random.random(shape) < 0.7).astype(np.int64)
    return found


@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize("name", MODELS)
def test_exported_attention(name: str, precision: str) -> None:
    make, hides = MODELS[name]
    model = make()
    options = Options(target="cuda:sm_90", precision=precision)
    graph = graph_of(model, options)
    assert sum(node.op == "onnxc.Attention" for node in graph.walk()) == 1
    assert not any(node.op in ("Softmax", "IsNaN") for node in graph.walk())
    program = program_of(graph, target_of(options))
    (kernel,) = (kernel for kernel in program.kernels.values() if kernel.name.startswith("attention"))
    end = next(line for line in render_kernel(kernel).splitlines() if "end_turn = " in line)
    assert ("first_query" in end) == hides
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for sizes in SIZES:
        inputs = inputs_of(model, sizes)
        results = run_program(program, [inputs[value.name] for value in program.inputs])
        for expected, actual in zip(session.run(None, inputs), results, strict=True):
            top = np.abs(expected).max(initial=1e-30)
            np.testing.assert_allclose(actual, expected, rtol=0, atol={"f32": 1e-5, "f16": 5e-3}[precision] * top)
