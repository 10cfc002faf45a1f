"""The graph language as text: what `parse` reads back to an equal graph.

    symbol batch in [1, 8]
    graph @squeezenet(%image: f32[batch, 3, 224, 224]) -> (%prob: f32[batch, 1000]) {
      %w = constant @"conv1.weight" : f32[64, 3, 3, 3]
      %axes = constant [2, 3] : i64[2]
      %0 = Conv(%image, %w, _) {strides = [2, 2]} : f32[batch, 64, 111, 111]   // from "conv1"
      ...
    }

An absent input is `_`. Regions follow their node's line, as `then_branch: graph @name(...) -> (...) { ... }`. The
symbols declared in front are those whose bounds are not a size's, [0, _]; `_` is no bound. Large constants are names of
handles and never text; small ones are exact, a complex number as the list of its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from . import dtypes
from .atoms import quote
from .dims import Dim, Sum, Symbol, symbols
from .dtypes import DType
from .graph import Attribute, Constant, Graph, Node, OptionalType, SequenceType, TensorType, Type, Value

_SEGMENT = r"(?:[A-Za-z0-9_.$-]|/(?!/))+"
NAME = rf"{_SEGMENT}(?:(?:::|:(?=[0-9])){_SEGMENT})*"
"""Names of values and graphs that need no quotes, such as `onnx::MatMul_12`, `/layer.0/Add_output_0` and `input:0`."""
WORD = r"[A-Za-z_][A-Za-z0-9_.]*"
"""Names of operators, attributes and regions that need no quotes."""
_NOT_A_SYMBOL = frozenset(dtypes.BY_NAME) | {"nan", "inf", "_"}
"""What stands for something else where attributes are written; a symbol of this name goes in parentheses."""
INLINE_ELEMENTS = 16
_COMMENT_COLUMN = 120
_NAME, _WORD = re.compile(NAME), re.compile(WORD)
_LITERAL_CLASSES: dict[str, tuple[type, ...]] = {
    "string": (str, bytes),
    "bool": (bool,),
    "int": (int,),
    "uint": (int,),
    "float": (int, float),
    "complex": (int, float),
}
_PARTS = {"c64": np.float32, "c128": np.float64}


def print_graph(graph: Graph) -> str:
    """The text of a graph; a line for a node, with the ONNX nodes it came from as a comment."""
    printer = _Printer()
    lines = [*printer.graph(graph, "")]
    return "\n".join([*filter(None, printer.declarations.values()), *lines]) + "\n"


def name_text(name: str) -> str:
    return name if _NAME.fullmatch(name) else quote(name)


def _word(name: str) -> str:
    return name if _WORD.fullmatch(name) and name != "constant" else quote(name)


def _float(number: float) -> str:
    return repr(float(number))


def _with_point(digits: str) -> str:
    return digits + ".0" if digits.lstrip("-").isdecimal() else digits


def _bytes(data: bytes) -> str:
    return 'b"' + repr(b'"' + data)[3:-1].replace('"', '\\"') + '"'


class _Printer:
    """The symbols met so far, and the texts of types that come again and again."""

    def __init__(self) -> None:
        self.declarations: dict[Symbol, str] = {}
        self._types: dict[Type, str] = {}

    def graph(self, graph: Graph, indent: str) -> Iterator[str]:
        """The lines of a graph; the first is not indented, as something may stand before it."""
        inputs, outputs = (", ".join(map(self._typed, values)) for values in (graph.inputs, graph.outputs))
        yield f"graph @{name_text(graph.name)}({inputs}) -> ({outputs}) {{"
        inner = indent + "  "
        heads = [inner + self._head(node) for node in graph.nodes]
        widths = (len(head) for head, node in zip(heads, graph.nodes, strict=True) if node.origin)
        column = max((width for width in widths if width <= _COMMENT_COLUMN), default=0)
        for head, node in zip(heads, graph.nodes, strict=True):
            origin = f"from {', '.join(map(quote, node.origin))}" if node.origin else ""
            comment = "; ".join(filter(None, (origin, node.remark)))
            yield f"{head:{column}}   // {comment}" if comment else head
            for name, region in node.regions.items():
                first, *rest = self.graph(region, inner + "  ")
                yield f"{inner}  {_word(name)}: {first}"
                yield from rest
        yield indent + "}"

    def _typed(self, value: Value) -> str:
        return f"%{name_text(value.name)}: {self._type(value.type)}"

    def _head(self, node: Node) -> str:
        results = ", ".join(f"%{name_text(value.name)}" for value in node.outputs)
        call = _constant(node)
        if call is None:
            inputs = ("_" if value is None else f"%{name_text(value.name)}" for value in node.inputs)
            call = f"{_word(node.op)}({', '.join(inputs)})"
            if node.attributes:
                pairs = (f"{_word(name)} = {self._attribute(value)}" for name, value in node.attributes.items())
                call += f" {{{', '.join(pairs)}}}"
        types = ", ".join(self._type(value.type) for value in node.outputs)
        return f"{results} = {call} : {types}" if node.outputs else call

    def _type(self, type: Type) -> str:
        text = self._types.get(type)
        if text is None:
            match type:
                case TensorType(dtype, shape):
                    text = f"{dtype}[{', '.join(map(self._dim, shape))}]"
                case SequenceType(element):
                    text = f"seq({self._type(element)})"
                case OptionalType(element):
                    text = f"optional({self._type(element)})"
            self._types[type] = text
        return text

    def _dim(self, dim: Dim) -> str:
        for symbol in symbols(dim):
            self._declare(symbol)
        return str(dim)

    def _declare(self, symbol: Symbol) -> None:
        if symbol not in self.declarations:
            lower = "_" if symbol.lower is None else str(symbol.lower)
            upper = "_" if symbol.upper is None else self._expression(symbol.upper)
            default = (lower, upper) == ("0", "_")
            self.declarations[symbol] = "" if default else f"symbol {symbol} in [{lower}, {upper}]"

    def _expression(self, dim: Dim) -> str:
        """A dim where other things than dims may stand."""
        text = self._dim(dim)
        return f"({text})" if text.startswith('"') or text.lstrip("-") in _NOT_A_SYMBOL else text

    def _attribute(self, attribute: Attribute | Type) -> str:
        match attribute:
            case int():
                return str(int(attribute))
            case float():
                return _float(attribute)
            case str():
                return quote(attribute)
            case bytes():
                return _bytes(attribute)
            case Sum():
                return self._expression(attribute)
            case DType():
                return attribute.name
            case Symbol():
                self._declare(attribute)
                return f"symbol {attribute}"
            case Constant():
                return "@" + quote(attribute.name)
            case tuple():
                return f"[{', '.join(map(self._attribute, attribute))}]"
            case TensorType() | SequenceType() | OptionalType():
                return self._type(attribute)
        raise TypeError(f"{attribute!r} is no attribute of the graph language")


def _constant(node: Node) -> str | None:
    """What stands between `=` and `:` for a Constant node in its usual form, else None."""
    usual = node.op == "Constant" and not node.inputs and len(node.outputs) == 1 and not node.regions
    handle = node.attributes.get("value")
    if not usual or not isinstance(handle, Constant) or len(node.attributes) != 1:
        return None
    value = node.outputs[0]
    if handle.name == value.name and isinstance(value.type, TensorType) and handle.array.size <= INLINE_ELEMENTS:
        literal = _literal(value.type, handle.array)
        if literal is not None:
            return f"constant {literal}"
    return "constant @" + quote(handle.name)


def literal_shape(type: TensorType) -> tuple[int, ...] | None:
    """The shape of the nested list that writes a tensor of this type, None where its sizes are not all numbers."""
    sizes = tuple(dim for dim in type.shape if isinstance(dim, int))
    return None if len(sizes) < len(type.shape) else sizes + (2,) * (type.dtype.kind == "complex")


def literal_array(type: TensorType, elements: Sequence[object]) -> np.ndarray:
    """The array of a static type that a flattened literal stands for; ValueError names an element that does not fit."""
    dtype, shape = type.dtype, tuple(int(dim) for dim in type.shape if isinstance(dim, int))
    low, high = dtype.limits if dtype.is_integer else (0, 0)
    for element in elements:
        fits = element.__class__ in _LITERAL_CLASSES[dtype.kind]
        if not fits or (dtype.is_integer and not low <= element <= high):  # type: ignore[operator]
            raise ValueError(f"{element!r} is no {dtype}")
    if dtype.kind == "string":
        array = np.empty(len(elements), object)
        array[:] = elements
    else:
        array = np.array(elements, {"int": np.int64, "uint": np.uint64, "bool": np.bool_}.get(dtype.kind, np.float64))
    with np.errstate(all="ignore"):
        array = (array.view(np.complex128) if dtype.kind == "complex" else array).astype(dtype.numpy)
    return array.reshape(shape)


def _literal(type: TensorType, array: np.ndarray) -> str | None:
    """The array as a nested list, None where a text would not give back every bit (a NaN's payload) or its type."""
    shape = literal_shape(type)
    if shape is None or array.shape != type.shape or array.dtype != type.dtype.numpy:
        return None
    flat = np.ascontiguousarray(array).reshape(-1)
    for texts, elements in _spellings(type.dtype, flat):
        again = literal_array(type, elements).reshape(-1)
        if again.tobytes() == flat.tobytes() if flat.dtype != object else again.tolist() == flat.tolist():
            return _nested(iter(texts), shape)
    return None


def _spellings(dtype: DType, flat: np.ndarray) -> Iterator[tuple[list[str], list[object]]]:
    """(texts, what they read back as) of the elements, the most readable spelling first."""
    if dtype.kind == "string":
        items = flat.tolist()
        if all(type(item) in (str, bytes) for item in items):
            yield [quote(item) if isinstance(item, str) else _bytes(item) for item in items], items
        return
    if dtype.kind == "bool":
        yield ["true" if item else "false" for item in flat.tolist()], flat.tolist()
    elif dtype.is_integer:
        items = flat.astype(np.int64 if dtype.kind == "int" else np.uint64).tolist()
        yield [str(item) for item in items], items
    else:
        numbers = flat.view(_PARTS[dtype.name]) if dtype.kind == "complex" else flat
        exact = [_float(number) for number in numbers]
        # numpy prints the shortest digits that tell a number from its neighbours.
        short = [min(text, _with_point(str(number)), key=len) for text, number in zip(exact, numbers, strict=True)]
        for texts in (short, exact):
            yield texts, [float(text) for text in texts]


def _nested(texts: Iterator[str], shape: Iterable[int]) -> str:
    sizes = tuple(shape)
    if not sizes:
        return next(texts)
    return f"[{', '.join(_nested(texts, sizes[1:]) for _ in range(sizes[0]))}]"
