"""Few rows by a matrix that lies transposed: read in place, exact on whole numbers, where packing does not pay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import run
from onnxc.backends.cpu.kernels import gemm
from onnxc.ir.functions import maximum
from onnxc.ir.target import Target
from onnxc.passes.regions import Lowered
from onnxc.tools.bench_kernels import make_region

TARGETS = [name for name in ("host", "x86-64-v3", "x86-64") if name == "host" or Target.host().architecture == "x86_64"]


def names(lowered: Lowered | None) -> list[str]:
    assert lowered is not None
    return [call.kernel.name for call in lowered.kernel_calls]


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_shapes(target: str, data: st.DataObject) -> None:
    chosen = replace(Target.parse(target), threads=data.draw(st.integers(1, 2), "threads"))
    lanes = chosen.lanes(32)
    batch = (data.draw(st.integers(1, 3), "batch"),)
    m, n = data.draw(st.integers(2, 12), "rows"), data.draw(st.integers(2, 50), "columns")
    depth = lanes * max(-(-m * 16 // lanes), data.draw(st.integers(4, 16), "depth"))
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-3, 4, (*batch, *s)).astype(np.float32) for s in ((m, depth), (n, depth), (m, n)))
    region = make_region(
        "com.microsoft.FusedMatMul",
        [(a.shape, "f4"), (b.shape, "f4")],
        {"transB": 1},
        [(c.shape, "f4")],
        lambda y, other: maximum(y + other, 0.0),
    )
    lowered = gemm.schedule(region, chosen)
    assert any("dots" in name for name in names(lowered))
    assert lowered is not None
    for interpret in (False, True) if m * n * depth < 6000 else (False,):
        (result,) = run(region, lowered, chosen, [a, b, c], interpret=interpret)
        np.testing.assert_array_equal(result, np.maximum(a @ b.swapaxes(1, 2) + c, 0))


@pytest.mark.parametrize(
    ("m", "depth", "transposed", "taken"),
    [(8, 768, 1, True), (64, 768, 1, False), (8, 768, 0, False), (4, 37, 1, False)],
)
def test_chosen_where_it_pays(m: int, depth: int, transposed: int, taken: bool) -> None:
    shape = (96, depth) if transposed else (depth, 96)
    region = make_region("Gemm", [((m, depth), "f4"), (shape, "f4")], {"transB": transposed})
    assert any("dots" in name for name in names(gemm.schedule(region, Target.parse("x86-64-v4")))) == taken
