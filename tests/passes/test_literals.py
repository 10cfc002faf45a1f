"""Layers that differ in scales and zero points alone share kernels, which give the bits that own kernels give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxc import Target
from onnxc.backends.cpu.build import Building, build
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options, target_of
from onnxc.ir import scalars as s
from onnxc.ir.dtypes import F32, I32, U8
from onnxc.ir.loops import Kernel, Store
from onnxc.ir.program import MARK, Program, Run
from onnxc.ir.scalars import Buffer, Rewriter
from onnxc.passes.literals import Literals
from onnxc.passes.rounding_steps import round_in_steps

Layer = tuple[float, int]
"""The scale and the zero point of a layer's result."""


class Network:
    """A chain of layers on u8[32, 32], made node by node."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.count = 0

    def constant(self, array: Any, dtype: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        self.count += 1
        self.nodes.append(helper.make_node(op, inputs, [f"v{self.count}"], **attributes))
        return f"v{self.count}"

    def parameters(self, layer: Layer) -> tuple[str, str]:
        return self.constant(layer[0], np.float32), self.constant(layer[1], np.uint8)

    def linear(self, x: str, before: Layer, after: Layer, activation: str = "Relu") -> str:
        """Constant weights, a bias, an activation, quantized."""
        weights = self.node(
            "DequantizeLinear",
            self.constant(self.random.integers(-127, 128, (32, 32)), np.int8),
            self.constant(self.random.uniform(2e-3, 6e-3, 32), np.float32),
            axis=1,
        )
        real = self.node("DequantizeLinear", x, *self.parameters(before))
        bias = self.constant(self.random.standard_normal(32), np.float32)
        total = self.node(activation, self.node("Add", self.node("MatMul", real, weights), bias))
        return self.node("QuantizeLinear", total, *self.parameters(after))

    def softmax(self, x: str, before: Layer, after: Layer) -> str:
        """Along columns and rows in turn, so that no two are one kernel."""
        real = self.node("DequantizeLinear", self.node("Transpose", x, perm=[1, 0]), *self.parameters(before))
        return self.node("QuantizeLinear", self.node("Softmax", real), *self.parameters(after))

    def product(self, x: str, before: Layer, after: Layer) -> str:
        """The matrix by its own transpose, and by itself again: neither operand is constant."""
        real = self.node("DequantizeLinear", x, *self.parameters(before))
        square = self.node("MatMul", self.node("Transpose", real, perm=[1, 0]), real)
        steps = self.parameters(after)
        square = self.node("DequantizeLinear", self.node("QuantizeLinear", square, *steps), *steps)
        return self.node("QuantizeLinear", self.node("MatMul", real, square), *self.parameters(after))

    def model(self, output: str) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.UINT8, (32, 32))
        y = helper.make_tensor_value_info(output, TensorProto.UINT8, None)
        graph = helper.make_graph(self.nodes, "g", [x], [y], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def chain(kind: str, layers: Sequence[Layer]) -> onnx.ModelProto:
    network, value = Network(), "x"
    for before, after in pairwise(layers):
        value = getattr(network, kind)(value, before, after)
    return network.model(value)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From then on no number becomes an entry of a table."""
    return lambda: monkeypatch.setattr(Literals, "_group", lambda self, graph: None)


def lowered(model: onnx.ModelProto, target: str | None = None) -> Program:
    options = Options(target)
    return program_of(graph_of(model, options), target_of(options))


def run(model: onnx.ModelProto, target: str | None = None) -> np.ndarray:
    x = np.random.default_rng(1).integers(0, 256, (32, 32)).astype(np.uint8)
    (result,) = onnxc.compile(model, target=target, threads=1).run({"x": x}).values()
    return result


ASYMMETRIC: Sequence[Layer] = [(0.021, 117), (0.034, 131), (0.045, 124), (0.013, 92), (0.027, 140)]


@pytest.mark.parametrize("target", [None, "x86-64-v3"])
@pytest.mark.parametrize(("kind", "kernels"), [("linear", 2), ("softmax", 2), ("product", 7)])
def test_layers_share_kernels_with_the_same_bits(
    kind: str, kernels: int, target: str | None, apart: Callable[[], None]
) -> None:
    model = chain(kind, ASYMMETRIC)
    program, together = lowered(model, target), run(model, target)
    apart()
    assert len(program.kernels) <= kernels < len(lowered(model, target).kernels)
    np.testing.assert_array_equal(together, run(model, target))


def test_what_differs_is_read_from_a_table() -> None:
    program = lowered(chain("softmax", ASYMMETRIC))
    for kernel in program.kernels.values():
        assert {buffer.name for buffer in kernel.parameters[-2:]} == {"literals", "whole_literals"}
    numbers = program.constants[f"{MARK}literals"]()
    assert {np.float32(scale) for scale, _ in ASYMMETRIC[:-1]} <= set(numbers)
    steps = [step for segment in program.segments for step in segment if isinstance(step, Run)]
    assert len({step.arguments[-2:] for step in steps}) == len(steps) == len(ASYMMETRIC) - 1


@pytest.mark.parametrize("odd", [(0.03, 0), (1.0, 120)], ids=["no zero point", "a factor of 1"])
def test_numbers_that_make_code_simpler_stay_in_it(odd: Layer) -> None:
    usual = len(lowered(chain("softmax", ASYMMETRIC)).kernels)
    assert len(lowered(chain("softmax", [*ASYMMETRIC[:2], odd, *ASYMMETRIC[2:]])).kernels) > usual


def test_kernels_are_compiled_as_they_come() -> None:
    """One that the finished program has no more, or another one of the name, is left out."""
    model, target = chain("product", ASYMMETRIC), Target.host()
    told: list[str] = []
    with Building(target) as building:

        def tell(name: str, kernel: Kernel) -> None:
            told.append(name)
            building.add(name, kernel)

        program = program_of(graph_of(model, Options()), target, tell=tell)
        found = building.finish(program)
    assert told == list(program.kernels)
    assert found.objects == build(program, target).objects
    with Building(target) as building:
        for name, kernel in program.kernels.items():
            building.add(f"old_{name}", kernel)
        assert building.finish(program).objects == found.objects


def test_one_layer_keeps_its_numbers() -> None:
    (kernel,) = lowered(chain("softmax", ASYMMETRIC[:2])).kernels.values()
    assert "literals" not in str(kernel) and str(float(np.float32(ASYMMETRIC[0][0]))) in str(kernel)


@settings(max_examples=4, deadline=None)
@given(
    st.sampled_from(["linear", "softmax", "product"]),
    st.lists(st.tuples(st.floats(2.0**-10, 2.0, width=32), st.integers(0, 255)), min_size=3, max_size=5),
)
def test_any_scales_and_zero_points(kind: str, layers: list[Layer]) -> None:
    model = chain(kind, layers)
    together = run(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Literals, "_group", lambda self, graph: None)
        np.testing.assert_array_equal(together, run(model))


# Literals of several kernels.


def test_what_is_computed_of_literals_alone_is_one() -> None:
    points = s.varying([1, 200, 7], U8)
    assert s.cast(points, F32) == s.varying([1.0, 200.0, 7.0], F32)
    assert s.cast(points, I32) - s.const(128, I32) == s.varying([-127, 72, -121], I32)
    assert -s.varying([1.5, -2.0], F32) == s.varying([-1.5, 2.0], F32)
    assert s.varying([3, 3], I32) == s.const(3, I32)
    assert s.varying([0.0, -0.0], F32) != s.const(0.0, F32)


def _quantized(scale: s.Scalar, zero: s.Scalar, back: bool) -> s.Scalar:
    x = s.load(Buffer("x", F32, 9), 0)
    whole = s.binary("add", s.unary("round", x / scale), s.cast(zero, F32))
    limited = s.binary("min", s.binary("max", whole, s.const(0.0)), s.const(255.0))
    narrow = s.cast(limited, U8)
    return s.cast(s.cast(narrow, I32) - s.cast(zero, I32), F32) * scale if back else narrow


@given(
    st.lists(st.tuples(st.floats(2.0**-10, 8.0, width=32), st.integers(1, 255)), min_size=2, max_size=4, unique=True),
    st.booleans(),
    st.booleans(),
)
def test_roundings_of_each_member_are_those_of_its_own_numbers(layers: list[Layer], back: bool, fma: bool) -> None:
    scales, zeros = [scale for scale, _ in layers], [zero for _, zero in layers]

    def rounded(scale: s.Scalar, zero: s.Scalar) -> s.Scalar:
        value = _quantized(scale, zero, back)
        into = Buffer("y", value.dtype, 9)
        kernel = round_in_steps(Kernel("k", (into,), ("y",), (), (Store(into, 0, value),)), fma)
        (store,) = kernel.body
        assert isinstance(store, Store)
        return store.value

    for member, (scale, zero) in enumerate(layers):

        def own(node: s.Scalar, member: int = member) -> s.Scalar | None:
            return s.const(node.values[member], node.dtype) if isinstance(node, s.Varying) else None

        together = Rewriter(own)(rounded(s.varying(scales, F32), s.varying(zeros, U8)))
        assert together == rounded(s.const(scale, F32), s.cast(s.const(zero, U8), U8))
