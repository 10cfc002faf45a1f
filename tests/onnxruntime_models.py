"""Small models in the spelling that ONNX Runtime's optimizer looks for, and what it makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from single_node import Array

BATCH, LENGTH, HIDDEN, HEADS, WORDS = 2, 8, 32, 4, 40


class Graph:
    """Collects nodes and weights; every method gives the name of its result."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def __call__(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{op.lower()}_{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, f"{op}_{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: Any, dtype: Any = None) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def weight(self, *shape: int, scale: float = 0.3) -> str:
        return self.constant(self.random.standard_normal(shape) * scale, np.float32)

    def linear(self, x: str, width: int, depth: int) -> str:
        return str(self("Add", self("MatMul", x, self.weight(depth, width)), self.weight(width)))

    def normal(self, x: str, width: int) -> str:
        scale = self.constant(1 + self.random.standard_normal(width) / 9, np.float32)
        return str(self("LayerNormalization", x, scale, self.weight(width), axis=-1, epsilon=1e-5))

    def model(self, inputs: Mapping[str, tuple[int, list[Any]]], outputs: Mapping[str, list[Any]]) -> onnx.ModelProto:
        def values(types: Mapping[str, tuple[int, list[Any]]]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in types.items()]

        results = values({name: (TensorProto.FLOAT, shape) for name, shape in outputs.items()})
        graph = helper.make_graph(self.nodes, "small", values(inputs), results, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def bert() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Embeddings and one layer of an encoder, with the mask of BERT."""
    g = Graph()
    words = g("Gather", g.weight(WORDS, HIDDEN), "ids", axis=0)
    kinds = g("Gather", g.weight(2, HIDDEN), "kinds", axis=0)
    places = g("Gather", g.weight(16, HIDDEN), g.constant(np.arange(LENGTH)[None]), axis=0)
    x = g.normal(g("Add", g("Add", words, kinds), places), HIDDEN)
    wide = g("Unsqueeze", g("Unsqueeze", "mask", g.constant([1])), g.constant([2]))
    seen = g("Cast", wide, to=TensorProto.FLOAT)
    masked = g("Mul", g("Sub", g.constant(1.0, np.float32), seen), g.constant(-10000.0, np.float32))
    heads = [0, 0, HEADS, HIDDEN // HEADS]
    q, k, v = (g("Reshape", g.linear(x, HIDDEN, HIDDEN), g.constant(heads)) for _ in range(3))
    q, v = (g("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
    k = g("Transpose", k, perm=[0, 2, 3, 1])
    root = g.constant((HIDDEN / HEADS) ** 0.5, np.float32)
    weights = g("Softmax", g("Add", g("Div", g("MatMul", q, k), root), masked), axis=3)
    context = g("Transpose", g("MatMul", weights, v), perm=[0, 2, 1, 3])
    merged = g("Reshape", context, g.constant([0, 0, HIDDEN]))
    x = g.normal(g("Add", g.linear(merged, HIDDEN, HIDDEN), x), HIDDEN)
    inner = g.linear(x, 2 * HIDDEN, HIDDEN)
    half = g("Add", g("Erf", g("Div", inner, g.constant(2**0.5, np.float32))), g.constant(1.0, np.float32))
    gelu = g("Mul", g("Mul", inner, half), g.constant(0.5, np.float32))
    y = g.normal(g("Add", g.linear(gelu, HIDDEN, 2 * HIDDEN), x), HIDDEN)
    integers = (TensorProto.INT64, [BATCH, LENGTH])
    model = g.model({"ids": integers, "kinds": integers, "mask": integers}, {y: [BATCH, LENGTH, HIDDEN]})
    random = np.random.default_rng(1)
    mask = np.ones((BATCH, LENGTH), np.int64)
    mask[1, 5:] = 0
    feeds = {"ids": random.integers(0, WORDS, mask.shape), "kinds": random.integers(0, 2, mask.shape), "mask": mask}
    return model, feeds


def network() -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Convolutions: whole, depthwise, in a residual block and beside pooling, then a larger image and a classifier."""
    g = Graph(2)

    def conv(x: str, filters: int, channels: int, size: int, **attributes: Any) -> str:
        pads = [size // 2] * 4
        weights = g.weight(filters, channels, size, size, scale=0.2)
        return str(g("Conv", x, weights, g.weight(filters), kernel_shape=[size, size], pads=pads, **attributes))

    x = g("Relu", conv("x", 32, 3, 3, strides=[2, 2]))
    x = g("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    inner = g("Clip", conv(x, 32, 1, 3, group=32), g.constant(0.0, np.float32), g.constant(6.0, np.float32))
    x = g("Relu", g("Add", conv(inner, 32, 32, 1), x))
    gate = conv(g("GlobalAveragePool", x), 32, 32, 1)
    x = g("Mul", x, g("Sigmoid", gate))
    small = g("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    scales = g.constant([1, 1, 2, 2], np.float32)
    large = g("Resize", small, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric",
              nearest_mode="floor")  # fmt: skip
    x = g("Concat", large, conv(x, 48, 32, 3), axis=1)
    x = g("LeakyRelu", conv(x, 40, 80, 1), alpha=0.1)
    flat = g("Flatten", g("GlobalAveragePool", x))
    y = g("Gemm", flat, g.weight(40, 10), g.weight(10))
    model = g.model({"x": (TensorProto.FLOAT, [BATCH, 3, 32, 32])}, {y: [BATCH, 10]})
    return model, {"x": np.random.default_rng(3).standard_normal((BATCH, 3, 32, 32)).astype(np.float32)}


def decoder() -> onnx.ModelProto:
    """Two layers of a decoder as onnxruntime-genai's model builder writes them: weights of 4 and 8 bits, a cache of
    keys and values, every size a symbol."""
    hidden, heads, groups, width, inner, longest = 64, 4, 2, 16, 96, 32
    g = Graph(5)

    def own(op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        return g(op, *inputs, outputs=outputs, domain="com.microsoft", **attributes)

    def linear(x: str, rows: int, depth: int, bits: int = 4, block: int = 32) -> str:
        packed = g.random.integers(0, 256, (rows, depth // block, block * bits // 8))
        steps = g.random.random((rows, depth // block)) * 0.01 + 0.005
        weights = g.constant(packed, np.uint8), g.constant(steps, np.float32)
        return str(own("MatMulNBits", x, *weights, K=depth, N=rows, bits=bits, block_size=block))

    def scale() -> str:
        return g.constant(1 + g.random.standard_normal(hidden) / 9, np.float32)

    def added(x: str, y: str) -> tuple[str, str]:
        normal, *_, total = own("SkipSimplifiedLayerNormalization", x, y, scale(), outputs=4, epsilon=1e-6)
        g.nodes[-1].output[1:3] = ["", ""]
        return normal, total

    ends = g("Sub", g("ReduceSum", "attention_mask", g.constant([1]), keepdims=0), g.constant([1]))
    ends = g("Cast", ends, to=TensorProto.INT32)
    total = g("Gather", g("Shape", "attention_mask"), g.constant(1), axis=0)
    total = g("Cast", total, to=TensorProto.INT32)
    angles = np.outer(np.arange(longest), 1e4 ** -(np.arange(width // 2) / (width // 2)))
    turns = g.constant(np.cos(angles), np.float32), g.constant(np.sin(angles), np.float32)
    x = g("Gather", g.weight(WORDS, hidden), "input_ids", axis=0)
    y = g("SimplifiedLayerNormalization", x, scale(), axis=-1, epsilon=1e-6, stash_type=1)
    outputs: dict[str, list[Any]] = {}
    inputs: dict[str, tuple[int, list[Any]]] = {
        "input_ids": (TensorProto.INT64, ["batch", "sequence"]),
        "attention_mask": (TensorProto.INT64, ["batch", "total"]),
    }
    for layer in range(2):
        past = [f"past.{layer}.key", f"past.{layer}.value"]
        inputs |= dict.fromkeys(past, (TensorProto.FLOAT, ["batch", groups, "past", width]))
        context, *present = own(
            "GroupQueryAttention", linear(y, (heads + 2 * groups) * width, hidden), "", "", *past, ends, total, *turns,
            outputs=3, num_heads=heads, kv_num_heads=groups, do_rotary=1,
        )  # fmt: skip
        outputs |= {name: ["batch", groups, "total", width] for name in present}
        y, x = added(x, linear(context, hidden, heads * width))
        gate = linear(y, inner, hidden)
        gated = g("Mul", g("Mul", gate, g("Sigmoid", gate)), linear(y, inner, hidden, bits=8))
        y, x = added(x, linear(gated, hidden, inner))
    model = g.model(inputs, {linear(y, WORDS, hidden): ["batch", "sequence", WORDS], **outputs})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def options_at(level: str) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    return options


def outputs_of(model: bytes | str, feeds: Mapping[str, Array], level: str = "DISABLE_ALL") -> list[Array]:
    """What ONNX Runtime computes."""
    session = onnxruntime.InferenceSession(model, options_at(level), providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def optimized(model: bytes | str, level: str, path: Path) -> onnx.ModelProto:
    """The model that ONNX Runtime writes at a level, also as a file."""
    options = options_at(level)
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


def own_operators(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator of a Microsoft domain occurs."""
    names = (f"{node.domain.removeprefix('com.microsoft').lstrip('.')}.{node.op_type}" for node in model.graph.node
             if node.domain.startswith("com."))  # fmt: skip
    return dict(Counter(name.lstrip(".") for name in names))
