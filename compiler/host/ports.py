"""Inputs and outputs of a model that are no tensors of numbers: how they are spelt, and what fits them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, TypeProto

from ...ir.dtypes import BY_ONNX
from ...ir.errors import ShapeError
from ..binding import Port
from .operators import described, texts


@dataclass(frozen=True)
class ValuePort(Port):
    """A port of a model that Python runs in part: a sequence, optional or map has its spelling as element type."""

    plain: bool = True

    def __str__(self) -> str:
        return super().__str__() if self.plain else f"{self.name}: {self.dtype}"


def port_of(value: onnx.ValueInfoProto) -> ValuePort:
    """The port of a declared input or output."""
    if value.type.WhichOneof("value") == "tensor_type":
        return ValuePort(value.name, _dtype(value.type), _shape(value.type))
    return ValuePort(value.name, spelling(value.type), (), False)


def spelling(type: TypeProto) -> str:
    """A declared type as text, e.g. seq(f32[2, n])."""
    which = type.WhichOneof("value")
    if which == "sequence_type":
        return f"seq({spelling(type.sequence_type.elem_type)})"
    if which == "optional_type":
        return f"optional({spelling(type.optional_type.elem_type)})"
    if which == "map_type":
        key = BY_ONNX[type.map_type.key_type].name
        return f"map({key}, {spelling(type.map_type.value_type)})"
    shape = f"[{', '.join(map(str, _shape(type)))}]" if type.tensor_type.HasField("shape") else ""
    return _dtype(type) + shape


def _dtype(type: TypeProto) -> str:
    found = BY_ONNX.get(type.tensor_type.elem_type)
    return found.name if found is not None else "?"


def _shape(type: TypeProto) -> tuple[int | str, ...]:
    dims = type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims)


def fitting(value: Any, type: TypeProto, name: str) -> Any:
    """An argument as steps take it: arrays of the declared element type, text as str objects, lists, dicts, None.

    Raises ShapeError naming the input, with the place in it, where the argument is of another type.
    """

    def wrong(why: str = "") -> ShapeError:
        return ShapeError(f"input {name!r} is {described(value)}: it must be {spelling(type)}{why}")

    which = type.WhichOneof("value")
    if which == "optional_type":
        return None if value is None else fitting(value, type.optional_type.elem_type, name)
    if which == "sequence_type":
        if not isinstance(value, list | tuple):
            raise wrong(", a list")
        inner = type.sequence_type.elem_type
        return [fitting(item, inner, f"{name}[{place}]") for place, item in enumerate(value)]
    if which == "map_type":
        return _fitting_map(value, type.map_type, wrong)
    if value is None or isinstance(value, dict):
        raise wrong()
    if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__"):
        value = np.from_dlpack(value)
    try:
        array = np.asarray(value)
    except ValueError as error:  # a list of lists of several lengths
        raise wrong(f"; {error}") from error
    wanted = type.tensor_type.elem_type
    if wanted == TensorProto.STRING:
        try:
            return texts(array if array.dtype.kind in "OSU" else array.astype(object))
        except ValueError as error:
            raise wrong(f"; {error}") from error
    dtype = np.dtype(BY_ONNX[wanted].numpy) if wanted in BY_ONNX else array.dtype
    literal = not isinstance(value, np.ndarray | np.generic)
    if array.dtype.newbyteorder("=") != dtype and not (literal and np.can_cast(array.dtype, dtype, "same_kind")):
        raise wrong()
    return np.ascontiguousarray(array, dtype).reshape(array.shape)


def _fitting_map(value: Any, type: TypeProto.Map, wrong: Callable[[str], ShapeError]) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise wrong(", a dict")
    key_type, value_type = (
        str if number == TensorProto.STRING else np.dtype(BY_ONNX[number].numpy).type
        for number in (type.key_type, type.value_type.tensor_type.elem_type)
    )
    keys = str if key_type is str else int
    if not all(isinstance(key, keys | np.integer if keys is int else str) for key in value):
        raise wrong(f"; a key is no {keys.__name__}")
    try:
        return {keys(key): value_type(item) for key, item in value.items()}
    except (TypeError, ValueError) as error:
        raise wrong(f"; {error}") from error
