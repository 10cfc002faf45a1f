"""Single operators whose speed is measured: as ONNX models of one size, with what PyTorch has of the same kind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from onnx import helper, numpy_helper

from ...ir.dtypes import BY_NAME
from ..bench_kernels import Layer
from .bench import random_array

COPY_SHARE, PEER_SHARE = 0.8, 0.5
"""The first marks: of the copy bandwidth for what is bound by memory, of cuBLAS for products."""
OPSET = 23
TENSOR = 256 << 20
"""Bytes of what memory-bound operators read: several times the L2 cache of any GPU."""
Shape: TypeAlias = tuple[int, ...]
Node: TypeAlias = tuple[str, Sequence[str], Sequence[str], Mapping[str, Any]]


@dataclass(frozen=True)
class Operator:
    """A model of few nodes: (operator, inputs, outputs, attributes). `inputs` and `weights` are shapes, all of one
    element type; `peer` names one of `peers.OPERATORS`, which takes inputs, weights and `settings`; `mark` is a share
    of the "copy" bandwidth or of the "peer"'s speed.
    """

    kind: str
    name: str
    precision: str
    nodes: Sequence[Node]
    inputs: Mapping[str, Shape]
    output: Shape
    weights: Mapping[str, Shape] = field(default_factory=dict)
    peer: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    mark: tuple[str, float] | None = None
    needed: float = 1.0
    """The part of the operations counted that has to be done: of a causal attention about half."""

    @property
    def dtype(self) -> str:
        """The element type of inputs and weights."""
        return "f32" if self.precision == "tf32" else self.precision

    @property
    def moved(self) -> int:
        """The bytes of all inputs, weights and the output."""
        shapes = (*self.inputs.values(), *self.weights.values(), self.output)
        return BY_NAME[self.dtype].bytes * sum(map(math.prod, shapes))

    def model(self) -> bytes:
        """The ONNX model: inputs by name, one output y, weights as initializers."""
        dtype = BY_NAME[self.dtype].onnx
        inputs = [helper.make_tensor_value_info(name, dtype, shape) for name, shape in self.inputs.items()]
        output = helper.make_tensor_value_info("y", dtype, self.output)
        weights = [numpy_helper.from_array(self.array(name), name) for name in self.weights]
        nodes = [helper.make_node(op, ins, outs, **attributes) for op, ins, outs, attributes in self.nodes]
        graph = helper.make_graph(nodes, self.kind, inputs, [output], weights)
        opset = [helper.make_opsetid("", OPSET)]
        content: bytes = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
        return content

    def array(self, name: str) -> Any:
        """The values of an input or of weights: such that products keep to the range of f16."""
        shapes = {**self.inputs, **self.weights}
        values = random_array(shapes[name], self.dtype, list(shapes).index(name))
        if name in self.weights and len(shapes[name]) > 1:
            values = (values / math.sqrt(math.prod(shapes[name][1:]))).astype(values.dtype)
        return values


def memory_bound(size: int = TENSOR) -> Iterator[Operator]:
    """Operators that move `size` bytes from memory and mostly as many back."""
    for precision, width in (("f32", 4), ("f16", 2)):
        count = size // width
        rows, columns, long = count // 1024, 1024, min(32768, count)
        side = 1 << int(math.log2(count)) // 2
        tall, turned = (count // side, side), (side, count // side)
        flat, narrow = {"x": (rows, columns)}, {"x": (count // long, long)}
        image = max(count // (64 * 56 * 56), 1), 64, 56, 56
        scale, bias = {"scale": (columns,)}, {"bias": (columns,)}
        half: dict[str, Shape] = {"a": (rows // 2, columns), "b": (rows // 2, columns)}
        table: list[tuple[str, str, str, Mapping[str, Shape], Mapping[str, Shape], Shape, dict[str, Any]]] = [
            ("pointwise", "Sigmoid", "sigmoid", flat, {}, flat["x"], {}),
            ("pointwise", "Add", "add", half, {}, half["a"], {}),
            ("pointwise", "Gelu", "gelu", flat, {}, flat["x"], {}),
            ("softmax", "Softmax", "softmax", flat, {}, flat["x"], {}),
            ("softmax", "Softmax", "softmax", narrow, {}, narrow["x"], {}),
            ("layer norm", "LayerNormalization", "layer_norm", flat, scale | bias, flat["x"], {}),
            ("RMS norm", "RMSNormalization", "rms_norm", flat, scale, flat["x"], {}),
            ("transpose", "Transpose", "permute", {"x": tall}, {}, turned, {"order": [1, 0]}),
            ("transpose", "Transpose", "permute", {"x": image}, {}, (image[0], 56, 56, 64), {"order": [0, 2, 3, 1]}),
            ("reduction", "ReduceSum", "sum", flat, {}, (rows,), {"axis": 1}),
            ("reduction", "ReduceSum", "sum", flat, {}, (columns,), {"axis": 0}),
        ]
        for kind, op, peer, inputs, weights, output, settings in table:
            attributes = {"perm": settings["order"]} if "order" in settings else {}
            nodes: list[Node] = [(op, [*inputs, *weights], ["y"], attributes)]
            if "axis" in settings:
                axes: Node = ("Constant", [], ["axes"], {"value_ints": [settings["axis"]]})
                nodes = [axes, (op, ["x", "axes"], ["y"], {"keepdims": 0})]
            name = f"{op} {'x'.join(map(str, next(iter(inputs.values()))))}"
            name += "".join(f", {what} {value}" for what, value in settings.items())
            mark = "copy", COPY_SHARE
            yield Operator(kind, name, precision, nodes, inputs, output, weights, peer, settings, mark)


PRODUCTS = [
    (4096, 4096, 4096), (8192, 8192, 8192), (2048, 2048, 2048), (1024, 1024, 1024), (128, 768, 768), (128, 3072, 768),
    (128, 768, 3072), (4096, 768, 3072), (1, 4096, 4096), (32, 4096, 4096), (1, 50257, 768), (32, 50257, 768),
    (4096, 11008, 4096), (1000, 999, 777),
]  # fmt: skip
"""Rows, columns and the summed extent."""


def products(precision: str, shapes: Sequence[tuple[int, int, int]] = PRODUCTS) -> Iterator[Operator]:
    """Products of two matrices that come where they are square, else of one with one that is constant."""
    nodes: list[Node] = [("MatMul", ["a", "b"], ["y"], {})]
    for m, n, k in shapes:
        square = m == n == k
        a, b = {"a": (m, k)}, {"b": (k, n)}
        mark = ("peer", PEER_SHARE) if square and precision in ("f16", "bf16") else None
        given, held = (a | b, {}) if square else (a, b)
        yield Operator("product", f"{m}x{n}x{k}", precision, nodes, given, (m, n), held, "matmul", {}, mark)


def convolutions(layers: Sequence[Layer], batch: int, precision: str = "f16") -> Iterator[Operator]:
    """Convolutions of channels-last images."""
    for layer in dict.fromkeys(layers):
        if not layer.kernel:
            continue
        attributes = {"pads": [layer.kernel // 2] * 4, "strides": [layer.stride] * 2, "group": layer.group}
        nodes: list[Node] = [
            ("Transpose", ["x"], ["first"], {"perm": [0, 3, 1, 2]}),
            ("Conv", ["first", "w"], ["convolved"], attributes),
            ("Transpose", ["convolved"], ["y"], {"perm": [0, 2, 3, 1]}),
        ]
        side = -(-layer.size // layer.stride)
        inputs = {"x": (batch, layer.size, layer.size, layer.channels)}
        filters = {"w": (layer.filters, layer.channels // layer.group, layer.kernel, layer.kernel)}
        settings = {"padding": layer.kernel // 2, "stride": layer.stride, "groups": layer.group}
        name, output = f"{layer} batch {batch}", (batch, side, side, layer.filters)
        yield Operator("convolution", name, precision, nodes, inputs, output, filters, "convolution", settings)


ATTENTIONS = [(1, 12, 128, 128, 64), (32, 12, 128, 128, 64), (1, 32, 2048, 2048, 128), (4, 16, 4096, 4096, 64),
              (1, 12, 1, 1024, 64), (32, 12, 1, 1024, 64)]  # fmt: skip
"""Batch, heads, queries, keys, channels."""


def attentions(shapes: Sequence[tuple[int, ...]] = ATTENTIONS, precision: str = "f16") -> Iterator[Operator]:
    """Attention without a mask, and with a causal one where there are as many queries as keys."""
    for batch, heads, queries, keys, width in shapes:
        query, key = (batch, heads, queries, width), (batch, heads, keys, width)
        for causal in (False, True) if queries == keys else (False,):
            nodes: list[Node] = [("Attention", ["q", "k", "v"], ["y"], {"is_causal": int(causal)})]
            name = f"{batch}x{heads}x{queries}x{keys}x{width}{' causal' if causal else ''}"
            inputs, settings = {"q": query, "k": key, "v": key}, {"causal": causal}
            needed = (keys + 1) / (2 * keys) if causal else 1.0
            yield Operator("attention", name, precision, nodes, inputs, query, {}, "attention", settings, None, needed)
