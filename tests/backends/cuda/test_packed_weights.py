"""Products by packed weights on a GPU: unpacked as they are loaded, never in memory."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_lowered import run
from emulator import harness
from onnxc.backends.cuda.schedules import schedule
from onnxc.ir.target import Target
from onnxc.tools.bench_kernels import make_region

RANDOM = np.random.default_rng(0)


@pytest.mark.skipif(harness.compiler() is None, reason="the emulator needs g++")
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 40, 96), (20, 70, 64)])
def test_products(rows: int, columns: int, depth: int) -> None:
    numbers = RANDOM.integers(0, 16, (columns, depth)).astype(np.uint8)
    scales = 2.0 ** RANDOM.integers(-2, 2, (columns, depth // 32)).astype(np.float32)
    zeros = RANDOM.integers(0, 16, (columns, depth // 32)).astype(np.uint8)
    codes = numbers[:, ::2] | numbers[:, 1::2] << 4
    x = RANDOM.integers(-4, 5, (rows, depth)).astype(np.float32)
    attributes = {"depth": depth, "bits": 4, "block_size": 32}
    region = make_region("onnxc.PackedMatMul", [(x.shape, "f4"), codes, scales, zeros], attributes)
    target = Target.parse("cuda:sm_80")
    lowered = schedule(region, target)
    assert lowered is not None
    assert sum(int(str(buffer.size)) for buffer in lowered.workspaces) < columns * depth
    (result,) = run(region, lowered, target, [x, codes, scales, zeros])
    weights = (numbers.astype(np.float32) - np.repeat(zeros, 32, 1)) * np.repeat(scales, 32, 1)
    np.testing.assert_array_equal(result, x @ weights.T)
