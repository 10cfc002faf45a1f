"""What is known of tensors between integers and reals: scale, zero point, and the range that sums can take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..ir.dtypes import F32, I8, U8, DType
from ..ir.graph import Node, TensorType, Value
from .rewriting import Rewriter

SUMS = 1 << 31
"""What a sum in i32 must stay below."""
BYTES = 8
"""Bits of the integers that products are formed of."""


@dataclass(frozen=True)
class Quantized:
    """A real tensor (source - zero) * scale, `node` being its DequantizeLinear.

    `scale` and `zero` (None: 0) are scalars or [n] along `axis`, which is None where there is one for all elements.
    """

    node: Node
    source: Value
    scale: Value
    zero: Value | None
    axis: int | None


class QuantizedRewriter(Rewriter):
    """A sweep that looks through DequantizeLinear."""

    def quantized(self, value: Value | None) -> Quantized | None:
        """The integers that a value stands for, None where it is no DequantizeLinear or has a scale for each block."""
        node = self.made_by(value, "DequantizeLinear")
        return None if node is None else self.parameters(node)

    def parameters(self, node: Node) -> Quantized | None:
        """What a QuantizeLinear or DequantizeLinear does; None where it has a scale for each block, or one of a length
        that is not known, or divides in a type of its own."""
        source, scale, zero = (*node.inputs, None)[:3]
        if source is None or scale is None or scale.tensor.rank > 1 or source.tensor.rank == 0 != scale.tensor.rank:
            return None
        if zero is not None and self.is_nothing(zero):
            zero = None
        if "precision" in node.attributes:
            return None
        if scale.tensor.rank == 0 or scale.shape == (1,):
            return Quantized(node, source, scale, zero, None)
        if not isinstance(scale.shape[0], int) or not scale.shape[0]:
            return None
        axis = node.attributes.get("axis", 1)
        assert isinstance(axis, int)
        return Quantized(node, source, scale, zero, axis % source.tensor.rank if source.tensor.rank > 1 else 0)

    def is_nothing(self, zero: Value) -> bool:
        """Whether a zero point is the constant 0."""
        array = self.array(zero)
        return array is not None and not np.any(array)

    # Scales and zero points in the forms that other operators want.

    def shaped(self, value: Value, shape: tuple[int, ...], origin: tuple[str, ...]) -> Value:
        """The value, of as many elements, in another shape."""
        if value.shape == shape:
            return value
        array = self.array(value)
        if array is not None:
            return self.constant(array.reshape(shape), value.name, origin)
        return self.emit("Reshape", (value,), {"shape": shape}, stem=value.name, origin=origin)

    def scalar_of(self, value: Value, origin: tuple[str, ...]) -> Value:
        """A parameter for all elements, of rank 0."""
        return self.shaped(value, (), origin)

    def along(self, value: Value, axis: int | None, rank: int, origin: tuple[str, ...]) -> Value:
        """A parameter that broadcasts along an axis of tensors of the given rank."""
        if axis is None:
            return self.scalar_of(value, origin)
        (count,) = value.shape
        assert isinstance(count, int)
        return self.shaped(value, (count,) + (1,) * (rank - 1 - axis), origin)

    def product(self, a: Value, b: Value, origin: tuple[str, ...]) -> Value:
        """a * b in f32, of constants at once."""
        arrays = self.array(a), self.array(b)
        if arrays[0] is not None and arrays[1] is not None:
            return self.constant(np.multiply(arrays[0], arrays[1], dtype=np.float32), f"{b.name}.product", origin)
        return self.emit("Mul", (a, b), stem=f"{b.name}.product", origin=origin)

    def bytes_of(self, value: Value, dtype: DType, origin: tuple[str, ...]) -> Value:
        """Integers of a few bits as bytes."""
        if value.dtype == dtype:
            return value
        array = self.array(value)
        if array is not None:
            return self.constant(array.astype(dtype.numpy), f"{value.name}.{dtype}", origin)
        return self.emit("Cast", (value,), {"to": dtype}, stem=f"{value.name}.{dtype}", origin=origin)

    # Ranges.

    def largest(self, found: Quantized) -> int:
        """A bound of |source - zero|."""
        low, high = map(int, found.source.dtype.limits)
        if found.zero is None:
            return max(-low, high)
        zeros = self.array(found.zero)
        if zeros is None:
            return high - low
        return int(max(high - int(zeros.min()), int(zeros.max()) - low))

    def fits_sums(self, factor: Quantized, weights: Quantized, axes: tuple[int, ...]) -> bool:
        """Whether sums of products of elements of `factor` with those of `weights` over axes of the latter fit i32; a
        size that is not known is taken to be 1."""
        extents = [weights.source.shape[axis] for axis in axes]
        depth = math.prod(extent for extent in extents if isinstance(extent, int))
        if self.largest(factor) * self.largest(weights) * depth < SUMS:
            return True
        array, zeros = self.array(weights.source), np.zeros((), np.int32)
        if weights.zero is not None:
            known = self.array(weights.zero)
            if known is None:
                return False
            zeros = known.astype(np.int32).reshape(-1, *(1,) * (len(weights.source.shape) - 1 - (weights.axis or 0)))
        if array is None:
            return False
        rows = np.abs(array.astype(np.int32) - zeros).sum(axis=axes, dtype=np.int64)
        return int(rows.max(initial=0)) * self.largest(factor) < SUMS


def byte_type(dtype: DType) -> DType | None:
    """The type of 8 bits that holds integers of this one."""
    if not dtype.is_integer or dtype.bits > BYTES:
        return None
    return I8 if dtype.limits[0] < 0 else U8


def is_real(value: Value) -> bool:
    """Whether it is a tensor of f32."""
    return isinstance(value.type, TensorType) and value.dtype == F32


def trimmed(*inputs: Value | None) -> tuple[Value | None, ...]:
    """Inputs without those at the end that are absent."""
    found = list(inputs)
    while found and found[-1] is None:
        found.pop()
    return tuple(found)
