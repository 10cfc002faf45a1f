"""Inputs that nobody gave: of sensible sizes, and of numbers that suit what the model does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ...compiler.binding import Port
from ...ir.dims import as_symbol, evaluate, symbols
from ...ir.dtypes import BY_NAME, BY_ONNX, DType
from ...ir.graph import Graph, OptionalType, SequenceType, TensorType, Type, Value
from ..arrays import dims_of
from .uses import Role, Uses

Array = NDArray[Any]
LENGTH = 3
"""Elements of a sequence that is made up: of each, as some are taken apart in step."""
WORDS = ("a", "the", "Zebra", "onnx", "café", "")
ATTEMPTS: Sequence[tuple[int, int, int]] = (
    (224, 16, 16), (224, 512, 1), (256, 64, 16), (320, 128, 64), (48, 8, 8), (416, 576, 1), (32, 4, 4), (64, 2048, 128),
)  # fmt: skip
"""Sizes that nobody gave, the next ones where the model cannot be evaluated with these: (height and width of images,
the last axis of others, axes between); the first axis is 1."""


def ports_of(graph: onnx.GraphProto, constants: Mapping[str, Any]) -> list[Port]:
    """The inputs as the model declares them; a sequence as its elements."""
    return [_port(value) for value in _inputs(graph, constants)]


def _inputs(graph: onnx.GraphProto, constants: Mapping[str, Any]) -> list[onnx.ValueInfoProto]:
    return [value for value in graph.input if value.name not in constants]


def _port(value: onnx.ValueInfoProto) -> Port:
    type = value.type
    while type.WhichOneof("value") in ("sequence_type", "optional_type"):
        inner = type.sequence_type if type.HasField("sequence_type") else type.optional_type
        type = inner.elem_type
    tensor = type.tensor_type
    shape = tuple(_size(dim) for dim in tensor.shape.dim)
    return Port(value.name, BY_ONNX[tensor.elem_type].name if tensor.elem_type in BY_ONNX else "f32", shape)


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    """A size that is negative stands for any."""
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else dim.dim_param or "?"


def shapes_for(
    ports: Sequence[Port], given: Mapping[str, Any], dims: Mapping[str, int], attempt: int = 0
) -> dict[str, tuple[int, ...]]:
    """The shapes of all inputs; `attempt` counts other choices of the sizes that nobody gave."""
    arrays = {name: array for name, array in given.items() if isinstance(array, np.ndarray)}
    image, last, between = ATTEMPTS[attempt]
    sizes = dict(dims)
    for port in ports:
        for dim, size in zip(dims_of(port), arrays[port.name].shape if port.name in arrays else (), strict=False):
            name = as_symbol(dim)
            if name is not None:
                sizes.setdefault(name.name, size)
    for port in ports:
        rank = len(port.shape)
        for axis, dim in enumerate(dims_of(port)):
            usual = 1 if axis == 0 else image if rank == 4 and axis > 1 else last if axis == rank - 1 else between
            for part in symbols(dim):
                sizes.setdefault(part.name, usual)
    found = {port.name: tuple(evaluate(dim, sizes) for dim in dims_of(port)) for port in ports}
    return found | {name: array.shape for name, array in arrays.items()}


def made_inputs(
    graph: Graph, given: Mapping[str, Any], fills: Mapping[str, str], random: np.random.Generator
) -> dict[str, Any]:
    """An array for each input of a graph whose sizes are numbers; those given stay as they are."""
    uses = Uses(graph)
    found: dict[str, Any] = {}
    for value in graph.inputs:
        if value.name in given:
            found[value.name] = given[value.name]
        elif fills.get(value.name, "random") != "random":
            ones = float(fills[value.name] == "ones")
            found[value.name] = np.full(_shape(value.type), ones).astype(value.dtype.numpy)
        else:
            found[value.name] = made_value(value, uses.role(value), random)
    return found


def bare_graph(proto: onnx.GraphProto, constants: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Graph:
    """The inputs alone, for a model of which nothing more can be imported."""
    values = []
    for declared, port in zip(_inputs(proto, constants), ports_of(proto, constants), strict=True):
        tensor = TensorType(BY_NAME[port.dtype], shapes.get(port.name, ()))
        values.append(Value(port.name, _type(declared.type, tensor)))
    return Graph("inputs", tuple(values), (), ())


def _type(proto: onnx.TypeProto, tensor: TensorType) -> Type:
    """The type with these tensors as its elements."""
    if proto.HasField("sequence_type"):
        return SequenceType(_type(proto.sequence_type.elem_type, tensor))
    if proto.HasField("optional_type"):
        return OptionalType(_type(proto.optional_type.elem_type, tensor))
    return tensor


def made_value(value: Value, role: Role, random: np.random.Generator) -> Any:
    """An array for one input; for a sequence a list of them."""
    if isinstance(value.type, SequenceType):
        inner = Value(value.name, value.type.element)
        return [made_value(inner, role, random) for _ in range(LENGTH)]
    if isinstance(value.type, OptionalType):
        return made_value(Value(value.name, value.type.element), role, random)
    return made_array(value.dtype, _shape(value.type), role, random)


def _shape(type: Type) -> tuple[int, ...]:
    shape = getattr(type, "shape", ())
    return tuple(size if isinstance(size, int) else 1 for size in shape)


def made_array(dtype: DType, shape: tuple[int, ...], role: Role, random: np.random.Generator) -> Array:
    """An array of numbers that suit the role."""
    if dtype.kind == "string":
        return random.choice(np.array(WORDS, object), shape).astype(object).reshape(shape)
    if role.choices and not role.mask:
        return random.choice(np.array(role.choices), shape).astype(dtype.numpy).reshape(shape)
    if role.total is not None and len(shape) == 1 and shape[0]:
        cuts = np.sort(random.integers(0, role.total, shape[0] - 1, endpoint=True))
        array: Any = np.diff(np.concatenate([[0], cuts, [role.total]]))
    elif role.mask:
        array = _mask(shape, random)
    elif role.boxes and shape and shape[-1] == 4:
        corners = np.sort(random.random((*shape[:-1], 2, 2)), axis=-2)
        array = corners.reshape(shape) * 8
    elif dtype.is_integer:
        array = _integers(dtype, shape, role, random)
    elif dtype.kind == "complex":
        array = random.normal(size=shape) + 1j * random.normal(size=shape)
    else:
        array = _floats(dtype, shape, role, random)
    for column, (low, high) in role.columns.items():
        array[..., column] = random.integers(int(low), int(high), array.shape[:-1], endpoint=True)
    return np.asarray(array).astype(dtype.numpy).reshape(shape)


def _mask(shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Zeros and ones; along the last axis of several ones first, as padding leaves them, and never none."""
    if not shape or not shape[-1]:
        return (random.random(shape) < 0.5).astype(np.int64)
    lengths = random.integers(1, shape[-1], (*shape[:-1], 1), endpoint=True)
    return (np.arange(shape[-1]) < lengths).astype(np.int64)


def _integers(dtype: DType, shape: tuple[int, ...], role: Role, random: np.random.Generator) -> Array:
    least, most = (int(x) for x in dtype.limits)
    low = 0 if role.low is None else int(np.ceil(role.low))
    high = (low + 9 if dtype.bits > 8 else most) if role.high is None else int(np.floor(role.high))
    if role.low is None and role.high is None and dtype.bits <= 8:
        low = least
    if role.divisor:
        low = max(low, 1)
    low, high = max(low, least), min(max(low, high), most)
    return random.integers(low, high, shape, np.int64 if most < 1 << 63 else np.uint64, endpoint=True)


def _floats(dtype: DType, shape: tuple[int, ...], role: Role, random: np.random.Generator) -> Array:
    low, high = role.low, role.high
    if low is not None and high is not None and high - low <= 4:
        return np.asarray(random.uniform(low, high, shape))
    array = random.normal(size=shape)
    if role.divisor:
        array = np.where(array < 0, -1.0, 1.0) * (0.25 + np.abs(array))
    if low is not None and low >= 0:
        array = low + np.abs(array)
    return np.clip(array, low, high) if low is not None or high is not None else np.asarray(array)


__all__ = ["ATTEMPTS", "bare_graph", "made_array", "made_inputs", "made_value", "ports_of", "shapes_for"]
