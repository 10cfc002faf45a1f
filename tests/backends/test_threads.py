"""How compiled models use threads: what is planned for how many, and what becomes of work that is divided."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxc.backends.cpu.kernels.division import TASKS_PER_THREAD, divides_rows, row_blocks
from onnxc.compiler import loading, options
from onnxc.compiler.options import Options, target_of

RANDOM = np.random.default_rng(0)


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the machine had eight processors; threads are real."""
    monkeypatch.setattr(options, "available_threads", lambda: 8)


def floats(*shape: int) -> np.ndarray:
    """Whole numbers, so that sums are exact in any order."""
    return RANDOM.integers(-4, 5, shape).astype(np.float32)


def model_of(
    nodes: Sequence[tuple[str, Sequence[str], dict[str, Any]]],
    constants: dict[str, np.ndarray],
    **inputs: Sequence[int | str],
) -> onnx.ModelProto:
    """A chain of nodes (operator, inputs, attributes), each named by its position; the last one's value is returned."""
    made = [helper.make_node(op, names, [f"v{i}"], **given) for i, (op, names, given) in enumerate(nodes)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    last = helper.make_tensor_value_info(made[-1].output[0], TensorProto.FLOAT, None)
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(made, "g", ports, [last], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def check_all(model: onnx.ModelProto, inputs: dict[str, np.ndarray], threads: Sequence[int]) -> np.ndarray:
    """The output by definitions, which is the same, bit by bit, for every number of threads."""
    (name,) = (output.name for output in model.graph.output)

    def output(count: int) -> np.ndarray:
        found: np.ndarray = onnxc.compile(model, threads=count, winograd="off", strassen="off").run(inputs)[name]
        return found

    expected = output(1)
    for count in threads:
        np.testing.assert_array_equal(output(count), expected)
    return expected


# --- planning


def test_schedules_are_planned_for_the_threads_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cache decides: code for one thread is not taken for two."""
    monkeypatch.setattr(options, "available_threads", lambda: 2)
    assert [target_of(Options(threads=n)).threads for n in (None, 1, 2, 64)] == [2, 1, 2, 2]
    assert Options(threads=1).decisive != Options(threads=2).decisive == Options().decisive
    monkeypatch.setattr(options, "available_threads", lambda: 8)
    assert target_of(Options()).threads == 8
    named = [target_of(Options(target="x86-64-v3", threads=n)).threads for n in (None, 16)]
    assert named == [options.USUAL_THREADS, 16]  # of another machine only the caller knows how many it has


def test_rows_are_divided_unless_the_constants_are_larger() -> None:
    def divided(pixels: int, channels: int, filters: int, threads: int = 2) -> bool:
        return divides_rows(4 * pixels * channels, 4 * channels * filters, 4 * pixels * filters, threads)

    assert divided(56 * 56, 64, 256) and divided(28 * 28, 512, 128)  # ResNet's first stages
    assert not divided(7 * 7, 2048, 512) and not divided(1, 4096, 1000)  # its last one; a classifier
    assert not divided(56 * 56, 64, 256, threads=1)


@given(rows=st.integers(0, 500), others=st.integers(1, 100), threads=st.integers(1, 64))
def test_every_thread_has_rows_and_enough_tasks(rows: int, others: int, threads: int) -> None:
    blocks = row_blocks(rows, others, threads)
    assert 1 <= blocks <= max(rows, 1)
    if rows >= threads:
        assert blocks >= threads
        assert blocks == rows or blocks * others >= TASKS_PER_THREAD * threads
    assert blocks % threads == 0 or blocks == max(rows, 1)  # as many for each


# --- results do not depend on it


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("rows", [7, 40, 129])
@pytest.mark.parametrize(("depth", "columns"), [(5, 300), (130, 33), (64, 64)])
def test_products(rows: int, depth: int, columns: int) -> None:
    x, w, b = floats(rows, depth), floats(depth, columns), floats(columns)
    nodes = [("MatMul", ["x", "w"], {}), ("Add", ["v0", "b"], {}), ("Relu", ["v1"], {})]
    found = check_all(model_of(nodes, {"w": w, "b": b}, x=x.shape), {"x": x}, (2, 7))
    np.testing.assert_array_equal(found, np.maximum(x @ w + b, 0))
    both = model_of([("MatMul", ["x", "w"], {})], {}, x=x.shape, w=w.shape)
    np.testing.assert_array_equal(check_all(both, {"x": x, "w": w}, (3,)), x @ w)


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("winograd", ["off", "auto"])
@pytest.mark.parametrize(
    ("shape", "filters", "kernel", "given"),
    [
        ((1, 16, 23, 19), 48, 3, {"pads": [1, 1, 1, 1]}),
        ((3, 16, 7, 7), 32, 3, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ((1, 32, 13, 5), 80, 1, {}),
        ((2, 24, 9, 9), 48, 1, {"group": 4}),
        ((1, 80, 14, 14), 80, 3, {"group": 80, "pads": [1, 1, 1, 1]}),
        ((5, 40, 3, 4), 40, 5, {"group": 40, "pads": [2, 2, 2, 2]}),
        ((1, 64, 1, 1), 64, 1, {}),
    ],
)
def test_convolutions(shape: tuple[int, ...], filters: int, kernel: int, given: dict[str, Any], winograd: str) -> None:
    w = floats(filters, shape[1] // given.get("group", 1), kernel, kernel)
    nodes = [("Conv", ["x", "w", "b"], given), ("Relu", ["v0"], {})]
    x = floats(*shape)
    model = model_of(nodes, {"w": w, "b": floats(filters)}, x=shape)
    if winograd == "off":
        check_all(model, {"x": x}, (2, 7))
        return
    # Each number of threads may have filters of its own.
    exact = onnxc.compile(model, threads=1, winograd="off").run({"x": x})["v1"]
    for count in (1, 3):
        found = onnxc.compile(model, threads=count, winograd="auto").run({"x": x})["v1"]
        np.testing.assert_allclose(found, exact, atol=1e-4 * float(np.max(np.abs(exact))))


@pytest.mark.usefixtures("many_threads")
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_networks_of_open_sizes(data: st.DataObject) -> None:
    """Convolution, pooling, softmax and normalisation over sizes that only the run knows."""
    threads = data.draw(st.integers(2, 8))
    size = [data.draw(st.integers(3, 40)) for _ in range(2)]
    nodes: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Conv", ["x", "w"], {"pads": [1, 1, 1, 1]}),
        ("MaxPool", ["v0"], {"kernel_shape": [2, 2]}),
        ("Softmax", ["v1"], {"axis": 1}),
        ("ReduceMean", ["v2", "axes"], {}),
    ]
    constants = {"w": floats(24, 8, 3, 3), "axes": np.array([2, 3])}
    model = model_of(nodes, constants, x=["n", 8, "h", "w"])
    check_all(model, {"x": floats(2, 8, *size)}, (threads,))


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("batch", [1, 3])
def test_recurrent_layers(direction: str, batch: int) -> None:
    directions, hidden, inputs, steps = 1 + (direction == "bidirectional"), 70, 9, 6
    weights = {
        "w": (RANDOM.standard_normal((directions, 4 * hidden, inputs)) / 8).astype(np.float32),
        "r": (RANDOM.standard_normal((directions, 4 * hidden, hidden)) / 8).astype(np.float32),
    }
    nodes = [("LSTM", ["x", "w", "r"], {"hidden_size": hidden, "direction": direction})]
    x = RANDOM.standard_normal((steps, batch, inputs)).astype(np.float32)
    model = model_of(nodes, weights, x=x.shape)
    expected = onnxc.compile(model, threads=1).run({"x": x})["v0"]
    for count in (2, 4):
        found = onnxc.compile(model, threads=count).run({"x": x})["v0"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# --- several models, one pool


def workers() -> int:
    """Of the pool in this process."""
    tasks = Path("/proc/self/task")
    return sum((task / "comm").read_text().strip() == "onnxc" for task in tasks.iterdir())


def at_once(count: int, action: Callable[[int], None]) -> None:
    """Runs `action` on several threads; raises what one of them raises."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            action(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("many_threads")
@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/task").exists(), reason="counts threads by /proc")
def test_models_share_one_pool() -> None:
    """Two models called from two threads at once: right results, and never more workers than one call may have."""

    def child() -> None:
        made = []
        for columns in (300, 170):
            w = floats(200, columns)
            made.append((onnxc.compile(model_of([("MatMul", ["x", "w"], {})], {"w": w}, x=["n", 200]), threads=3), w))

        def call(number: int) -> None:
            model, w = made[number]
            for rows in (1, 64, 130) * 20:
                x = np.full((rows, 200), number + 1, np.float32)
                np.testing.assert_array_equal(model(x), x @ w)

        at_once(2, call)
        assert workers() <= 2

    process = os.fork()
    if process == 0:
        code = 1
        try:
            child()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_no_more_threads_than_there_are_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    executable = loading.Executable

    def recorded(compiled: Any, threads: int, *others: Any) -> Any:
        asked.append(threads)
        return executable(compiled, threads, *others)

    monkeypatch.setattr(loading, "Executable", recorded)
    monkeypatch.setattr(options, "available_threads", lambda: 2)
    model = model_of([("Relu", ["x"], {})], {}, x=[4])
    for wanted in (1, 2, 1000, None):
        onnxc.compile(model, threads=wanted)
    assert asked == [1, 2, 2, 2]
