"""One form for what can be written in several ways: shapes as attributes, reshapes as Reshape, no-ops gone.

Operands that decide shapes become attributes where their elements are known, be it symbolically; the attribute has the
operand's name and holds a tuple of numbers or dims. What else is known to be sizes becomes a `Dims` node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from ..ir.dims import Dim, Sum, product
from ..ir.dtypes import BOOL, I64, DType
from ..ir.graph import Attribute, Graph, Node, TensorType, Value
from ..ir.infer import known_dims
from ..ir.ops import REGISTRY
from ..ir.ops.declare import Operator
from .pipeline import Pass, register
from .rewriting import Rewriter, is_small, until_stable

_MANTISSA = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}
_EXPONENT = {"f16": 5, "bf16": 8, "f32": 8, "f64": 11}


@register
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Brings nodes into one form; see the module."""

    name = "canonicalize"

    def run(self, graph: Graph) -> Graph:
        return until_stable(lambda found: Canonicalizer(found).run(), graph)


class Canonicalizer(Rewriter):
    """The sweep of `Canonicalize`."""

    def visit(self, node: Node) -> None:
        node = self.with_static_attributes(node)
        sizes = self.symbolic_sizes(node)
        if sizes:
            for value, elements in zip(node.outputs, sizes, strict=True):
                self.add_sizes(value, elements, node.origin)
            return
        same = unchanged(self, node)
        while same is None:
            simpler = BECOMES[node.op](self, node) if node.op in BECOMES else None
            if simpler is None:
                self.add(node)
                return
            node = simpler
            same = unchanged(self, node)
        self.forward(node, same)

    # Operands that decide shapes.

    def with_static_attributes(self, node: Node) -> Node:
        """The node with its known static operands as attributes."""
        operator = REGISTRY.get(node.op)
        if operator is None or not operator.static:
            return node
        inputs, attributes = list(node.inputs), dict(node.attributes)
        for position, name in operator.static_positions(len(inputs)).items():
            elements = self.elements(inputs[position])
            if elements is not None:
                inputs[position], attributes[name] = None, elements
        while inputs and inputs[-1] is None:
            inputs.pop()
        if node.op == "Range" and inputs != list(node.inputs):
            attributes["dtype"] = node.output.dtype  # it is that of the operands
        changed = replace(node, inputs=tuple(inputs), attributes=attributes)
        if changed == node or not self.same_element_types(operator, changed):
            return node
        return changed

    def elements(self, value: Value | None) -> tuple[int | float | Sum, ...] | None:
        """The elements of a static operand as attributes hold them, None where they are not (exactly) known."""
        if value is None:
            return None
        array = self.array(value)
        if array is not None:
            return tuple(array.reshape(-1).tolist()) if array.dtype.kind in "iuf" else None
        known = self.inference.values.get(value.name)
        if known is None or not all(exactly(element, value.dtype) for element in known):
            return None
        return tuple(element for element in known if isinstance(element, int | float | Sum))

    def same_element_types(self, operator: Operator, node: Node) -> bool:
        """Whether the results keep their element types: some operators take them from a static operand."""
        names = [value.name for value in node.outputs]
        found = self.inference.definition(node.op, node.inputs, node.attributes, node.regions, names, node.origin)
        old = [value.dtype for value in node.outputs if isinstance(value.type, TensorType)]
        return len(old) == len(node.outputs) and [getattr(t, "dtype", None) for t in found[: len(old)]] == old

    # Sizes that data operators read.

    def symbolic_sizes(self, node: Node) -> list[tuple[Dim, ...]]:
        """The elements of each integer result where all are known, but not all as numbers; else nothing."""
        if node.op in ("Dims", "Constant") or (node.op == "Cast" and self.made_by(node.inputs[0], "Dims")):
            return []
        if node.op not in REGISTRY or not all(is_small(value) and value.dtype.is_integer for value in node.outputs):
            return []
        self.learn(node)
        known = [known_dims(self.inference.values.get(value.name)) for value in node.outputs]
        found = [sizes for sizes in known if sizes is not None]
        symbolic = any(isinstance(size, Sum) for sizes in found for size in sizes)
        return found if symbolic and len(found) == len(node.outputs) else []

    def add_sizes(self, value: Value, sizes: tuple[Dim, ...], origin: tuple[str, ...]) -> None:
        attributes: dict[str, Attribute] = {"values": sizes, "shape": value.shape}
        if value.dtype == I64:
            self.emit("Dims", (), attributes, stem=value.name, origin=origin, output=value)
            return
        wide = self.emit("Dims", (), attributes, stem=f"{value.name}.dims", origin=origin)
        self.emit("Cast", (wide,), {"to": value.dtype}, stem=value.name, origin=origin, output=value)


def exactly(element: object, dtype: DType) -> bool:
    """Whether a known element is what the run computes too: floats only where no rounding can have happened."""
    if isinstance(element, bool):
        return False
    if isinstance(element, float):
        return float(np.asarray(element, dtype.numpy)) == element
    return isinstance(element, int | Sum)


# No-ops: an operator, and when its first output is its first operand.


def unchanged(rewriter: Rewriter, node: Node) -> Value | None:
    """The value that the node merely repeats."""
    rule = NO_OPS.get(node.op)
    source = node.inputs[0] if node.inputs else None
    if rule is None or source is None or not node.outputs:
        return None
    if any(rewriter.readers(value) for value in node.outputs[1:]):
        return None
    if node.op in CANCELLING:
        inner = rewriter.made_by(source, node.op)
        return inner.inputs[0] if inner is not None else None
    return source if rule(rewriter, node) else None


def _alone(_: Rewriter, node: Node) -> bool:
    return len(node.inputs) == 1


def _same_shape(_: Rewriter, node: Node) -> bool:
    source = node.inputs[0]
    return source is not None and len(node.operands) == 1 and source.shape == node.output.shape


def _whole(rewriter: Rewriter, node: Node) -> bool:
    steps = node.attributes.get("steps", ())
    return _same_shape(rewriter, node) and isinstance(steps, tuple) and all(step == 1 for step in steps)


def _unpadded(_: Rewriter, node: Node) -> bool:
    pads = node.attributes.get("pads")
    return isinstance(pads, tuple) and all(width == 0 for width in pads)


def _single_piece(rewriter: Rewriter, node: Node) -> bool:
    return len(node.outputs) == 1 and node.inputs[0] is not None and node.inputs[0].shape == node.outputs[0].shape


def _no_training(rewriter: Rewriter, node: Node) -> bool:
    return len(node.inputs) < 3 or node.inputs[2] is None or rewriter.scalar(node.inputs[2]) is False


def _resized_to_itself(rewriter: Rewriter, node: Node) -> bool:
    scales, mode = node.attributes.get("scales"), node.attributes.get("coordinate_transformation_mode")
    plain = len(node.operands) == 1 and mode != "tf_crop_and_resize"
    return plain and _same_shape(rewriter, node) and (not scales or all(s == 1 for s in scales))  # type: ignore[union-attr]


def _sorted_axes(_: Rewriter, node: Node) -> bool:
    perm = node.attributes.get("perm")
    return isinstance(perm, tuple) and list(perm) == list(range(len(perm)))


NO_OPS: dict[str, Callable[[Rewriter, Node], bool]] = {
    "Identity": _alone, "Concat": _alone, "Sum": _alone, "Min": _alone, "Max": _alone, "Mean": _alone,
    "Clip": lambda _, node: len(node.operands) == 1,
    "Cast": lambda _, node: node.inputs[0] is not None and node.inputs[0].type == node.output.type,
    "Reshape": _same_shape, "Expand": _same_shape, "Tile": _same_shape, "Slice": _whole, "Pad": _unpadded,
    "Split": _single_piece, "Dropout": _no_training, "Resize": _resized_to_itself, "Transpose": _sorted_axes,
    "Neg": _alone, "Not": _alone, "BitwiseNot": _alone,
}  # fmt: skip
CANCELLING = ("Neg", "Not", "BitwiseNot")
"""Operators that undo themselves."""


# Other forms: an operator, and the simpler node that means the same.

Becomes: TypeAlias = Callable[[Rewriter, Node], Node | None]


def _reshape(rewriter: Rewriter, node: Node) -> Node | None:
    """Any operator that only regroups axes, as Reshape {shape = [...]}, reading the first of a chain of Reshapes."""
    if len(node.operands) != 1:
        return None
    source, shape = node.operands[0], node.output.shape
    inner = rewriter.made_by(source, "Reshape")
    if inner is not None and len(inner.operands) == 1:
        source = inner.operands[0]
    attributes: dict[str, Attribute] = {"shape": shape}
    if 0 in shape:
        attributes["allowzero"] = 1  # a 0 is the extent, not a copy of the operand's
    new = replace(node, op="Reshape", inputs=(source,), attributes=attributes)
    return None if new == node else new


def _expand(rewriter: Rewriter, node: Node) -> Node | None:
    same = len(node.operands) == 1 and product(node.operands[0].shape) == product(node.output.shape)
    return _reshape(rewriter, node) if same else None


def _transpose(rewriter: Rewriter, node: Node) -> Node | None:
    source = node.operands[0]
    rank = len(source.shape)
    given = node.attributes.get("perm", tuple(range(rank))[::-1])
    assert isinstance(given, tuple)
    perm = tuple(axis % rank for axis in given if isinstance(axis, int))
    inner = rewriter.made_by(source, "Transpose")
    if inner is not None and "perm" in inner.attributes:
        before = inner.attributes["perm"]
        assert isinstance(before, tuple)
        source, perm = inner.operands[0], tuple(before[axis] for axis in perm)  # type: ignore[misc]
    if moves_nothing(source.shape, perm) and perm != tuple(range(rank)):
        return _reshape(rewriter, replace(node, inputs=(source,)))
    new = replace(node, inputs=(source,), attributes={"perm": perm})
    return None if new == node else new


def moves_nothing(shape: Sequence[Dim], perm: Sequence[int]) -> bool:
    """Whether a transpose leaves the elements where they are: only axes of extent 1 change their place."""
    long = [axis for axis in perm if shape[axis] != 1]
    return long == sorted(long)


def _concat(rewriter: Rewriter, node: Node) -> Node | None:
    """Without the parts that are empty."""
    axis = node.attributes["axis"]
    assert isinstance(axis, int)
    kept = tuple(value for value in node.operands if value.shape[axis] != 0) or node.operands[:1]
    return None if len(kept) == len(node.inputs) else replace(node, inputs=kept)


def _constant_right(rewriter: Rewriter, node: Node) -> Node | None:
    """Operators that do not mind the order have their constant on the right."""
    if len(node.inputs) != 2 or rewriter.array(node.inputs[0]) is None or rewriter.array(node.inputs[1]) is not None:
        return None
    return replace(node, inputs=node.inputs[::-1])


def _sum(rewriter: Rewriter, node: Node) -> Node | None:
    return replace(node, op="Add") if len(node.inputs) == 2 else None


def _cast(rewriter: Rewriter, node: Node) -> Node | None:
    """A conversion that reads past one that loses nothing."""
    inner = rewriter.made_by(node.inputs[0], "Cast")
    if inner is None or not lossless(inner.operands[0].dtype, inner.output.dtype):
        return None
    return replace(node, inputs=inner.inputs)


def lossless(source: DType, target: DType) -> bool:
    """Whether every value of `source` is exactly one of `target`."""
    if source in (BOOL, target):
        return target.kind != "string" and (source == target or target.name != "f8e8m0")  # which has no zero
    if target.name in _MANTISSA:
        if source.is_integer:
            return source.bits - (source.kind == "int") <= _MANTISSA[target.name]
        wider = source.name in _MANTISSA and _MANTISSA[source.name] <= _MANTISSA[target.name]
        return wider and _EXPONENT[source.name] <= _EXPONENT[target.name]
    signs = (source.kind, target.kind)
    return signs in (("int", "int"), ("uint", "uint"), ("uint", "int")) and source.bits < target.bits


def _reduced_over_ones(rewriter: Rewriter, node: Node) -> Node | None:
    """A sum, mean or extremum over axes of extent 1 moves nothing."""
    same = len(node.operands) == 1 and product(node.operands[0].shape) == product(node.output.shape)
    return _reshape(rewriter, node) if same else None


def _resize(_: Rewriter, node: Node) -> Node | None:
    """Without the operands that older exporters give as empty, and without a region that is not looked at."""
    crops = node.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    absent = {name for name in ("roi", "scales", "sizes") if node.attributes.get(name) == ()}
    absent |= set() if crops else {"roi"}
    kept = {name: value for name, value in node.attributes.items() if name not in absent}
    return None if len(kept) == len(node.attributes) else replace(node, attributes=kept)


def _own_domain(_: Rewriter, node: Node) -> Node:
    """ONNX's operator of the same name and meaning, which took over the types that another domain added."""
    return replace(node, op=node.op.rpartition(".")[2])


BECOMES: dict[str, Becomes] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"), _reduced_over_ones),
    **dict.fromkeys(("Add", "Mul", "Min", "Max", "Equal", "And", "Or", "Xor"), _constant_right),
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor"), _constant_right),
    "Expand": _expand, "Transpose": _transpose, "Concat": _concat, "Sum": _sum, "Cast": _cast,
    "Resize": _resize,
    **dict.fromkeys(("com.microsoft.QuantizeLinear", "com.microsoft.DequantizeLinear"), _own_domain),
}  # fmt: skip
