"""What values are, as far as it matters who computes them: tensors of numbers are compiled, all else is Python's.

A kind is ONNX's spelling of a type without the element types of numbers: "tensor", "tensor(string)", "seq(tensor)",
"optional(seq(tensor(string)))", "map".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, TypeProto

NUMBERS, TEXT, MAP = "tensor", "tensor(string)", "map"

STEPS = (
    "ConcatFromSequence", "ImageDecoder", "Optional", "OptionalGetElement", "OptionalHasElement", "RegexFullMatch",
    "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
    "SequenceMap", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit", "ai.onnx.ml.CastMap",
    "ai.onnx.ml.CategoryMapper", "ai.onnx.ml.DictVectorizer", "ai.onnx.ml.ZipMap",
)  # fmt: skip
"""Operators that Python runs whatever their operands, but for sequences and optionals that the importer resolves."""

TEXT_ATTRIBUTES = (
    "cats_strings", "classlabels_strings", "keys_strings", "pool_strings", "value_string", "value_strings",
    "values_strings",
)  # fmt: skip
"""Attributes that make an operator one on text wherever they have a value."""


def kind_of_type(type: TypeProto) -> str:
    """The kind of a declared type; of one that is not declared, that of a tensor of numbers."""
    which = type.WhichOneof("value")
    if which == "sequence_type":
        return f"seq({kind_of_type(type.sequence_type.elem_type)})"
    if which == "optional_type":
        return f"optional({kind_of_type(type.optional_type.elem_type)})"
    if which == "map_type":
        return MAP
    return TEXT if which == "tensor_type" and type.tensor_type.elem_type == TensorProto.STRING else NUMBERS


def element(kind: str) -> str:
    """The kind inside a sequence or an optional; any other as it is."""
    return kind.partition("(")[2][:-1] if kind.startswith(("seq(", "optional(")) else kind


def has_text_attribute(attributes: Mapping[str, Any]) -> bool:
    """Whether attributes, in plain Python, say that an operator reads or gives text."""
    tensors = (attributes.get(name) for name in ("keys_tensor", "values_tensor"))
    texts = (getattr(t, "data_type", 0) == TensorProto.STRING or _is_text_array(t) for t in tensors)
    return any(attributes.get(name) for name in TEXT_ATTRIBUTES) or any(texts)


def _is_text_array(constant: Any) -> bool:
    return getattr(getattr(getattr(constant, "array", None), "dtype", None), "kind", "") == "O"


def operator_of(node: NodeProto) -> str:
    """The operator, its domain in front."""
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """The attributes in plain Python; texts as str."""
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if not a.ref_attr_name}
    return {
        name: [_text(item) for item in value] if isinstance(value, list) else _text(value)
        for name, value in found.items()
    }  # fmt: skip


def _text(value: Any) -> Any:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def output_kinds(
    node: NodeProto, opset: int, kinds: Sequence[str | None], bodies: Sequence[Sequence[str]]
) -> list[str]:
    """The kinds of a node's outputs, by those of its operands and of what its graphs give.

    They follow from the operator's schema of that opset but where the rules below say otherwise.
    """
    name, attributes, count = operator_of(node), attributes_of(node), len(node.output)
    if name in _RULES:
        return [_RULES[name](attributes, kinds)] * count
    if name == "If":
        return [max(pair, key=len) for pair in zip(*bodies, strict=True)]
    if name in ("Loop", "Scan"):
        # States keep their kinds, but an optional that the body gives without wrapping it is what the body gives.
        return list(bodies[0][1 if name == "Loop" else 0 :])
    if name == "SequenceMap":
        return [f"seq({kind})" for kind in bodies[0]]
    return _by_schema(node, opset, kinds, attributes)


def _by_schema(node: NodeProto, opset: int, kinds: Sequence[str | None], attributes: Mapping[str, Any]) -> list[str]:
    domain, count = "" if node.domain == "ai.onnx" else node.domain, len(node.output)
    if not onnx.defs.has(node.op_type, opset, domain):
        return [NUMBERS] * count
    schema = onnx.defs.get_schema(node.op_type, opset, domain)
    bound: dict[str, str] = {}
    for position, kind in enumerate(kinds):
        if kind is not None and schema.inputs:
            bound.setdefault(schema.inputs[min(position, len(schema.inputs) - 1)].type_str, kind)
    found = []
    for position in range(count):
        formal: Any = schema.outputs[min(position, len(schema.outputs) - 1)]
        if formal.type_str in bound:
            found.append(bound[formal.type_str])
        elif formal.types == {TEXT}:
            found.append(TEXT)
        else:
            texts = position == 0 and has_text_attribute({k: v for k, v in attributes.items() if k in _GIVING})
            found.append(TEXT if texts and TEXT in formal.types else NUMBERS)
    return found


_GIVING = ("classlabels_strings", "value_string", "value_strings", "values_strings", "values_tensor")
"""The attributes of text that tell of the first output."""

Rule = Callable[[Mapping[str, Any], Sequence[str | None]], str]


def _first(attributes: Mapping[str, Any], kinds: Sequence[str | None]) -> str:
    return next((kind for kind in kinds if kind is not None), NUMBERS)


def _typed(attributes: Mapping[str, Any], wrap: str, inner: str) -> str:
    text = attributes.get("dtype") == TensorProto.STRING
    return f"{wrap}({TEXT if text else inner})"


_RULES: Mapping[str, Rule] = {
    "Cast": lambda attributes, kinds: TEXT if attributes.get("to") in (TensorProto.STRING, "STRING") else NUMBERS,
    "CastLike": lambda attributes, kinds: kinds[1] or NUMBERS,
    "Constant": lambda attributes, kinds: (
        TEXT if has_text_attribute({**attributes, "values_tensor": attributes.get("value")}) else NUMBERS
    ),
    "ConcatFromSequence": lambda attributes, kinds: element(_first(attributes, kinds)),
    "Optional": lambda attributes, kinds: (
        f"optional({_first(attributes, kinds) if 'type' not in attributes else kind_of_type(attributes['type'])})"
    ),
    "OptionalGetElement": lambda attributes, kinds: (
        element(kinds[0]) if kinds[0] and kinds[0].startswith("optional") else kinds[0] or NUMBERS
    ),
    "SequenceAt": lambda attributes, kinds: element(_first(attributes, kinds)),
    "SequenceConstruct": lambda attributes, kinds: f"seq({_first(attributes, kinds)})",
    "SequenceEmpty": lambda attributes, kinds: _typed(attributes, "seq", NUMBERS),
    "SequenceErase": _first,
    "SequenceInsert": _first,
    "SplitToSequence": lambda attributes, kinds: f"seq({_first(attributes, kinds)})",
    "ai.onnx.ml.CastMap": lambda attributes, kinds: TEXT if attributes.get("cast_to") == "TO_STRING" else NUMBERS,
    "ai.onnx.ml.CategoryMapper": lambda attributes, kinds: NUMBERS if kinds[0] == TEXT else TEXT,
    "ai.onnx.ml.ZipMap": lambda attributes, kinds: f"seq({MAP})",
}
"""Operators whose outputs' kinds their schemas do not tell."""
