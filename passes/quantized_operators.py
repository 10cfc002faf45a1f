"""Operators of quantized tensors as products of integers, or as reals between a dequantization and a quantization:
what they mean, bit for bit, in the form that other passes know."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..ir.dtypes import F32
from ..ir.graph import Attribute, Node, Value
from .quantized_values import QuantizedRewriter, byte_type, trimmed


class Operators(QuantizedRewriter):
    """The sweep that spells operators of quantized tensors out."""

    def visit(self, node: Node) -> None:
        make = OPERATORS.get(node.op)
        if make is None or not make(self, node):
            self.add(node)

    def requantized(self, node: Node, total: Value, scale: Value, y_scale: Value, y_zero: Value | None) -> None:
        """Adds total * scale / y_scale + y_zero as the node's result."""
        stem, origin = node.output.name, node.origin
        real = self.emit("Cast", (total,), {"to": F32}, stem=f"{stem}.real", origin=origin)
        scaled = self.emit("Mul", (real, scale), stem=f"{stem}.scaled", origin=origin)
        self.quantize(node, scaled, y_scale, y_zero)

    def quantize(self, node: Node, real: Value, scale: Value, zero: Value | None) -> None:
        """Adds the quantized tensor as the node's result."""
        scale = self.scalar_of(scale, node.origin)
        attributes: dict[str, Attribute] = {}
        if zero is None:
            attributes["output_dtype"] = node.output.dtype
        else:
            zero = self.scalar_of(zero, node.origin)
        self.emit(
            "QuantizeLinear", trimmed(real, scale, zero), attributes, stem="", origin=node.origin, output=node.output
        )

    def real(self, x: Value, scale: Value, zero: Value | None, origin: tuple[str, ...]) -> Value:
        """(x - zero) * scale."""
        parameters = (self.scalar_of(scale, origin), None if zero is None else self.scalar_of(zero, origin))
        return self.emit("DequantizeLinear", trimmed(x, *parameters), stem=f"{x.name}.real", origin=origin)

    def row(self, value: Value, rank: int, origin: tuple[str, ...]) -> Value:
        """A scale for all elements, or one for each position of axis 1 of tensors of that rank."""
        return self.along(value, None if is_single(value) else 1, rank, origin)

    def zero_of(self, value: Value | None, origin: tuple[str, ...]) -> Value | None:
        """Zero points, None where they are 0; one for all elements has no axes."""
        if value is None or self.is_nothing(value):
            return None
        return self.scalar_of(value, origin) if is_single(value) else value


def is_single(value: Value) -> bool:
    """Whether a parameter has one element."""
    return value.shape in ((), (1,))


def _conv(sweep: Operators, node: Node) -> bool:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias = (*node.inputs, None)[:9]
    assert x and x_scale and w and w_scale and y_scale
    if not all(map(is_single, (x_scale, y_scale))) or {x_scale.dtype, w_scale.dtype, y_scale.dtype} != {F32}:
        return False
    if byte_type(x.dtype) != x.dtype or byte_type(w.dtype) != w.dtype:
        return False
    stem, origin, rank = node.output.name, node.origin, node.output.tensor.rank
    zeros = sweep.zero_of(x_zero, origin), sweep.zero_of(w_zero, origin)
    total = sweep.emit(
        "ConvInteger", trimmed(x, w, *zeros), node.attributes, stem=f"{stem}.products", origin=origin
    )  # fmt: skip
    if bias is not None:
        total = sweep.emit(
            "Add", (total, sweep.along(bias, 1, rank, origin)), stem=f"{stem}.sum", origin=origin
        )  # fmt: skip
    scale = sweep.product(sweep.row(w_scale, rank, origin), sweep.scalar_of(x_scale, origin), origin)
    sweep.requantized(node, total, scale, y_scale, y_zero)
    return True


def _matmul(sweep: Operators, node: Node) -> bool:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = node.inputs
    assert a and a_scale and b and b_scale and y_scale
    columns = is_single(b_scale) or b_scale.tensor.rank == 1
    if not (is_single(a_scale) and columns and is_single(y_scale)) or min(a.tensor.rank, b.tensor.rank) < 2:
        return False
    if {a_scale.dtype, b_scale.dtype, y_scale.dtype} != {F32}:
        return False
    if byte_type(a.dtype) != a.dtype or byte_type(b.dtype) != b.dtype:
        return False
    origin = node.origin
    zeros = sweep.zero_of(a_zero, origin), sweep.zero_of(b_zero, origin)
    total = sweep.emit("MatMulInteger", trimmed(a, b, *zeros), stem=f"{node.output.name}.sum", origin=origin)
    weights = sweep.scalar_of(b_scale, origin) if is_single(b_scale) else b_scale
    scale = sweep.product(sweep.scalar_of(a_scale, origin), weights, origin)
    sweep.requantized(node, total, scale, y_scale, y_zero)
    return True


def _pair(op: str) -> Callable[[Operators, Node], bool]:
    def rewrite(sweep: Operators, node: Node) -> bool:
        a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (*node.inputs, None)[:8]
        assert a and a_scale and b and b_scale and y_scale
        if not all(map(is_single, (a_scale, b_scale, y_scale))) or {a_scale.dtype, b_scale.dtype} != {F32}:
            return False
        origin = node.origin
        left, right = sweep.real(a, a_scale, a_zero, origin), sweep.real(b, b_scale, b_zero, origin)
        result = sweep.emit(op, (left, right), stem=f"{node.output.name}.real", origin=origin)
        sweep.quantize(node, result, y_scale, y_zero)
        return True

    return rewrite


OPERATORS: Mapping[str, Callable[[Operators, Node], bool]] = {
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "com.microsoft.QLinearAdd": _pair("Add"),
    "com.microsoft.QLinearMul": _pair("Mul"),
}
"""How operators are spelt out; False where they stay as they are. The importer expands others of com.microsoft."""
