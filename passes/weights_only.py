"""Products by weights that only they are quantized of: the codes stay packed, and a kernel unpacks them in registers.

MatMul, Gemm or FusedMatMul of a real operand and a DequantizeLinear of constants of 2, 4 or 8 bits (one scale, one for
each column, or one for each block along the depth), perhaps reshaped or transposed, becomes `onnxc.PackedMatMul`, which
MatMulNBits is from the start. And rows gathered from such a table are gathered before they are dequantized, so that the
table is never there in reals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..ir.dtypes import BF16, F16, F32, of_numpy
from ..ir.graph import Attribute, Graph, Node, Value, unite
from ..ir.ops.packed_weights import packed_codes
from ..ir.tensors import normalize_axis
from .cleanup import without_dead_code
from .pipeline import Pass, register
from .rewriting import Rewriter

REAL = (F32, F16, BF16)
WORD = 32
"""Bits that a block of codes must fill, or several times: kernels unpack words."""


@dataclass(frozen=True)
class Codes:
    """A matrix of codes [rows, columns]; (code - zero) * scale with scales and zeros [row blocks, column blocks], each
    for `block` = (rows, columns) of the matrix."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    block: tuple[int, int]

    @property
    def transposed(self) -> Codes:
        zeros = None if self.zeros is None else self.zeros.T
        return Codes(self.codes.T, self.scales.T, zeros, (self.block[1], self.block[0]))


class Unfit(Exception):
    """Why weights are not kept packed; empty where they are not quantized."""


@register
@dataclass(frozen=True)
class WeightsOnly(Pass):
    """Keeps constants of few bits packed in products; those of less than `least` elements are not worth it."""

    name = "weights-only"
    least: int = 1 << 12

    def run(self, graph: Graph) -> Graph:
        changed = _Sweep(graph, least=self.least).run()
        return graph if changed is graph else without_dead_code(changed)


class _Sweep(Rewriter):
    def __init__(self, graph: Graph, parent: _Sweep | None = None, least: int = 0) -> None:
        super().__init__(graph, parent)
        self.least: int = parent.least if parent else least

    def visit(self, node: Node) -> None:
        try:
            if node.op in ("MatMul", "Gemm", "com.microsoft.FusedMatMul"):
                self.product(node)
                return
            if node.op == "Gather":
                self.gather(node)
                return
        except Unfit as reason:
            remark = f"weights in {node.output.dtype}: {reason}" if str(reason) else node.remark
            self.add(node if node.remark == remark else replace(node, remark=remark))
            return
        self.add(node)

    # Products

    def product(self, node: Node) -> None:
        """x @ w as a product by packed weights."""
        left, right = node.inputs[:2]
        if left is None or right is None or node.output.dtype not in REAL or left.dtype not in REAL:
            raise Unfit
        weights, origin = self.codes(right)
        if self.array(left) is not None or weights.codes.size < self.least:
            raise Unfit
        unknown = set(node.attributes) - {"alpha", "beta", "transA", "transB"}
        if any(node.attributes[name] for name in unknown):
            raise Unfit("the product has batch axes that are moved")
        if node.attributes.get("transB"):
            weights = weights.transposed
        depth = weights.codes.shape[0]
        block, count = weights.block
        if count != 1 and weights.scales.shape[1] > 1:
            raise Unfit("neighbouring columns share a scale that differs along them")
        bits = of_numpy(weights.codes.dtype).bits
        blocks = -(-depth // block)
        if blocks > 1 and block * bits % WORD:
            raise Unfit(f"blocks of {block} codes of {bits} bits end within a word")
        arrays = packed(weights, bits, blocks)
        origin = unite(node.origin, origin)
        if node.attributes.get("transA"):
            order = (*range(left.tensor.rank - 2), left.tensor.rank - 1, left.tensor.rank - 2)
            left = self.emit("Transpose", (left,), {"perm": order}, stem=f"{left.name}.turned", origin=node.origin)
        constants = [self.constant(array, f"{right.name}.{name}", origin) for name, array in arrays.items()]
        attributes: dict[str, Attribute] = {"depth": depth, "bits": bits, "block_size": block}
        alpha, beta = (node.attributes.get(name, 1.0) for name in ("alpha", "beta"))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        last = bias is None and alpha == 1.0
        result = self.emit(
            "onnxc.PackedMatMul", (left, *constants), attributes, stem=f"{node.output.name}.packed", origin=origin,
            output=node.output if last else None,
        )  # fmt: skip
        if alpha != 1.0:
            result = self._scaled(result, alpha, node, node.output if bias is None else None)
        if bias is not None:
            bias = bias if beta == 1.0 else self._scaled(bias, beta, node)
            self.emit("Add", (result, bias), stem="", origin=node.origin, output=node.output)

    def _scaled(self, value: Value, factor: Attribute, node: Node, output: Value | None = None) -> Value:
        number = self.constant(np.array(factor, value.dtype.numpy), f"{value.name}.factor", node.origin)
        return self.emit("Mul", (value, number), stem=f"{value.name}.scaled", origin=node.origin, output=output)

    def codes(self, value: Value) -> tuple[Codes, tuple[str, ...]]:
        """The matrix that a value is by constants. Raises Unfit."""
        node = self.producer(value)
        if node is not None and node.op == "Transpose" and len(value.shape) == 2:
            found, origin = self.codes(self._source(node))
            swapped = node.attributes.get("perm", (1, 0)) == (1, 0)
            return (found.transposed if swapped else found), unite(origin, node.origin)
        if node is not None and node.op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"):
            return self.codes_of(self._source(node), value), node.origin
        return self.codes_of(value, value), ()

    def _source(self, node: Node) -> Value:
        source = node.inputs[0]
        assert source is not None
        return source

    def codes_of(self, value: Value, matrix: Value) -> Codes:
        """The matrix of a dequantization, whose last axes may be taken for one in `matrix`."""
        node = self.made_by(value, "DequantizeLinear", "com.microsoft.DequantizeLinear")
        if node is None:
            raise Unfit
        x, scale, zero = (*(self.known(v) for v in node.inputs), None)[:3]
        if x is None or scale is None or (len(node.inputs) > 2 and node.inputs[2] is not None and zero is None):
            raise Unfit
        if of_numpy(x.dtype).bits not in (2, 4, 8) or not of_numpy(x.dtype).is_integer:
            raise Unfit(f"they are quantized to {of_numpy(x.dtype)}")
        if of_numpy(scale.dtype) not in REAL:
            raise Unfit(f"scales are {of_numpy(scale.dtype)}")
        shape = matrix.shape
        merged = (*x.shape[:1], x.size // max(x.shape[0], 1)) if x.ndim else ()
        if x.ndim < 2 or 0 in x.shape or len(shape) != 2 or shape not in (x.shape, merged):
            raise Unfit("their axes are taken together in another way than the last ones")
        axis = normalize_axis(int(str(node.attributes.get("axis", 1))), x.ndim)
        block = int(str(node.attributes.get("block_size", 0)))
        scales, size = self._blocks(scale, x, axis, block)
        zeros = None if zero is None else self._blocks(zero, x, axis, block)[0]
        return Codes(x.reshape(merged), scales, zeros, size)

    def known(self, value: Value | None) -> np.ndarray | None:
        """A constant, or one number that is expanded: a zero point for all blocks is too large for folding."""
        node = None if value is None else self.made_by(value, "Expand")
        source = None if node is None else self.array(node.inputs[0])
        sizes = () if value is None else value.shape
        if source is not None and all(isinstance(size, int) for size in sizes):
            return np.broadcast_to(source, [int(str(size)) for size in sizes])
        return self.array(value)

    def _blocks(
        self, parameter: np.ndarray, x: np.ndarray, axis: int, block: int
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """A scale or zero point as blocks of the matrix [x.shape[0], all else]."""
        rows, columns = x.shape[0], x.size // x.shape[0]
        if parameter.size == 1:
            return parameter.reshape(1, 1), (rows, columns)
        if parameter.ndim == 1 and x.ndim > 1 and not (block and parameter.shape[0] != x.shape[axis]):
            if axis == 0:
                return parameter.reshape(-1, 1), (1, columns)
            if x.ndim == 2:
                return parameter.reshape(1, -1), (rows, 1)
        if parameter.ndim == x.ndim and axis == 0 and x.ndim == 2:
            return parameter, (block, 1)
        if parameter.ndim == x.ndim and axis == x.ndim - 1 and x.shape[axis] % block == 0:
            return parameter.reshape(rows, -1), (1, block)
        if parameter.ndim == x.ndim == 2:
            return parameter, (1, block)
        raise Unfit("scales lie along an axis in the middle")

    # Tables

    def gather(self, node: Node) -> None:
        """Rows of a table: codes, scales and zero points are gathered, not what is made of them."""
        table = self.made_by(node.inputs[0], "DequantizeLinear", "com.microsoft.DequantizeLinear")
        indices = node.inputs[1]
        if table is None or indices is None or node.attributes.get("axis", 0) != 0:
            raise Unfit
        parts = [self.array(value) for value in table.inputs if value is not None]
        x, scale = parts[0], parts[1]
        if x is None or scale is None or any(part is None for part in parts) or x.size < self.least or x.ndim < 2:
            raise Unfit
        block, rank = int(str(table.attributes.get("block_size", 0))), indices.tensor.rank
        axis = normalize_axis(int(str(table.attributes.get("axis", 1))), x.ndim)
        by_row = scale.ndim == 1 and scale.size > 1 and axis == 0 and x.ndim == 2
        if scale.size > 1 and axis == 0 and not by_row:
            raise Unfit
        if by_row:  # as blocks that are whole rows
            axis, block = 1, x.shape[1]
        each = by_row or (scale.ndim == x.ndim and scale.size > 1)
        arrays = [scale, *(array for array in parts[2:] if array is not None)]
        kind, width = of_numpy(x.dtype), x.shape[-1]
        codes = x
        if kind.bits < 8:  # an element would take a byte
            middle = 1 << (kind.bits - 1) if kind.kind == "int" else 0
            codes = packed_codes(x.astype(np.int8) + np.int8(middle), kind.bits)
            zeros = arrays[1].astype(np.int8) if len(arrays) > 1 else np.zeros(scale.shape, np.int8)
            arrays[1:] = [(zeros + np.int8(middle)).view(np.uint8)]
        stems = [value.name for value in (*table.inputs, table.inputs[0]) if value is not None]
        inputs: list[Value | None] = []
        for number, (array, stem) in enumerate(zip((codes, *arrays), stems, strict=False)):
            array = array.reshape(-1, 1) if number and by_row else array
            value = self.constant(array, f"{stem}.table", node.origin)
            if each or not number:
                value = self.emit("Gather", (value, indices), {"axis": 0}, stem=f"{stem}.rows", origin=node.origin)
            if not number and kind.bits < 8:
                bits: dict[str, Attribute] = {"bits": kind.bits, "count": (width,)}
                value = self.emit("onnxc.UnpackBits", (value,), bits, stem=f"{stem}.codes", origin=node.origin)
            inputs.append(value)
        attributes: dict[str, Attribute] = {**table.attributes, "axis": axis + rank - 1}
        if each:
            attributes["block_size"] = block
        origin = unite(table.origin, node.origin)
        self.emit(table.op, inputs, attributes, stem="", origin=origin, output=node.output)


def packed(weights: Codes, bits: int, blocks: int) -> dict[str, np.ndarray]:
    """The operands of `onnxc.PackedMatMul` for a matrix [depth, columns]: codes, scales, and zero points unless all are
    in the middle of the range."""
    depth, columns = weights.codes.shape
    signed = of_numpy(weights.codes.dtype).kind == "int"
    middle, each = 1 << (bits - 1), 8 // bits

    def unsigned(array: np.ndarray) -> np.ndarray:
        narrow = array.astype(np.int8 if signed else np.uint8).view(np.uint8)
        return (narrow + np.uint8(middle if signed else 0)) & np.uint8(2 * middle - 1)

    codes = np.zeros((columns, -(-depth // each)), np.uint8)
    step = max(1, (1 << 22) // max(depth, 1))
    for first in range(0, columns, step):  # a part at a time: what is read of a mapped file need not stay
        part = unsigned(np.ascontiguousarray(weights.codes[:, first : first + step].T))
        codes[first : first + step] = packed_codes(part, bits)
    spread = (columns, blocks)
    scales = np.ascontiguousarray(np.broadcast_to(weights.scales.T, spread))
    found = {"codes": codes, "scales": scales}
    if weights.zeros is not None:
        zeros = unsigned(weights.zeros.T)
    else:
        zeros = np.full((1, 1), middle if signed else 0, np.uint8)
    if np.any(zeros != middle):
        found["zeros"] = np.ascontiguousarray(np.broadcast_to(zeros, spread))
    return found
