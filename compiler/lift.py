"""Older opsets lifted: every operator gets the meaning it has in the newest opset.

Of the changes between the versions of an operator most only add element types, inputs or attributes with a default that
keeps the old meaning; they need nothing here. The tables below hold the others, found by comparing all versions that
`onnx.defs` knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from ..ir.dtypes import BOOL, BY_ONNX, F32, I64, DType
from ..ir.errors import UnsupportedError
from ..ir.graph import Attribute, Constant, Graph, TensorType, Type, Value
from .calls import NEWEST, Builder, Call, Lift
from .composites import COMPOSITES
from .dropout import dropout
from .expand import expand


@dataclass(frozen=True)
class _Operand:
    """An attribute that became an operand: before `version`, now at `position`, of `dtype` (that of operand 0 for None)
    and of `rank` 0 or 1."""

    version: int
    attribute: str
    position: int
    dtype: DType | None = I64
    rank: int = 1


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

OPERANDS: Mapping[str, tuple[_Operand, ...]] = {
    "Reshape": (_Operand(5, "shape", 1),),
    "Upsample": (_Operand(9, "scales", 1, F32),),
    "Slice": (_Operand(10, "starts", 1), _Operand(10, "ends", 2), _Operand(10, "axes", 3)),
    "TopK": (_Operand(10, "k", 1),),
    "Pad": (_Operand(11, "pads", 1), _Operand(11, "value", 2, None, 0)),
    "Clip": (_Operand(11, "min", 1, None, 0), _Operand(11, "max", 2, None, 0)),
    "Split": (_Operand(13, "split", 1),),
    "Squeeze": (_Operand(13, "axes", 1),),
    "Unsqueeze": (_Operand(13, "axes", 1),),
    "ReduceSum": (_Operand(13, "axes", 1),),
    **{f"Reduce{name}": (_Operand(18, "axes", 1),) for name in _REDUCTIONS},
    "DFT": (_Operand(20, "axis", 2, I64, 0),),
}

_SAMPLING: Mapping[str, Attribute] = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}

DEFAULTS: Mapping[str, tuple[int, Mapping[str, Attribute]]] = {
    "Concat": (4, {"axis": 1}),
    "Selu": (6, {"alpha": 1.6732, "gamma": 1.0507}),
    "Upsample": (NEWEST, _SAMPLING),
    "Resize": (11, _SAMPLING),
    "RoiAlign": (16, {"coordinate_transformation_mode": "output_half_pixel"}),
    "DFT": (20, {"axis": 1}),
}
"""Defaults of attributes that differ from today's, by the version before which they hold."""

SPELLINGS: Mapping[str, tuple[int, str, Mapping[str, str]]] = {
    "Upsample": (NEWEST, "mode", {"bilinear": "linear", "trilinear": "linear"}),
    "GridSample": (20, "mode", {"bilinear": "linear", "bicubic": "cubic"}),
}
"""Attribute values that are spelt otherwise today."""

DROPPED: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "Dropout": (12, ("ratio", "is_test", "consumed_inputs")),
    "BatchNormalization": (9, ("is_test", "consumed_inputs")),
    "Gemm": (7, ("broadcast",)),
}
"""Attributes without a meaning at inference."""

_CONSUMED = (6, ("consumed_inputs",))


def lift(call: Call, build: Builder) -> Call | None:
    """The call in the form of the newest opset; None where `build` has emitted all of it, under the names it has.

    Raises UnsupportedError for the rare old meaning that has no newer form.
    """
    name, version = call.op, call.version
    if name in COMPOSITES:
        expand(COMPOSITES[name], call, build)
        return None
    before, dropped = DROPPED.get(name, _CONSUMED)
    if version < before:
        call = call.with_attributes(dropped)
    before, defaults = DEFAULTS.get(name, (0, {}))
    if version < before:
        call = replace(call, attributes={**defaults, **call.attributes})
    before, attribute, spellings = SPELLINGS.get(name, (0, "", {}))
    if version < before and attribute in call.attributes:
        value = str(call.attributes[attribute])
        call = call.with_attributes(**{attribute: spellings.get(value, value)})
    for operand in OPERANDS.get(name, ()):
        if version < operand.version and operand.attribute in call.attributes:
            call = _to_operand(call, operand, build)
    before, function = _FUNCTIONS.get(name, (0, None))
    if function is None or version >= before:
        return replace(call, version=NEWEST)
    lifted = function(call, build)
    return None if lifted is None else replace(lifted, version=NEWEST)


def _to_operand(call: Call, operand: _Operand, build: Builder) -> Call:
    dtype, first = operand.dtype, call.input(0)
    if dtype is None:
        assert first is not None
        dtype = first.dtype
    # A limit of the largest f32 is an infinity in f16: no limit.
    with np.errstate(over="ignore"):
        array = np.array(call.attributes[operand.attribute]).astype(dtype.numpy)
    value = build.constant(array.reshape((-1,) if operand.rank else ()), f"{call.outputs[0]}.{operand.attribute}")
    return call.with_attributes((operand.attribute,)).with_input(operand.position, value)


def _one(build: Builder, call: Call, op: str, inputs: Sequence[Value | None], /, **attributes: Attribute) -> Value:
    """The only output of a node added on behalf of `call`."""
    return build.emit(Call(op, tuple(inputs), attributes, origin=call.origin))[0]


def _operand(call: Call, position: int = 0) -> Value:
    value = call.input(position)
    if value is None or not isinstance(value.type, TensorType):
        raise UnsupportedError(f"{call.op} needs a tensor as operand {position}")
    return value


def _ints(build: Builder, call: Call, numbers: Sequence[int]) -> Value:
    return build.constant(np.array(numbers, np.int64), f"{call.outputs[0]}.ints", call.origin)


def _flattening(call: Call, build: Builder) -> Call:
    """Softmax and its kin normalised over all axes from `axis` on, taken as one."""
    x = _operand(call)
    rank, axis = x.tensor.rank, call.integer("axis", 1)
    axis += rank if axis < 0 else 0
    wide = [position for position in range(axis, rank) if x.shape[position] != 1]
    if len(wide) < 2:
        return call.with_attributes(axis=wide[0] if wide else -1)
    flat = _one(build, call, "Flatten", [x], axis=axis)
    normalised = _one(build, call, call.op, [flat], axis=-1)
    return _reshaped(call, build, normalised, x)


def _reshaped(call: Call, build: Builder, value: Value, like: Value) -> Call:
    shape = _one(build, call, "Shape", [like])
    return replace(call, op="Reshape", inputs=(value, shape), attributes={"allowzero": 1})


def _reshape(call: Call, build: Builder) -> Call:
    """A shape that only the run tells may hold 0 (the extent there is) and -1 (what the others leave): both are
    computed, so that each element is an extent."""
    x, shape = _operand(call), call.input(1)
    if shape is None or shape.shape == (0,) or build.settled(shape) or not isinstance(shape.shape[0], int):
        return call

    def one(op: str, *inputs: Value, **attributes: Attribute) -> Value:
        return _one(build, call, op, inputs, **attributes)

    count, rank = shape.shape[0], x.tensor.rank
    zero, free, unit = (_ints(build, call, [number]) for number in (0, -1, 1))
    if not call.integer("allowzero", 0):
        there = [one("Shape", x, end=min(count, rank))] if rank else []
        there += [_ints(build, call, [0] * (count - rank))] if count > rank else []
        kept = one("Concat", *there, axis=0) if len(there) > 1 else there[0]
        shape = one("Where", one("Equal", shape, zero), kept, shape)
    is_free = one("Equal", shape, free)
    others = one("ReduceProd", one("Where", is_free, unit, shape), keepdims=1)
    left = one("Div", one("Size", x), one("Max", others, unit))
    extents = one("Where", is_free, left, shape)
    return call.with_input(1, extents).with_attributes(allowzero=1)


def _dropout(call: Call, build: Builder) -> Call | None:
    """Dropout at inference: the identity, and a mask of ones."""
    training = build.known(call.input(2))
    if call.input(2) is not None and (training is None or training.any()):
        expand(dropout, call, build)
        return None
    x = _operand(call)
    if len(call.outputs) > 1 and call.outputs[1]:
        ones = np.ones(1, (BOOL if call.version >= 10 else x.dtype).numpy)
        shape = _one(build, call, "Shape", [x])
        attributes: dict[str, Attribute] = {"value": Constant(f"{call.outputs[1]}.value", ones)}
        build.emit(Call("ConstantOfShape", (shape,), attributes, call.outputs[1:2], origin=call.origin))
        if not call.outputs[0]:
            return None
    return replace(call, op="Identity", inputs=(x,), attributes={}, outputs=call.outputs[:1])


def _batch_normalization(call: Call, build: Builder) -> Call:
    """Training was told by the number of outputs; statistics could be per element instead of per channel."""
    if any(call.outputs[3:]):
        raise UnsupportedError("the saved statistics of a BatchNormalization in training are no longer in ONNX")
    if len(call.outputs) > 1:
        return replace(call.with_attributes(("spatial",), training_mode=1), outputs=call.outputs[:3])
    spatial, x = call.integer("spatial", 1), _operand(call)
    call = call.with_attributes(("spatial",))
    if spatial or x.tensor.rank < 3:
        return call
    flat = _one(build, call, "Flatten", [x], axis=1)
    statistics = [_one(build, call, "Reshape", [v, _ints(build, call, [-1])]) for v in call.inputs[1:]]
    normalised = _one(build, call, call.op, [flat, *statistics], **call.attributes)
    return _reshaped(call, build, normalised, x)


def _group_normalization(call: Call, build: Builder) -> Call:
    """Scale and bias were per group, not per channel."""
    x, groups = _operand(call), call.integer("num_groups", 1)
    channels = x.shape[1] if x.tensor.rank > 1 else 0
    if not isinstance(channels, int) or groups < 1 or channels % groups:
        raise UnsupportedError(f"{groups} groups do not divide the channels of {x.type}")

    def per_channel(value: Value | None) -> Value:
        column = _one(build, call, "Reshape", [value, _ints(build, call, [groups, 1])])
        wide = _one(build, call, "Expand", [column, _ints(build, call, [groups, channels // groups])])
        return _one(build, call, "Reshape", [wide, _ints(build, call, [channels])])

    return replace(call, inputs=(x, *(per_channel(value) for value in call.inputs[1:])))


def _resize(call: Call, build: Builder) -> Call:
    """Absent operands were empty tensors; Resize-10 and Upsample sample where no corner is aligned."""
    version = call.version
    if version < 11:
        call = replace(call, op="Resize", inputs=(*call.inputs[:1], None, *call.inputs[1:2]))
    for position in (1, 2, 3):
        value = call.input(position)
        if value is not None and isinstance(value.type, TensorType) and value.shape == (0,):
            call = call.with_input(position, None)
    if version < 13 and call.attributes.get("coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        if call.attributes.get("mode", "nearest") != "nearest" or call.attributes.get("nearest_mode") != "floor":
            raise UnsupportedError("coordinate_transformation_mode tf_half_pixel_for_nn needs nearest_mode floor")
        # floor((x + 0.5) / scale) is the half-up rounding of (x + 0.5) / scale - 0.5.
        call = call.with_attributes(coordinate_transformation_mode="half_pixel", nearest_mode="round_prefer_ceil")
    scales = build.known(call.input(2)) if 10 <= version < 11 else None
    if scales is not None and call.attributes.get("mode", "nearest") == "nearest" and (scales < 1).any():
        # Resize-10 rounds up where it shrinks and down where it grows (the test cases of that opset and ONNX Runtime).
        if (scales > 1).any():
            fewer = build.constant(np.minimum(scales, 1), f"{call.outputs[0]}.scales", call.origin)
            shrunk = call.with_input(2, fewer).with_attributes(nearest_mode="ceil")
            (value,) = build.emit(replace(shrunk, outputs=("",), version=NEWEST))
            more = build.constant(np.maximum(scales, 1), f"{call.outputs[0]}.scales", call.origin)
            return call.with_input(0, value).with_input(2, more)
        return call.with_attributes(nearest_mode="ceil")
    return call


def _split(call: Call, build: Builder) -> Call:
    """Equal parts, as many as there are outputs, were the default."""
    return call if call.input(1) is not None else call.with_attributes(num_outputs=len(call.outputs))


def _cast_like(call: Call, build: Builder) -> Call:
    return replace(call.with_attributes(to=_operand(call, 1).dtype), op="Cast", inputs=call.inputs[:1])


def _cast(call: Call, build: Builder) -> Call:
    """The target was spelt as text."""
    names = {onnx.TensorProto.DataType.Name(number): dtype for number, dtype in BY_ONNX.items()}
    text = str(call.attributes.get("to", "")).upper()
    if text not in names:
        raise UnsupportedError(f"Cast to the unknown element type {text!r}")
    return call.with_attributes(to=names[text])


def _attention(call: Call, build: Builder) -> Call | None:
    """Values may be of another type than queries and keys, which its function multiplies them with: they are converted,
    and those that come out again converted back."""
    query, value = _operand(call), _operand(call, 2)
    if query.dtype == value.dtype:
        return call
    for position in (2, 5):
        given = call.input(position)
        if given is not None:
            call = call.with_input(position, _one(build, call, "Cast", [given], to=query.dtype))
    found = build.emit(replace(call, outputs=tuple("" for _ in call.outputs), version=NEWEST))
    for position, (result, name) in enumerate(zip(found, call.outputs, strict=True)):
        if name:
            wanted = value.dtype if position == 2 else query.dtype
            build.emit(Call("Cast", (result,), {"to": wanted}, (name,), origin=call.origin))
    return None


def _broadcast(call: Call, build: Builder) -> Call:
    """Before opset 7 operand 1 was aligned with axis `axis` of operand 0, and only where `broadcast` was set."""
    x, y = _operand(call), _operand(call, 1)
    axis = call.integer("axis", x.tensor.rank - y.tensor.rank)
    call = call.with_attributes(("axis", "broadcast"))
    if call.op == "PRelu" and y.tensor.rank == 1 and y.shape != (1,):
        axis = 1
    missing = x.tensor.rank - (axis + x.tensor.rank if axis < 0 else axis) - y.tensor.rank
    if missing < 1:
        return call
    axes = _ints(build, call, range(y.tensor.rank, y.tensor.rank + missing))
    return call.with_input(1, _one(build, call, "Unsqueeze", [y, axes]))


def _batched_scan(call: Call, build: Builder) -> None:
    """Scan-8 ran over a batch too: an outer Scan over axis 0 around one over the sequence."""
    lengths, *operands = call.inputs
    if lengths is not None:
        raise UnsupportedError(
            "Scan with sequence_lens is of opset 8 only and not supported; export with opset 9 or newer"
        )
    scans, body = call.integer("num_scan_inputs", 1), call.bodies["body"]
    inner: dict[str, Attribute] = {"num_scan_inputs": scans}
    if "directions" in call.attributes:
        inner["scan_input_directions"] = call.attributes["directions"]

    def over_batch(types: Sequence[Type]) -> Graph:
        def fill(values: tuple[Value, ...]) -> Sequence[Value]:
            names = ("",) * len(call.outputs)
            return build.emit(Call("Scan", values, inner, names, bodies={"body": body}, origin=call.origin))

        return build.region("batch", types, fill)

    outer: dict[str, Attribute] = {"num_scan_inputs": len(operands)}
    build.emit(Call("Scan", tuple(operands), outer, call.outputs, bodies={"body": over_batch}, origin=call.origin))


def _scan(call: Call, build: Builder) -> Call | None:
    """Axes other than the first are brought to the front, and what is stacked along others brought there behind it."""
    if call.version < 9:
        _batched_scan(call, build)
        return None
    scans = call.integer("num_scan_inputs", 1)
    states = len(call.inputs) - scans
    reads, writes = (call.attributes.get(f"scan_{what}_axes", ()) for what in ("input", "output"))
    assert isinstance(reads, tuple) and isinstance(writes, tuple)
    if not any(reads) and not any(writes):
        return call
    inputs = list(call.inputs)
    for position, axis in enumerate(reads, states):
        rank = _operand(call, position).tensor.rank
        assert isinstance(axis, int) and -rank <= axis < rank, f"operand {position} has no such axis"
        order = [axis % rank, *(other for other in range(rank) if other != axis % rank)]
        if axis:
            inputs[position] = _one(build, call, "Transpose", [inputs[position]], perm=tuple(order))
    plain = call.with_attributes(("scan_input_axes", "scan_output_axes"))
    moved = [position for position, axis in enumerate(writes, states) if axis and call.outputs[position]]
    names = tuple("" if position in moved else name for position, name in enumerate(call.outputs))
    values = build.emit(replace(plain, inputs=tuple(inputs), outputs=names, version=NEWEST))
    for position in moved:
        rank, axis = values[position].tensor.rank, writes[position - states]
        assert isinstance(axis, int) and -rank <= axis < rank, f"output {position} has no such axis"
        order = list(range(1, rank))
        order.insert(axis % rank, 0)
        attributes: dict[str, Attribute] = {"perm": tuple(order)}
        names = (call.outputs[position],)
        build.emit(Call("Transpose", (values[position],), attributes, names, origin=call.origin))
    return None


_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less", "PRelu")

_FUNCTIONS: Mapping[str, tuple[int, Lift]] = {
    **dict.fromkeys(_ARITHMETIC, (7, _broadcast)),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), (13, _flattening)),
    **dict.fromkeys(("Resize", "Upsample"), (NEWEST, _resize)),
    "Attention": (NEWEST, _attention),
    "BatchNormalization": (14, _batch_normalization),
    "Cast": (6, _cast),
    "CastLike": (NEWEST, _cast_like),
    "Dropout": (NEWEST, _dropout),
    "GroupNormalization": (21, _group_normalization),
    "Reshape": (NEWEST, _reshape),
    "Scan": (NEWEST, _scan),
    "Scatter": (NEWEST, lambda call, build: replace(call, op="ScatterElements")),
    "Split": (18, _split),
}
"""The lifts that take more than a table, by the version before which they apply."""
