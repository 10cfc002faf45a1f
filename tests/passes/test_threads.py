"""Kernels that name no threads, mapped to blocks and threads: the same results, in any order of warps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from emulator import harness
from kernel_interpreter import run_kernel
from onnxc.backends.cuda.launch import launch_of
from onnxc.backends.cuda.source import render_kernels
from onnxc.ir import loops as k
from onnxc.ir import scalars as s
from onnxc.ir.dims import Dim, evaluate, symbol
from onnxc.ir.dtypes import F16, F32, I8, I64, DType
from onnxc.ir.scalars import Buffer, Scalar, load
from onnxc.passes.threads import distribute

pytestmark = pytest.mark.skipif(harness.compiler() is None, reason="kernels are emulated by g++, which is not there")

N, M = symbol("n", 0, 4000), symbol("m", 0, 4000)
ROW, COLUMN = k.index_symbol("row", N), k.index_symbol("column", M)


def kernel(body: Sequence[k.Statement], *buffers: Buffer, outputs: int = 1) -> k.Kernel:
    names = tuple(buffer.name for buffer in buffers[:outputs])
    return k.Kernel("k", buffers, names, k.free_sizes(tuple(body), buffers), tuple(body))


def check(made: k.Kernel, sizes: dict[str, int], tolerance: float = 0, **buffers: Any) -> list[k.Kernel]:
    """Asserts that the kernels it becomes write what the interpreter does, without races; gives them."""
    parts = distribute(made)
    expected = {name: array.copy() for name, array in buffers.items()}
    run_kernel(made, expected, sizes)
    for checked, seed in ((False, 0), (False, 5), (True, 1)):
        found = {name: array.copy() for name, array in buffers.items()}
        library = harness.compile_source(render_kernels(tuple(parts)), checked)
        for part in parts:
            launch = launch_of(part)
            grid = evaluate(launch.grid, sizes)
            arguments = [*(found[p.name] for p in part.parameters), *(sizes[name] for name in part.sizes)]
            library.launch(part.name, grid, launch.threads, launch.shared_bytes, arguments, seed)
        for name in made.outputs:
            np.testing.assert_allclose(
                found[name].astype(np.float64), expected[name].astype(np.float64), rtol=tolerance, err_msg=name
            )
    return parts


def numbers(*shape: int, dtype: DType = F32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(-9, 9, int(np.prod(shape))).astype(dtype.numpy)


def total(op: str, value: Scalar, extent: Dim, dtype: DType = F32) -> tuple[Buffer, list[k.Statement]]:
    """A register and the statements that combine a row into it."""
    register = Buffer(f"{op}_of_row", dtype, 1, "register")
    update = k.Store(register, 0, s.Binary(dtype, 1, op, load(register, 0), value))
    start = s.const(s.IDENTITY[op](dtype), dtype)
    return register, [k.Define(register, start), k.For("column", extent, (update,), "vector")]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 700), (300, 2), (0, 5)])
def test_independent_loops_become_a_grid_of_threads(n: int, m: int) -> None:
    x, y = Buffer("x", F32, N * M), Buffer("y", F32, N * M)
    body = [k.Store(y, ROW * M + COLUMN, load(x, ROW * M + COLUMN) * 2.0)]
    nest = [k.For("row", N, (k.For("column", M, tuple(body), "vector"),), "parallel")]
    (part,) = check(kernel(nest, y, x), {"n": n, "m": m}, x=numbers(n * m), y=np.zeros(n * m, np.float32))
    assert [st.kind for st in k.walk(part.body) if isinstance(st, k.For)] == ["grid", "block"]


@pytest.mark.parametrize("dtype", [F32, F16, I64, I8], ids=str)
@pytest.mark.parametrize("op", ["add", "max"])
def test_threads_of_a_block_share_a_reduction(op: str, dtype: DType) -> None:
    x, y = Buffer("x", dtype, N * M), Buffer("y", dtype, N)
    register, statements = total(op, load(x, ROW * M + COLUMN), M, dtype)
    body = [*statements, k.Store(y, ROW, load(register, 0))]
    made = kernel([k.For("row", N, tuple(body), "parallel")], y, x)
    sizes = {"n": 3, "m": 517}
    # Sums of small integers are exact in f32; f16 rounds where it is stored.
    (part,) = check(made, sizes, x=numbers(3, 517, dtype=dtype), y=np.zeros(3, dtype.numpy), tolerance=1e-3)
    assert any(isinstance(st, k.Barrier) for st in k.walk(part.body))
    assert any(st.space == "shared" for st in (a.buffer for a in k.walk(part.body) if isinstance(a, k.Alloc)))


def test_rows_kept_in_private_memory_are_shared_by_the_block() -> None:
    x, y = Buffer("x", F32, N * 200), Buffer("y", F32, N * 200)
    kept = Buffer("kept", F32, 200, "stack")
    column = k.index_symbol("column", 200)
    largest, statements = total("max", load(x, ROW * 200 + column), 200)
    again = k.index_symbol("again", 200)
    body = [
        *statements,
        k.Alloc(kept),
        k.For("again", 200, (k.Store(kept, again, load(x, ROW * 200 + again) - load(largest, 0)),), "vector"),
        # Read by another thread than wrote it.
        k.For("column", 200, (k.Store(y, ROW * 200 + column, load(kept, 199 - column)),), "vector"),
    ]
    check(
        kernel([k.For("row", N, tuple(body), "parallel")], y, x),
        {"n": 4},
        x=numbers(4, 200),
        y=np.zeros(800, np.float32),
    )


def test_serial_work_between_parallel_loops_is_done_by_one_thread() -> None:
    x, y, state = Buffer("x", F32, N), Buffer("y", F32, N), Buffer("state", F32, 8)
    count = Buffer("count", I64, 1, "register")
    step = k.index_symbol("step", 5)
    body = [
        k.Define(count, s.const(0, I64)),
        k.Store(state, 0, s.const(1.0)),
        k.For(
            "step",
            5,
            (
                k.For("row", N, (k.Store(y, ROW, load(y, ROW) + load(x, ROW) * load(state, step)),), "parallel"),
                k.Store(state, step + 1, load(state, step) * 2.0 + load(y, 0)),
                k.Store(count, 0, s.binary("add", load(count, 0), s.const(1, I64))),
            ),
        ),
        k.Store(state, 7, s.cast(load(count, 0), F32)),
    ]
    made = kernel(body, y, state, x, outputs=2)
    parts = check(made, {"n": 333}, x=numbers(333), y=np.zeros(333, np.float32), state=np.zeros(8, np.float32))
    assert len(parts) == 1


def test_a_loop_that_goes_on_while_memory_says_so() -> None:
    x, y = Buffer("x", F32, N), Buffer("y", F32, 4)
    going = s.binary("lt", load(y, 0), s.const(3.0))
    addition = k.Store(y, 0, load(y, 0) + 1.0)
    body = [
        k.Store(y, 0, s.const(0.0)),
        k.While(going, (k.For("row", N, (k.Store(x, ROW, load(x, ROW) + load(y, 0)),), "parallel"), addition)),
    ]
    check(kernel(body, y, x, outputs=2), {"n": 400}, x=numbers(400), y=np.zeros(4, np.float32))


def test_statements_that_share_nothing_are_launches_of_their_own() -> None:
    x, y, z = Buffer("x", F32, N), Buffer("y", F32, N), Buffer("z", F32, N)
    body = [
        k.For("row", N, (k.Store(y, ROW, load(x, ROW) + 1.0),), "parallel"),
        # Reads what other blocks of the first loop wrote.
        k.For("row", N, (k.Store(z, ROW, load(y, N - 1 - ROW)),), "parallel"),
    ]
    made = kernel(body, y, z, x, outputs=2)
    zeros = np.zeros(1000, np.float32)
    parts = check(made, {"n": 1000}, x=numbers(1000), y=zeros, z=zeros.copy())
    assert len(parts) == 2 and parts[0].outputs == ("y",) and parts[1].outputs == ("z",)
