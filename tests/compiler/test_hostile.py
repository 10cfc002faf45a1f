"""Models that are made to do harm: allocations, compile times and recursion that a few bytes ask for are refused."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxc.compiler.importer import import_model
from onnxc.compiler.limits import LARGEST_EXTENT, MOST_OPERANDS, format_bytes, memory_of_machine, parse_bytes
from onnxc.ir.errors import LimitError, ModelError, OnnxcError, ShapeError
from small_models import model_of_text, small_cnn

MOST = 64 << 20
node = helper.make_node


def compiled(model: onnx.ModelProto | bytes) -> Any:
    return onnxc.compile(model, threads=1, max_memory=MOST)


def of(text: str, inputs: str = "float[2, 3, 8, 8] x", outputs: str = "y", **weights: Any) -> onnx.ModelProto:
    """A model of nodes over an image."""
    ports = ", ".join(f"float[] {name}" for name in outputs.split())
    model = model_of_text(f"g ({inputs}) => ({ports}) {{ {text} }}", **{k: np.array(v) for k, v in weights.items()})
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    model.opset_import[0].version = 21
    return model


KERNEL = np.ones((4, 3, 3, 3), np.float32)
LIMITS = {
    "a pooling window of 10^18": of(
        "y = MaxPool <kernel_shape = [1000000000, 1000000000], pads = [999999999, 999999999, 999999999, 999999999]> (x)"
    ),
    "a window that is padding": of(
        "y = AveragePool <kernel_shape = [2147483647, 1], pads = [2147483646, 0, 0, 0]> (x)"
    ),
    "pads of 2^62": of("y = Pad (x, p)", p=[0, 0, 2**62, 2**62, 0, 0, 2**62, 2**62]),
    "pads of terabytes": of("y = Pad (x, p)", p=[0, 0, 2**20, 2**20, 0, 0, 0, 0]),
    "pads of a convolution": of("y = Conv <pads = [4611686018427387904, 0, 0, 0]> (x, w)", w=KERNEL),
    "an output of terabytes": of("y = ConstantOfShape (s)", "", s=[10**6, 10**6]),
    "sizes whose product is 2^64": of("y = ConstantOfShape (s)", "", s=[2**32, 2**32]),
    "an expanded input": of("y = Expand (x, s)", s=[2**20, 2, 3, 8, 8]),
    "a tiled input": of("y = Tile (x, s)", s=[2**40, 1, 1, 2**40]),
    "a range": of("y = Range (a, b, c)", "", a=0, b=2**62, c=1),
    "a resized image": of("y = Resize (x, , s)", s=np.array([1, 1, 1e9, 1e9], np.float32)),
    "a depth of 2^50": of("y = OneHot (i, d, v)", "int64[4] i", d=2**50, v=np.zeros(2, np.float32)),
    "an intermediate value": of("t = MatMul (a, b) y = Softmax (t)", "float[65536, 4] a, float[4, 65536] b"),
    "weights made by a node": of("w = ConstantOfShape (s) y = Conv (x, w)", s=[2**24, 3, 3, 3]),
    "weights in the file": of("y = MatMul (x, w)", "float[1, 4096] x", w=np.ones((4096, 4097), np.float32)),
    "10,000 axes": of("y = Relu (x)", f"float[{', '.join(['1'] * 10_000)}] x"),
    "a million axes to add": of("y = Unsqueeze (x, a)", a=np.arange(10**6)),
    "random numbers": of("y = RandomNormal <shape = [1073741824, 1024]> ()", ""),
    "a window function": of("y = HannWindow (n)", "", n=2**50),
    "a sparse tensor": None,
}  # fmt: skip


def sparse(dims: list[int]) -> onnx.ModelProto:
    values = numpy_helper.from_array(np.array([1], np.float32), "s")
    model = of("y = ReduceSum (s)", "")
    indices = numpy_helper.from_array(np.array([0]), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, dims))
    return model


LIMITS["a sparse tensor"] = sparse([2**20, 2**14])


@pytest.mark.parametrize("model", LIMITS.values(), ids=LIMITS)
def test_allocations_are_refused_before_they_are_made(model: onnx.ModelProto) -> None:
    with pytest.raises(LimitError):
        compiled(model)


def test_what_is_large_only_on_its_way_is_no_allocation() -> None:
    total = compiled(of("t = Expand (x, s) y = ReduceSum <keepdims = 0> (t)", "float[1] x", s=[2**27]))
    assert total.run({"x": np.zeros(1, np.float32)})["y"] == 0


def test_sizes_that_inputs_tell_are_measured_before_a_run_allocates() -> None:
    outer = compiled(of("y = MatMul (a, b)", "float[n, 1] a, float[1, m] b"))
    assert outer(np.ones((3, 1), np.float32), np.ones((1, 5), np.float32)).shape == (3, 5)
    with pytest.raises(LimitError, match="output 'y' takes 256 MB; the limit is 64 MB"):
        outer(np.ones((8192, 1), np.float32), np.ones((1, 8192), np.float32))
    nodes = "t = MatMul (a, b) u = Softmax <axis = 0> (t) y = MatMul (u, a)"
    soft = compiled(of(nodes, "float[n, 1] a, float[1, n] b"))
    with pytest.raises(LimitError, match="intermediate value"):
        soft(np.ones((8192, 1), np.float32), np.ones((1, 8192), np.float32))


def test_sizes_that_data_tell_are_measured_before_a_run_allocates() -> None:
    made = compiled(of("y = ConstantOfShape (s)", "int64[2] s"))
    assert made(np.array([2, 3])).shape == (2, 3)
    for sizes in ([2**20, 2**20], [2**32, 2**32], [2**62, 4], [0, 2**62]):
        with pytest.raises((LimitError, ShapeError)):
            made(np.array(sizes))


def test_limits_hold_for_artifacts_and_for_models_from_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "cnn.onnx"
    onnx.save(small_cnn(), path)
    image = np.zeros((1, 3, 8, 8), np.float32)
    whole = onnxc.compile(path, max_memory="1G")
    whole.save(tmp_path / "cnn.onnxc")
    assert onnxc.compile(path)(image).shape == onnxc.load(tmp_path / "cnn.onnxc", max_memory="100M")(image).shape
    with pytest.raises(LimitError, match="constants"):
        onnxc.compile(path, max_memory=100)
    with pytest.raises(LimitError, match="constants"):
        onnxc.load(tmp_path / "cnn.onnxc", max_memory=100)
    with pytest.raises(LimitError, match="intermediate"):
        onnxc.load(tmp_path / "cnn.onnxc", max_memory="100K")(np.zeros((8, 3, 64, 64), np.float32))


@pytest.mark.usefixtures("gpu")
def test_limits_hold_on_gpus() -> None:
    outer = of("y = MatMul (a, b)", "float[n, 1] a, float[1, m] b")
    executable = onnxc.compile(outer, target="cuda", max_memory=1 << 10)
    assert executable(np.ones((2, 1), np.float32), np.ones((1, 3), np.float32)).shape == (2, 3)
    with pytest.raises(LimitError, match="output 'y' takes 4 KB; the limit is 1 KB"):
        executable(np.ones((32, 1), np.float32), np.ones((1, 32), np.float32))
    made = onnxc.compile(of("y = ConstantOfShape (s)", "int64[2] s"), target="cuda", max_memory=1 << 10)
    with pytest.raises(LimitError, match="output 'y' takes 4 TB"):
        made(np.array([2**20, 2**20]))
    with pytest.raises(LimitError, match="constants"):
        onnxc.compile(small_cnn(), target="cuda", max_memory=100)


@pytest.mark.parametrize(("text", "size"), [("1000", 1000), ("2G", 2 << 30), ("1.5 MiB", 3 << 19), ("7kb", 7 << 10)])
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size
    assert parse_bytes(size) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "1e9", "9" * 5000])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(OnnxcError, match="write 500M or 2G"):
        parse_bytes(text)


def test_the_machines_memory_is_told() -> None:
    assert 1 << 28 < memory_of_machine() < 1 << 50
    assert format_bytes(3 << 29) == "1.5 GB"


# Compile time.


def doubled(times: int) -> onnx.ModelProto:
    nodes = " ".join(f"t{i + 1} = Concat <axis = 0> (t{i}, t{i})" for i in range(times))
    return of(f"{nodes} y = ReduceSum <keepdims = 0> (t{times})", "", t0=np.ones(20_000, np.float32))


def test_constants_that_double_are_not_folded_for_ever() -> None:
    graph = import_model(doubled(24))
    assert graph.outputs[0].shape == ()
    with pytest.raises(LimitError):
        compiled(doubled(34))


def functions_that_double(depth: int) -> onnx.ModelProto:
    """The billion laughs: each function calls the next one twice."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    functions = [
        helper.make_function(
            "local", f"f{i}", ["x"], ["y"],
            [*(node(f"f{i + 1}", ["x"], [name], domain="local") for name in "ab"), node("Add", ["a", "b"], ["y"])],
            opsets,
        )
        for i in range(depth)
    ]  # fmt: skip
    functions.append(helper.make_function("local", f"f{depth}", ["x"], ["y"], [node("Relu", ["x"], ["y"])], opsets))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node("f0", ["x"], ["y"], domain="local")], "g", [value("x", 1, [2])], [value("y", 1, [2])]
    )
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def test_functions_expand_to_so_many_nodes_at_most() -> None:
    assert len(import_model(functions_that_double(6)).nodes) == 127
    with pytest.raises(LimitError, match="expand to too many nodes"):
        import_model(functions_that_double(30))


def loops_in_loops(depth: int) -> onnx.ModelProto:
    """Each body is read twice, as its state grows: 2^depth times the innermost."""
    value = helper.make_tensor_value_info

    def body(level: int) -> onnx.GraphProto:
        state, result = f"s{level}", f"o{level}"
        inputs = [value(f"i{level}", 7, []), value(f"c{level}", 9, []), value(state, 1, None)]
        inner = node("Loop", ["m", "", state], [result], body=body(level - 1)) if level else None
        nodes = [
            node("Identity", [f"c{level}"], [f"d{level}"]),
            inner or node("Concat", [state, state], [result], axis=0),
        ]
        return helper.make_graph(nodes, f"b{level}", inputs, [value(f"d{level}", 9, []), value(result, 1, None)])

    trips = numpy_helper.from_array(np.array(1), "m")
    graph = helper.make_graph(
        [node("Loop", ["m", "", "x"], ["y"], body=body(depth))],
        "g",
        [value("x", 1, [4])],
        [value("y", 1, None)],
        [trips],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_loops_in_loops_do_not_double_their_bodies_for_ever() -> None:
    with pytest.raises(OnnxcError):
        import_model(loops_in_loops(25))


def sizes_squared(times: int, step: str) -> onnx.ModelProto:
    nodes = " ".join(step.format(old=f"t{i}", new=f"t{i + 1}", i=i) for i in range(times))
    text = f"t0 = Shape <end = 1> (x) {nodes} y = ConstantOfShape (t{times})"
    return of(text, "float[a, b] x", one=[1], three=[3])


@pytest.mark.parametrize("step", [
    "{new} = Mul ({old}, {old})",
    "{new} = Add ({old}, {old})",
    "q{i} = Mul ({old}, {old}) r{i} = Add (q{i}, one) {new} = Div (r{i}, three)",
])  # fmt: skip
def test_arithmetic_of_sizes_does_not_explode(step: str) -> None:
    with suppress(OnnxcError):
        compiled(sizes_squared(70, step))(np.ones((2, 1), np.float32))
    found = compiled(sizes_squared(2, step))(np.ones((2, 1), np.float32))
    assert found.size in (16, 8, 0)


def test_numbers_that_are_squared_wrap_round_as_their_type_does() -> None:
    nodes = " ".join(f"t{i + 1} = Mul (t{i}, t{i})" for i in range(80))
    model = model_of_text(f"g () => (int64[1] y) {{ {nodes} y = Identity (t80) }}", t0=np.array([3]))
    expected = 3
    for _ in range(80):
        expected = expected * expected % 2**64
    assert int(compiled(model)()[0]) % 2**64 == expected


def test_a_node_has_so_many_outputs_at_most() -> None:
    count = MOST_OPERANDS + 1
    split = node("Split", ["x"], [f"y{i}" for i in range(count)], num_outputs=count)
    model = of("y = Relu (x)", f"float[{count}] x", "y")
    model.graph.node.insert(0, split)
    with pytest.raises(LimitError, match=f"at most {MOST_OPERANDS}"):
        compiled(model)


# Recursion.


def wire(number: int, payload: bytes) -> bytes:
    """A delimited field of protobuf."""
    result, length = [number << 3 | 2], len(payload)
    while length > 127:
        result.append(length & 127 | 128)
        length >>= 7
    return bytes([*result, length]) + payload


def branches_in_branches(depth: int) -> bytes:
    output = helper.make_tensor_value_info("y", 1, [1]).SerializeToString()
    other = wire(1, node("Neg", ["x"], ["y"]).SerializeToString()) + wire(2, b"e") + wire(12, output)
    inner = other
    for _ in range(depth):
        branches = [wire(5, wire(1, name) + b"\xa0\x01\x05" + wire(6, graph)) for name, graph in
                    ((b"then_branch", inner), (b"else_branch", other))]  # fmt: skip
        inner = (
            wire(1, wire(1, b"c") + wire(2, b"y") + wire(4, b"If") + b"".join(branches))
            + wire(2, b"g")
            + wire(12, output)
        )
    ports = [helper.make_tensor_value_info(*port).SerializeToString() for port in (("x", 1, [1]), ("c", 9, []))]
    return b"\x08\x0a" + wire(8, b"\x10\x15") + wire(7, inner + b"".join(wire(11, port) for port in ports))


def test_branches_in_branches() -> None:
    assert compiled(branches_in_branches(10)).run({"x": np.ones(1, np.float32), "c": np.array(True)})["y"] == -1
    for depth in (80, 2000):
        with pytest.raises(OnnxcError):
            compiled(branches_in_branches(depth))


def test_deep_expressions() -> None:
    nodes = " ".join(f"t{i + 1} = {('Sigmoid', 'Neg')[i % 2]} (t{i})" for i in range(3000))
    model = of(f"t0 = Relu (x) {nodes} y = Relu (t3000)", "float[2] x")
    with suppress(OnnxcError):
        assert np.isfinite(compiled(model)(np.ones(2, np.float32))).all()


# What protobuf lets pass.


@pytest.mark.parametrize("content", [
    b"", b"\0", b"\x08\x0a", b"PK\x03\x04", b'{"irVersion": "10"}', b"ir_version: 10 graph { }", b"\xff" * 100,
    b"<ir_version: 10> g (float x) => (float y) { y = Relu (x) }", b"\x89onnxc\r\n" + bytes(200), b"#!/bin/sh\n",
    b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", wire(7, b"") * 3,
    wire(7, wire(7, wire(7, b"\x0b" * 5000))),
])  # fmt: skip
def test_what_is_no_model(content: bytes) -> None:
    with pytest.raises(ModelError):
        compiled(content)


def test_names_that_are_no_text() -> None:
    content = of("y = Relu (x)").SerializeToString()
    for old in (b"g", b"x", b"y", b"Relu"):
        damaged = content.replace(wire(2, old), wire(2, b"\xff" * len(old))).replace(
            wire(1, old), wire(1, b"\xfe" * len(old))
        )
        with suppress(OnnxcError):
            compiled(damaged)


def test_a_name_of_ten_megabytes() -> None:
    model = of("t = Relu (x) y = Neg (t)")
    name = "n" * 10_000_000
    for item in model.graph.node:
        item.name = item.name or name
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = name
    try:
        compiled(model)(np.ones((2, 3, 8, 8), np.float32))
    except OnnxcError as error:
        assert len(str(error)) < 100_000


@pytest.mark.parametrize(
    "place", ["raw_data:" + "9" * 5000 + ":16", "raw_data:\u0663:16", "raw_data:99999999999:16", ":::", "x"]
)
def test_places_in_the_file_cannot_be_forged(place: str) -> None:
    model = of("y = Relu (w)", "")
    tensor = TensorProto(name="w", data_type=1, dims=[4])
    tensor.external_data.add(key="onnxc.in_file", value=place)
    model.graph.initializer.append(tensor)
    with pytest.raises(ModelError):
        compiled(model.SerializeToString())


def test_sizes_that_overflow_beside_an_empty_axis() -> None:
    model = of("y = ReduceSum <keepdims = 0> (w)", "")
    model.graph.initializer.append(TensorProto(name="w", data_type=1, dims=[0, 2**62, 2**62], raw_data=b""))
    with pytest.raises(OnnxcError):
        compiled(model)


def test_an_attribute_says_what_onnx_knows() -> None:
    with pytest.raises(ModelError, match="'summ', not one of none, mean, sum"):
        compiled(of('y = SoftmaxCrossEntropyLoss <reduction = "summ"> (x, l)', "float[3, 5] x, int64[3] l"))
    with pytest.raises(ModelError, match='"keepdims" is 7, which must be 0 or 1'):
        compiled(of("y = ReduceSum <keepdims = 7> (x)"))


# Operands whose shapes would be read beyond their ends.


@pytest.mark.parametrize(("text", "inputs"), [
    ("y = ReverseSequence <batch_axis = 0, time_axis = 1> (x, l)", "float[4, 5] x, int64[3] l"),
    ("y = ReverseSequence <batch_axis = 0, time_axis = 1> (x, l)", "float[4, 5] x, int64 l"),
    ("y = QuantizeLinear <axis = 0> (x, s, z)", "float[4, 5] x, float[3] s, uint8[3] z"),
    ("y = QuantizeLinear <axis = 0> (x, s, z)", "float[4, 5] x, float[4] s, uint8[3] z"),
    ("y = DequantizeLinear <axis = 1, block_size = 2> (x, s)", "uint8[4, 6] x, float[4, 2] s"),
    ("y = RoiAlign (x, r, b)", "float[1, 1, 8, 8] x, float[2, 3] r, int64[2] b"),
    ("y = RoiAlign (x, r, b)", "float[1, 1, 8, 8] x, float[2, 4] r, int64[1] b"),
    ("y = GridSample (x, g)", "float[1, 1, 8, 8] x, float[1, 2, 2, 3] g"),
    ("y = AffineGrid (x, s)", "float[1, 2, 2] x, int64[4] s"),
    ("y = DeformConv (x, w, o)", "float[1, 1, 4, 4] x, float[1, 1, 2, 2] w, float[1, 8, 2, 3] o"),
    ("y = LSTM (x, w, r)", "float[2, 3, 4] x, float[1, 16, 4] w, float[1, 12, 4] r"),
    ("y = GRU (x, w, r, b)", "float[2, 3, 4] x, float[1, 12, 4] w, float[1, 12, 4] r, float[1, 12] b"),
    ("y = RNN (x, w, r, , l)", "float[2, 3, 4] x, float[1, 4, 4] w, float[1, 4, 4] r, int32[2] l"),
    ("y = LSTM (x, w, r, , , h, c, p)",
     "float[2, 3, 4] x, float[1, 16, 4] w, float[1, 16, 4] r, float[1, 3, 4] h, float[1, 3, 4] c, float[1, 8] p"),
    ("y = MaxPool <kernel_shape = [2, 2], pads = [1]> (x)", "float[1, 1, 8, 8] x"),
    ("y = Conv <strides = [0, 1]> (x, w)", "float[1, 1, 8, 8] x, float[1, 1, 2, 2] w"),
])  # fmt: skip
def test_operands_of_wrong_shapes_are_refused(text: str, inputs: str) -> None:
    model = of(text, inputs)
    if "s)" in text and "AffineGrid" in text:
        model = of(text, "float[1, 2, 2] x", s=[1, 1, 4, 4])
    with pytest.raises(ShapeError):
        compiled(model)


def test_a_state_that_grows_is_run_by_python() -> None:
    text = """y, z = Scan <num_scan_inputs = 1, body = b (float[2] s, float[2] v) => (float[2] t, float[2] u) {
        t = Add (s, v) u = Identity (t) }> (x, xs)"""
    last, _ = compiled(of(text, "float[1] x, float[3, 2] xs", "y z"))(
        np.ones(1, np.float32), np.ones((3, 2), np.float32)
    )
    np.testing.assert_array_equal(last, [4, 4])


def test_the_limits_leave_room_for_real_models() -> None:
    assert LARGEST_EXTENT * 4 > 1 << 49
    assert compiled(small_cnn())(np.zeros((2, 3, 9, 9), np.float32)).shape == (2, 5)
