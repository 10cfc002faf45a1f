"""DequantizeLinear moved towards the results, QuantizeLinear towards the operands, until they meet: what only moves
elements, or picks the largest of some, does the same to integers, as quantizing is monotone.

A pair that meets with one scale and one zero point is nothing: (x - zero) * scale is within 2^-23 of a whole number of
scales. So are a Relu and a Clip whose bounds quantize to the ends of the type's range. All of it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..ir.graph import Attribute, Node, Value, constant_node
from .fold import evaluate
from .quantized_values import Quantized, QuantizedRewriter, is_real

MOVED = (
    "Reshape", "Transpose", "Expand", "Tile", "Split", "Slice", "Gather", "GatherElements", "GatherND",
    "ReverseSequence", "DepthToSpace", "SpaceToDepth",
)  # fmt: skip
"""Operators whose results are elements of their first operand."""
PICKED = ("MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin")
"""Operators whose results are the largest, or smallest, of some elements."""
RAISED = (
    "Reshape",
    "Transpose",
    "Expand",
    "Tile",
    "Concat",
    "DepthToSpace",
    "SpaceToDepth",
    "MaxPool",
    "Pad",
    "Resize",
)
"""Operators before which a QuantizeLinear has no more to do than behind them, or leaves them less to read."""


class Moves(QuantizedRewriter):
    """The sweep that moves and cancels."""

    def visit(self, node: Node) -> None:
        if node.op == "DequantizeLinear" and all(self.is_number(value) for value in node.operands):
            self.again(node, node.inputs, node.outputs)
        elif node.op == "QuantizeLinear":
            if not (self.cancelled(node) or self.absorbed(node) or self.raised(node)):
                self.add(node)
        elif not (self.lowered(node) or self.needless(node)):
            self.add(node)

    # What is known of constants.

    def is_number(self, value: Value) -> bool:
        """Whether it is a constant of one element."""
        array = self.array(value)
        return array is not None and array.size == 1

    def is_regular(self, found: Quantized) -> bool:
        """Whether scales are known, positive, and such that no product of them with integers leaves the normal f32."""
        scale = self.array(found.scale)
        return scale is not None and scale.dtype == np.float32 and bool(np.all((scale > 1e-30) & (scale < 1e30)))

    def same(self, one: Value | None, other: Value | None) -> bool:
        """Whether two parameters are one value, or constants of the same elements."""
        if one is None or other is None or one == other:
            return one == other
        arrays = self.array(one), self.array(other)
        if arrays[0] is None or arrays[1] is None or arrays[0].dtype != arrays[1].dtype:
            return False
        return arrays[0].size == arrays[1].size and bool(np.all(arrays[0].reshape(-1) == arrays[1].reshape(-1)))

    def alike(self, one: Quantized, other: Quantized) -> bool:
        """Whether scale, zero point and axis are the same."""
        return one.axis == other.axis and self.same(one.scale, other.scale) and self.same(one.zero, other.zero)

    # Pairs.

    def cancelled(self, node: Node) -> bool:
        """Quantizing what was dequantized with the same parameters."""
        own, before = self.parameters(node), self.quantized(node.inputs[0])
        if own is None or before is None or before.source.dtype != node.output.dtype or not is_real(own.source):
            return False
        if not self.alike(own, before) or not self.is_regular(own) or not node.output.dtype.is_integer:
            return False
        self.forward(node, before.source)
        return True

    # Ranges.

    def absorbed(self, node: Node) -> bool:
        """A quantization of what was clipped to no less than the range of the type."""
        source = node.inputs[0]
        bounds = self.bounds(self.producer(source)) if source is not None else None
        own = self.parameters(node)
        if (
            bounds is None
            or own is None
            or source is None
            or self.readers(source) > 1
            or not self.saturates(own, bounds)
        ):
            return False
        clip = self.producer(source)
        assert clip is not None
        self.add(node.with_inputs({source: clip.operands[0]}))
        return True

    def needless(self, node: Node) -> bool:
        """A clip of what was dequantized from no more than what it lets pass, or what replaces its NaNs."""
        if node.op == "Where":
            return self.replaces_nothing(node)
        bounds = self.bounds(node)
        found = self.quantized(node.inputs[0]) if bounds is not None else None
        if bounds is None or found is None or not self.saturates(found, bounds):
            return False
        self.forward(node, node.operands[0])
        return True

    def replaces_nothing(self, node: Node) -> bool:
        """A choice of other elements where those of a dequantized tensor are NaN: integers are not."""
        test = self.made_by(node.inputs[0], "IsNaN")
        found = self.quantized(test.inputs[0]) if test is not None else None
        chosen = node.inputs[2]
        if found is None or chosen is None or chosen.type != node.output.type or not self.is_regular(found):
            return False
        self.forward(node, chosen)
        return True

    def bounds(self, node: Node | None) -> tuple[float, float] | None:
        """The bounds of a Relu or of a Clip by constants."""
        if node is None or not node.outputs or not is_real(node.outputs[0]):
            return None
        if node.op == "Relu":
            return 0.0, np.inf
        if node.op != "Clip":
            return None
        low, high = (self.scalar(value) if value else default for value, default in zip(
            (*node.inputs[1:], None, None), (-np.inf, np.inf), strict=False))  # fmt: skip
        return None if low is None or high is None else (float(low), float(high))

    def saturates(self, found: Quantized, bounds: tuple[float, float]) -> bool:
        """Whether both bounds quantize to the ends of the range of the type, or beyond."""
        scale, zero = self.array(found.scale), self.array(found.zero) if found.zero is not None else np.zeros(())
        dtype = found.node.output.dtype if found.node.op == "QuantizeLinear" else found.source.dtype
        if scale is None or zero is None or not self.is_regular(found) or not dtype.is_integer:
            return False
        zero = zero.astype(np.float64)
        low, high = (np.rint(np.float32(bound) / scale) + zero for bound in bounds)
        return bool(np.all(low <= dtype.limits[0]) and np.all(high >= dtype.limits[1]))

    # Movement.

    def lowered(self, node: Node) -> bool:
        """Movement of what was dequantized moves the integers."""
        if node.op == "Concat":
            return self.concatenated(node)
        found = self.quantized(node.inputs[0]) if node.inputs else None
        if found is None or found.source.dtype.bits < 8 or not node.outputs:
            return False
        axis = found.axis
        if node.op == "Transpose" and axis is not None:
            perm = node.attributes.get("perm")
            assert isinstance(perm, tuple)
            axis = perm.index(axis)
        elif axis is not None or not self.moves_integers(node, found):
            return False
        inputs = self.for_integers(node, found.source, found)
        if inputs is None:
            return False
        moved = self.again(node, inputs)
        attributes: dict[str, Attribute] = dict(found.node.attributes)
        if axis is not None:
            attributes["axis"] = axis
        for old, new in zip(node.outputs, moved, strict=True):
            parameters = (new, *found.node.inputs[1:])
            self.emit("DequantizeLinear", parameters, attributes, stem="", origin=found.node.origin, output=old)
        return True

    def moves_integers(self, node: Node, found: Quantized) -> bool:
        """Whether the operator does to integers of one scale what it does to reals."""
        if node.op in MOVED:
            return True
        if len(node.outputs) != 1 or not self.is_regular(found):
            return False
        return node.op in PICKED or (node.op in ("Pad", "Resize"))

    def for_integers(self, node: Node, x: Value, found: Quantized) -> tuple[Value | None, ...] | None:
        """The inputs with which the operator does to the integers `x` what it does to reals; None where it cannot."""
        inputs = (x, *node.inputs[1:])
        if node.op == "Resize":
            plain = node.attributes.get("mode", "nearest") == "nearest" and not node.attributes.get("antialias", 0)
            inside = node.attributes.get("coordinate_transformation_mode") != "tf_crop_and_resize"
            return inputs if plain and inside else None
        if node.op != "Pad" or node.attributes.get("mode", "constant") != "constant":
            return inputs
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        if fill is not None and self.scalar(fill) != 0.0:
            return None
        zero = self.array(found.zero) if found.zero is not None else np.zeros((), x.dtype.numpy)
        if zero is None:
            return None
        value = self.constant(zero.reshape(()), f"{node.output.name}.zero", node.origin)
        return (x, inputs[1] if len(inputs) > 1 else None, value, *inputs[3:])

    def concatenated(self, node: Node) -> bool:
        """Parts with one scale and zero point are integers one after another."""
        parts = [self.quantized(value) for value in node.inputs]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts) or any(part.axis is not None or not self.alike(part, found[0]) for part in found):
            return False
        if len({part.source.dtype for part in found}) > 1 or found[0].source.dtype.bits < 8:
            return False
        (moved,) = self.again(node, [part.source for part in found])
        parameters = (moved, *found[0].node.inputs[1:])
        self.emit(
            "DequantizeLinear", parameters, found[0].node.attributes, stem="", origin=found[0].node.origin,
            output=node.output,
        )  # fmt: skip
        return True

    def may_raise(self, node: Node, source: Value) -> bool:
        """Whether nothing else reads what is quantized but movement that may come to be quantized too."""
        if source in self.graph.outputs:
            return False
        others = [reader for reader in self.graph.users.get(source, ()) if reader.outputs != node.outputs]
        return all(reader.op in PICKED or reader.op == "Concat" for reader in others)

    def raised(self, node: Node) -> bool:
        """Quantizing what was moved moves what was quantized."""
        source, own = node.inputs[0], self.parameters(node)
        mover = self.made_by(source, *RAISED)
        if mover is None or own is None or own.axis is not None or source is None or not self.may_raise(node, source):
            return False
        if len(mover.outputs) != 1 or node.output.dtype.bits < 8 or not node.output.dtype.is_integer:
            return False
        if mover.op not in MOVED and mover.op != "Concat" and not self.is_regular(own):
            return False
        moved = [value for value in (mover.inputs if mover.op == "Concat" else mover.inputs[:1]) if value is not None]
        if any(not is_real(value) for value in moved):
            return False
        count = len(self.nodes)
        integers = [
            self.emit(
                "QuantizeLinear", (value, *node.inputs[1:]), node.attributes, stem=f"{node.output.name}.early",
                origin=node.origin,
            )
            for value in moved
        ]  # fmt: skip
        inputs = integers if mover.op == "Concat" else self.for_integers(mover, integers[0], own)
        if inputs is None:
            del self.nodes[count:]
            return False
        self.again(mover, inputs, node.outputs)
        return True

    def again(self, node: Node, inputs: Sequence[Value | None], outputs: Sequence[Value] = ()) -> tuple[Value, ...]:
        """The node with other inputs, evaluated where these are constants; its results."""
        arrays = {value.name: self.array(value) for value in inputs if value is not None}
        if not outputs:
            names = [self.names.fresh(f"{value.name}.integers") for value in node.outputs]
            types = self.inference.outputs(node.op, tuple(inputs), node.attributes, {}, names, node.origin)
            outputs = [Value(name, type) for name, type in zip(names, types, strict=True)]
        made = replace(node, inputs=tuple(inputs), outputs=tuple(outputs))
        if all(array is not None for array in arrays.values()):
            results = evaluate(made, {name: array for name, array in arrays.items() if array is not None})
            for value, array in zip(outputs, results, strict=True):
                shaped = np.ascontiguousarray(array).reshape(array.shape)  # numpy gives one of rank 0 an axis
                self.add(constant_node(value.name, shaped, value.tensor, node.origin))
            return tuple(outputs)
        return self.add(made).outputs
