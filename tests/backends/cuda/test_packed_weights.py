"""Products by packed weights on a GPU: unpacked as they are loaded, never in memory."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnxc
import pytest
from cuda_lowered import aligned, run, text
from emulator import harness
from onnx import helper
from onnxc.backends.cuda import nvrtc, report
from onnxc.backends.cuda.schedules import schedule
from onnxc.backends.cuda.source import prelude
from onnxc.ir.target import Target
from onnxc.passes.regions import Lowered
from onnxc.tools.bench_kernels import make_region
from single_node import model_of

RANDOM = np.random.default_rng(0)


needs_compiler = pytest.mark.skipif(harness.compiler() is None, reason="the emulator needs g++")


def check(
    rows: int, columns: int, depth: int, bits: int = 4, block: int = 32, zero: str | None = "u1", dtype: str = "f4"
) -> Lowered:
    """A product of small whole numbers and scales that are powers of two: every order of sums gives the same."""
    blocks, each = -(-depth // block), 8 // bits
    numbers = RANDOM.integers(0, 1 << bits, (columns, depth)).astype(np.uint8)
    scales = 2.0 ** RANDOM.integers(-2, 2, (columns, blocks)).astype(np.float32)
    points = RANDOM.integers(0, 1 << bits, (columns, blocks)).astype(zero or "u1")
    codes = sum(numbers[:, place::each] << np.uint8(place * bits) for place in range(each))
    x = RANDOM.integers(-4, 5, (rows, depth)).astype(dtype)
    attributes = {"depth": depth, "bits": bits, "block_size": block}
    operands = [codes, scales.astype(dtype), *([points] if zero else [])]
    region = aligned(make_region("onnxc.PackedMatMul", [(x.shape, dtype), *operands], attributes))
    target = Target.parse("cuda:sm_80")
    lowered = schedule(region, target)
    assert lowered is not None
    assert sum(int(str(buffer.size)) for buffer in lowered.workspaces) < columns * depth
    (result,) = run(region, lowered, target, [x, *operands])
    middle = points.astype(np.float32) if zero else np.float32(1 << (bits - 1))
    each_middle = np.repeat(middle, block, 1)[:, :depth] if zero else middle
    weights = (numbers.astype(np.float32) - each_middle) * np.repeat(scales, block, 1)[:, :depth]
    np.testing.assert_array_equal(result, (x.astype(np.float32) @ weights.T).astype(dtype))
    return lowered


@needs_compiler
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 40, 96), (20, 70, 64)])
def test_products(rows: int, columns: int, depth: int) -> None:
    check(rows, columns, depth)


@needs_compiler
@pytest.mark.parametrize("zero", [None, "u1", "f4"])
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 16), (4, 128), (8, 32), (8, 64), (2, 16), (2, 64), (4, 256)])
def test_few_rows(bits: int, block: int, zero: str | None) -> None:
    """Codes are read 16 bytes at a time, and become reals by operations on their bits."""
    made = text(check(1, 33, 512, bits, block, zero))
    assert f"{bits}_bits_few_rows" in made and "codes" in made


@needs_compiler
@pytest.mark.parametrize("rows", [2, 5, 8])
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_a_few_more_rows(rows: int, dtype: str) -> None:
    assert "few_rows" in text(check(rows, 70, 256, dtype=dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_many_rows_of_16_bits_are_multiplied_by_tensor_cores(dtype: str) -> None:
    assert ("mma_m16n8k16_f16" in text(check(40, 48, 128, dtype=dtype))) == (dtype == "f2")


@needs_compiler
@pytest.mark.parametrize(("depth", "block"), [(100, 32), (96, 96), (544, 17 * 32)])
def test_depths_that_no_vectors_of_codes_fill(depth: int, block: int) -> None:
    check(1, 24, depth, block=block)


@pytest.mark.skipif(not nvrtc.is_available(), reason="NVRTC is not installed")
@pytest.mark.parametrize("rows", [1, 8])
def test_no_conversions_of_integers_and_no_spills(rows: int) -> None:
    attributes = {"depth": 4096, "bits": 4, "block_size": 32}
    codes, scales = np.zeros((4096, 2048), np.uint8), np.zeros((4096, 128), np.float32)
    region = aligned(make_region("onnxc.PackedMatMul", [((rows, 4096), "f4"), codes, scales], attributes))
    lowered = schedule(region, Target.parse("cuda:sm_90"))
    assert lowered is not None
    found = nvrtc.compile_source(prelude() + text(lowered), "sm_90")
    assert not any(each.spill_store_bytes for each in found.resources.values())
    if report.has_disassembler():
        listing = report.sass(found.image)
        assert "I2F" not in listing and "LDG.E.128" in listing


@pytest.mark.parametrize("rows", [1, 30])
def test_weights_that_are_dequantized_in_blocks_stay_packed(rows: int, gpu: None) -> None:
    """From a model in ONNX's own form to the results, as on a CPU."""
    depth, columns, block = 256, 64, 32
    codes = RANDOM.integers(-8, 8, (depth, columns)).astype(ml_dtypes.int4)
    scales = RANDOM.uniform(0.01, 0.02, (depth // block, columns)).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=block),
        helper.make_node("MatMul", ["x", "d"], ["m"]),
        helper.make_node("Relu", ["m"], ["y"]),
    ]
    x = RANDOM.normal(size=(rows, depth)).astype(np.float32)
    model = model_of(nodes, {"x": x}, {"w": codes, "s": scales}, ["y"])
    compiled = onnxc.compile(model, target="cuda")
    assert "PackedMatMul" in compiled.dump("graph")
    (found,) = compiled.run({"x": x}).values()
    (expected,) = onnxc.compile(model).run({"x": x}).values()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert ("few_rows" in compiled.dump("cuda")) == (rows == 1)
