"""Matrix products of seven half as large: every shape, epilogue and target within the method's error, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import erf as exact_erf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import run, spills, summing_loops
from onnx import TensorProto, helper, numpy_helper
from onnxc.backends.cpu.kernels import gemm, strassen
from onnxc.backends.cpu.kernels.product import find_product
from onnxc.ir.dims import symbol
from onnxc.ir.errors import OnnxcError
from onnxc.ir.functions import erf, maximum
from onnxc.ir.target import Target
from onnxc.ir.tensors import Tensor
from onnxc.passes.regions import Lowered, Region
from onnxc.tools.bench_kernels import make_region

TARGETS = [name for name in ("host", "x86-64-v3", "x86-64") if name == "host" or Target.host().architecture == "x86_64"]
RANDOM = np.random.default_rng(0)


def machine(name: str = "host", levels: int = 1, threads: int = 1) -> Target:
    return replace(Target.parse(name), strassen=levels, threads=threads)


def names(lowered: Lowered) -> list[str]:
    return [call.kernel.name for call in lowered.kernel_calls]


def always(region: Region, target: Target) -> Lowered:
    """The schedule with as many levels as are allowed, also where the definition would be faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strassen, "WORTH", (0.0, 0.0))
        lowered = gemm.schedule(region, target)
    assert lowered is not None
    assert any("strassen" in name for name in names(lowered)), names(lowered)
    return lowered


def whole_numbers(*shape: int) -> np.ndarray:
    """So small that sums are exact in any order."""
    return RANDOM.integers(-3, 4, shape).astype(np.float32)


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("levels", [1, 2])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_shapes(target: str, levels: int, data: st.DataObject) -> None:
    """Any number of rows and columns, with bias, residual and an activation: exact on whole numbers."""
    chosen = machine(target, levels)
    lanes, parts = chosen.lanes(32), 2**levels
    m = data.draw(st.integers(2 * parts, 70), "rows")
    n = data.draw(st.integers(parts * lanes, 13 * lanes), "columns")
    depth = parts * lanes * data.draw(st.integers(1, 3), "depth")
    a, w, bias, residual = whole_numbers(m, depth), whole_numbers(depth, n), whole_numbers(n), whole_numbers(m, n)
    region = make_region(
        "MatMul",
        [(a.shape, "f4"), w],
        extras=[bias, (residual.shape, "f4")],
        epilogue=lambda y, b, r: maximum(y + b + r, 0.0),
    )
    lowered = always(region, chosen)
    for interpret in (False, True) if m * n * depth < 20_000 else (False,):
        (result,) = run(region, lowered, chosen, [a, w, bias, residual], interpret=interpret)
        np.testing.assert_array_equal(result, np.maximum(a @ w + bias + residual, 0))


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("threads", [1, 3])
def test_more_rows_than_a_cache_holds(levels: int, threads: int) -> None:
    """Blocks of rows, the last of them smaller and ending in rows that do not exist."""
    chosen = machine(levels=levels, threads=threads)
    lanes = chosen.lanes(32)
    a, w = whole_numbers(1021, 64 * lanes // 16), whole_numbers(64 * lanes // 16, 9 * lanes + 3)
    region = make_region("MatMul", [(a.shape, "f4"), w])
    lowered = always(region, chosen)
    (result,) = run(region, lowered, chosen, [a, w])
    np.testing.assert_array_equal(result, a @ w)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("rows", [(8, 128), (768, 3), (4, 197)])
def test_chunks_of_many_rows(rows: tuple[int, int], levels: int) -> None:
    """Rows that are done in chunks, by the same two kernels: each starts where the one before ended."""
    chosen = machine(levels=levels)
    a, w = whole_numbers(*rows, 1024), whole_numbers(1024, 8 * chosen.lanes(32))
    region = make_region("MatMul", [(a.shape, "f4"), w], extras=[(a.shape[:2] + w.shape[1:], "f4")], epilogue=add)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strassen, "OUTSIDE_BYTES_PER_CYCLE", 0.1)
        lowered = always(region, replace(chosen, l3_bytes=6 << 20))
    assert len(lowered.kernel_calls) > 2
    assert len({id(call.kernel) for call in lowered.kernel_calls}) == 2
    residual = whole_numbers(*rows, w.shape[1])
    (result,) = run(region, lowered, chosen, [a, w, residual])
    np.testing.assert_array_equal(result, a @ w + residual)


def test_rows_of_a_batch_and_heads_as_depth() -> None:
    """[batch, heads, sequence, size] by weights over heads and size, as after attention; rows of two axes."""
    chosen = machine()
    heads, size = 6, 2 * chosen.lanes(32)
    a, w = whole_numbers(2, heads, 9, size), whole_numbers(heads, size, 5 * chosen.lanes(32))
    region = make_region("Einsum", [(a.shape, "f4"), w], {"equation": "bhsd,hdn->bsn"})
    (result,) = run(region, always(region, chosen), chosen, [a, w])
    np.testing.assert_array_equal(result, np.einsum("bhsd,hdn->bsn", a, w))


def test_weights_that_lie_transposed() -> None:
    chosen = machine(levels=2)
    lanes = chosen.lanes(32)
    a, w, bias = whole_numbers(33, 8 * lanes), whole_numbers(7 * lanes, 8 * lanes), whole_numbers(7 * lanes)
    region = make_region("Gemm", [(a.shape, "f4"), w, bias], {"transB": 1})
    (result,) = run(region, always(region, chosen), chosen, [a, w, bias])
    np.testing.assert_array_equal(result, a @ w.T + bias)


def test_convolution_of_one_pixel() -> None:
    chosen = machine()
    lanes = chosen.lanes(32)
    x, w = whole_numbers(2, 7, 5, 4 * lanes), whole_numbers(4 * lanes, 4 * lanes, 1, 1)
    region = make_region("Conv", [(x.shape, "f4"), w], {"layout": "channels_last", "group": 1})
    (result,) = run(region, always(region, chosen), chosen, [x, w])
    np.testing.assert_array_equal(result, x @ w[:, :, 0, 0].T)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(("m", "depth", "n"), [(128, 768, 3072), (197, 3072, 768), (49, 2048, 512), (128, 384, 1536)])
def test_error(m: int, depth: int, n: int, levels: int) -> None:
    """Layers of real models against f64: within 1e-5 of the largest output, epilogue included."""
    chosen = machine(levels=levels)
    a = RANDOM.standard_normal((m, depth)).astype(np.float32)
    w = (RANDOM.standard_normal((depth, n)) / np.sqrt(depth)).astype(np.float32)
    bias = RANDOM.standard_normal(n).astype(np.float32)
    region = make_region(
        "MatMul",
        [(a.shape, "f4"), w],
        extras=[bias],
        epilogue=lambda y, b: (y + b) * (erf((y + b) * 2**-0.5) + 1.0) * 0.5,
    )
    (result,) = run(region, always(region, chosen), chosen, [a, w, bias])
    sums = a.astype(np.float64) @ w + bias
    plain = make_region("MatMul", [(a.shape, "f4"), w], extras=[bias], epilogue=lambda y, b: y + b)
    (before,) = run(plain, always(plain, chosen), chosen, [a, w, bias])
    assert np.abs(before - sums).max() < 1e-5 * np.abs(sums).max()
    expected = sums * (np.vectorize(exact_erf)(sums * 2**-0.5) + 1) / 2
    assert np.abs(result - expected).max() < 1e-5 * np.abs(sums).max()


@pytest.mark.parametrize("levels", [1, 2])
def test_inner_loop_has_no_spills(levels: int) -> None:
    chosen = machine(levels=levels)
    region = make_region("MatMul", [((128, 768), "f4"), np.ones((768, 3072), np.float32)])
    loops = summing_loops(always(region, chosen), chosen)
    assert loops
    assert not any(spills(loop) for loop in loops)


@pytest.mark.parametrize(
    ("m", "depth", "n", "levels"),
    [
        (128, 768, 3072, 2), (128, 3072, 768, 2), (128, 768, 768, 2), (197, 768, 3072, 2), (64, 768, 2304, 1),
        (128, 384, 384, 1), (1024, 768, 768, 2), (1, 768, 768, 0), (16, 768, 3072, 0), (3136, 64, 256, 0),
        (3136, 256, 64, 0), (128, 64, 64, 0),
    ],
)  # fmt: skip
def test_chosen_where_it_pays(m: int, depth: int, n: int, levels: int) -> None:
    """By a machine of one wide multiply-add a cycle, as it was measured on."""
    region = make_region("MatMul", [((m, depth), "f4"), np.zeros((depth, n), np.float32)])
    found = find_product(region)
    assert found is not None
    for allowed in (0, 1, 2):
        plan = strassen.choose_plan(found, replace(Target.parse("znver4"), l3_bytes=16 << 20), allowed)
        assert (plan.levels if plan is not None else 0) == min(levels, allowed)


@pytest.mark.parametrize("rows", [symbol("M"), 128])
@pytest.mark.parametrize("constant", [False, True])
def test_left_to_the_definition(rows: Any, constant: bool) -> None:
    """Unless all sizes and the right operand are known when the model is compiled."""
    w: Any = np.zeros((768, 768), np.float32) if constant else ((768, 768), "f4")
    lowered = gemm.schedule(make_region("MatMul", [((rows, 768), "f4"), w]), machine("znver4"))
    assert lowered is not None
    assert any("strassen" in name for name in names(lowered)) == (constant and rows == 128)


def test_coefficients_multiply_matrices() -> None:
    """The tables are those of a product of matrices: Brent's equations."""
    for levels in (1, 2):
        left, right, result = (
            strassen.coefficients(table, levels) for table in (strassen.LEFT, strassen.RIGHT, strassen.RESULT)
        )
        size = 2**levels
        product = np.einsum("rij,rkl,rmn->ijklmn", left, right, result)
        one = np.eye(size, dtype=np.int64)
        np.testing.assert_array_equal(product, np.einsum("im,jk,ln->ijklmn", one, one, one))


def model_of(sizes: Sequence[int], rows: int) -> onnx.ModelProto:
    nodes, weights, current = [], [], "x"
    for i, (depth, columns) in enumerate(pairwise(sizes)):
        w = (RANDOM.standard_normal((depth, columns)) / np.sqrt(depth)).astype(np.float32)
        weights.append(numpy_helper.from_array(w, f"w{i}"))
        nodes += [
            helper.make_node("MatMul", [current, f"w{i}"], [f"m{i}"]),
            helper.make_node("Tanh", [f"m{i}"], [f"t{i}"]),
        ]
        current = f"t{i}"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, sizes[0]])],
        [helper.make_tensor_value_info(current, TensorProto.FLOAT, [rows, sizes[-1]])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`strassen` decides; two threads give what one gives; an artifact keeps it; other values are refused."""
    monkeypatch.setattr(strassen, "WORTH", (0.0, 0.0))
    monkeypatch.setenv("ONNXC_CACHE_DIR", str(tmp_path / "cache"))
    model = model_of((256, 512, 192), 50)
    x = RANDOM.standard_normal((50, 256)).astype(np.float32)
    plain = onnxc.compile(model, strassen="off")(x)
    for value in ("auto", "two"):
        one = onnxc.compile(model, strassen=value, threads=1)
        two = onnxc.compile(model, strassen=value, threads=2)
        np.testing.assert_array_equal(one(x), two(x))
        assert 0 < np.abs(one(x) - plain).max() < 1e-5
        one.save(tmp_path / "chain.onnxc")
        np.testing.assert_array_equal(onnxc.load(tmp_path / "chain.onnxc")(x), one(x))
    with pytest.raises(OnnxcError, match="strassen"):
        onnxc.compile(model, strassen="three")


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("rows", [64, 61])
def test_a_row_that_is_not_finite_spreads_to_no_other(levels: int, rows: int) -> None:
    """Of two texts of a batch one may overflow; the other has its own result all the same."""
    chosen = machine("host", levels)
    depth, columns = 2 * 2**levels * chosen.lanes(32), 6 * chosen.lanes(32)
    w, plain = whole_numbers(depth, columns), whole_numbers(rows, depth)
    for value, row, place in ((np.nan, 3, 0), (np.inf, rows - 1, depth - 1), (-np.inf, rows // 2, depth // 2)):
        a = plain.copy()
        a[row, place] = value
        region = make_region("MatMul", [(a.shape, "f4"), w])
        (found,) = run(region, always(region, chosen), chosen, [a, w])
        others = np.arange(rows) != row
        np.testing.assert_array_equal(found[others], plain[others] @ w)
        assert not np.isfinite(found[row]).any()
