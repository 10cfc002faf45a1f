"""The loops in which models spend their time, as each target's assembly: no vector of theirs lives on the stack.

The schedules are sized by the registers of the target; a tile too large by one would halve the speed and no other test
would notice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from lowered import multiplying_loops, spills, summing_loops_of
from onnxc.backends.cpu.kernels.register_tile import Tile, accumulators, multiply_accumulate
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options, target_of
from onnxc.ir import loops as k
from onnxc.ir.dtypes import F32
from onnxc.ir.loops import Kernel
from onnxc.ir.scalars import Buffer, Scalar, load
from onnxc.ir.target import Target
from small_models import model_of_text

TARGETS = ["haswell", "znver2", "x86-64-v4", "neoverse-n1", "cortex-a72"]


def convolution(size: int, channels: int, filters: int, kernel: int, **attributes: Any) -> onnx.ModelProto:
    group = attributes.get("group", 1)
    given = ", ".join(f"{name} = {value}" for name, value in {"group": group, **attributes}.items())
    return model_of_text(
        f"""conv (float[1, {channels}, {size}, {size}] x) => (float[1, {filters}, a, b] y) {{
          c = Conv <{given}> (x, w, b)
          y = Relu (c)
        }}""",
        w=np.ones((filters, channels // group, kernel, kernel), np.float32),
        b=np.ones(filters, np.float32),
    )


def product(rows: int, depth: int, columns: int) -> onnx.ModelProto:
    return model_of_text(
        f"""product (float[{rows}, {depth}] x) => (float[{rows}, {columns}] y) {{
          p = MatMul (x, w)
          s = Add (p, b)
          y = Gelu (s)
        }}""",
        w=np.ones((depth, columns), np.float32),
        b=np.ones(columns, np.float32),
    )


def attention(length: int) -> onnx.ModelProto:
    return model_of_text(
        f"""attention (float[1, 12, {length}, 64] q, float[1, 12, 64, 128] k, float[1, 12, 128, 64] v)
          => (float[1, 12, {length}, 64] y) {{
          s = MatMul (q, k)
          t = Mul (s, f)
          p = Softmax (t)
          y = MatMul (p, v)
        }}""",
        f=np.array(0.125, np.float32),
    )


def recurrent(kind: str, gates: int, batch: int) -> onnx.ModelProto:
    return model_of_text(
        f"""recurrent (float[20, {batch}, 128] x) => (float[20, 1, {batch}, 256] y) {{
          y = {kind} <hidden_size = 256> (x, w, r)
        }}""",
        w=np.ones((1, gates * 256, 128), np.float32),
        r=np.ones((1, gates * 256, 256), np.float32),
    )


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "1x1": lambda: convolution(28, 256, 128, 1),
    "3x3": lambda: convolution(28, 128, 128, 3, pads=[1, 1, 1, 1]),
    "3x3 of 7 pixels": lambda: convolution(14, 128, 256, 3, pads=[1, 1, 1, 1], strides=[2, 2]),
    "first layer": lambda: convolution(64, 3, 64, 7, pads=[3, 3, 3, 3], strides=[2, 2]),
    "depthwise": lambda: convolution(28, 96, 96, 3, pads=[1, 1, 1, 1], group=96),
    "depthwise, strides": lambda: convolution(28, 96, 96, 5, pads=[2, 2, 2, 2], strides=[2, 2], group=96),
    "groups": lambda: convolution(28, 128, 128, 3, pads=[1, 1, 1, 1], group=4),
    "tokens": lambda: product(128, 768, 3072),
    "few rows": lambda: product(5, 768, 768),
    "one row": lambda: product(1, 768, 3072),
    "attention": lambda: attention(128),
    "attention of a step": lambda: attention(1),
    "lstm": lambda: recurrent("LSTM", 4, 1),
    "lstm, batch": lambda: recurrent("LSTM", 4, 8),
    "gru": lambda: recurrent("GRU", 3, 2),
}


def kernels(name: str, target: str, **given: Any) -> tuple[list[Kernel], Target]:
    options = Options(target=target, threads=1, **given)
    chosen = target_of(options)
    return list(program_of(graph_of(MODELS[name](), options), chosen).kernels.values()), chosen


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", list(MODELS))
def test_sums_stay_in_registers(name: str, target: str) -> None:
    made, chosen = kernels(name, target, winograd="off")
    loops = [(kernel.name, loop) for kernel in made for loop in summing_loops_of(kernel, chosen)]
    loops = [
        (kernel, loop) for kernel, loop in loops if not re.search(r"mm\d+, -?\d*\(%rsp,", loop)
    ]  # stores to an array
    assert loops
    spilt = [f"{kernel}:\n{loop}" for kernel, loop in loops if spills(loop)]
    assert not spilt, "\n".join(spilt)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["3x3", "3x3 of 7 pixels"])
def test_sums_of_minimal_filtering_stay_in_registers(name: str, target: str) -> None:
    """Its transformations may spill: they hold dozens of values at once, and take a small part of the time."""
    made, chosen = kernels(name, target, winograd="auto")
    assert not [loop for kernel in made for loop in summing_loops_of(kernel, chosen) if spills(loop)]


@pytest.mark.parametrize("target", ["neoverse-n1", "cortex-a72"])
@pytest.mark.parametrize("name", ["1x1", "tokens", "few rows"])
def test_neon_multiplies_by_elements(name: str, target: str) -> None:
    """A left element that is a lane of a register needs no instruction to be broadcast: FMLA by element."""
    made, chosen = kernels(name, target)
    loops = [loop for kernel in made for loop in summing_loops_of(kernel, chosen)]
    largest = max(loops, key=lambda loop: loop.count("fmla"))
    lines = [line.split("//")[0] for line in largest.splitlines()]
    by_element = [line for line in lines if "fmla" in line and line.rstrip().endswith("]")]
    broadcasts = [line for line in lines if line.split()[:1] in (["dup"], ["ld1r"])]
    assert len(by_element) * 2 >= largest.count("fmla") or len(broadcasts) * 3 <= largest.count("fmla"), largest


def too_large(target: Target, rows: int, vectors: int) -> Kernel:
    """A register tile."""
    lanes, n = target.lanes(32), k.index_symbol("n", 100)
    x, w, y = (Buffer(stem, F32, 100 * rows * vectors * lanes) for stem in "xwy")

    def right(v: int) -> Scalar:
        return load(w, (n * vectors + v) * lanes, lanes)

    tile = Tile(rows, vectors, lanes)
    body = multiply_accumulate(tile, F32, [("n", 100)], lambda i: load(x, n * rows + i), right)
    sums = accumulators(tile, F32)
    stores = [k.Store(y, i * lanes, load(sums, i, lanes)) for i in range(rows * vectors)]
    return Kernel("k", (y, x, w), ("y",), (), (*body, *stores))


@pytest.mark.parametrize(("name", "rows", "vectors"), [("haswell", 8, 3), ("neoverse-n1", 12, 4), ("x86-64-v4", 12, 4)])
def test_spills_are_seen(name: str, rows: int, vectors: int) -> None:
    target = Target.parse(name)
    assert any(map(spills, multiplying_loops(too_large(target, rows, vectors), target)))
