"""Mutations of models: what a damaged download, a careless exporter or an attacker may hand to a compiler.

`mutated` changes the bytes of a model or the fields of the parsed one, by protobuf's own descriptions of its messages,
so that a field of a newer ONNX is mutated because it is there.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

INTEGERS = (
    0, 1, 2, 3, 5, 7, 16, 63, 64, 65, 127, 128, 255, 1000, 4096, 65536, 10**6, 10**9, 2**31 - 1, 2**31, 2**32, 2**40,
    2**53, 2**62, 2**63 - 1, -1, -2, -3, -128, -(2**31), -(2**62), -(2**63),
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e30, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"), 1e9)
TEXTS = (
    "", " ", "\0", "a\0b", "x" * 5000, "../secret.bin", "/etc/passwd", "..\\secret.bin", "%s%n", "{0}", 'a"b', "a\nb",
    "ß√", "$batch", "batch", "NOTSET", "SAME_UPPER", "linear", "constant", "reflect", "wrap", "ai.onnx",
    "com.microsoft",
)  # fmt: skip
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def mutated(model: bytes, seed: int) -> bytes:
    """The model with one to four faults; which ones, the seed tells."""
    rng = random.Random(seed)
    if rng.random() < 0.3:
        for _ in range(rng.choice((1, 1, 2, 4))):
            model = rng.choice(_OF_BYTES)(model, rng)
        return model
    proto = onnx.ModelProto.FromString(model)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(_OF_FIELDS)(proto, rng)
    return bytes(proto.SerializeToString())


# Bytes.


def _flip(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data)) if data else 0
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :] if data else data


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    junk = rng.choice((b"\xff" * 10, b"\0" * 8, rng.randbytes(4), b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"))
    return data[:place] + junk + data[place + len(junk) :]


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[place:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, place = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    span = data[start : start + rng.choice((1, 8, 64, 1024))]
    return data[:place] + span * rng.choice((1, 2, 50)) + data[place:]


def _cut(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 8, 64, 1024)) :]


def _lengthen(data: bytes, rng: random.Random) -> bytes:
    """A length of protobuf: a byte behind the key of a delimited field."""
    keys = [place for place in range(len(data) - 1) if data[place] & 7 == 2 and data[place] < 128]
    if not keys:
        return data
    place = rng.choice(keys) + 1
    length = rng.choice((b"\0", b"\x01", b"\x7f", b"\xff\xff\xff\xff\x07", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"))
    return data[:place] + length + data[place + 1 :]


_OF_BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _flip, _overwrite, _truncate, _insert, _repeat, _cut, _lengthen, _lengthen,
)  # fmt: skip


# Fields.


def messages(proto: Message) -> Iterator[Message]:
    """The message and all in it."""
    waiting: list[Message] = [proto]
    while waiting:
        message = waiting.pop()
        yield message
        for field, value in message.ListFields():
            if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
                waiting.extend(value if field.is_repeated else [value])


def _any_field(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Any field of any message: the kinds of messages are equally likely, whatever their numbers."""
    kinds: dict[str, list[Message]] = defaultdict(list)
    for message in messages(proto):
        kinds[message.DESCRIPTOR.name].append(message)
    message = rng.choice(kinds[rng.choice(sorted(kinds))])
    fields = [field for field, _ in message.ListFields()]
    if not fields or rng.random() < 0.15:
        fields = list(message.DESCRIPTOR.fields)
    _change(message, rng.choice(fields), kinds, rng)


def _change(message: Message, field: FieldDescriptor, kinds: dict[str, list[Message]], rng: random.Random) -> None:
    if rng.random() < 0.1:
        message.ClearField(field.name)
        return
    donors = kinds.get(field.message_type.name, []) if field.message_type else []
    if field.is_repeated:
        _change_list(getattr(message, field.name), field, donors, kinds, rng)
    elif field.message_type:
        if donors:
            other = type(donors[0])()
            other.CopyFrom(rng.choice(donors))
            getattr(message, field.name).CopyFrom(other)
    else:
        setattr(message, field.name, _scalar(field, getattr(message, field.name), kinds, rng))


def _change_list(
    items: Any, field: FieldDescriptor, donors: list[Message], kinds: dict[str, list[Message]], rng: random.Random
) -> None:
    def copied(item: Any) -> Any:
        if not field.message_type:
            return item
        other = type(item)()
        other.CopyFrom(item)
        return other

    found = [copied(item) for item in items]
    place = rng.randrange(len(found)) if found else 0
    what = rng.choice(("drop", "twice", "swap", "change", "change", "insert", "many", "reverse"))
    if what == "drop":
        del found[place : place + 1]
    elif what == "twice" and found:
        found.insert(rng.randrange(len(found) + 1), copied(found[place]))
    elif what == "swap" and found:
        other = rng.randrange(len(found))
        found[place], found[other] = found[other], found[place]
    elif what == "reverse":
        found.reverse()
    elif what == "many" and found and not field.message_type:
        found[place:place] = [found[place]] * rng.choice((3, 100, 20_000))
    elif field.message_type:
        if donors:
            found[place : place + (what == "change")] = [copied(rng.choice(donors))]
    else:
        found[place : place + (what == "change")] = [_scalar(field, found[place] if found else None, kinds, rng)]
    del items[:]
    items.extend(found)


def _scalar(field: FieldDescriptor, old: Any, kinds: dict[str, list[Message]], rng: random.Random) -> Any:
    if field.enum_type:
        return rng.choice([value.number for value in field.enum_type.values])
    if field.cpp_type in _RANGES:
        low, high = _RANGES[field.cpp_type]
        near = [(old or 0) + 1, (old or 0) - 1, 2 * (old or 0), -(old or 0)]
        return min(max(rng.choice([*INTEGERS, *near, *near]), low), high)
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice(FLOATS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.choice((_flip, _truncate, _insert, _repeat, lambda data, rng: rng.choice(TEXTS).encode()))(
            old or b"", rng
        )
    if field.name == "op_type" and rng.random() < 0.5:
        return rng.choice(_operators())
    names = [
        text for kind in ("NodeProto", "ValueInfoProto", "TensorProto", "FunctionProto") for text in _names(kinds[kind])
    ]
    return rng.choice(names) if names and rng.random() < 0.6 else rng.choice(TEXTS)


def _names(found: list[Message]) -> Iterator[str]:
    for message in found[:200]:
        for field, value in message.ListFields():
            if field.type == FieldDescriptor.TYPE_STRING:
                yield from value if field.is_repeated else [value]


def _operators() -> list[str]:
    return sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""})


def _recursive_function(proto: onnx.ModelProto, rng: random.Random) -> None:
    """A function that calls itself, or a node that calls a function of its own operator."""
    nodes = [item for item in messages(proto) if isinstance(item, onnx.NodeProto)]
    if not nodes:
        return
    node = rng.choice(nodes)
    function = proto.functions.add(name=node.op_type, domain=rng.choice((node.domain, "local")))
    function.input.extend(dict.fromkeys(node.input))
    function.output.extend(dict.fromkeys(node.output))
    function.node.add().CopyFrom(node)
    function.opset_import.extend(proto.opset_import)
    if function.domain == "local":
        proto.opset_import.add(domain="local", version=1)
        function.opset_import.add(domain="local", version=1)
        function.node[0].domain = rng.choice(("local", node.domain))
        node.domain = "local"


def _nested(proto: onnx.ModelProto, rng: random.Random) -> None:
    """The graph's nodes in branches within branches."""
    for _ in range(rng.choice((1, 3, 30))):
        graph = onnx.GraphProto()
        graph.CopyFrom(proto.graph)
        inner = onnx.GraphProto(name="inner", node=graph.node, output=graph.output)
        del proto.graph.node[:]
        condition = onnx.numpy_helper.from_array(__import__("numpy").array(rng.random() < 0.5), "hostile_condition")
        known = {tensor.name for tensor in proto.graph.initializer}
        if condition.name not in known:
            proto.graph.initializer.append(condition)
        names = [value.name for value in graph.output]
        node = onnx.helper.make_node("If", ["hostile_condition"], names, then_branch=inner, else_branch=inner)
        if len(node.SerializeToString()) > 1 << 20:
            proto.graph.CopyFrom(graph)
            return
        proto.graph.node.append(node)


def _rewired(proto: onnx.ModelProto, rng: random.Random) -> None:
    """A node reads what another one gives: other types, cycles."""
    nodes = [item for item in messages(proto) if isinstance(item, onnx.NodeProto) and item.input]
    if nodes:
        node = rng.choice(nodes)
        node.input[rng.randrange(len(node.input))] = rng.choice(
            [*rng.choice(nodes).output, *rng.choice(nodes).input, ""]
        )


def _other_weights(proto: onnx.ModelProto, rng: random.Random) -> None:
    """A tensor of extreme numbers."""
    inside = onnx.TensorProto.DEFAULT
    found = [item for item in messages(proto) if isinstance(item, onnx.TensorProto) and item.data_location == inside]
    tensors = [tensor for tensor in found if not tensor.external_data]
    if not tensors:
        return
    tensor = rng.choice(tensors)
    try:
        array = onnx.numpy_helper.to_array(tensor)
        pool = INTEGERS if array.dtype.kind in "iu" else FLOATS
        flat = array.flatten()
        for _ in range(rng.choice((1, 1, flat.size))):
            flat[rng.randrange(flat.size)] = rng.choice(pool)
    except (ValueError, TypeError, OverflowError):
        return
    tensor.CopyFrom(onnx.numpy_helper.from_array(flat.reshape(array.shape), tensor.name))


def _external(proto: onnx.ModelProto, rng: random.Random) -> None:
    """A tensor whose data are said to be in another file."""
    tensors = [item for item in messages(proto) if isinstance(item, onnx.TensorProto)]
    if tensors:
        tensor = rng.choice(tensors)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        location = rng.choice(
            (
                "../secret.bin",
                "/etc/passwd",
                "link.bin",
                "hard.bin",
                "pipe",
                "folder",
                "way/secret.bin",
                ".",
                "data.bin",
            )
        )
        tensor.external_data.add(key="location", value=location)
        for key in ("offset", "length"):
            if rng.random() < 0.5:
                tensor.external_data.add(key=key, value=str(rng.choice(INTEGERS)))


_OF_FIELDS: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    *[_any_field] * 12, _recursive_function, _nested, _rewired, _rewired, _other_weights, _other_weights, _external,
)  # fmt: skip

__all__ = ["DecodeError", "messages", "mutated"]
