"""Hypothesis strategies for dims, types and graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnxc.ir import dtypes
from onnxc.ir.dims import Dim, as_symbol, dim_max, dim_min, floordiv, modulo, symbol
from onnxc.ir.dtypes import DType
from onnxc.ir.graph import (
    Attribute,
    Constant,
    Graph,
    Names,
    Node,
    OptionalType,
    SequenceType,
    TensorType,
    Type,
    Value,
)

M = symbol("m", 1, 8)
SYMBOLS: dict[str, Dim] = {
    "n": symbol("n"),
    "m": M,
    "i": symbol("i", -4, 4),
    "j": symbol("j", 0, M - 1),
}
"""A size, a bounded size, a signed symbol, and an index below `m`."""
ODD_SYMBOLS = tuple(map(symbol, ("in", "f32", "nan", "_", "min", "None", "seq.len + 1", 'a "b"', "ﬁ")))

Tree = int | str | tuple[str, Any, Any]
"""An expression as it was written: a number, the name of a symbol, or (operation, left, right)."""

_DIM_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "floordiv": floordiv,
    "mod": modulo,
    "min": dim_min,
    "max": dim_max,
}
_INT_OPERATIONS = _DIM_OPERATIONS | {"floordiv": int.__floordiv__, "mod": int.__mod__, "min": min, "max": max}


def build(tree: Tree) -> Dim:
    """The dim of an expression, simplified as dims are."""
    if isinstance(tree, tuple):
        return _DIM_OPERATIONS[tree[0]](build(tree[1]), build(tree[2]))  # type: ignore[no-any-return]
    return SYMBOLS[tree] if isinstance(tree, str) else tree


def calculate(tree: Tree, bindings: Mapping[str, int]) -> int:
    """The value of an expression by Python's own arithmetic."""
    if isinstance(tree, tuple):
        return _INT_OPERATIONS[tree[0]](calculate(tree[1], bindings), calculate(tree[2], bindings))  # type: ignore[no-any-return]
    return bindings[tree] if isinstance(tree, str) else tree


def _grow(inner: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    divisors = st.sampled_from([1, 2, 3, 4, 6, "m", ("*", 2, "m"), ("+", "m", 1), ("*", "m", "m")])
    return st.tuples(st.sampled_from(["+", "-", "*", "min", "max"]), inner, inner) | st.tuples(
        st.sampled_from(["floordiv", "mod"]), inner, divisors
    )


trees: st.SearchStrategy[Tree] = st.recursive(
    st.integers(-6, 8) | st.sampled_from(sorted(SYMBOLS)), _grow, max_leaves=6
)
dims = trees.map(build)


@st.composite
def bindings(draw: st.DrawFn) -> dict[str, int]:
    """A number for each of SYMBOLS, within its bounds."""
    m = draw(st.integers(1, 8))
    return {"n": draw(st.integers(0, 20)), "m": m, "i": draw(st.integers(-4, 4)), "j": draw(st.integers(0, m - 1))}


sizes: st.SearchStrategy[Dim] = (
    st.integers(0, 5) | dims.filter(lambda dim: not isinstance(dim, int)) | st.sampled_from(ODD_SYMBOLS)
)
element_types = st.sampled_from(dtypes.ALL)
tensor_types = st.builds(TensorType, element_types, st.lists(sizes, max_size=4).map(tuple))
types: st.SearchStrategy[Type] = st.recursive(
    tensor_types, lambda inner: st.builds(SequenceType, inner) | st.builds(OptionalType, inner), max_leaves=2
)

_ODD_NAMES = ["", "_", "0", "x:0", "onnx::MatMul_12", "/layer.0/Add", "a//b", "a:b", "a::", "%", '"', "\\", "\n", "é"]
value_names = st.sampled_from(["x", "y", "w", *_ODD_NAMES]) | st.text(max_size=4)
words = st.sampled_from(["axis", "constant", "graph", "symbol", "com.microsoft.Gelu", "then_branch", ""]) | st.text(
    max_size=4
)


@st.composite
def arrays(draw: st.DrawFn, dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
    """An array of any bits that the element type allows: NaNs with payloads, negative zeros, subnormals."""
    count = int(np.prod(shape, dtype=np.int64))
    if dtype.kind == "string":
        strings = np.empty(count, object)
        strings[:] = draw(st.lists(st.text(max_size=3) | st.binary(max_size=3), min_size=count, max_size=count))
        return strings.reshape(shape)
    size = dtype.numpy.itemsize * count
    # A few distinct bytes, repeated, keep the large arrays cheap to draw.
    data = np.resize(np.frombuffer(draw(st.binary(min_size=1, max_size=64)), np.uint8), size)
    if dtype.bits < 8 or dtype.kind == "bool":
        bits = data % (2 if dtype.kind == "bool" else 1 << dtype.bits)
        if dtype.kind == "int":
            return (bits.astype(np.int8) - (1 << (dtype.bits - 1))).astype(dtype.numpy).reshape(shape)
        return (bits.view(dtype.numpy) if dtype.is_float else bits.astype(dtype.numpy)).reshape(shape)
    return data.view(dtype.numpy).reshape(shape)


shapes = st.sampled_from([(), (1,), (3,), (2, 2), (0,), (2, 0, 3), (16,), (17,), (5, 7)])


def attributes(constants: st.SearchStrategy[Constant]) -> st.SearchStrategy[Attribute]:
    """An attribute of any kind. NaN is left out, as it does not equal itself."""
    scalars = (
        st.integers(-(1 << 70), 1 << 70)
        | st.floats(allow_nan=False)
        | st.text(max_size=6)
        | st.binary(max_size=6)
        | sizes
        | element_types
        | types
        | st.sampled_from([*SYMBOLS.values(), *ODD_SYMBOLS]).map(as_symbol)
        | constants
    )
    return st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)


@st.composite
def graphs(draw: st.DrawFn, max_nodes: int = 5) -> Graph:
    """A graph that keeps the rules of `verify_graph`; its operators and types mean nothing."""
    names, handles = Names(), Names()

    def value(of: st.SearchStrategy[Type]) -> Value:
        return Value(names.fresh(draw(value_names)), draw(of))

    @st.composite
    def constants(draw: st.DrawFn) -> Constant:
        array = draw(arrays(draw(element_types), draw(shapes)))
        return Constant(handles.fresh(draw(value_names)), array)

    def node(visible: list[Value], depth: int) -> Node:
        origin = tuple(draw(st.lists(st.text(max_size=6), max_size=2)))
        if draw(st.booleans()):
            dtype, shape = draw(element_types), draw(shapes)
            name, array = names.fresh(draw(value_names)), draw(arrays(dtype, shape))
            handle = handles.fresh(name if draw(st.booleans()) else draw(value_names))
            return Node(
                "Constant",
                (),
                (Value(name, TensorType(dtype, shape)),),
                {"value": Constant(handle, array)},
                origin=origin,
            )
        operands = st.sampled_from(visible) | st.none() if visible else st.none()
        inputs = tuple(draw(st.lists(operands, max_size=3)))
        pairs = draw(st.dictionaries(words, attributes(constants()), max_size=3))
        labels = draw(st.lists(words, max_size=2, unique=True)) if depth else []
        regions = {label: graph(list(visible), depth - 1) for label in labels}
        outputs = tuple(value(types) for _ in range(draw(st.integers(0, 2))))
        op = draw(words.filter(lambda word: word != "Constant"))
        return Node(op, inputs, outputs, pairs, regions, origin)

    def graph(visible: list[Value], depth: int) -> Graph:
        inputs = tuple(value(types) for _ in range(draw(st.integers(0, 2))))
        visible.extend(inputs)
        nodes = []
        for _ in range(draw(st.integers(0, max_nodes if depth == 2 else 2))):
            nodes.append(node(visible, depth))
            visible.extend(nodes[-1].outputs)
        outputs = draw(st.lists(st.sampled_from(visible), max_size=2)) if visible else []
        return Graph(draw(value_names), inputs, tuple(outputs), tuple(nodes))

    return graph([], 2)
