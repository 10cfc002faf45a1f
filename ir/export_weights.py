"""Codes of a few bits as ONNX's own operators: unpacked by shifts, for a product also scaled and multiplied."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from .errors import UnsupportedError
from .export_sizes import Sizes
from .graph import Node


class _Writer:
    """Collects the nodes that stand for one."""

    def __init__(self, node: Node, sizes: Sizes) -> None:
        self.node, self.sizes, self.nodes = node, sizes, list[NodeProto]()
        self.numbers = count()

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{self.node.output.name}~weights{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        return self.sizes.constant(array, f"{self.node.output.name}~numbers{next(self.numbers)}")

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def byte(self, number: int) -> str:
        return self.constant(np.array(number, np.uint8))

    def unpacked(self, codes: str, rank: int, bits: int, high_first: bool = False) -> str:
        """All codes along the last axis of bytes, each as a byte."""
        if bits == 8:
            return codes
        places = range(8 // bits)
        parts = []
        for place in reversed(places) if high_first else places:
            shifted = self.add("BitShift", codes, self.byte(place * bits), direction="RIGHT")
            masked = self.add("BitwiseAnd", shifted, self.byte((1 << bits) - 1))
            parts.append(self.add("Unsqueeze", masked, self.ints(rank)))
        return self.add("Reshape", self.add("Concat", *parts, axis=rank), self.ints(*[0] * (rank - 1), -1))

    def finished(self, result: str, dtype: int) -> list[NodeProto]:
        self.nodes.append(onnx.helper.make_node("Cast", [result], [self.node.output.name], to=dtype))
        return [*self.sizes.take(), *self.nodes]


def unpacked_to_onnx(node: Node, sizes: Sizes) -> list[NodeProto]:
    """Nodes that compute what an onnxc.UnpackBits is."""
    write, packed, wanted = _Writer(node, sizes), node.operands[0], node.attributes.get("count")
    rank = packed.tensor.rank
    bits, high_first = (int(str(node.attributes.get(name, 0))) for name in ("bits", "high_first"))
    codes = write.unpacked(packed.name, rank, bits, bool(high_first))
    if isinstance(wanted, tuple) and isinstance(wanted[0], int):
        ends = write.ints(wanted[0])
    elif len(node.operands) > 1:
        ends = node.operands[1].name
    else:
        raise UnsupportedError(f"{node.where}: ONNX cannot hold the symbolic number of codes {wanted!r}")
    result = write.add("Slice", codes, write.ints(0), ends, write.ints(rank - 1))
    return write.finished(result, TensorProto.UINT8)


def packed_product_to_onnx(node: Node, sizes: Sizes) -> list[NodeProto]:
    """Nodes that compute what an onnxc.PackedMatMul is."""
    write = _Writer(node, sizes)
    add, ints = write.add, write.ints
    a, codes, scales, *zeros = (value.name for value in node.operands)
    depth, bits, block = (int(str(node.attributes[name])) for name in ("depth", "bits", "block_size"))

    def real(value: str) -> str:
        return add("Cast", value, to=TensorProto.FLOAT)

    def row(value: str) -> str:
        """[N, blocks] for each of the neighbours, as [N, depth]."""
        wide = add("Expand", add("Unsqueeze", value, ints(2)), ints(1, 1, block))
        return add("Slice", add("Reshape", wide, ints(0, -1)), ints(0), ints(depth), ints(1))

    values = real(add("Slice", write.unpacked(codes, 2, bits), ints(0), ints(depth), ints(1)))
    zero = row(real(zeros[0])) if zeros else write.constant(np.array(1 << (bits - 1), np.float32))
    weights = add("Mul", add("Sub", values, zero), row(real(scales)))
    product = add("MatMul", real(a), add("Transpose", weights, perm=[1, 0]))
    return write.finished(product, node.output.dtype.onnx)
