"""Scales of quantization moved into what is quantized: where constants are multiplied with sums anyway, dividing by the
scale costs nothing.

round((sum * s) / t) becomes round(sum * (s / t)), and so through sums, activations that scale with their operand, and
residuals. The quotient of the constants is rounded once, as the division was: what is quantized differs in its last bit
at most, so that a quantized value is another one only where a real lay that near the middle of two steps. Sums of
dequantized bytes may lie there often: 0.2 a + 0.02 b, for a step of 0.2, at every tenth b. All pairs of bytes tell;
where more than few differ, the division stays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..ir.dtypes import F32, I8, I32, U8, DType
from ..ir.graph import Node, Value
from .quantized_values import BYTES, QuantizedRewriter

HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu")
"""Operators f with f(x / t) = f(x) / t for t > 0."""


FEW = 2.5e-4
"""The share of pairs of bytes whose sum may come to another step."""


class Scales(QuantizedRewriter):
    """The sweep that leaves QuantizeLinear a scale of 1 after products of integers."""

    def visit(self, node: Node) -> None:
        scale = self.array(node.inputs[1]) if node.op == "QuantizeLinear" and len(node.inputs) > 1 else None
        x = node.inputs[0] if node.inputs else None
        plain = scale is not None and scale.size == 1 and scale.dtype == np.float32 and x is not None
        few = node.op == "QuantizeLinear" and node.output.dtype.is_integer and node.output.dtype.bits <= BYTES
        if scale is None or x is None or not (plain and few) or x.dtype != F32 or float(scale.reshape(-1)[0]) == 1:
            self.add(node)
            return
        step = scale.reshape(-1)[0]
        if (
            not (np.isfinite(step) and step > 0)
            or not self.divisible(x)
            or not self.after_sums(x)
            or not self.agrees(x, step)
        ):
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

    def agrees(self, value: Value, step: np.float32) -> bool:
        """Whether (nearly) all bytes come to the same steps both ways; sums of products lie anywhere."""
        leaves = self.bytes_below(value)
        if leaves is None or len(leaves) > 2:
            return leaves is None
        shapes = ((256, 1), (1, 256))
        places = {
            name: np.arange(*map(int, (dtype.limits[0], dtype.limits[1] + 1)), dtype=np.float32).reshape(shape)
            for (name, dtype), shape in zip(leaves.items(), shapes, strict=False)
        }
        defined = np.rint(self.computed(value, places, np.float32(1)) / step)
        return bool(np.mean(np.rint(self.computed(value, places, step)) != defined) <= FEW)

    def bytes_below(self, value: Value) -> dict[str, DType] | None:
        """The dequantized bytes of which a value is made by numbers; None where it is made of anything else."""
        array, node = self.array(value), self.producer(value)
        if array is not None or node is None:
            return {} if array is not None and array.size == 1 else None
        if node.op == "DequantizeLinear":
            found = self.parameters(node)
            plain = found is not None and found.axis is None and found.source.dtype in (U8, I8)
            known = found is not None and (found.zero is None or self.array(found.zero) is not None)
            return {value.name: node.operands[0].dtype} if plain and known else None
        if node.op not in ("Add", "Mul", "Relu", "LeakyRelu"):
            return None
        parts = [self.bytes_below(operand) for operand in node.operands]
        leaves: dict[str, DType] = {}
        for part in parts:
            leaves.update(part or {})
        return None if None in parts else leaves

    def computed(self, value: Value, places: Mapping[str, np.ndarray], step: np.float32) -> np.ndarray:
        """The value for some bytes in f32, by constants that are divided by a step."""
        array, node = self.array(value), self.producer(value)
        if array is not None or node is None:
            assert array is not None
            return np.asarray(array / step, np.float32).reshape(())
        if node.op == "DequantizeLinear":
            scale, zero = (None if operand is None else self.array(operand) for operand in (*node.inputs, None)[1:3])
            assert scale is not None
            shifted = places[value.name] if zero is None else places[value.name] - zero.astype(np.float32).reshape(())
            return np.asarray(shifted * np.float32(scale.reshape(-1)[0] / step), np.float32)
        if node.op == "Mul":
            first = next(i for i, operand in enumerate(node.operands) if self.array(operand) is not None)
            one = np.float32(1)
            parts = [self.computed(x, places, step if i == first else one) for i, x in enumerate(node.operands)]
            return np.asarray(parts[0] * parts[1])
        parts = [self.computed(operand, places, step) for operand in node.operands]
        if node.op == "Add":
            return np.asarray(parts[0] + parts[1])
        slope = node.attributes.get("alpha", 0.01) if node.op == "LeakyRelu" else 0.0
        assert isinstance(slope, float)
        return np.where(parts[0] < 0, parts[0] * np.float32(slope), parts[0])

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
