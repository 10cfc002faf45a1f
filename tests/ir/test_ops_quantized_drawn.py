"""Operators on quantised tensors against ONNX Runtime's CPU kernels: drawn shapes, types, scales and zero points, the
weights as constants and as inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxc
import pytest
from against_kernel import by_onnxruntime, operator_model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from single_node import Array

EXAMPLES = int(os.environ.get("ONNXC_QUANTIZED_EXAMPLES", "3"))
"""For each operator; more where somebody looks for faults."""


@dataclass
class Drawn:
    """A node of one operator: its operands in order, None for those that are left out. `weights` may be constants.
    `steps` is how far integers may be off, on a `share` of the elements at most; floats by `relative`."""

    operands: Mapping[str, Array | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("y",)
    steps: int = 0
    share: float = 0.01
    relative: float = 2e-6


class Source:
    """Draws sizes and choices by hypothesis, elements by a seed."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))

    def size(self, low: int = 1, high: int = 9) -> int:
        return self.data.draw(st.integers(low, high))

    def one_of(self, *values: Any) -> Any:
        return self.data.draw(st.sampled_from(values))

    def maybe(self) -> bool:
        return self.data.draw(st.booleans())

    def real(self, *shape: int) -> Array:
        return self.random.standard_normal(shape).astype(np.float32)

    def scale(self, *shape: int, least: float = 0.005, most: float = 0.1) -> Array:
        return np.asarray(self.random.uniform(least, most, shape), np.float32)

    def integers(self, dtype: Any, *shape: int) -> Array:
        limits = np.iinfo(dtype)
        array = self.random.integers(limits.min, limits.max, shape, np.int64, endpoint=True)
        if self.random.random() < 0.2:  # the ends, where sums are largest
            array = np.where(array < np.mean([limits.min, limits.max]), limits.min, limits.max)
        return np.asarray(array).astype(dtype)

    def zero(self, dtype: Any, *shape: int) -> Array:
        """A zero point: anything, or what quantizers write."""
        limits = np.iinfo(dtype)
        usual = self.one_of(None, 0, limits.max // 2 + 1 if limits.min == 0 else 0, limits.min, limits.max)
        return self.integers(dtype, *shape) if usual is None else np.full(shape, usual, dtype)

    def batch(self) -> tuple[int, ...]:
        return tuple(self.size(1, 3) for _ in range(self.size(0, 2)))


def matmul_integer(s: Source) -> Drawn:
    m, k, n = s.size(), s.size(1, 40), s.size(1, 20)
    left, right = s.one_of(np.uint8, np.int8), s.one_of(np.uint8, np.int8)
    a, b = s.integers(left, *s.batch(), m, k), s.integers(right, k, n)
    zb = s.one_of(None, s.zero(right), s.zero(right, n))
    return Drawn({"a": a, "b": b, "za": s.one_of(None, s.zero(left)), "zb": zb}, weights=("b", "zb"))


def matmul_to_float(s: Source) -> Drawn:
    m, k, n = s.size(), s.size(1, 40), s.size(1, 20)
    left, right = s.one_of((np.uint8, np.uint8), (np.uint8, np.int8), (np.int8, np.int8))
    columns = s.maybe()
    return Drawn(
        {"a": s.integers(left, *s.batch(), m, k), "b": s.integers(right, k, n), "sa": s.scale(),
         "sb": s.scale(n) if columns else s.scale(), "za": s.one_of(None, s.zero(left)),
         "zb": s.one_of(None, s.zero(right, n) if columns else s.zero(right)), "bias": s.one_of(None, s.real(n))},
        weights=("b", "sb", "zb", "bias"), relative=1e-5,
    )  # fmt: skip


def dynamic_matmul(s: Source) -> Drawn:
    m, k, n = s.size(), s.size(1, 40), s.size(1, 20)
    right, columns = s.one_of(np.uint8, np.int8), s.maybe()
    a = s.real(*s.batch(), m, k) * s.one_of(1.0, 30.0) + s.one_of(0.0, 2.0)
    return Drawn(
        {"a": a.astype(np.float32), "b": s.integers(right, k, n), "sb": s.scale(n) if columns else s.scale(),
         "zb": s.one_of(None, s.zero(right, n) if columns else s.zero(right)), "bias": s.one_of(None, s.real(n))},
        weights=("b", "sb", "zb", "bias"), relative=1e-5,
    )  # fmt: skip


def qgemm(s: Source) -> Drawn:
    m, k, n = s.size(), s.size(1, 40), s.size(1, 20)
    turned, flat = s.maybe(), s.maybe()
    left, right = s.one_of((np.uint8, np.uint8), (np.uint8, np.int8), (np.int8, np.int8))
    columns, real = s.maybe(), s.maybe()
    bias = s.one_of(None, s.random.integers(-999, 999, n).astype(np.int32))
    ends = {} if real else {"sy": s.scale(least=0.3, most=2), "zy": s.zero(left)}
    return Drawn(
        {"a": s.integers(left, *((k, m) if flat else (m, k))), "sa": s.scale(), "za": s.zero(left),
         "b": s.integers(right, *((n, k) if turned else (k, n))), "sb": s.scale(n) if columns else s.scale(),
         "zb": s.zero(right, n) if columns else s.zero(right), "c": bias, **ends},
        {"transA": int(flat), "transB": int(turned), "alpha": s.one_of(1.0, 0.5)},
        ("b", "sb", "zb", "c"), steps=1, relative=1e-5,
    )  # fmt: skip


def qlinear_matmul(s: Source) -> Drawn:
    m, k, n = s.size(), s.size(1, 40), s.size(1, 20)
    left, right = s.one_of((np.uint8, np.uint8), (np.uint8, np.int8), (np.int8, np.int8))
    columns = s.maybe()
    return Drawn(
        {"a": s.integers(left, *s.batch(), m, k), "sa": s.scale(), "za": s.zero(left), "b": s.integers(right, k, n),
         "sb": s.scale(n) if columns else s.scale(), "zb": s.zero(right, n) if columns else s.zero(right),
         "sy": s.scale(least=0.3, most=2), "zy": s.zero(left)}, {}, ("b", "sb", "zb"), steps=1,
    )  # fmt: skip


def window(s: Source, size: int) -> tuple[list[int], dict[str, Any]]:
    kernel = [s.size(1, 3), s.size(1, 3)]
    return kernel, {
        "strides": [s.size(1, 2), s.size(1, 2)],
        "pads": [s.size(0, min(2, kernel[i % 2] - 1)) for i in range(4)],
        "dilations": [s.size(1, 2) if kernel[i] < size // 2 else 1 for i in range(2)],
    }


def qlinear_conv(s: Source) -> Drawn:
    side, groups = s.size(5, 9), s.one_of(1, 1, 2, 4)
    channels, filters = groups * s.size(1, 5), groups * s.size(1, 5)
    if groups == 4 and s.maybe():
        channels = filters = 4
    left, right = s.one_of((np.uint8, np.uint8), (np.uint8, np.int8), (np.int8, np.int8))
    kernel, attributes = window(s, side)
    columns = s.maybe()
    zero = np.zeros if right is np.int8 or s.maybe() else lambda shape, dtype: s.zero(dtype, *shape)
    shape = (filters,) if columns else ()
    bias = s.one_of(None, s.random.integers(-999, 999, filters).astype(np.int32))
    return Drawn(
        {"x": s.integers(left, s.size(1, 2), channels, side, s.size(5, 9)), "sx": s.scale(), "zx": s.zero(left),
         "w": s.integers(right, filters, channels // groups, *kernel), "sw": s.scale(*shape),
         "zw": np.full(shape, s.zero(right)) if not columns else zero(shape, right),
         "sy": s.scale(least=0.3, most=2), "zy": s.zero(left), "b": bias},
        {**attributes, "group": groups}, ("w", "sw", "zw", "b"), steps=1,
    )  # fmt: skip


def conv_integer(s: Source) -> Drawn:
    side, groups = s.size(5, 9), s.one_of(1, 1, 2)
    channels, filters = groups * s.size(1, 5), groups * s.size(1, 5)
    right = s.one_of(np.uint8, np.int8)
    kernel, attributes = window(s, side)
    return Drawn(
        {"x": s.integers(np.uint8, s.size(1, 2), channels, side, s.size(5, 9)),
         "w": s.integers(right, filters, channels // groups, *kernel), "zx": s.one_of(None, s.zero(np.uint8)),
         "zw": s.one_of(None, s.zero(right))}, {**attributes, "group": groups}, ("w", "zw"),
    )  # fmt: skip


def nbits(s: Source) -> Drawn:
    bits, block = s.one_of(2, 4, 4, 8), s.one_of(16, 32, 64, 128)
    width, rows = s.size(1, 200), s.size(1, 20)
    blocks = -(-width // block)
    zeros = s.one_of("none", "packed", "real")
    packed = s.integers(np.uint8, rows, -(-blocks * bits // 8))
    points = {"packed": packed, "real": s.scale(rows, blocks) * 50, "none": None}[zeros if bits < 8 else "none"]
    return Drawn(
        {"a": s.real(*s.batch(), s.size(), width), "b": s.integers(np.uint8, rows, blocks, block * bits // 8),
         "s": s.scale(rows, blocks), "z": points, "g": None, "bias": s.one_of(None, s.real(rows))},
        {"K": width, "N": rows, "bits": bits, "block_size": block}, ("b", "s", "z"), relative=1e-5,
    )  # fmt: skip


def gathered(s: Source) -> Drawn:
    bits, block, blocks = s.one_of(4, 8), s.one_of(16, 32), s.size(1, 4)
    rows = s.size(1, 12)
    indices = s.random.integers(-rows, rows, tuple(s.size(1, 3) for _ in range(s.size(1, 2))))
    zero = s.one_of(None, s.integers(np.uint8, rows, -(-blocks * bits // 8)))
    return Drawn(
        {"d": s.integers(np.uint8, rows, blocks * block * bits // 8), "i": indices.astype(s.one_of(np.int32, np.int64)),
         "s": s.scale(rows, blocks), "z": zero},
        {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}, ("d", "s", "z"),
    )  # fmt: skip


def attention(s: Source) -> Drawn:
    heads, width, batch, length = s.size(1, 4), 4 * s.size(1, 3), s.size(1, 3), s.size(1, 7)
    hidden, right = heads * width, s.one_of(np.uint8, np.int8)
    inner = s.size(2, 16)
    columns = s.maybe()
    mask = s.one_of(None, s.random.integers(1, length, batch, endpoint=True).astype(np.int32))
    if mask is not None and s.maybe():
        mask = (np.arange(length) < mask[:, None]).astype(np.int32)
    return Drawn(
        {"x": s.integers(np.uint8, batch, length, inner), "w": s.integers(right, inner, 3 * hidden),
         "b": s.real(3 * hidden), "sx": s.scale(most=0.02), "sw": s.scale(3 * hidden, most=0.02) if columns
         else s.scale(most=0.02), "mask": mask, "zx": s.zero(np.uint8),
         "zw": s.zero(right, 3 * hidden) if columns else s.zero(right)},
        {"num_heads": heads, "unidirectional": int(s.maybe())}, ("w", "b", "sw", "zw"), relative=1e-4,
    )  # fmt: skip


def lstm(s: Source) -> Drawn:
    steps, batch, inputs, hidden = s.size(1, 6), s.size(1, 3), s.size(1, 10), s.size(1, 10)
    direction = s.one_of("forward", "reverse", "bidirectional")
    ways = 2 if direction == "bidirectional" else 1
    right, columns = s.one_of(np.uint8, np.int8), s.maybe()
    point = np.int8(0) if right is np.int8 else s.zero(np.uint8) if not columns else np.uint8(128)

    def zero(shape: tuple[int, ...]) -> Array:
        return np.full(shape, point, right)

    shape = (ways, 4 * hidden) if columns else (ways,)
    full = s.maybe()
    states = (s.real(ways, batch, hidden), s.real(ways, batch, hidden)) if full else (None, None)
    lengths = s.one_of(None, s.random.integers(1, steps, batch, endpoint=True).astype(np.int32))
    return Drawn(
        {"X": s.real(steps, batch, inputs), "W": s.integers(right, ways, inputs, 4 * hidden),
         "R": s.integers(right, ways, hidden, 4 * hidden), "B": s.one_of(None, s.real(ways, 8 * hidden)),
         "lengths": lengths, "h": states[0], "c": states[1],
         "P": s.one_of(None, s.real(ways, 3 * hidden)), "sW": s.scale(*shape, least=0.001, most=0.005),
         "zW": zero(shape), "sR": s.scale(*shape, least=0.001, most=0.005), "zR": zero(shape)},
        {"hidden_size": hidden, "direction": direction}, ("W", "R", "B", "P", "sW", "zW", "sR", "zR"),
        ("Y", "Y_h", "Y_c"), relative=0.05,  # states are quantised anew each step
    )  # fmt: skip


def pointwise(op: str) -> Callable[[Source], Drawn]:
    def draw(s: Source) -> Drawn:
        dtype, shape = s.one_of(np.uint8, np.int8), (*s.batch(), s.size(), s.size(1, 40))
        attributes = {"alpha": s.one_of(0.01, 0.2)} if op == "QLinearLeakyRelu" else {}
        ends = {"sy": s.scale(least=0.002, most=0.05), "zy": s.zero(dtype)}
        return Drawn(
            {"x": s.integers(dtype, *shape), "sx": s.scale(), "zx": s.zero(dtype), **ends}, attributes, steps=1
        )

    return draw


def softmax(s: Source) -> Drawn:
    """The kernel adds up a table of exponentials in integers, and goes round where a result is beyond the type: so the
    scale is what quantizers write, and there is more than one element."""
    dtype = s.one_of(np.uint8, np.int8)
    x = s.integers(dtype, *s.batch(), s.size(), s.size(2, 40))
    ends = {"sy": np.array(1 / 256, np.float32), "zy": np.array(np.iinfo(dtype).min, dtype)}
    operands = {"x": x, "sx": s.scale(), "zx": s.zero(dtype), **ends}
    return Drawn(operands, {"opset": 13, "axis": -1}, steps=1, share=1.0)


def two(s: Source) -> Drawn:
    dtype = s.one_of(np.uint8, np.int8)
    left = (*s.batch(), s.size(), s.size(1, 20))
    right = tuple(size if s.maybe() else 1 for size in left[s.size(0, len(left) - 1) :])
    a, b = s.integers(dtype, *left), s.integers(dtype, *right)
    if s.maybe():
        a, b = b, a
    return Drawn(
        {"a": a, "sa": s.scale(), "za": s.zero(dtype), "b": b, "sb": s.scale(), "zb": s.zero(dtype),
         "sy": s.scale(least=0.02, most=0.2), "zy": s.zero(dtype)}, steps=1,
    )  # fmt: skip


def pooled(s: Source) -> Drawn:
    dtype, side = s.one_of(np.uint8, np.int8), s.size(4, 9)
    kernel, attributes = window(s, side)
    del attributes["dilations"]
    return Drawn(
        {"x": s.integers(dtype, s.size(1, 2), s.size(), side, s.size(4, 9)), "sx": s.scale(), "zx": s.zero(dtype),
         "sy": s.scale(), "zy": s.zero(dtype)},
        {**attributes, "kernel_shape": kernel, "count_include_pad": int(s.maybe())}, steps=1,
    )  # fmt: skip


def pooled_whole(s: Source) -> Drawn:
    dtype, last = s.one_of(np.uint8, np.int8), s.maybe()
    shape = (s.size(1, 2), s.size(1, 20), s.size(1, 9), s.size(1, 9))
    return Drawn(
        {"x": s.integers(dtype, *shape), "sx": s.scale(), "zx": s.zero(dtype), "sy": s.scale(), "zy": s.zero(dtype)},
        {"channels_last": int(last)}, steps=1,
    )  # fmt: skip


OPERATORS: Mapping[str, Callable[[Source], Drawn]] = {
    "MatMulInteger": matmul_integer, "ConvInteger": conv_integer, "QLinearConv": qlinear_conv,
    "QLinearMatMul": qlinear_matmul, "MatMulIntegerToFloat": matmul_to_float,
    "DynamicQuantizeMatMul": dynamic_matmul, "QGemm": qgemm, "MatMulNBits": nbits, "GatherBlockQuantized": gathered,
    "QAttention": attention, "DynamicQuantizeLSTM": lstm, "QLinearSigmoid": pointwise("QLinearSigmoid"),
    "QLinearLeakyRelu": pointwise("QLinearLeakyRelu"), "QLinearSoftmax": softmax,
    "QLinearAdd": two, "QLinearMul": two, "QLinearAveragePool": pooled, "QLinearGlobalAveragePool": pooled_whole,
}  # fmt: skip

OWN = frozenset(("MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul"))
"""ONNX's own; the others are com.microsoft's."""
CONSTANT = frozenset(("MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeLSTM"))
"""Operators of which ONNX Runtime wants the weights as constants."""


@pytest.mark.parametrize("op", OPERATORS)
def test_as_onnx_runtime(op: str) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=EXAMPLES < 20,
        phases=[Phase.generate],
    )
    @given(st.data(), st.booleans())
    def check(data: st.DataObject, constant: bool) -> None:
        drawn = OPERATORS[op](Source(data))
        weights = drawn.weights if constant or op in CONSTANT else ()
        model, inputs = operator_model(op, drawn.operands, drawn.attributes, drawn.outputs, weights)
        if op in OWN:
            model.graph.node[0].domain = ""
        wanted = by_onnxruntime(model, inputs)
        found = onnxc.compile(model).run(inputs)
        for name, right in zip(drawn.outputs, wanted, strict=True):
            compare(found[name], right, drawn)

    check()


def compare(found: Array, wanted: Array, drawn: Drawn) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if wanted.dtype.kind in "iu":
        gap = np.abs(found.astype(np.int64) - wanted.astype(np.int64))
        assert gap.max(initial=0) <= drawn.steps
        assert np.count_nonzero(gap) <= max(1, gap.size * drawn.share), "more than what lies between two steps"
    else:
        limit = drawn.relative * max(float(np.abs(wanted).max(initial=0)), 1e-30)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=limit)
