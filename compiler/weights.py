"""The bytes of a model: its file, and its tensors as arrays over the file's own bytes.

A model's weights are neither parsed nor copied: the file is scanned for them first, and protobuf only gets the rest.
"""

from __future__ import annotations

import math
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import Descriptor  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import ModelProto, SparseTensorProto, TensorProto, numpy_helper

from ..ir.dtypes import BY_ONNX, DType
from ..ir.errors import LimitError, ModelError
from .limits import LARGEST_EXTENT, MOST_AXES, format_bytes, memory_of_machine

IN_PLACE = 1024
"""Payloads of at least so many bytes stay where they are in the file; shorter ones go through protobuf."""

MAPPED = 64 << 20
"""Files from this size on are mapped into memory instead of read. (A smaller file may change while it is in use.)"""

_IN_FILE = "onnxc.in_file"
_VARINT, _EIGHT_BYTES, _DELIMITED, _FOUR_BYTES = 0, 1, 2, 5
_TENSOR = TensorProto.DESCRIPTOR
_PAYLOADS = {_TENSOR.fields_by_name[name].number: name for name in ("raw_data", "float_data", "double_data")}
_TYPED = {"float_data": ("f32", "c64"), "double_data": ("f64", "c128")}
_ENTRIES = _TENSOR.fields_by_name["external_data"].number


class Weights:
    """Arrays of the tensors of one model: views of its file's bytes, or of files beside it."""

    def __init__(self, data: np.ndarray | None, folder: Path | None, most: int | None = None) -> None:
        """`most` limits the bytes of one array that is larger than its data (None: the machine's memory)."""
        self._data = data
        self._most = most
        self._folder = folder
        self._files: dict[str, np.ndarray] = {}

    def array(self, tensor: TensorProto) -> np.ndarray:
        """The tensor's elements; read-only, perhaps unaligned, and without a copy where they are stored as such.

        Raises ModelError where data and declared shape differ, or where external data may not be read.
        """
        dtype, shape = BY_ONNX.get(tensor.data_type), tuple(tensor.dims)
        if dtype is None:
            raise ModelError(f'tensor "{tensor.name}" has the unknown element type {tensor.data_type}')
        if any(dim < 0 for dim in shape):
            raise ModelError(f'tensor "{tensor.name}" has a negative dimension: {list(shape)}')
        count = math.prod(shape)
        payload = self._payload(tensor, dtype)
        if payload is None:
            return _typed_array(tensor, shape, count)
        if dtype.kind == "string":
            raise ModelError(f'tensor "{tensor.name}" holds strings as raw bytes, which ONNX does not allow')
        expected = (count * dtype.bits + 7) // 8
        if payload.size != expected:
            raise _mismatch(tensor, f"{expected} bytes", f"{payload.size}")
        _check_extent(tensor.name, shape)
        if dtype.bits < 8:
            packed = TensorProto(data_type=tensor.data_type, dims=[count], raw_data=payload.tobytes())
            return np.asarray(numpy_helper.to_array(packed)).reshape(shape)
        if dtype.kind == "bool" and count and payload.max() > 1:
            return np.asarray(payload != 0).reshape(shape)
        return np.reshape(payload.view(dtype.numpy), shape)

    def dense(self, tensor: SparseTensorProto) -> np.ndarray:
        """The dense array of a sparse tensor, whose indices are [elements] or [elements, rank]."""
        values, indices, shape = self.array(tensor.values), self.array(tensor.indices), tuple(tensor.dims)
        _check_extent(tensor.values.name, shape)
        flat = indices.reshape(-1, 1) if indices.ndim == 1 else indices
        sizes = (math.prod(shape),) if indices.ndim == 1 else shape
        fits = values.ndim == 1 and flat.shape == (values.size, len(sizes)) and not any(dim < 0 for dim in shape)
        if not fits or np.any(flat < 0) or np.any(flat >= np.array(sizes, np.int64)):
            raise ModelError(f'sparse tensor "{tensor.values.name}": the indices do not fit the shape {list(shape)}')
        most, size = memory_of_machine() if self._most is None else self._most, math.prod(shape) * values.itemsize
        if size > most:
            raise LimitError(f'sparse tensor "{tensor.values.name}" takes {format_bytes(size)} when it is dense')
        result = np.zeros(sizes, values.dtype)
        result[tuple(flat.T)] = values
        return result.reshape(shape)

    def _payload(self, tensor: TensorProto, dtype: DType) -> np.ndarray | None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location == TensorProto.EXTERNAL:
            return self._external(tensor, entries, (math.prod(tensor.dims) * dtype.bits + 7) // 8)
        if _IN_FILE in entries and self._data is not None:
            name, offset, length = (entries[_IN_FILE] + ":0:0").split(":")[:3]
            digits = offset + length
            if (
                dtype.name not in _TYPED.get(name, (dtype.name,))
                or not (digits.isascii() and digits.isdecimal())
                or len(digits) > 40
            ):
                raise ModelError(f'tensor "{tensor.name}" of {dtype} keeps its elements in {name}')
            return self._data[int(offset) : int(offset) + int(length)]
        return np.frombuffer(tensor.raw_data, np.uint8) if tensor.HasField("raw_data") else None

    def _external(self, tensor: TensorProto, entries: dict[str, str], expected: int) -> np.ndarray:
        location = entries.get("location", "")
        data = self._files.get(location)
        if data is None:
            data = self._files[location] = self._open(tensor.name, location)
        try:
            offset, length = int(entries.get("offset", "0")), int(entries.get("length", expected))
        except ValueError as error:
            raise ModelError(f'tensor "{tensor.name}": offset or length is no number: {error}') from error
        if offset < 0 or length < 0 or offset + length > data.size:
            raise ModelError(
                f'tensor "{tensor.name}" asks for bytes {offset} to {offset + length} of "{location}", '
                f"which has {data.size}: the file is truncated or belongs to another model"
            )
        return data[offset : offset + length]

    def _open(self, name: str, location: str) -> np.ndarray:
        """The bytes of a file in the model's folder, mapped read-only."""

        def refuse(why: str) -> ModelError:
            return ModelError(f'tensor "{name}": external data "{location}" {why}')

        if self._folder is None:
            raise refuse("lies beside the model, which was not given as a path: pass folder=")
        windows, posix = PureWindowsPath(location), PurePosixPath(location)
        parts = {*windows.parts, *posix.parts}
        if not location or "\0" in location or ".." in parts or posix.is_absolute() or windows.drive or windows.root:
            raise refuse("leaves the model's folder: only a relative path inside it is read")
        folder = self._folder.resolve()
        try:
            path = (folder / location).resolve(strict=True)
            if not path.is_relative_to(folder):
                raise refuse("is a link that leaves the model's folder: copy the file into it")
            flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            with open(os.open(path, flags), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise refuse("is no regular file")
                # Folders may have become links since the path was resolved: Linux tells what was opened indeed.
                opened = Path(f"/proc/self/fd/{file.fileno()}")
                if opened.exists() and not opened.resolve().is_relative_to(folder):
                    raise refuse("leaves the model's folder: it changed while it was opened")
                if status.st_nlink > 1:
                    raise refuse("has a second hard link, perhaps outside the model's folder: copy the file")
                return np.memmap(file, np.uint8, "r") if status.st_size else np.empty(0, np.uint8)
        except (OSError, RuntimeError, ValueError) as error:
            raise refuse(f"cannot be read: {error}") from error


def external_files(path: str) -> list[str]:
    """The places of a model's external data, as the model tells them. Raises ModelError as `load_model` does."""
    proto, _ = load_model(path)
    found: set[str] = set()
    waiting: list[Any] = [proto]
    while waiting:
        message = waiting.pop()
        if isinstance(message, TensorProto):
            if message.data_location == TensorProto.EXTERNAL:
                found |= {entry.value for entry in message.external_data if entry.key == "location"}
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                waiting += [value] if isinstance(value, Message) else value
    return sorted(found)


def _check_extent(name: str, shape: tuple[int, ...]) -> None:
    """ModelError where sizes multiply to what no memory holds, also beside an empty axis: numpy has 64 bits for it."""
    if len(shape) > MOST_AXES or math.prod(max(abs(dim), 1) for dim in shape) >= LARGEST_EXTENT:
        raise ModelError(f'tensor "{name}" of shape {str(list(shape))[:200]} has more elements than any memory holds')


def _mismatch(tensor: TensorProto, expected: str, found: str) -> ModelError:
    return ModelError(
        f'tensor "{tensor.name}" of shape {list(tensor.dims)} needs {expected} of data, but {found} are there: '
        "the file is damaged, export or download it again"
    )


def _typed_array(tensor: TensorProto, shape: tuple[int, ...], count: int) -> np.ndarray:
    """The elements of a tensor that keeps them in a typed field of protobuf (a copy)."""
    if tensor.data_type == TensorProto.STRING:
        if len(tensor.string_data) != count:
            raise _mismatch(tensor, f"{count} strings", str(len(tensor.string_data)))
        strings = np.empty(count, np.object_)
        strings[:] = [text.decode("utf-8", "surrogateescape") for text in tensor.string_data]
        return strings.reshape(shape)
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, OverflowError, KeyError) as error:
        raise ModelError(f'tensor "{tensor.name}" of shape {list(shape)}: {error}') from error
    if array.shape != shape:
        raise _mismatch(tensor, f"{count} elements", str(array.size))
    return array


def _varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise ValueError("a number is cut off")


def _encode(value: int) -> bytes:
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    return bytes([*result, value])


def _without_payloads(data: memoryview, start: int, end: int, message: Descriptor) -> bytes:
    """The message at data[start:end] in protobuf's wire format, its tensors' payloads replaced by their place."""
    pieces: list[bytes | memoryview] = []
    position = copied = start
    while position < end:
        field_start = position
        key, position = _varint(data, position, end)
        number, kind = key >> 3, key & 7
        length = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind, 0)
        if kind in (_VARINT, _DELIMITED):
            length, position = _varint(data, position, end)
            length = length if kind == _DELIMITED else 0
        elif kind not in (_EIGHT_BYTES, _FOUR_BYTES):
            raise ValueError(f"unknown wire type {kind}")
        if position + length > end:
            raise ValueError("a field is cut off")
        if kind == _DELIMITED and length >= IN_PLACE:
            field = message.fields_by_number.get(number)
            if message is _TENSOR and number in _PAYLOADS:
                place = f"{_PAYLOADS[number]}:{position}:{length}"
                inner = onnx.StringStringEntryProto(key=_IN_FILE, value=place).SerializeToString()
                number = _ENTRIES
            elif field is not None and field.message_type is not None:
                inner = _without_payloads(data, position, position + length, field.message_type)
            else:
                position += length
                continue
            pieces += [data[copied:field_start], _encode(number << 3 | _DELIMITED), _encode(len(inner)), inner]
            copied = position + length
        position += length
    return b"".join([*pieces, data[copied:end]])


def _read(path: Path) -> np.ndarray:
    status = path.stat()
    if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):  # /dev/zero has no end
        raise ValueError(f"{path} is a device")
    if status.st_size < MAPPED:
        return np.frombuffer(path.read_bytes(), np.uint8)
    return np.memmap(path, np.uint8, "r")


def _guarded(read: Callable[[], np.ndarray]) -> np.ndarray:
    try:
        return read()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelError(f"the model cannot be read: {reason}") from error


def load_model(
    model: str | os.PathLike[str] | bytes | ModelProto,
    folder: str | os.PathLike[str] | None = None,
    most: int | None = None,
) -> tuple[ModelProto, Weights]:
    """The model without its larger weights, and the weights.

    `folder` holds external data; it defaults to the folder of a model that is given as a path; `most` is the limit of
    `Weights`. Of a model given as a path or as bytes one copy of the weights at most is in memory, of a ModelProto a
    second one.
    Raises ModelError where the file cannot be read or is no ONNX model.
    """
    home = Path(folder) if folder is not None else None
    if isinstance(model, ModelProto):
        return model, Weights(None, home, most)
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        data = _guarded(lambda: _read(path))
        home = home or path.parent
    else:
        data = np.frombuffer(model, np.uint8)
    what = "the file is empty" if not data.size else "not an ONNX model, or a truncated one"
    try:
        if sys.byteorder != "little":
            raise ModelError("onnxc reads models on little-endian machines only")
        light = _without_payloads(data.data, 0, data.size, ModelProto.DESCRIPTOR)
        proto = ModelProto.FromString(light)
    except (ValueError, DecodeError, RecursionError) as error:
        raise ModelError(f"{what} ({error}); export or download it again") from error
    if not proto.HasField("graph") or not (proto.ir_version or proto.opset_import):
        raise ModelError(f"{what} (it declares no graph); export or download it again")
    return proto, Weights(data, home, most)
