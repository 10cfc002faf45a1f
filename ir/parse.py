"""Reading the text of the graph language; `print` says how it looks."""

from __future__ import annotations

import ast
import math
import re
from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping
from typing import NoReturn, TypeVar

from . import dtypes
from .dims import Dim, Symbol, as_symbol, parse_dim, symbol
from .errors import ModelError
from .graph import Attribute, Constant, Graph, Node, OptionalType, SequenceType, TensorType, Type, Value
from .print import NAME, WORD, literal_array, literal_shape

_HEX = "[0-9a-fA-F]"
_ESCAPE = rf"[nrtabfv\\'\"]|x{_HEX}{{2}}"
_STRING = rf"\"(?:[^\"\\\x00-\x1f\x7f]|\\(?:{_ESCAPE}|u{_HEX}{{4}}|U00(?:0{_HEX}|10){_HEX}{{4}}))*\""
_BYTES = rf"b\"(?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\(?:{_ESCAPE}))*\""
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_TOKEN = re.compile(
    rf"""(?P<space>[ \t\r\n]+) | (?P<comment>//[^\n]*)
    | (?P<value>%(?:{NAME}|{_STRING})) | (?P<at>@(?:{NAME}|{_STRING})) | (?P<string>{_STRING}|{_BYTES})
    | (?P<number>{_NUMBER}) | (?P<word>{WORD})
    | (?P<sign>->|[()\[\]{{}},:=+*-]) | (?P<unknown>.)""",
    re.VERBOSE | re.DOTALL,
)
_ORIGIN = re.compile(rf"//\s*from\s+({_STRING}(?:\s*,\s*{_STRING})*)\s*(?:;.*)?")
_OPENING, _CLOSING = "([{", ")]}"
_LITERALS: dict[str, int | float] = {"nan": math.nan, "inf": math.inf, "true": True, "false": False}
_T = TypeVar("_T")


def parse_graph(text: str, constants: Mapping[str, Constant] | None = None) -> Graph:
    """The graph that `print_graph` printed as `text`, or that a person wrote or edited.

    `constants` holds the handles that the text names, as `Graph.constants` gives them. Raises ModelError with the line
    and column, what was expected there and what was found. Whether the graph makes sense is `verify_graph`'s question.
    """
    try:
        return _Parser(text, constants or {}).file()
    except RecursionError:
        raise ModelError("the text is nested too deeply") from None


def _unquote(token: str) -> str:
    if not token.startswith('"'):
        return token
    return str(ast.literal_eval(token)) if "\\" in token else token[1:-1]


def _string(token: str) -> str | bytes:
    return bytes(ast.literal_eval(token)) if token.startswith("b") else _unquote(token)


def _number(token: str) -> int | float:
    # Python refuses to read an int of more than 4,300 digits.
    return int(token) if token.isdecimal() and len(token) < 4000 else float(token)


def _flatten(literal: object, shape: tuple[int, ...], elements: list[object]) -> bool:
    """Appends the leaves of a nested list; False where it does not have this shape."""
    if not shape:
        elements.append(literal)
        return not isinstance(literal, list)
    if not isinstance(literal, list) or len(literal) != shape[0]:
        return False
    return all(_flatten(item, shape[1:], elements) for item in literal)


class _Parser:
    """Recursive descent over a list of tokens; `_at` is the index of the next one."""

    def __init__(self, text: str, constants: Mapping[str, Constant]) -> None:
        self._text = text
        self._constants = constants
        self._symbols: dict[str, Dim] = {}
        self._dims: dict[str, Dim] = {}
        self._tokens: list[tuple[str, str, int]] = []  # kind, text, offset
        self._origins: dict[int, tuple[str, ...]] = {}  # by the index of the token in front
        self._at = 0
        for found in _TOKEN.finditer(text):
            kind, token = found.lastgroup or "", found.group()
            if kind == "comment":
                origin = _ORIGIN.fullmatch(token)
                if origin:
                    self._origins[len(self._tokens) - 1] = tuple(map(_unquote, re.findall(_STRING, origin[1])))
            elif kind != "space":
                self._tokens.append((kind, token, found.start()))
        self._tokens.append(("end", "", len(text)))

    @property
    def _kind(self) -> str:
        return self._tokens[self._at][0]

    @property
    def _next(self) -> str:
        return self._tokens[self._at][1]

    @property
    def _after_next(self) -> str:
        return self._tokens[min(self._at + 1, len(self._tokens) - 1)][1]

    def _fail(self, expected: str, at: int | None = None) -> NoReturn:
        kind, token, offset = self._tokens[self._at if at is None else at]
        start = self._text.rfind("\n", 0, offset) + 1
        line, column = self._text.count("\n", 0, offset) + 1, offset - start + 1
        found = "the end of the text" if kind == "end" else f"`{token}`"
        raise ModelError(f"line {line}, column {column}: expected {expected}, found {found}")

    def _take(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1][1]

    def _expect(self, token: str) -> None:
        if not self._skip(token):
            self._fail(f"`{token}`")

    def _skip(self, token: str) -> bool:
        if self._next != token:
            return False
        self._at += 1
        return True

    def _name(self, kind: str, expected: str) -> str:
        """The name in the next token: "value" for %name, "at" for @name, "word" for a word or a string."""
        quoted = kind == "word" and self._kind == "string" and self._next.startswith('"')
        if self._kind != kind and not quoted:
            self._fail(expected)
        token = self._take()
        return _unquote(token if kind == "word" else token[1:])

    def _list(self, opening: str, closing: str, item: Callable[[], _T]) -> list[_T]:
        items: list[_T] = []
        self._expect(opening)
        while not self._skip(closing):
            if items and not self._skip(","):
                self._fail(f"`,` or `{closing}`")
            items.append(item())
        return items

    def file(self) -> Graph:
        while self._next == "symbol":
            self._declaration()
        graph = self._graph({})
        if self._kind != "end":
            self._fail("the end of the text")
        return graph

    def _declaration(self) -> None:
        self._expect("symbol")
        name = self._name("word", "the name of a symbol")
        self._expect("in")
        start = self._at
        bounds = self._list("[", "]", self._bound)
        if len(bounds) != 2 or not isinstance(bounds[0], int | None):
            self._fail("[lower, upper] with a number or `_` as lower bound", start)
        self._symbols[name] = symbol(name, bounds[0], bounds[1])
        self._dims.clear()

    def _bound(self) -> Dim | None:
        return None if self._skip("_") else self._dim()

    def _graph(self, outer: MutableMapping[str, Value]) -> Graph:
        self._expect("graph")
        name = self._name("at", "the graph's @name")
        inputs = self._list("(", ")", self._typed_value)
        self._expect("->")
        outputs = self._list("(", ")", self._typed_value)
        self._expect("{")
        scope = ChainMap({value.name: value for value in inputs}, outer)
        nodes: list[Node] = []
        while not self._skip("}"):
            node = self._node(scope)
            nodes.append(node)
            scope.update((value.name, value) for value in node.outputs)
        return Graph(name, tuple(inputs), tuple(outputs), tuple(nodes))

    def _typed_value(self) -> Value:
        name = self._name("value", "a %name")
        self._expect(":")
        return Value(name, self._type())

    def _node(self, scope: ChainMap[str, Value]) -> Node:
        names: list[str] = []
        while self._kind == "value":
            names.append(self._name("value", "a %name"))
            if not self._skip(","):
                self._expect("=")
                break
        if self._next == "constant" and names:
            return self._constant(names)
        op = self._name("word", "`constant` or an operator" if names else "a node or `}`")
        inputs = self._list("(", ")", lambda: self._operand(scope))
        attributes = dict(self._list("{", "}", self._pair)) if self._next == "{" else {}
        outputs: list[Value] = []
        for name in names:
            self._expect("," if outputs else ":")
            outputs.append(Value(name, self._type()))
        origin = self._origins.get(self._at - 1, ())
        regions: dict[str, Graph] = {}
        while self._kind in ("word", "string") and self._after_next == ":":
            name = self._name("word", "the name of a region")
            self._expect(":")
            regions[name] = self._graph(scope)
        return Node(op, tuple(inputs), tuple(outputs), attributes, regions, origin)

    def _operand(self, scope: Mapping[str, Value]) -> Value | None:
        if self._skip("_"):
            return None
        at = self._at
        value = scope.get(self._name("value", "a %name or `_`"))
        return value if value is not None else self._fail("a value that is defined above", at)

    def _pair(self) -> tuple[str, Attribute]:
        name = self._name("word", "the name of an attribute")
        self._expect("=")
        return name, self._attribute()

    def _constant(self, names: list[str]) -> Node:
        self._expect("constant")
        start = self._at
        handle = self._handle() if self._kind == "at" else None
        literal = self._literal() if handle is None else None
        self._expect(":")
        at = self._at
        type = self._type()
        if len(names) != 1 or not isinstance(type, TensorType):
            self._fail("one tensor's type for one %name", at)
        if handle is None:
            shape = literal_shape(type)
            elements: list[object] = []
            if shape is None or not _flatten(literal, shape, elements):
                self._fail(f"a constant of the type {type}", start)
            try:
                handle = Constant(names[0], literal_array(type, elements))
            except (ValueError, OverflowError) as error:
                self._fail(f"a constant of the type {type} ({error})", start)
        origin = self._origins.get(self._at - 1, ())
        return Node("Constant", (), (Value(names[0], type),), {"value": handle}, origin=origin)

    def _handle(self) -> Constant:
        at = self._at
        handle = self._constants.get(self._name("at", "the @name of a constant"))
        return handle if handle is not None else self._fail("one of the constants that were given", at)

    def _literal(self) -> object:
        """A number, truth value or string, or a list of such."""
        if self._next == "[":
            return self._list("[", "]", self._literal)
        if self._kind == "string":
            return _string(self._take())
        minus = self._skip("-")
        if self._kind != "number" and self._next not in _LITERALS:
            self._fail("a number, a string, a truth value, `[` or a constant's @name")
        token = self._take()
        number = _LITERALS[token] if token in _LITERALS else _number(token)
        return -number if minus else number

    def _type(self) -> Type:
        word = self._next
        if word in ("seq", "optional"):
            self._at += 1
            self._expect("(")
            element = self._type()
            self._expect(")")
            return SequenceType(element) if word == "seq" else OptionalType(element)
        dtype = dtypes.BY_NAME.get(word)
        if dtype is None:
            self._fail("a type, such as f32[batch, 3]")
        self._at += 1
        return TensorType(dtype, tuple(self._list("[", "]", self._dim)))

    def _expression(self) -> str:
        """The tokens up to a `,` or a closing bracket, joined by spaces."""
        start, depth = self._at, 0
        while self._kind not in ("end", "unknown"):
            token = self._next
            if depth == 0 and (token == "," or token in _CLOSING):
                break
            depth += (token in _OPENING) - (token in _CLOSING)
            self._at += 1
        return " ".join(token for _, token, _ in self._tokens[start : self._at])

    def _dim(self) -> Dim:
        start = self._at
        return self._as_dim(self._expression(), start, "a dimension")

    def _as_dim(self, text: str, start: int, expected: str) -> Dim:
        dim = self._dims.get(text)
        if dim is None:
            try:
                dim = self._dims[text] = parse_dim(text, self._symbols)
            except ValueError:
                self._fail(expected, start)
        return dim

    def _attribute(self) -> Attribute:
        if self._next == "[":
            return tuple(self._list("[", "]", self._attribute))
        if self._kind == "string":
            return _string(self._take())
        if self._kind == "at":
            return self._handle()
        if self._next == "symbol" and re.match(r'[\w"]', self._after_next):
            self._at += 1
            name = self._name("word", "the name of a symbol")
            return as_symbol(self._symbols.get(name, 0)) or Symbol(name)
        if self._next in ("seq", "optional") or (self._next in dtypes.BY_NAME and self._after_next == "["):
            return self._type()  # type: ignore[return-value]
        start = self._at
        text = self._expression()
        if text in dtypes.BY_NAME:
            return dtypes.BY_NAME[text]
        digits = text.removeprefix("- ")
        if digits in ("nan", "inf") or re.fullmatch(_NUMBER, digits):
            number = _LITERALS[digits] if digits in _LITERALS else _number(digits)
            return number if digits == text else -number
        return self._as_dim(text, start, "an attribute: a number, string, dimension, element type, @constant or list")
