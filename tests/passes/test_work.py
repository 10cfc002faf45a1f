"""Operations and bytes of kernels."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options, target_of
from onnxc.ir import loops as k
from onnxc.ir import scalars as s
from onnxc.ir.dims import dim_min, evaluate, symbol
from onnxc.ir.dtypes import F32, I32, U32
from onnxc.ir.program import Run, walk
from onnxc.ir.scalars import Buffer
from onnxc.passes.work import load_of

N = symbol("n")


def kernel(*body: k.Statement) -> k.Kernel:
    return k.Kernel("k", (Buffer("x", F32, N), Buffer("y", F32, N)), ("y",), ("n",), body)


def loads(op: str, shapes: list[list[int]], **attributes: object) -> list[tuple[float, float]]:
    """(operations, bytes) of each call of a model of one operator, its inputs of f32."""
    inputs = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape) for i, shape in enumerate(shapes)]
    node = helper.make_node(op, [value.name for value in inputs], ["y"], **attributes)
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    options = Options()
    program = program_of(graph_of(model, options), target_of(options))
    runs = [step for segment in program.segments for step in walk(segment) if isinstance(step, Run)]
    found = [load_of(program.kernels[run.kernel], [evaluate(size, {}) for size in run.sizes]) for run in runs]
    return [(load.flops, load.bytes) for load in found]


def test_loops_multiply() -> None:
    x, y = Buffer("x", F32, N), Buffer("y", F32, N)
    i = symbol("i", 0, N - 1)
    value = s.fma(s.load(x, i), s.load(x, i), s.const(1.0, F32)) + 2.0
    load = load_of(kernel(k.For("i", N, (k.Store(y, i, value),), "vector")), [1000])
    assert (load.flops, load.bytes) == (3000, 8000)


def test_extents_that_hang_on_an_index() -> None:
    x, y = Buffer("x", F32, N), Buffer("y", F32, N)
    i, j = symbol("i", 0), symbol("j", 0)
    inner = k.For("j", i, (k.Store(y, j, s.load(x, j) * 2.0),))
    assert load_of(kernel(k.For("i", N, (inner,))), [100]).flops == sum(range(100))
    part = k.For("j", symbol("length", 0), (k.Store(y, i * 8 + j, s.load(x, i * 8 + j) * 2.0),))
    tiles = k.For("i", (N + 7) // 8, (k.Let("length", dim_min(8, N - i * 8)), part))
    assert load_of(kernel(tiles), [1001]).flops == 1001


def test_no_buffer_moves_more_than_once() -> None:
    x, y = Buffer("x", F32, N), Buffer("y", F32, N)
    i = symbol("i", 0, N - 1)
    again = k.For("r", 50, (k.For("i", N, (k.Store(y, i, s.load(x, i) * 2.0),)),))
    assert load_of(kernel(again), [1000]).bytes == 8000


def test_matrix_product() -> None:
    found = loads("MatMul", [[96, 128], [128, 80]])
    flops = 2 * 96 * 128 * 80
    assert flops <= sum(flops for flops, _ in found) <= 1.25 * flops  # columns are filled up to whole vectors
    assert max(moved for _, moved in found) >= 4 * (96 * 128 + 128 * 80 + 96 * 80)


def test_convolution() -> None:
    found = loads("Conv", [[1, 16, 20, 20], [32, 16, 3, 3]], pads=[1, 1, 1, 1])
    flops = 2 * 32 * 16 * 9 * 400
    assert flops <= sum(flops for flops, _ in found) <= 1.25 * flops


@pytest.mark.parametrize(("name", "group"), [("dot2_bf16_bf16", 2), ("dot4_u8_i8", 4)])
def test_dot_products_are_counted_apart(name: str, group: int) -> None:
    dtype = F32 if "bf16" in name else I32
    sums, groups = s.const(0, dtype, 16), s.const(0, U32, 16)
    y = Buffer("y", dtype, 16)
    load = load_of(kernel(k.Store(y, 0, s.Call(dtype, 16, name, (sums, groups, groups)) + sums)), [1])
    assert load.dots == {name: 16 * 2 * group}
    assert (load.flops, load.integer_ops) == ((16, 0) if dtype == F32 else (0, 16))
    assert (load + load).operations == 2 * load.operations == 2 * (16 * 2 * group + load.flops)
