"""A random graph, grown node by node: each new node is run at once by the reference, so that its shapes and values are
known to the next one, and one that the reference refuses or that has no defined meaning is not taken.

A size is a tuple: what it is at each of the bindings of the model's symbols (one binding, or two).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from fuzz.compare import by_onnxruntime, by_reference, compared, is_float
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]
Size = tuple[int, ...]
Attributes = dict[str, Any]
OPSET = 26
"""Run by ONNX Runtime instead."""
LARGEST = 1 << 18
"""Elements of a value."""

DTYPES = {
    "float": np.dtype(np.float32), "double": np.dtype(np.float64), "float16": np.dtype(np.float16),
    "bool": np.dtype(np.bool_), "bfloat16": np.dtype(ml_dtypes.bfloat16), "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"{sign}int{bits}": np.dtype(getattr(ml_dtypes, f"{sign}int{bits}")) for sign in ("", "u") for bits in (2, 4)},
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "float8e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8e5m2": np.dtype(ml_dtypes.float8_e5m2), "float8e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float4e2m1": np.dtype(ml_dtypes.float4_e2m1fn),
}  # fmt: skip
"""By the names of ONNX's schemas; strings, sequences and optionals have host steps and tests of their own."""
FLOATS = tuple(DTYPES[name] for name in ("float", "double", "float16", "bfloat16"))
INDICES = (DTYPES["int64"], DTYPES["int32"])
COMMON = (DTYPES["float"],) * 4 + (DTYPES["int64"], DTYPES["int32"], DTYPES["float16"], DTYPES["double"])
"""What half of the values have: other types are met by one node in two."""


@lru_cache(maxsize=512)
def schema_of(op: str) -> onnx.defs.OpSchema:
    domain, _, name = op.rpartition(".")
    return onnx.defs.get_schema(name, OPSET if domain == "" else onnx.defs.onnx_opset_version(), domain)


@lru_cache(maxsize=1024)
def admitted(op: str, kind: str) -> tuple[np.dtype[Any], ...]:
    """The element types that a type variable of the schema (or a type itself) stands for."""
    constraints = {item.type_param_str: item.allowed_type_strs for item in schema_of(op).type_constraints}
    names = [name.removeprefix("tensor(").removesuffix(")") for name in constraints.get(kind, [kind])]
    return tuple(DTYPES[name] for name in names if name in DTYPES)


@dataclass(frozen=True)
class Value:
    """A tensor of the graph and what it holds at each binding."""

    name: str
    arrays: tuple[Array, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.arrays[0].dtype

    @property
    def rank(self) -> int:
        return self.arrays[0].ndim

    @cached_property
    def shape(self) -> tuple[Size, ...]:
        return tuple(zip(*(array.shape for array in self.arrays), strict=True)) if self.rank else ()


class Rejected(Exception):
    """A node that is not taken: what it would need is not there, or has no meaning."""


@dataclass
class Builder:
    """The graph so far. `integer(low, high)` draws a number, both ends included. `outer` is the graph around a body;
    `bindings` how many sets of sizes it is run with; `alone` says that it is to have one node."""

    integer: Callable[[int, int], int]
    bindings: int = 1
    special: bool = False
    huge: bool = False
    alone: bool = False
    outer: Builder | None = None
    values: list[Value] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[tuple[Value, tuple[int | str, ...]]] = field(default_factory=list)
    constants: list[Value] = field(default_factory=list)
    symbols: dict[str, Size] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    counter: list[int] = field(default_factory=lambda: [0])

    # What is drawn.

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def chance(self, percent: int) -> bool:
        return self.integer(0, 99) >= 100 - percent

    def size(self, low: int = 0, high: int = 9) -> Size:
        """A size: a number, or a symbol's."""
        if self.bindings > 1 and self.chance(50):
            name = f"n{self.integer(0, 2)}"
            if name not in self.symbols:
                self.symbols[name] = tuple(self.integer(max(low, 1), high) for _ in range(self.bindings))
            if all(low <= n <= high for n in self.symbols[name]):
                return self.symbols[name]
        number = self.choice((1, 2, 3, 4, 5, 7, 8, 9, 1, 2, 3, 5, 16, 17, 33, 0))
        return (min(max(number, low), high) if (number > 9 and high <= 9) or number < low or number > high else number,
                ) * self.bindings  # fmt: skip

    def shape(self, low: int = 0, high: int = 6, smallest: int = 0) -> tuple[Size, ...]:
        """A shape of `low` to `high` axes, rather few; in a graph of `huge` values one long axis."""
        rank = min(high, max(low, self.choice((1, 2, 3, 4, 2, 3, 0, 5, 6))))
        most = 9 if rank < 4 else 4
        sizes = [self.size(smallest, 33 if rank < 3 else most) for _ in range(rank)]
        if self.huge and rank and self.chance(60):
            sizes = [(1,) * self.bindings if np.prod(s) > 4 else s for s in sizes]
            sizes[self.integer(0, rank - 1)] = (self.choice((1000, 4097, 65537, 100_000)),) * self.bindings
        return tuple(sizes)

    def random(self) -> np.random.Generator:
        return np.random.default_rng(self.integer(0, 1 << 16))

    def dtype(self, options: Sequence[np.dtype[Any]]) -> np.dtype[Any]:
        if not options:
            raise Rejected("none of its types is a tensor of numbers")
        common = [dtype for dtype in COMMON if dtype in options]
        return self.choice(common) if common and self.chance(50) else self.choice(options)

    def elements(self, dtype: np.dtype[Any], shape: Sequence[int], fill: str = "") -> Array:
        """Elements of a kind: "" for any, "positive", "unit" (0 to 1), "small" (a few whole numbers)."""
        random = self.random()
        if dtype.kind == "b":
            return random.random(shape) < 0.5
        if dtype.kind in "iu" or dtype in (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2):
            limits = ml_dtypes.iinfo(dtype)
            reach = 5 if fill or self.chance(70) else 100 if self.chance(50) else 1 << 70
            low = max(int(limits.min), 0 if fill in ("positive", "unit") else -reach)
            found = random.integers(low, min(int(limits.max), reach), shape, endpoint=True,
                                    dtype=np.uint64 if low >= 0 else np.int64).astype(dtype)  # fmt: skip
            if self.special and not fill and dtype.itemsize > 1 and self.chance(50):
                found = np.where(random.random(shape) < 0.1, random.choice([limits.min, limits.max], shape), found)
            return np.asarray(found).astype(dtype)
        if fill == "small" or (not fill and self.chance(25)):
            wide = random.integers(-3, 4, shape).astype(np.float64)
        elif fill == "unit":
            wide = random.random(shape)
        else:
            wide = random.standard_normal(shape) * self.choice((1.0, 3.0, 0.2))
        if fill == "positive":
            wide = np.abs(wide) + 0.125
        if dtype.kind == "c":
            wide = wide + 1j * random.standard_normal(shape)
        if self.special and not fill and dtype.itemsize > 1 and dtype.kind != "c":
            tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
            odd = random.choice([np.nan, np.inf, -np.inf, -0.0, tiny * 3, float(ml_dtypes.finfo(dtype).max)], shape)
            wide = np.where(random.random(shape) < 0.15, odd, wide)
        with np.errstate(all="ignore"):
            return np.asarray(wide).astype(dtype)

    # What is in the graph.

    def name(self) -> str:
        self.counter[0] += 1
        return f"v{self.counter[0]}"

    def add(self, arrays: Sequence[Array], constant: bool = False) -> Value:
        """A new initializer or graph input with these arrays; in a body an initializer of the graph around it."""
        if self.outer is not None:
            return self.outer.add(arrays, constant)
        value = Value(self.name(), tuple(arrays))
        same = all(np.array_equal(arrays[0], array) for array in arrays[1:]) and arrays[0].dtype.kind != "V"
        if constant and (same or self.bindings == 1):
            self.constants.append(value)
        else:
            dims: list[int | str] = []
            for axis, size in enumerate(value.shape):
                known = [name for name, sizes in self.symbols.items() if sizes == size]
                if len(set(size)) > 1 and not known:
                    known = [f"{value.name}_{axis}"]
                    self.symbols[known[0]] = size
                dims.append(known[0] if known and (len(set(size)) > 1 or self.chance(30)) else size[0])
            self.inputs.append((value, tuple(dims)))
        return value

    def fresh(self, dtype: np.dtype[Any], shape: Sequence[Size | int], fill: str = "", constant: int = 30) -> Value:
        """A new operand; in `constant` percent of the cases an initializer."""
        shapes = [tuple(s if isinstance(s, int) else s[k] for s in shape) for k in range(self.bindings)]
        if max(int(np.prod(s)) for s in shapes) > LARGEST:
            raise Rejected("too large")
        arrays = [self.elements(dtype, s, fill) for s in shapes[:1]]
        arrays += [arrays[0] if s == shapes[0] else self.elements(dtype, s, fill) for s in shapes[1:]]
        value = self.add(arrays, self.chance(constant))
        self.values.append(value)
        return value

    def numbers(self, values: Sequence[Any] | Array | int, dtype: Any = np.int64, constant: int = 80) -> Value:
        """An operand of given elements, the same at each binding."""
        return self.add([np.asarray(values, dtype)] * self.bindings, self.chance(constant))

    def visible(self) -> list[Value]:
        return self.values + (self.outer.visible() if self.outer is not None else [])

    def operand(
        self,
        dtypes: Sequence[np.dtype[Any]],
        low: int = 0,
        high: int = 6,
        fits: Callable[[Value], bool] = lambda value: True,
        smallest: int = 0,
    ) -> Value:
        """A value that is there, or a new one, with one of these types and `low` to `high` axes."""
        there = [
            v for v in self.visible()[-12:]
            if v.dtype in dtypes and low <= v.rank <= high and fits(v)
            and all(n >= smallest for size in v.shape for n in size)
        ]  # fmt: skip
        if there and self.chance(80):
            return self.choice(there)
        value = self.fresh(self.dtype(dtypes), self.shape(low, high, smallest))
        if not fits(value):
            raise Rejected("does not fit")
        return value

    def like(self, shape: Sequence[Size], dtype: np.dtype[Any], fill: str = "") -> Value:
        """An operand that broadcasts with a shape: one of that type that is there, or a new one."""
        there = [
            v for v in self.visible()[-12:]
            if v.dtype == dtype and not fill and all(
                a == b or set(a) == {1} or set(b) == {1} for a, b in zip(v.shape[::-1], shape[::-1], strict=False)
            )
        ]  # fmt: skip
        if there and self.chance(70):
            return self.choice(there)
        one = (1,) * self.bindings
        sizes = [one if self.chance(20) else self.size(1) if set(s) == {1} and self.chance(30) else s for s in shape]
        cut = self.integer(0, len(sizes)) if self.chance(30) else 0
        return self.fresh(dtype, sizes[cut:], fill)

    def node(
        self,
        op: str,
        operands: Sequence[Value | None],
        attributes: Mapping[str, Any],
        outputs: int = 1,
        defined: Callable[..., bool] | None = None,
    ) -> list[Value]:
        """Runs a node and appends it. Raises Rejected where the reference refuses it or it is not `defined`."""
        domain, _, kind = op.rpartition(".")
        kept = list(operands)
        while kept and kept[-1] is None:
            kept.pop()
        node = helper.make_node(
            kind, [v.name if v else "" for v in kept], [self.name() for _ in range(outputs)],
            domain=domain, **attributes,
        )  # fmt: skip
        for k in range(self.bindings):
            if defined and not defined([None if v is None else v.arrays[k] for v in operands], attributes):
                raise Rejected("not defined")
        outer = {v.name: v for v in self.visible()} if any(a.type == a.GRAPH for a in node.attribute) else {}
        given = outer | {v.name: v for v in kept if v is not None}
        results = []
        for k in range(self.bindings):
            feeds = {name: value.arrays[k] for name, value in given.items()}
            results.append(run_node(node, feeds, alone=self.alone))
        found = [Value(name, arrays) for name, arrays in zip(node.output, zip(*results, strict=True), strict=True)]
        for value in found:
            ranks = {(array.dtype, array.ndim) for array in value.arrays}
            if len(ranks) > 1 or value.dtype not in DTYPES.values() or max(a.size for a in value.arrays) > LARGEST:
                raise Rejected("a rank that follows a size, or too large")
        self.nodes.append(node)
        self.used.update(name for name in node.input)
        self.values += found
        return found


def overflows(array: Array) -> bool:
    """Whether a value of a narrow type holds what is not finite."""
    return array.dtype.itemsize <= 2 and is_float(array) and not np.isfinite(array.astype(np.float32)).all()


def run_node(node: onnx.NodeProto, feeds: Mapping[str, Array], alone: bool = True) -> list[Array]:
    """What the reference (for operators that it lacks ONNX Runtime) computes for one node; Rejected where both refuse.

    A node that is not `alone` in its graph must be undisputed: where ONNX Runtime gives something else, what comes
    after the node would be compared with a result of which nobody knows whether it is right.
    """
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    graph = helper.make_graph([node], "node", inputs, [onnx.ValueInfoProto(name=name) for name in node.output])
    model = model_of(graph)
    finite = all(not overflows(array) for array in feeds.values())
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        declared = {v.name: v.type.tensor_type for v in inferred.graph.output}
        compute = by_onnxruntime if node.domain else by_reference
        results = compute(model, {n: a.copy() for n, a in feeds.items()})
    except Exception as error:
        raise Rejected(str(error)) from error
    for name, array in results.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind in "OUS":
            raise Rejected("no tensor of numbers")
        if finite and overflows(array):
            raise Rejected("overflow of a narrow type: sums are wider than the type, so where it happens is open")
        # Where the reference contradicts the schema's own rule, what it would give to the next node is no value of it.
        type_of = declared[name]
        if type_of.elem_type and helper.tensor_dtype_to_np_dtype(type_of.elem_type) != array.dtype:
            raise Rejected("the reference gives another type than the schema")
        dims = [d.dim_value if d.HasField("dim_value") else None for d in type_of.shape.dim]
        agree = len(dims) == array.ndim and all(d in (None, n) for d, n in zip(dims, array.shape, strict=True))
        if type_of.HasField("shape") and not agree:
            raise Rejected("the reference gives another shape than the schema")
    if not alone and compute is by_reference:
        try:
            second = by_onnxruntime(model, dict(feeds))
        except Exception:
            second = results
        if compared(second, results, ""):
            raise Rejected("the reference and ONNX Runtime differ")
    return [results[name] for name in node.output]


def model_of(graph: onnx.GraphProto) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=13)


@dataclass(frozen=True)
class Case:
    """A model, what to run it with, and what the reference gave node by node."""

    model: onnx.ModelProto
    inputs: tuple[dict[str, Array], ...]
    expected: tuple[dict[str, Array], ...]

    def __repr__(self) -> str:
        sizes = [{name: (a.dtype.name, a.shape) for name, a in inputs.items()} for inputs in self.inputs]
        return f"{onnx.printer.to_text(self.model)}\nrun with {sizes}"


def case_of(builder: Builder) -> Case:
    """The model of a graph: its outputs are all values that nothing reads, and some that are read."""
    computed = {name: v for v in builder.values for name in [v.name] if any(name in n.output for n in builder.nodes)}
    outputs = [v for v in computed.values() if v.name not in builder.used or builder.chance(15)]
    if not outputs:
        raise Rejected("computes nothing")

    def info(value: Value, dims: Sequence[int | str | None] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(value.dtype), dims)

    graph = helper.make_graph(
        builder.nodes,
        "fuzz",
        [info(value, dims) for value, dims in builder.inputs],
        [info(value, [None] * value.rank) for value in outputs],
        [numpy_helper.from_array(value.arrays[0], value.name) for value in builder.constants],
    )
    feeds = tuple({v.name: v.arrays[k] for v, _ in builder.inputs} for k in range(builder.bindings))
    expected = tuple({v.name: v.arrays[k] for v in outputs} for k in range(builder.bindings))
    return Case(model_of(graph), feeds, expected)
