"""Strategies for If, Loop and Scan: bodies are graphs of their own, grown like the one around them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from fuzz.graphs import DTYPES, Attributes, Builder, Rejected, Value
from onnx import helper

Sample = tuple[list[Value | None], Attributes, int]
KINDS = (DTYPES["float"], DTYPES["float"], DTYPES["int64"], DTYPES["int32"], DTYPES["double"])
FOR_ALL = ("Add", "Sub", "Mul", "Max", "Min")
FOR_FLOATS = ("Tanh", "Sin", "Relu", "Sigmoid", "Abs", "Neg", "Softsign")


def body(b: Builder) -> Builder:
    """A graph inside of `b`, which may read its values."""
    return Builder(b.integer, b.bindings, outer=b, counter=b.counter, alone=b.alone)


def step(inner: Builder, x: Value) -> Value:
    """Some operations that keep shape and type: what is read besides broadcasts to `x`."""
    for _ in range(inner.integer(1, 3)):
        if x.dtype.kind == "f" and inner.chance(50):
            (x,) = inner.node(inner.choice(FOR_FLOATS), [x], {})
            continue
        fitting = [
            v for v in inner.visible()[-12:]
            if v.dtype == x.dtype and v.rank <= x.rank
            and all(a == b or set(b) == {1} for a, b in zip(x.shape[::-1], v.shape[::-1], strict=False))
        ]  # fmt: skip
        other = inner.choice(fitting) if fitting else x
        (x,) = inner.node(inner.choice(FOR_ALL), [x, other] if inner.chance(70) else [other, x], {})
        if x.shape != x.shape:
            raise Rejected("another shape")
    return x


def info(value: Value, name: str = "", rank: int | None = None) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    return helper.make_tensor_value_info(name or value.name, kind, [None] * (value.rank if rank is None else rank))


def graph_of(inner: Builder, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[Value]) -> onnx.GraphProto:
    """The body; what it reads from outside is read there."""
    assert inner.outer is not None
    inner.outer.used |= inner.used | {value.name for value in outputs}
    return helper.make_graph(inner.nodes, name, inputs, [info(value) for value in outputs])


def branches(b: Builder, op: str) -> Sample:
    """If: both branches end in the same type and shape."""
    condition = b.fresh(DTYPES["bool"], b.choice(((), (1,))), constant=20)
    x = b.operand(KINDS, 0, 4)
    graphs: Attributes = {}
    for name in ("then_branch", "else_branch"):
        inner = body(b)
        results = [step(inner, x), *([step(inner, x)] if b.chance(0) else [])]
        graphs[name] = graph_of(inner, name, [], results)
    return [condition], graphs, 1


def sample_of(b: Builder, value: Value, arrays: list[np.ndarray] | None = None) -> Value:
    """What a body's input is while the body grows: the first round's value."""
    found = Value(b.name(), tuple(arrays) if arrays is not None else value.arrays)
    b.values.append(found)
    return found


def loop(b: Builder, op: str) -> Sample:
    """For a number of rounds, while a condition holds, or both; one or two states; perhaps the states of all rounds."""
    states = [b.operand(KINDS, 0, 3) for _ in range(b.integer(1, 2))]
    inner = body(b)
    count, go = inner.name(), inner.name()
    inputs = [
        helper.make_tensor_value_info(count, onnx.TensorProto.INT64, []),
        helper.make_tensor_value_info(go, onnx.TensorProto.BOOL, []),
    ]
    carried = [sample_of(inner, state) for state in states]
    inputs += [info(value) for value in carried]
    results = [step(inner, value) for value in carried]
    if any(a.shape != b.shape for a, b in zip(results, carried, strict=True)):
        raise Rejected("a state whose shape changes")
    number = Value(count, tuple(np.asarray(0, np.int64) for _ in range(b.bindings)))
    if b.chance(40):
        limit = b.numbers(b.integer(0, 4))
        (more,) = inner.node("Less", [number, limit], {})
    else:
        flag = Value(go, tuple(np.asarray(True) for _ in range(b.bindings)))
        (more,) = inner.node("Identity", [flag], {})
    scanned = [inner.node("Identity", [v], {})[0] for v in results if b.chance(40)]
    graph = graph_of(inner, "body", inputs, [more, *results, *scanned])
    rounds = b.numbers(b.integer(0, 4), constant=50)
    start = b.numbers(True, np.bool_) if b.chance(70) else None
    return [rounds, start, *states], {"body": graph}, len(results) + len(scanned)


def scan(b: Builder, op: str) -> Sample:
    """A state and one or two sequences, read in either direction along axis 0."""
    x = b.operand(KINDS, 1, 3, smallest=1)
    first = [array[0] for array in x.arrays]
    inner = body(b)
    item = Value(inner.name(), tuple(first))
    state = b.fresh(x.dtype, item.shape)
    carried = sample_of(inner, state)
    inner.values.append(item)
    result = step(inner, carried)
    (result,) = inner.node("Add", [result, item], {})
    if result.shape != carried.shape:
        raise Rejected("a state whose shape changes")
    (out,) = inner.node("Identity", [result], {})
    graph = graph_of(inner, "body", [info(carried), info(item)], [result, out])
    found: Attributes = {"body": graph, "num_scan_inputs": 1}
    if b.chance(40):
        found |= {"scan_input_directions": [b.integer(0, 1)], "scan_output_directions": [b.integer(0, 1)]}
    return [state, x], found, 2


SAMPLERS: dict[str, Callable[[Builder, str], Sample]] = {"If": branches, "Loop": loop, "Scan": scan}
