"""Weights that only they are quantized of stay packed: text in, text out; numbers; and memory."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxc
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxc.compiler.driver import constants_of, graph_of, program_of
from onnxc.compiler.options import Options
from onnxc.ir.target import Target
from pass_checks import agree, check, parsed, transformed

RANDOM = np.random.default_rng(0)
INT4, UINT4 = ml_dtypes.int4, ml_dtypes.uint4


def codes(dtype: Any, *shape: int) -> np.ndarray:
    limits = (ml_dtypes.iinfo if np.dtype(dtype).name.endswith("int4") else np.iinfo)(dtype)
    return RANDOM.integers(limits.min, limits.max + 1, shape).astype(dtype)


def scales(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return (RANDOM.random(shape) * 0.1 + 0.01).astype(dtype)


def test_blocks_along_the_depth() -> None:
    """As ONNX Runtime's quantizer writes them: weights [depth, columns] in blocks of 32."""
    check(
        "weights-only",
        """
        // CHECK: %[[CODES:.*]] = constant @{{.*}} : u8[80, 64]
        // CHECK: %[[SCALES:.*]] = constant @{{.*}} : f32[80, 4]
        // CHECK: %[[ZEROS:.*]] = constant @{{.*}} : u8[80, 4]
        // CHECK: %y = onnxc.PackedMatMul(%x, %[[CODES]], %[[SCALES]], %[[ZEROS]])
        // CHECK-SAME: {depth = 128, bits = 4, block_size = 32} : f32[n, 80]
        // CHECK-NOT: DequantizeLinear
        graph @g(%x: f32[n, 128]) -> (%y: f32[n, 80]) {
          %w = constant @"w" : u4[128, 80]
          %s = constant @"s" : f32[4, 80]
          %z = constant @"z" : u4[4, 80]
          %r = DequantizeLinear(%w, %s, %z) {axis = 0, block_size = 32} : f32[128, 80]
          %y = MatMul(%x, %r) : f32[n, 80]
        }
        """,
        {"w": codes(UINT4, 128, 80), "s": scales(4, 80), "z": codes(UINT4, 4, 80)},
    )


def test_columns_through_a_transpose_and_a_gemm() -> None:
    """Signed codes without zero points have theirs in the middle: no operand."""
    check(
        "weights-only",
        """
        // CHECK: onnxc.PackedMatMul(%x, %{{[^,]*}}, %{{[^,]*}}) {depth = 128, bits = 8, block_size = 128} : f32[3, 70]
        // CHECK-NOT: DequantizeLinear
        // CHECK-NOT: Transpose
        graph @g(%x: f32[3, 128]) -> (%y: f32[3, 70]) {
          %w = constant @"w" : i8[70, 128]
          %s = constant @"s" : f32[70]
          %c = constant @"c" : f32[70]
          %r = DequantizeLinear(%w, %s) {axis = 0} : f32[70, 128]
          %t = Transpose(%r) {perm = [1, 0]} : f32[128, 70]
          %y = Gemm(%x, %t, %c) {alpha = 0.5, beta = 2.0} : f32[3, 70]
        }
        """,
        {"w": codes(np.int8, 70, 128), "s": scales(70), "c": scales(70)},
    )


SPELLINGS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Any], str]] = {
    "one scale": (np.int8, (128, 70), (), {}, ""),
    "a column each": (np.uint8, (128, 70), (70,), {"axis": 1}, ""),
    "rows turned": (INT4, (70, 128), (70, 2), {"axis": 1, "block_size": 64}, "T"),
    "uneven blocks": (UINT4, (100, 70), (4, 70), {"axis": 0, "block_size": 32}, ""),
    "blocks as an axis": (UINT4, (70, 4, 32), (70, 4, 1), {"axis": 2, "block_size": 32}, "RT"),
    "transB": (INT4, (70, 128), (70, 4), {"axis": 1, "block_size": 32}, "B"),
}


def spelt(name: str, zeros: bool, dtype: Any = np.float32) -> onnx.ModelProto:
    """x [3, depth] by weights that are dequantized in one of the ways."""
    kind, shape, blocks, attributes, chain = SPELLINGS[name]
    initializers = {"w": codes(kind, *shape), "s": scales(*blocks, dtype=dtype)}
    if zeros:
        initializers["z"] = codes(kind, *blocks) if blocks else np.array(3, kind)
    nodes = [helper.make_node("DequantizeLinear", list(initializers), ["r"], **attributes)]
    depth, columns = (128 if 128 in shape or len(shape) > 2 else shape[0]), 70
    matrix = "r"
    if "R" in chain:
        initializers["shape"] = np.array([shape[0], depth], np.int64)
        nodes.append(helper.make_node("Reshape", ["r", "shape"], [matrix := "flat"]))
    if "T" in chain:
        nodes.append(helper.make_node("Transpose", [matrix], ["turned"], perm=[1, 0]))
        matrix = "turned"
    product = helper.make_node("Gemm", ["x", matrix], ["y"], transB=1) if "B" in chain else None
    nodes.append(product or helper.make_node("MatMul", ["x", matrix], ["y"]))
    type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", type, [3, depth])],
        [helper.make_tensor_value_info("y", type, [3, columns])],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def unoptimised(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    """By ONNX Runtime as the model is written: its own packed products round the left operand to 8 bits."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, inputs)[0])


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_agree_with_onnxruntime(name: str, zeros: bool) -> None:
    model = spelt(name, zeros)
    assert [node.op for node in graph_of(model, Options()).walk() if node.op == "onnxc.PackedMatMul"]
    x = RANDOM.standard_normal((3, model.graph.input[0].type.tensor_type.shape.dim[1].dim_value)).astype(np.float32)
    expected = unoptimised(model, x=x)
    found = np.asarray(onnxc.compile(model)(x))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_zero_points_that_nobody_gave_are_known_however_many_blocks_there_are() -> None:
    """MatMulNBits without zero points: one number for more blocks than folding expands."""
    depth, columns = 2048, 1040  # 66560 blocks
    packed, steps = codes(np.uint8, columns, depth // 32, 16), scales(columns, depth // 32)
    weights = [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(steps, "s")]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, k]) for n, k in (("x", depth), ("y", columns))]
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=depth, N=columns, bits=4, block_size=32
    )
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (packed_node,) = (node for node in graph_of(model, Options()).walk() if node.op == "onnxc.PackedMatMul")
    assert len(packed_node.operands) == 3  # all zero points are the middle: there are none


def test_memory_is_that_of_the_packed_weights() -> None:
    """Also where scales are of 16 bits, so that folding would only double the weights."""
    for dtype in (np.float32, np.float16):
        for name, packed in (("one scale", 128 * 70), ("rows turned", 128 * 70 // 2)):
            target = Target.host()
            program = program_of(graph_of(spelt(name, False, dtype), Options()), target)
            size = sum(array.nbytes for array in constants_of(program)[1].values())
            assert size <= 80 / 70 * packed + 2 * 80 * 4 + 64  # columns fill vectors
            arena = sum(m.size for m in program.memories.values() if m.role == "arena" and isinstance(m.size, int))
            assert arena <= 3 * 4 * (128 + 128 // 16)


@pytest.mark.parametrize("level", [0, 4])
def test_queries_keys_and_values_round_their_rows_once(level: int) -> None:
    """Products of one input are one, whose result is read where its parts lie."""
    weights, nodes = [], []
    for name, columns in (("q", 64), ("k", 32), ("v", 32)):
        weights += [
            numpy_helper.from_array(RANDOM.integers(0, 256, (columns, 2, 16)).astype(np.uint8), f"{name}w"),
            numpy_helper.from_array(scales(columns, 2), f"{name}s"),
        ]
        nodes.append(
            helper.make_node(
                "MatMulNBits", ["x", f"{name}w", f"{name}s"], [name], domain="com.microsoft", K=64, N=columns, bits=4,
                block_size=32, accuracy_level=level,
            )
        )  # fmt: skip
    nodes += [helper.make_node("Concat", ["k", "v"], ["kv"], axis=1), helper.make_node("Tanh", ["q"], ["a"])]
    nodes.append(helper.make_node("Mul", ["a", "kv"], ["y"]))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    program = program_of(graph_of(model, Options()), Target.host())
    assert sum("_gemm" in kernel.name for kernel in program.kernels.values()) == 1
    for rows in (1, 20):
        x = RANDOM.standard_normal((rows, 64)).astype(np.float32)
        expected = unoptimised(model, x=x)
        found = np.asarray(onnxc.compile(model)(x))
        np.testing.assert_allclose(found, expected, rtol=0, atol=(2e-2 if level else 1e-5) * np.abs(expected).max())


def test_what_does_not_fit_is_left_with_a_remark() -> None:
    for shape, blocks, axis, block, why in (
        ((128, 70), (128,), 0, 0, "blocks of 1 codes of 4 bits end within a word"),
        ((100, 70), (5, 70), 0, 20, "blocks of 20 codes of 4 bits end within a word"),
        ((128, 70), (128, 2), 1, 35, "neighbouring columns share a scale that differs along them"),
    ):
        text = f"""
        graph @g(%x: f32[3, {shape[0]}]) -> (%y: f32[3, 70]) {{
          %w = constant @"w" : i4[{shape[0]}, 70]
          %s = constant @"s" : f32[{", ".join(map(str, blocks))}]
          %r = DequantizeLinear(%w, %s) {{axis = {axis}, block_size = {block}}} : f32[{shape[0]}, 70]
          %y = MatMul(%x, %r) : f32[3, 70]
        }}
        """
        after = transformed("weights-only", parsed(text, {"w": codes(INT4, *shape), "s": scales(*blocks)}))
        assert [node.remark for node in after.nodes if node.op == "MatMul"] == [f"weights in f32: {why}"]


def test_rows_of_a_table_are_gathered_before_they_are_dequantized() -> None:
    check(
        "weights-only",
        """
        // CHECK: constant @"w.table" : u8[90, 32]
        // CHECK: %[[BYTES:.*]] = Gather(%w.table, %i) {axis = 0} : u8[2, n, 32]
        // CHECK: %[[CODES:.*]] = onnxc.UnpackBits(%[[BYTES]]) {bits = 4, count = [64]} : u8[2, n, 64]
        // CHECK: %[[SCALES:.*]] = Gather(%s.table, %i) {axis = 0} : f32[2, n, 2]
        // CHECK: %y = DequantizeLinear(%[[CODES]], %[[SCALES]], %{{.*}}) {axis = 2, block_size = 32} : f32[2, n, 64]
        graph @g(%i: i64[2, n]) -> (%y: f32[2, n, 64]) {
          %w = constant @"w" : i4[90, 64]
          %s = constant @"s" : f32[90, 2]
          %r = DequantizeLinear(%w, %s) {axis = 1, block_size = 32} : f32[90, 64]
          %y = Gather(%r, %i) {axis = 0} : f32[2, n, 64]
        }
        """,
        {"w": codes(INT4, 90, 64), "s": scales(90, 2)},
    )
    for kind, shape, axis in ((np.uint8, (90,), 0), (np.int8, (), 1), (np.int8, (64,), 1)):
        text = f"""
        graph @g(%i: i64[2, 3]) -> (%y: f32[2, 3, 64]) {{
          %w = constant @"w" : {"u8" if kind is np.uint8 else "i8"}[90, 64]
          %s = constant @"s" : f32{list(shape)}
          %r = DequantizeLinear(%w, %s) {{axis = {axis}}} : f32[90, 64]
          %y = Gather(%r, %i) {{axis = 0}} : f32[2, 3, 64]
        }}
        """
        before = parsed(text, {"w": codes(kind, 90, 64), "s": scales(*shape)})
        after = transformed("weights-only", before)
        assert [node.op for node in after.nodes if node.op != "Constant"][-1] == "DequantizeLinear"
        agree(before, after)


def test_a_packed_embedding_is_not_expanded() -> None:
    """GatherBlockQuantized reads the rows that are asked for: the table stays as the model has it."""
    table, blocks = codes(UINT4, 5000, 64), scales(5000, 2)
    node = helper.make_node("GatherBlockQuantized", ["w", "i", "s"], ["y"], domain="com.microsoft", block_size=32)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, [7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [7, 64])],
        [numpy_helper.from_array(table, "w"), numpy_helper.from_array(blocks, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    program = program_of(graph_of(model, Options()), Target.host())
    sizes = dict.fromkeys(("arena", "constant"), 0)
    for memory in program.memories.values():
        if memory.role in sizes and isinstance(memory.bytes, int):
            sizes[memory.role] += memory.bytes
    assert sizes["constant"] <= table.size // 2 + blocks.nbytes + blocks.size and sizes["arena"] <= 1 << 14
    rows = RANDOM.integers(0, 5000, 7)
    expected = (table[rows].astype(np.float32) - 8) * np.repeat(blocks[rows], 32, 1)
    found = np.asarray(onnxc.compile(model)(rows))
    if np.abs(found - expected).max() > 1e-5:  # without zero points u4 has them at 0 in one version, at 8 in others
        expected = unoptimised(model, i=rows)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
