"""Networks whose least arena is published (Pisarchyk & Lee 2020, table 1, f32, batch 1), operator by operator."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from onnxc.backends.cpu.schedules import schedule
from onnxc.ir.dtypes import F32
from onnxc.ir.graph import Graph, Node, TensorType, Value, constant_node
from onnxc.ir.target import Target
from onnxc.passes.lower import lower
from onnxc.passes.pipeline import parse_pipeline, run_pipeline


@dataclass
class Network:
    """A graph in the making; weights are zeros that take no memory."""

    nodes: list[Node] = field(default_factory=list)

    def value(self, shape: tuple[int, ...]) -> Value:
        return Value(f"v{len(self.nodes)}", TensorType(F32, shape))

    def add(self, op: str, inputs: tuple[Value, ...], shape: tuple[int, ...], **attributes: object) -> Value:
        result = self.value(shape)
        self.nodes.append(Node(op, inputs, (result,), attributes))  # type: ignore[arg-type]
        return result

    def weights(self, *shape: int) -> Value:
        name = f"w{len(self.nodes)}"
        array = np.broadcast_to(np.float32(0), shape)
        self.nodes.append(constant_node(name, array, TensorType(F32, shape)))
        return self.nodes[-1].output

    def conv(
        self, x: Value, filters: int, kernel: int | tuple[int, int] = 1, stride: int = 1, group: int = 1,
        valid: bool = False, activation: str = "Relu",
    ) -> Value:  # fmt: skip
        """A convolution with its activation as an operator of its own."""
        _, channels, *image = (int(str(d)) for d in x.shape)
        k = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        sides = [(i - e) // stride + 1 if valid else -(-i // stride) for i, e in zip(image, k, strict=True)]
        spare = [0 if valid else max(0, (s - 1) * stride + e - i) for i, e, s in zip(image, k, sides, strict=True)]
        pads = tuple(p // 2 for p in spare) + tuple(p - p // 2 for p in spare)
        w, shape = self.weights(filters, channels // group, *k), (1, filters, *sides)
        y = self.add("Conv", (x, w), shape, strides=(stride, stride), pads=pads, group=group)
        return self.add(activation, (y,), shape) if activation else y

    def pool(self, x: Value, op: str, kernel: int, stride: int, pad: int = 0) -> Value:
        n, c, *image = (int(str(d)) for d in x.shape)
        sides = [(i + 2 * pad - kernel) // stride + 1 for i in image]
        shape = (n, c, *sides)
        return self.add(op, (x,), shape, kernel_shape=(kernel, kernel), strides=(stride, stride), pads=(pad,) * 4)

    def concat(self, *parts: Value) -> Value:
        n, _, h, w = (int(str(d)) for d in parts[0].shape)
        return self.add("Concat", parts, (n, sum(int(str(p.shape[1])) for p in parts), h, w), axis=1)


def mobilenet_v1(net: Network, x: Value) -> Value:
    x = net.conv(x, 32, 3, 2)
    for filters, stride in [
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    ]:
        channels = int(str(x.shape[1]))
        x = net.conv(net.conv(x, channels, 3, stride, channels), filters)
    return net.add("GlobalAveragePool", (x,), (1, 1024, 1, 1))


def mobilenet_v2(net: Network, x: Value) -> Value:
    x = net.conv(x, 32, 3, 2)
    for expand, filters, count, stride in [
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ]:  # fmt: skip
        for number in range(count):
            channels = int(str(x.shape[1]))
            y = net.conv(x, expand * channels) if expand > 1 else x
            y = net.conv(y, expand * channels, 3, stride if number == 0 else 1, expand * channels)
            y = net.conv(y, filters, activation="")
            x = net.add("Add", (x, y), tuple(map(int, map(str, y.shape)))) if number else y
    return net.add("GlobalAveragePool", (net.conv(x, 1280),), (1, 1280, 1, 1))


def inception_v3(net: Network, x: Value) -> Value:
    x = net.conv(net.conv(net.conv(x, 32, 3, 2, valid=True), 32, 3, valid=True), 64, 3)
    x = net.pool(x, "MaxPool", 3, 2)
    x = net.pool(net.conv(net.conv(x, 80), 192, 3, valid=True), "MaxPool", 3, 2)
    c = net.conv
    for filters in (32, 64, 64):
        pooled = c(net.pool(x, "AveragePool", 3, 1, 1), filters)
        x = net.concat(c(x, 64), c(c(x, 48), 64, 5), c(c(c(x, 64), 96, 3), 96, 3), pooled)
    x = net.concat(
        c(x, 384, 3, 2, valid=True), c(c(c(x, 64), 96, 3), 96, 3, 2, valid=True), net.pool(x, "MaxPool", 3, 2)
    )
    for f in (128, 160, 160, 192):
        long = c(c(c(c(c(x, f), f, (7, 1)), f, (1, 7)), f, (7, 1)), 192, (1, 7))
        short = c(c(c(x, f), f, (1, 7)), 192, (7, 1))
        x = net.concat(c(x, 192), short, long, c(net.pool(x, "AveragePool", 3, 1, 1), 192))
    seven = c(c(c(c(x, 192), 192, (1, 7)), 192, (7, 1)), 192, 3, 2, valid=True)
    x = net.concat(c(c(x, 192), 320, 3, 2, valid=True), seven, net.pool(x, "MaxPool", 3, 2))
    for _ in range(2):
        a, b = c(x, 384), c(c(x, 448), 384, 3)
        a, b = (net.concat(c(y, 384, (1, 3)), c(y, 384, (3, 1))) for y in (a, b))
        x = net.concat(c(x, 320), a, b, c(net.pool(x, "AveragePool", 3, 1, 1), 192))
    return net.add("GlobalAveragePool", (x,), (1, 2048, 1, 1))


@pytest.mark.parametrize(
    ("build", "side", "published"), [(mobilenet_v1, 224, 4.594), (mobilenet_v2, 224, 5.742), (inception_v3, 299, 7.914)]
)
def test_arena_without_fusion(build: object, side: int, published: float) -> None:
    net = Network()
    image = Value("image", TensorType(F32, (1, 3, side, side)))
    out = build(net, image)  # type: ignore[operator]
    graph = run_pipeline(Graph("net", (image,), (out,), tuple(net.nodes)), parse_pipeline("layout,reorder"))
    plan = lower(graph, schedule, Target.parse("x86-64-v3")).plan
    assert plan.size == plan.lower_bound
    assert published - 0.001 < plan.size / 2**20 < published + 0.0005
