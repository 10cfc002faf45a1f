"""Products with packed weights as ONNX's own operators: codes are unpacked, scaled, and multiplied as a matrix."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from .export_sizes import Sizes
from .graph import Node


def packed_product_to_onnx(node: Node, sizes: Sizes) -> list[NodeProto]:
    """Nodes that compute what an onnxc.PackedMatMul is."""
    a, codes, scales, zeros = (*(None if v is None else v.name for v in node.inputs), None)[:4]
    depth, bits, block = (int(str(node.attributes[name])) for name in ("depth", "bits", "block_size"))
    nodes: list[NodeProto] = []
    numbers = count()

    def add(op: str, *inputs: str | None, **attributes: Any) -> str:
        name = f"{node.output.name}~weights{len(nodes)}"
        nodes.append(onnx.helper.make_node(op, [i or "" for i in inputs], [name], **attributes))
        return name

    def constant(array: np.ndarray) -> str:
        return sizes.constant(array, f"{node.output.name}~numbers{next(numbers)}")

    def ints(*numbers: int) -> str:
        return constant(np.array(numbers, np.int64))

    def real(value: str | None) -> str:
        return add("Cast", value, to=TensorProto.FLOAT)

    def byte(number: int) -> str:
        return constant(np.array(number, np.uint8))

    def row(value: str, repeats: int) -> str:
        """[N, blocks] for each of so many neighbours, as [N, depth]."""
        wide = add("Expand", add("Unsqueeze", value, ints(2)), ints(1, 1, repeats))
        return add("Slice", add("Reshape", wide, ints(0, -1)), ints(0), ints(depth), ints(1))

    if bits < 8:
        parts = []
        for place in range(8 // bits):
            shifted = add("BitShift", codes, byte(place * bits), direction="RIGHT")
            parts.append(add("Unsqueeze", add("BitwiseAnd", shifted, byte((1 << bits) - 1)), ints(2)))
        codes = add("Reshape", add("Concat", *parts, axis=2), ints(0, -1))
    values = real(add("Slice", codes, ints(0), ints(depth), ints(1)))
    zero = constant(np.array(1 << (bits - 1), np.float32)) if zeros is None else row(real(zeros), block)
    weights = add("Mul", add("Sub", values, zero), row(real(scales), block))
    product = add("MatMul", real(a), add("Transpose", weights, perm=[1, 0]))
    nodes.append(onnx.helper.make_node("Cast", [product], [node.output.name], to=node.output.dtype.onnx))
    return [*sizes.take(), *nodes]
