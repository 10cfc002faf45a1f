"""Kernels that check themselves (ONNXC_CHECK_BOUNDS=1): planted faults are told, and do no harm."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnxc
import pytest
from native_kernel import Array, Fenced
from onnx import helper
from onnxc.backends.cpu import build
from onnxc.backends.cpu.bounds import DEFINITION, VIOLATION, raise_violation
from onnxc.backends.cpu.jit import CodeImage
from onnxc.backends.cpu.llvm import render_kernel
from onnxc.backends.cpu.objects import compile_objects
from onnxc.ir import loops as k
from onnxc.ir import scalars as s
from onnxc.ir.dims import Dim, symbol
from onnxc.ir.dtypes import F32, I64
from onnxc.ir.errors import AccessError
from onnxc.ir.scalars import Buffer, load
from onnxc.ir.target import Target
from single_node import model_of

N = symbol("n", 0)
X, Y = Buffer("x", F32, N), Buffer("y", F32, N)
AT = symbol("i", 0, N - 1)


def run_checked(kernel: k.Kernel, buffers: Mapping[str, Array], n: int, threads: int = 1) -> dict[str, Array]:
    """The buffers after a call; AccessError for what the kernel has told. They lie between pages that are not there."""
    target = Target.host()
    text = render_kernel(build.scheduled(kernel, target), target, checked=True)
    objects = compile_objects(
        [("kernel", text), ("report", f'target triple = "{target.triple}"\n{DEFINITION}')], target
    )
    image = CodeImage(objects, [kernel.name, VIOLATION], target)
    given = {name: Fenced(array) for name, array in buffers.items()}
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(given), *[ctypes.c_int64] * (len(kernel.sizes) + 1))
    addresses = [given[buffer.name].address for buffer in kernel.parameters]
    function(image.address(kernel.name))(*addresses, *[n] * len(kernel.sizes), threads)
    raise_violation(image.address(VIOLATION))
    return {name: fenced.array.copy() for name, fenced in given.items()}


def kernel_of(*body: k.Statement, parameters: tuple[Buffer, ...] = (X, Y)) -> k.Kernel:
    return k.Kernel("planted", parameters, ("y",), ("n",), tuple(body), ("the node",))


def copying(kind: str, source: Dim = AT, target: Dim = AT, step: int = 1) -> k.Kernel:
    return kernel_of(k.For("i", N, (k.Store(Y, target, load(X, source) * 2),), kind, step))


KINDS = ("serial", "vector", "parallel")
LENGTHS = (3, 16, 37)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LENGTHS)
def test_what_is_right_is_not_told(kind: str, n: int) -> None:
    x = np.arange(n, dtype=np.float32)
    found = run_checked(copying(kind), {"x": x, "y": np.zeros(n, np.float32)}, n, threads=2)
    np.testing.assert_array_equal(found["y"], 2 * x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("which", "shift"), [("x", 1), ("y", -1), ("y", 1 << 20), ("x", -(1 << 40))])
def test_one_beyond_the_end_is_told(kind: str, n: int, which: str, shift: int) -> None:
    kernel = copying(kind, **{"source" if which == "x" else "target": AT + shift})
    verb = "reads" if which == "x" else "writes"
    buffers = {"x": np.ones(n, np.float32), "y": np.zeros(n, np.float32)}
    with pytest.raises(
        AccessError, match=rf"kernel planted \(from the node\) {verb} outside of its buffer {which}: f32"
    ) as error:
        run_checked(kernel, buffers, n, threads=2)
    assert f"of {4 * n}" in str(error.value)


@pytest.mark.parametrize("stride", [2, -1, 3, 7, N])
@pytest.mark.parametrize("which", ["x", "y"])
def test_strided_vectors(stride: Dim, which: str) -> None:
    """Sixteen lanes apart by a stride: right by the last element, then one too far."""
    span = 15 * abs(stride if isinstance(stride, int) else 5) + 1
    first = span - 1 if stride == -1 else 0
    long, short = Buffer("x", F32, span), Buffer("x", F32, span - 1)
    for there, fits in ((long, True), (short, False)):
        here = Buffer("y", F32, 16)
        if which == "x":
            value = s.load(there, first, 16, stride=stride)
            body, parameters = k.Store(here, 0, value), (there, here)
        else:
            there, here = replace(there, name="y"), Buffer("x", F32, 16)
            body, parameters = k.Store(there, first, s.load(here, 0, 16), stride=stride), (here, there)
        kernel = kernel_of(body, parameters=parameters)
        buffers = {p.name: np.zeros(int(str(p.size)), np.float32) for p in parameters}
        if fits:
            run_checked(kernel, buffers, 5)
        else:
            with pytest.raises(AccessError, match=f"outside of its buffer {which}"):
                run_checked(kernel, buffers, 5)


@pytest.mark.parametrize("masked", [5, 6])
def test_lanes_of_a_mask(masked: int) -> None:
    """Of eight lanes five are inside: a sixth is told, and the first five are stored all the same."""
    mask = s.binary("lt", s.Lanes(I64, 8), s.Broadcast(I64, 8, s.const(masked, I64)))
    x, y = Buffer("x", F32, 5), Buffer("y", F32, 8)
    reading = kernel_of(k.Store(y, 0, s.load(x, 0, 8, predicate=mask)), parameters=(x, y))
    x, y = Buffer("x", F32, 8), Buffer("y", F32, 5)
    writing = kernel_of(k.Store(y, 0, s.load(x, 0, 8), mask), parameters=(x, y))
    for kernel, lengths in ((reading, (5, 8)), (writing, (8, 5))):
        buffers = {name: np.ones(length, np.float32) for name, length in zip("xy", lengths, strict=True)}
        if masked == 5:
            run_checked(kernel, buffers, 5)
        else:
            with pytest.raises(AccessError):
                run_checked(kernel, buffers, 5)


def test_private_memory_and_aliases() -> None:
    row = Buffer("row", F32, 8, "stack")
    pointer = Buffer("pointer", F32, 0)
    x, y = Buffer("x", F32, 16), Buffer("y", F32, 1)
    arrays = {"x": np.arange(16, dtype=np.float32), "y": np.zeros(1, np.float32)}
    at = symbol("at", 0, 7)
    filled = k.For("at", 8, (k.Store(row, at, load(x, at)),))
    for last, fits in ((7, True), (8, False), (-1, False)):
        stack = kernel_of(k.Alloc(row), filled, k.Store(y, 0, load(row, last)), parameters=(x, y))
        moved = kernel_of(k.Alias(pointer, x, 8), k.Store(y, 0, load(pointer, last)), parameters=(x, y))
        for kernel in (stack, moved) if last >= 0 else (stack,):
            if fits:
                found = run_checked(kernel, arrays, 0)
                assert found["y"][0] == (7 if kernel is stack else 15)
            else:
                with pytest.raises(AccessError):
                    run_checked(kernel, arrays, 0)


def test_a_compiled_model_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule that writes one element too far: the call raises with the node's name, the next one too."""
    monkeypatch.setenv("ONNXC_CHECK_BOUNDS", "1")
    model = model_of(
        [helper.make_node("Relu", ["x"], ["y"], name="the node")], {"x": np.zeros(5, np.float32)}, {}, ["y"]
    )
    x = np.arange(-2, 3, dtype=np.float32)
    np.testing.assert_array_equal(onnxc.compile(model)(x), np.maximum(x, 0))
    right = build.scheduled

    def wrong(kernel: k.Kernel, target: Target) -> k.Kernel:
        def shifted(block: k.Block) -> k.Block:
            return tuple(
                replace(st, offset=st.offset + 1) if isinstance(st, k.Store)
                else replace(st, body=shifted(st.body)) if isinstance(st, k.For)
                else st
                for st in block
            )  # fmt: skip

        made = right(kernel, target)
        return replace(made, body=shifted(made.body))

    monkeypatch.setattr(build, "scheduled", wrong)
    executable = onnxc.compile(model)
    for _ in range(2):
        with pytest.raises(AccessError, match=r"kernel relu_\w+ \(from the node\) writes outside of its buffer y0"):
            executable(x)
