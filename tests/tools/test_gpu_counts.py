"""What kernels read, write and compute, as gpu_check counts it, and the list of what it measures."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options
from onnxc.ir.target import Target
from onnxc.tools.bench_kernels import Layer
from onnxc.tools.gpu import check, shapes
from onnxc.tools.gpu.counts import work_of
from small_models import model_of_text

TARGET = Target.parse("cuda:sm_90")
COUNTED = {
    "map (float[8, 32] x) => (float[8, 32] y) { y = Relu (x) }": (1024, 1024, 0),
    "broadcast (float[8, 32] x, float[32] b) => (float[8, 32] y) { y = Add (x, b) }": (1024 + 128, 1024, 0),
    # The check of the indices reads them once more, and has room for what it may find.
    "gather (float[1000, 32] t, int64[4] i) => (float[4, 32] y) { y = Gather (t, i) }": (4 * 32 * 4 + 64, 512 + 32, 0),
    "slice (float[64, 32] x) => (float[2, 32] y) { y = Slice (x, starts, ends) }": (256, 256, 0),
    "rows (float[64, 256] x) => (float[64, 256] y) { y = Softmax (x) }": (65536, 65536, 0),
    "sums (float[64, 256] x) => (float[64] y) { y = ReduceSum <keepdims = 0> (x, axis) }": (65536, 256, 0),
    "product (float16[64, 128] a, float16[128, 32] b) => (float16[64, 32] y) { y = MatMul (a, b) }": (
        2 * (64 * 128 + 128 * 32),
        2 * 64 * 32,
        2 * 64 * 32 * 128,
    ),
    "gemm (float[7, 9] a, float[5, 7] b) => (float[9, 5] y) { y = Gemm <transA = 1, transB = 1> (a, b) }": (
        4 * (63 + 35),
        4 * 45,
        2 * 45 * 7,
    ),
    "sum (float[3, 4, 5] a, float[5, 6] b) => (float[3, 6] y) { y = Einsum <equation = 'ijk,kl->il'> (a, b) }": (
        4 * (60 + 30),
        4 * 18,
        2 * 3 * 4 * 5 * 6,
    ),
}


def counted(text: str) -> tuple[int, int, int]:
    names = {"starts": np.array([3]), "ends": np.array([5]), "axis": np.array([1])}
    model = model_of_text(text.replace("'", '"'), **{n: a for n, a in names.items() if n in text.split("{")[1]})
    options = Options(target=TARGET)
    graph = graph_of(model, options)
    work = work_of(program_of(graph, TARGET), graph)
    return sum(w.read for w in work), sum(w.written for w in work), sum(w.flops for w in work)


@pytest.mark.parametrize("text", COUNTED, ids=lambda text: text.split()[0])
def test_bytes_and_operations_of_kernels(text: str) -> None:
    assert counted(text) == COUNTED[text]


def test_convolutions_and_attention_count_by_their_definition() -> None:
    (layer,) = shapes.convolutions([Layer(8, 16, 32, 3, 2, 4)], 3)
    (plain, causal) = shapes.attentions([(2, 3, 16, 16, 8)])
    expected = [
        (layer, 2 * (3 * 4 * 4 * 32) * (4 * 3 * 3)),
        (plain, 2 * (2 * 3) * 16 * 16 * (8 + 8)),
        (causal, 2 * (2 * 3) * 16 * 16 * (8 + 8)),
    ]
    for operator, flops in expected:
        graph = graph_of(operator.model(), Options(target=TARGET))
        work = work_of(program_of(graph, TARGET), graph)
        assert sum(w.flops for w in work) == flops, operator.name
        assert max(work, key=lambda w: w.flops).origin, operator.name


def test_a_triangle_of_scores_reads_all_keys() -> None:
    """The loops of a causal attention end where the rows of a block do."""
    for operator in shapes.attentions([(32, 12, size, size, 64) for size in (128, 512)]):
        graph = graph_of(operator.model(), Options(target=TARGET))
        work = work_of(program_of(graph, TARGET), graph)
        assert sum(w.bytes for w in work) == pytest.approx(operator.moved, rel=0.001), operator.name
        assert sum(w.flops for w in work) * operator.needed == pytest.approx(
            2 * 32 * 12 * operator.output[2] ** 2 * 128 / (2 if operator.settings["causal"] else 1), rel=0.01
        )


def test_operations_go_to_the_kernels_that_do_them() -> None:
    """A product in parts: one kernel multiplies, another one adds the parts up."""
    (operator,) = shapes.products("f16", [(16, 64, 8192)])
    graph = graph_of(operator.model(), Options(target=TARGET))
    work = work_of(program_of(graph, TARGET), graph)
    assert sum(w.flops for w in work) == pytest.approx(2 * 16 * 64 * 8192, abs=len(work))
    assert max(w.flops for w in work) > 0.9 * 2 * 16 * 64 * 8192


def test_sizes_that_only_the_run_tells_are_not_counted() -> None:
    with pytest.raises(KeyError):
        counted("open (float[n] x) => (float[n] y) { y = Relu (x) }")


def test_all_that_is_measured_can_be_made() -> None:
    listed = check.all_operators()
    assert len({(o.kind, o.name, o.precision) for o in listed}) == len(listed) > 80
    assert {o.kind for o in listed} == {
        "product", "convolution", "attention", "pointwise", "softmax", "layer norm", "RMS norm", "transpose",
        "reduction",
    }  # fmt: skip
    assert any(o.name == "4096x4096x4096" and o.mark == ("peer", 0.5) for o in listed)
    for operator in (*shapes.memory_bound(1 << 13), *shapes.convolutions([Layer(4, 8, 8, 3)], 1)):
        model = onnx.load_model_from_string(operator.model())
        onnx.checker.check_model(model, full_check=True)
    memory = [o.moved for o in shapes.memory_bound() if o.kind != "reduction"]
    assert min(memory) > 380 << 20 and max(memory) < 513 << 20
