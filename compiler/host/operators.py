"""What Python runs: operators on text, sequences, optionals, maps and images.

Text is an array of str objects, a sequence a list, an optional its value or None, a map a dict. What ONNX's reference
implementation has is run by it; the operators below it lacks, or does otherwise than ONNX says.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import NodeProto
from onnx.reference import ReferenceEvaluator

from ...ir.errors import ModelError, ShapeError, TargetError, UnsupportedError
from .kinds import attributes_of, operator_of

Function: TypeAlias = Callable[[Sequence[Any]], Sequence[Any]]
Attributes: TypeAlias = Mapping[str, Any]


def function_of(node: NodeProto, opsets: Mapping[str, int]) -> Function:
    """What computes a node's outputs of its inputs, None standing for absent ones.

    Raises UnsupportedError where nothing does.
    """
    name = operator_of(node)
    if name in _OWN:
        run, attributes = _OWN[name], _with_defaults(node, opsets)
        return lambda inputs: run(inputs, attributes)
    graph = onnx.GraphProto(name="step", node=[_without_locale(node)])
    names = list(dict.fromkeys(filter(None, node.input)))
    graph.input.extend(onnx.ValueInfoProto(name=name) for name in names)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name)
    try:
        evaluator = ReferenceEvaluator(graph, opsets=dict(opsets))
    except Exception as error:  # the package raises whatever kind
        raise UnsupportedError(f"neither onnxc nor ONNX's reference can run {name} there: {error}") from error
    present = [position for position, output in enumerate(node.output) if output]

    def run_reference(inputs: Sequence[Any]) -> Sequence[Any]:
        given = {name: value for name, value in zip(node.input, inputs, strict=True) if name}
        found = evaluator.run(None, given)
        outputs: list[Any] = [None] * len(node.output)
        for position, value in zip(present, found, strict=True):
            outputs[position] = plain(value)
        return outputs

    return run_reference


def plain(value: Any) -> Any:
    """A value as runs hand it on: text as an array of str objects, numbers as an array."""
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    array = np.asarray(value)
    return texts(array) if array.dtype.kind in "OSU" else array


def texts(array: np.ndarray) -> np.ndarray:
    """An array of text with str objects as its elements. Raises ValueError where one is no text."""
    result = np.empty(array.shape, object)
    flat = result.reshape(-1)
    for position, item in enumerate(array.reshape(-1).tolist()):
        if not isinstance(item, str | bytes):
            raise ValueError(f"{item!r} is no text")
        flat[position] = item.decode() if isinstance(item, bytes) else str(item)
    return flat.reshape(array.shape)


def described(value: Any) -> str:
    """A value's type and shape, for messages."""
    if value is None:
        return "absent"
    if isinstance(value, list):
        return f"[{', '.join(map(described, value[:4]))}{', ...' if len(value) > 4 else ''}]"
    if isinstance(value, np.ndarray):
        return f"{'string' if value.dtype == object else value.dtype}{list(value.shape)}"
    return "map" if isinstance(value, dict) else type(value).__name__


def _with_defaults(node: NodeProto, opsets: Mapping[str, int]) -> Attributes:
    found = {}
    if onnx.defs.has(node.op_type, opsets.get(node.domain, 1), node.domain):
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
        defaults = [a.default_value for a in schema.attributes.values() if a.default_value.name]
        found = attributes_of(onnx.NodeProto(attribute=defaults))
    return found | attributes_of(node)


def _without_locale(node: NodeProto) -> NodeProto:
    """The reference sets the locale of the whole process where the node names one, though nothing that it does depends
    on it."""
    if node.op_type != "StringNormalizer":
        return node
    copy = NodeProto()
    copy.CopyFrom(node)
    kept = [attribute for attribute in node.attribute if attribute.name != "locale"]
    del copy.attribute[:]
    copy.attribute.extend(kept)
    return copy


# Sequences and optionals


def _position(value: Any, count: int, last: int) -> int:
    index = int(np.asarray(value).reshape(-1)[0])
    if not -count <= index <= last:
        raise ShapeError(f"position {index} in a sequence of {count} elements")
    return index + count if index < 0 else index


def _insert(inputs: Sequence[Any], attributes: Attributes) -> Sequence[Any]:
    sequence, item = list(inputs[0]), inputs[1]
    if sequence and isinstance(item, np.ndarray) and sequence[0].dtype != item.dtype:
        raise ShapeError(f"{described(item)} does not fit into a sequence of {described(sequence[0])}")
    count = len(sequence)
    sequence.insert(count if len(inputs) < 3 or inputs[2] is None else _position(inputs[2], count, count), item)
    return [sequence]


def _erase(inputs: Sequence[Any], attributes: Attributes) -> Sequence[Any]:
    sequence = list(inputs[0])
    place = inputs[1] if len(inputs) > 1 and inputs[1] is not None else -1
    del sequence[_position(place, len(sequence), len(sequence) - 1)]
    return [sequence]


def _at(inputs: Sequence[Any], attributes: Attributes) -> Sequence[Any]:
    return [inputs[0][_position(inputs[1], len(inputs[0]), len(inputs[0]) - 1)]]


def _concat(inputs: Sequence[Any], attributes: Attributes) -> Sequence[Any]:
    join = np.stack if attributes["new_axis"] else np.concatenate
    return [join(inputs[0], axis=attributes["axis"])]


def _split(inputs: Sequence[Any], attributes: Attributes) -> Sequence[Any]:
    array, axis = inputs[0], attributes["axis"]
    length = array.shape[axis]
    given = None if len(inputs) < 2 else inputs[1]
    sizes = [1] * length if given is None else [int(size) for size in given.reshape(-1)]
    if given is not None and not given.ndim:
        if sizes[0] < 1:
            raise ShapeError(f"parts of size {sizes[0]} are asked for")
        whole, rest = divmod(length, sizes[0])
        sizes = sizes * whole + [rest] * bool(rest)
    if sum(sizes) != length or min(sizes, default=0) < 0:
        raise ShapeError(f"parts of the sizes {sizes} do not make up axis {axis} of {described(array)}")
    parts = np.split(array, np.cumsum(sizes[:-1], dtype=np.int64), axis) if sizes else []
    return [[part.squeeze(axis) for part in parts] if given is None and not attributes["keepdims"] else list(parts)]


def _element(inputs: Sequence[Any], attributes: Attributes) -> Sequence[Any]:
    if inputs[0] is None:
        raise ShapeError("the optional has no value")
    return [inputs[0]]


# Images


def _decode_image(inputs: Sequence[Any], attributes: Attributes) -> Sequence[Any]:
    try:
        from PIL import Image
    except ImportError as error:
        raise TargetError("decoding images takes Pillow: pip install onnxc[image]") from error
    pixels = attributes["pixel_format"]
    if pixels not in ("RGB", "BGR", "Grayscale"):
        raise ModelError(f"there is no pixel format {pixels!r}, only RGB, BGR and Grayscale")
    with Image.open(io.BytesIO(np.ascontiguousarray(inputs[0]).tobytes())) as image:
        array = np.asarray(image.convert("L" if pixels == "Grayscale" else "RGB"))
    if pixels == "Grayscale":
        return [array[:, :, np.newaxis]]
    return [np.ascontiguousarray(array[:, :, ::-1]) if pixels == "BGR" else array]


# Maps


def _zip_map(inputs: Sequence[Any], attributes: Attributes) -> Sequence[Any]:
    labels = attributes.get("classlabels_strings") or attributes.get("classlabels_int64s") or []
    rows = np.atleast_2d(inputs[0])
    if rows.ndim != 2 or rows.shape[1] != len(labels):
        raise ShapeError(f"there are {len(labels)} labels for {described(inputs[0])}")
    return [[dict(zip(labels, row, strict=True)) for row in rows.tolist()]]


def _values_array(values: Sequence[Any]) -> np.ndarray:
    """The values of a map, of their own type; Python's floats stand for f32."""
    if any(isinstance(value, str) for value in values):
        return plain(np.array(values, object))  # type: ignore[no-any-return]
    exact = all(isinstance(value, np.generic | int) for value in values)
    return np.array(values, None if exact and values else np.float32)


def _vectorize(inputs: Sequence[Any], attributes: Attributes) -> Sequence[Any]:
    words = attributes.get("string_vocabulary") or attributes.get("int64_vocabulary") or []
    found = _values_array(list(inputs[0].values()))
    result = np.full((1, len(words)), "" if found.dtype == object else 0, found.dtype)
    for position, word in enumerate(words):
        if word in inputs[0]:
            result[0, position] = inputs[0][word]
    return [result]


def _cast_map(inputs: Sequence[Any], attributes: Attributes) -> Sequence[Any]:
    dtype = {"TO_FLOAT": np.float32, "TO_INT64": np.int64, "TO_STRING": object}[attributes["cast_to"]]
    items = sorted(inputs[0].items())
    cast = str if dtype is object else np.dtype(dtype).type
    if attributes["map_form"] == "DENSE":
        pairs, width = list(enumerate(value for _, value in items)), len(items)
    else:
        pairs, width = items, attributes["max_map"]
    result = np.full((1, width), "" if dtype is object else 0, dtype)
    for position, value in pairs:
        if 0 <= position < width:
            result[0, position] = cast(value)
    return [result]


def _map_categories(inputs: Sequence[Any], attributes: Attributes) -> Sequence[Any]:
    words, numbers = attributes["cats_strings"], attributes["cats_int64s"]
    text = inputs[0].dtype == object
    table = dict(zip(words, numbers, strict=True) if text else zip(numbers, words, strict=True))
    default = attributes["default_int64" if text else "default_string"]
    found = [table.get(item, default) for item in inputs[0].reshape(-1).tolist()]
    return [np.array(found, np.int64 if text else object).reshape(inputs[0].shape)]


_OWN: Mapping[str, Callable[[Sequence[Any], Attributes], Sequence[Any]]] = {
    "ConcatFromSequence": _concat,
    "Identity": lambda inputs, attributes: [inputs[0]],
    "ImageDecoder": _decode_image,
    "Optional": lambda inputs, attributes: [inputs[0] if inputs else None],
    "OptionalGetElement": _element,
    "OptionalHasElement": lambda inputs, attributes: [np.array(bool(inputs) and inputs[0] is not None)],
    "SequenceAt": _at,
    "SequenceConstruct": lambda inputs, attributes: [list(inputs)],
    "SequenceEmpty": lambda inputs, attributes: [[]],
    "SequenceErase": _erase,
    "SequenceInsert": _insert,
    "SequenceLength": lambda inputs, attributes: [np.array(len(inputs[0]), np.int64)],
    "SplitToSequence": _split,
    "ai.onnx.ml.CastMap": _cast_map,
    "ai.onnx.ml.CategoryMapper": _map_categories,
    "ai.onnx.ml.DictVectorizer": _vectorize,
    "ai.onnx.ml.ZipMap": _zip_map,
}
