"""Pointwise and depthwise convolutions by turns: which rows each turn makes, and what comes of all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxc
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options
from onnxc.ir.dims import evaluate, symbol
from onnxc.ir.dtypes import F32
from onnxc.ir.graph import Node, TensorType, Value
from onnxc.ir.ops.windows import sliding
from onnxc.ir.program import Program, Repeat
from onnxc.ir.target import Target
from onnxc.passes.bands import FILLED, Pair
from small_models import model_of_text

TARGETS = [name for name in ("host", "x86-64-v3", "x86-64") if name == "host" or Target.host().architecture == "x86_64"]


def small_caches(name: str = "host", threads: int = 1) -> Target:
    """A machine whose second-level cache holds some rows of a small image."""
    return replace(Target.parse(name), l2_bytes=96 << 10, threads=threads)


def inverted_residual(
    batch: int | str,
    height: int,
    width: int,
    channels: int,
    kernel: int,
    stride: int,
    pads: list[int],
    between: str = "Relu",
) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    return model_of_text(
        f"""block (float[{batch}, 8, {height}, {width}] x) => (float[b, 8, h, w] y) {{
            first = Conv <pads = [1, 1, 1, 1]> (x, stem)
            wide = Conv (first, expand, bias)
            active = {between} (wide)
            moved = Conv <group = {channels}, strides = [{stride}, {stride}], pads = {pads}> (active, depthwise, bias)
            again = Sigmoid (moved)
            y = Conv (again, project)
        }}""",
        stem=random.standard_normal((8, 8, 3, 3), np.float32),
        expand=random.standard_normal((channels, 8, 1, 1), np.float32),
        bias=random.standard_normal(channels, np.float32),
        depthwise=random.standard_normal((channels, 1, kernel, kernel), np.float32),
        project=random.standard_normal((8, channels, 1, 1), np.float32),
    )


def program(model: onnx.ModelProto, target: Target) -> Program:
    return program_of(graph_of(model, Options(target=target)), target)


def loops(program: Program) -> list[Repeat]:
    return [step for segment in program.segments for step in segment if isinstance(step, Repeat)]


def agrees(model: onnx.ModelProto, target: Target) -> None:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    (expected,) = session.run(None, {"x": x})
    found = onnxc.compile(model, target=target)(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("images", "size", "channels", "kernel", "stride", "pads"),
    [
        (1, (48, 27), 32, 3, 1, [1, 1, 1, 1]),
        (3, (64, 25), 24, 3, 2, [0, 1, 1, 0]),
        (2, (60, 32), 32, 5, 1, [2, 2, 2, 2]),
        (1, (60, 31), 28, 5, 2, [2, 1, 0, 2]),
        (1, (64, 26), 32, 2, 2, [0, 0, 0, 0]),
    ],
)
def test_in_bands_as_whole(
    target: str, images: int, size: tuple[int, int], channels: int, kernel: int, stride: int, pads: list[int]
) -> None:
    model, caches = inverted_residual(images, *size, channels, kernel, stride, pads), small_caches(target)
    assert len(loops(program(model, caches))) == 1
    agrees(model, caches)


def test_the_wide_image_is_a_memory_of_two_turns() -> None:
    model = inverted_residual(1, 64, 32, 32, 3, 2, [1, 1, 1, 1])
    banded = program(model, small_caches())
    (loop,) = loops(banded)
    wide = next(memory for memory in banded.memories.values() if memory.name.startswith("active"))
    assert loop.trips == 64 // 4
    assert wide.bytes == FILLED * 4 * 32 * 32 * 4
    whole = program(model, replace(Target.host(), threads=1))
    assert not loops(whole)
    assert banded.plan.size <= whole.plan.size / 2


def test_any_number_of_images() -> None:
    model = inverted_residual("batch", 64, 32, 32, 3, 1, [1, 1, 1, 1])
    assert len(loops(program(model, small_caches()))) == 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    compiled = onnxc.compile(model, target=small_caches())
    for images in (1, 3):
        x = np.random.default_rng(2).standard_normal((images, 8, 64, 32), np.float32)
        (expected,) = session.run(None, {"x": x})
        np.testing.assert_allclose(compiled(x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_threads_that_meet_at_each_turn_must_gain_more() -> None:
    model = inverted_residual(1, 64, 32, 32, 3, 2, [1, 1, 1, 1])
    assert not loops(program(model, small_caches(threads=4)))


def test_an_image_that_others_read_too_stays_whole() -> None:
    model = inverted_residual(1, 64, 32, 32, 3, 1, [1, 1, 1, 1])
    model.graph.output.append(onnx.helper.make_tensor_value_info("active", onnx.TensorProto.FLOAT, None))
    assert not loops(program(model, small_caches()))


def test_what_mixes_pixels_in_between_is_no_band() -> None:
    model = inverted_residual(1, 64, 32, 32, 3, 1, [1, 1, 1, 1], "Softmax <axis = 2>")
    assert not loops(program(model, small_caches()))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 6),
    turns=st.integers(1, 9),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pads=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_each_turn_does_what_the_memory_holds(
    rows: int, turns: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int]
) -> None:
    """All rows in order, each when all that it reads has been made and none of that is overwritten."""
    height, reach = rows * turns, (kernel - 1) * dilation
    if height + sum(pads) <= reach or reach > rows:
        return
    windows = sliding((height, 8), (kernel, 1), (stride, 1), (dilation, 1), (pads[0], 0, pads[1], 0))
    image = Value("image", TensorType(F32, (1, height, 8, 4)))
    pair = Pair(Node("Fused", (), (image,)), Node("Fused", (), (image,)), windows)
    pair.rows = rows
    until = [evaluate(pair.until(symbol("t", 0, turns)), {"t": turn}) for turn in range(turns + 1)]
    assert until[0] == 0 and until[-1] == windows.output[0] and until == sorted(until)
    for turn in range(turns):
        made = range(max(0, (turn + 1) * rows - FILLED * rows), (turn + 1) * rows)
        for row in range(until[turn], until[turn + 1]):
            read = [row * stride - pads[0] + tap * dilation for tap in range(kernel)]
            assert all(y in made for y in read if 0 <= y < height)
