"""Attention over a cache of keys and values in 8 bits: read as it lies, appended to in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxc
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options
from onnxc.ir.program import Program
from onnxc.ir.target import Target

RANDOM = np.random.default_rng(0)
HEADS, GROUPS, WIDTH = 4, 2, 16
I8, U8 = np.dtype(np.int8), np.dtype(np.uint8)


def real(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def integers(dtype: Any, *shape: int) -> np.ndarray:
    limits = np.iinfo(dtype)
    return RANDOM.integers(limits.min, limits.max + 1, shape).astype(dtype)


def info(name: str, dtype: Any, shape: list[Any] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def opened(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def program(model: onnx.ModelProto) -> Program:
    return program_of(graph_of(model, Options()), Target.host())


def assert_reads_bytes(made: Program, kind: str) -> None:
    """One kernel for the attention, which reads keys and values in 8 bits."""
    (kernel,) = (kernel for kernel in made.kernels.values() if "attention" in kernel.name)
    assert [str(parameter.dtype) for parameter in kernel.parameters].count(kind) == 2


def step(dtype: Any, zero: int, by_channel: bool = False, rows: int | str = 1) -> onnx.ModelProto:
    """Keys and values are quantized, appended to the cache, dequantized and attended to by groups of heads."""
    scale = (RANDOM.random(WIDTH) * 0.02 + 0.01 if by_channel else np.array(0.02)).astype(np.float32)
    constants = {"scale": scale, "zero": np.full(scale.shape, zero, dtype), "factor": np.float32(WIDTH**-0.5)}
    constants |= {"axis": np.array([2]), "each": np.array([1, 1, HEADS // GROUPS, 1, 1])}
    constants |= {"heads": np.array([1, HEADS, -1, WIDTH])}
    nodes = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))

    for name in "kv":
        add("QuantizeLinear", [name, "scale", "zero"], f"{name}_new", axis=3)
        add("Concat", [f"{name}_past", f"{name}_new"], f"{name}_all", axis=2)
        add("DequantizeLinear", [f"{name}_all", "scale", "zero"], f"{name}_real", axis=3)
        add("Unsqueeze", [f"{name}_real", "axis"], f"{name}_group")
        add("Expand", [f"{name}_group", "each"], f"{name}_each")
        add("Reshape", [f"{name}_each", "heads"], f"{name}_heads")
    add("Transpose", ["k_heads"], "k_turned", perm=[0, 1, 3, 2])
    add("MatMul", ["q", "k_turned"], "products")
    add("Mul", ["products", "factor"], "scores")
    add("Softmax", ["scores"], "weights", axis=-1)
    add("MatMul", ["weights", "v_heads"], "y")
    inputs = [info("q", np.float32, [1, HEADS, rows, WIDTH])]
    inputs += [info(name, np.float32, [1, GROUPS, rows, WIDTH]) for name in "kv"]
    inputs += [info(f"{name}_past", dtype, [1, GROUPS, "past", WIDTH]) for name in "kv"]
    outputs = [info("y", np.float32, None), *(info(f"{name}_all", dtype, None) for name in "kv")]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "step", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def feeds(dtype: Any, rows: int, past: int) -> dict[str, np.ndarray]:
    found = {"q": real(1, HEADS, rows, WIDTH)} | {name: real(1, GROUPS, rows, WIDTH) for name in "kv"}
    return found | {f"{name}_past": integers(dtype, 1, GROUPS, past, WIDTH) for name in "kv"}


@pytest.mark.parametrize(("dtype", "zero", "by_channel"), [(I8, 0, False), (U8, 128, False), (I8, 0, True)])
def test_dequantized_caches_agree_with_onnxruntime(dtype: Any, zero: int, by_channel: bool) -> None:
    model = step(dtype, zero, by_channel, "rows")
    assert_reads_bytes(program(model), "i8" if dtype == I8 else "u8")
    compiled, other = onnxc.compile(model), opened(model)
    for rows, past in ((1, 700), (1, 3), (40, 90)):
        given = feeds(dtype, rows, past)
        found, expected = compiled.run(given), other.run(None, given)
        np.testing.assert_allclose(found["y"], expected[0], rtol=0, atol=1e-5)
        for name, array in zip(("k_all", "v_all"), expected[1:], strict=True):
            np.testing.assert_array_equal(found[name], array)


def test_nothing_of_the_size_of_the_cache_is_written_where_it_is_donated() -> None:
    model = step(I8, 0)
    compiled = onnxc.compile(model, donate=True)
    given = feeds(I8, 1, 5)
    expected = opened(model).run(None, given)
    for name in ("k_past", "v_past"):
        roomy = np.full((1, GROUPS, 9, WIDTH), 77, np.int8)
        roomy[:, :, :5] = given[name]
        given[name] = roomy
    found = compiled.run({**given, "past": 5})
    np.testing.assert_allclose(found["y"], expected[0], rtol=0, atol=1e-5)
    for name, array in zip("kv", expected[1:], strict=True):
        assert found[f"{name}_all"] is given[f"{name}_past"]
        np.testing.assert_array_equal(given[f"{name}_past"][:, :, :6], array)
        assert (given[f"{name}_past"][:, :, 6:] == 77).all()
    large = program_of(graph_of(model, Options(donate=("k_past", "v_past"))), Target.host())
    assert_reads_bytes(large, "i8")
    arena = [memory.size for memory in large.memories.values() if memory.role == "arena"]
    assert all(isinstance(size, int) and size <= HEADS * WIDTH for size in arena)


@pytest.mark.parametrize("kind", ["PER_TENSOR", "PER_CHANNEL"])
@pytest.mark.parametrize("rows", [1, 3])
def test_group_query_attention_agrees_with_onnxruntime(kind: str, rows: int) -> None:
    """The attributes of ONNX Runtime's operator: new keys are rounded as it rounds them."""
    batch, past = (2 if rows == 1 else 1), 9
    names = ["q", "k", "v", "k_past", "v_past", "lengths", "total", *[""] * 5, "k_scale", "v_scale"]
    node = helper.make_node(
        "GroupQueryAttention", names, ["y", "k_all", "v_all"], domain="com.microsoft", num_heads=HEADS,
        kv_num_heads=GROUPS, k_quant_type=kind, v_quant_type=kind, kv_cache_bit_width=8,
    )  # fmt: skip
    scale = [1] if kind == "PER_TENSOR" else [GROUPS * WIDTH]
    shapes = {"q": [batch, rows, HEADS * WIDTH]} | {name: [batch, rows, GROUPS * WIDTH] for name in "kv"}
    given = {name: real(*shape) for name, shape in shapes.items()}
    given |= {name: integers(np.int8, batch, GROUPS, 20, WIDTH) for name in ("k_past", "v_past")}
    given |= {"lengths": np.full(batch, past + rows - 1, np.int32), "total": np.array([past + rows], np.int32)}
    given |= {name: (RANDOM.random(scale) * 0.02 + 0.01).astype(np.float32) for name in ("k_scale", "v_scale")}
    inputs = [info(name, array.dtype, list(array.shape)) for name, array in given.items()]
    outputs = [info("y", np.float32, None), *(info(f"{name}_all", np.int8, None) for name in "kv")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    assert_reads_bytes(program(model), "i8")
    found, expected = onnxc.compile(model).run(given), opened(model).run(None, given)
    np.testing.assert_allclose(found["y"], expected[0], rtol=0, atol=1e-5)
    for name, array in zip(("k_all", "v_all"), expected[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(found[name])[:, :, : past + rows], array[:, :, : past + rows])
