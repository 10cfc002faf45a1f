"""Scales of quantization moved into what is quantized: where constants are multiplied with sums anyway, dividing by the
scale costs nothing.

round((sum * s) / t) becomes round(sum * (s / t)), and so through sums, activations that scale with their operand, and
residuals. The quotient of the constants is rounded once, as the division was: what is quantized differs in its last bit
at most, so that a quantized value is another one only where a real lay that near the middle of two steps.
"""

from __future__ import annotations

import numpy as np

from ..ir.dtypes import F32, I32
from ..ir.graph import Node, Value
from .quantized_values import QuantizedRewriter

HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu")
"""Operators f with f(x / t) = f(x) / t for t > 0."""


class Scales(QuantizedRewriter):
    """The sweep that leaves QuantizeLinear a scale of 1 after products of integers."""

    def visit(self, node: Node) -> None:
        scale = self.array(node.inputs[1]) if node.op == "QuantizeLinear" and len(node.inputs) > 1 else None
        x = node.inputs[0] if node.inputs else None
        plain = scale is not None and scale.size == 1 and scale.dtype == np.float32 and x is not None
        if scale is None or x is None or not plain or x.dtype != F32 or float(scale.reshape(-1)[0]) == 1:
            self.add(node)
            return
        step = scale.reshape(-1)[0]
        if not (np.isfinite(step) and step > 0) or not self.divisible(x) or not self.after_sums(x):
            self.add(node)
            return
        one = self.constant(np.ones(scale.shape, np.float32), f"{node.output.name}.one", node.origin)
        self.add(node.with_inputs({x: self.divided(x, step), node.inputs[1]: one}))  # type: ignore[dict-item]

    def after_sums(self, value: Value | None) -> bool:
        """Whether a value is made of sums of integers by what their kernel takes in."""
        node = self.made_by(value, "Mul", "Add", "DequantizeLinear", "QuantizeLinear", *HOMOGENEOUS)
        if node is None:
            cast = self.made_by(value, "Cast")
            return cast is not None and cast.operands[0].dtype == I32
        return any(self.after_sums(operand) for operand in node.operands)

    def divisible(self, value: Value | None) -> bool:
        """Whether a constant can be taken into what makes a value, which nobody else reads (but a DequantizeLinear)."""
        if self.array(value) is not None:
            return True
        node = self.producer(value)
        if node is not None and node.op == "DequantizeLinear":
            return self.array(node.inputs[1]) is not None
        if node is None or value is None or self.readers(value) != 1:
            return False
        if node.op == "Mul":
            return any(self.array(operand) is not None for operand in node.operands)
        if node.op in HOMOGENEOUS:
            return self.divisible(node.inputs[0])
        return node.op == "Add" and all(map(self.divisible, node.operands))

    def divided(self, value: Value, step: np.float32) -> Value:
        """The value divided by a step."""
        array = self.array(value)
        if array is not None:
            return self.constant(np.asarray(array / step, np.float32), f"{value.name}.steps")
        node = self.producer(value)
        assert node is not None
        changed = list(node.inputs)
        if node.op == "Mul":
            places = [next(i for i, operand in enumerate(node.inputs) if self.array(operand) is not None)]
        elif node.op == "DequantizeLinear":
            places = [1]
        else:
            places = [0] if node.op in HOMOGENEOUS else [0, 1]
        for place in places:
            operand = node.inputs[place]
            assert operand is not None
            changed[place] = self.divided(operand, step)
        return self.emit(node.op, changed, node.attributes, stem=f"{value.name}.steps", origin=node.origin)
