"""Calls as builtin functions: what they take, what they leave to Python, references, several threads."""

from __future__ import annotations

import functools
import gc
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxc.backends.cpu import python_call
from onnxc.compiler import executable as executable_module
from onnxc.compiler.executable import Executable
from small_models import image, model_of_text, small_cnn

needs_builtins = pytest.mark.skipif(not python_call.arrays_are_as_known(), reason="another interpreter")

SUM = "g (float[n, m] x, float[n, m] y) => (float[n, m] z) { z = Add (x, y) }"
TWO = "g (float[n] x) => (float[n] y, float[n] z) { y = Neg (x) z = Abs (x) }"
PICK = "g (float[n] x, int64[k] i) => (float[k] y) { y = Gather <axis = 0> (x, i) }"


def compiled(text: str) -> Executable:
    model = onnxc.compile(model_of_text(text))
    assert isinstance(model, Executable)
    return model


@pytest.fixture(params=["builtin", "Python", "other layout"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How calls go: by the builtin functions, by Python, by Python without a look into arrays."""
    if request.param == "builtin" and not python_call.arrays_are_as_known():
        pytest.skip("another interpreter")
    if request.param != "builtin":
        monkeypatch.setattr(python_call, "_functions", lambda: None)
    if request.param == "other layout":
        monkeypatch.setattr(executable_module, "arrays_are_as_known", lambda: False)
    yield request.param


def test_all_ways_give_the_same(way: str) -> None:
    model = compiled(SUM)
    assert (model._native is not None) == (way == "builtin")
    for shape in ((2, 3), (4, 1), (2, 3), (0, 5), (300, 200)):
        x, y = image(*shape), image(*shape) * 2
        for z in (model(x, y), model(x, y=y), model.run({"y": y, "x": x})["z"], model(x[:, ::1], y.copy("F"))):
            np.testing.assert_array_equal(z, x + y)
            assert z.dtype == np.float32 and z.flags.owndata and z.shape == shape
    y, z = compiled(TWO)(image(5))
    np.testing.assert_array_equal([y, z], [-image(5), abs(image(5))])
    assert list(compiled(TWO).run({"x": image(5)})) == ["y", "z"]


def test_all_ways_refuse_the_same(way: str) -> None:
    model, x = compiled(SUM), image(2, 3)
    for _ in range(2):
        model(x, x)
        for arguments, message in (
            ((x,), "missing: y"),
            ((x, x[0]), r"must have rank 2"),
            ((x, x[:, :2]), r"axis 1 of input 'y' is 2: it must be m.* \(m = 3 by axis 1 of input 'x'\)"),
            ((x, x.astype(np.float64)), "input 'y' is of float64: it must be float32"),
            ((x, None), "input 'y' is of object"),
        ):
            with pytest.raises(onnxc.ShapeError, match=message):
                model(*arguments)
            with pytest.raises(onnxc.ShapeError, match=message):
                model.run(dict(zip("xy", arguments, strict=False)))
        with pytest.raises(onnxc.ShapeError, match="unknown: z"):
            model.run({"x": x, "z": x})


def test_what_checks_find_is_told_each_time(way: str) -> None:
    model, x = compiled(PICK), image(4)
    good, bad = np.array([3, -4]), np.array([1, 4])
    for _ in range(3):
        np.testing.assert_array_equal(model(x, good), x[good])
        with pytest.raises(onnxc.OnnxcError, match="4"):
            model(x, bad)
        with pytest.raises(onnxc.OnnxcError, match="4"):
            model.run({"x": x, "i": bad})
    assert len(model._workspaces) == 1


@needs_builtins
def test_plain_calls_run_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = compiled(SUM), image(2, 3)
    model(x, x)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("the slow way")

    monkeypatch.setattr(Executable, "_execute", refuse)
    np.testing.assert_array_equal(model(x, x), 2 * x)
    np.testing.assert_array_equal(model.run({"y": x, "x": x})["z"], 2 * x)
    with pytest.raises(AssertionError, match="the slow way"):
        model(x[:1], x[:1])


LOOP = """
g (float[n] x, int64 trips) => (float[n] y) {
    go = Constant <value = bool {1}> ()
    y = Loop <body = step (int64 i, bool before, float[n] s) => (bool after, float[n] t) {
        after = Identity (before)
        t = Add (s, s)
    }> (trips, go, x)
}"""


def test_loops_and_sizes_that_data_tell(way: str) -> None:
    """Loops need no Python; sizes that only the run tells do."""
    loop, x = compiled(LOOP), image(4)
    for trips in (3, 0, 5, 3):
        np.testing.assert_array_equal(loop(x, np.array(trips)), x * 2**trips)
    assert (loop._native is not None) == (way == "builtin")
    find = compiled("g (float[n] x) => (int64[1, k] y) { y = NonZero (x) }")
    for data in ([0.0, 1, 2], [0.0, 0, 0], [1.0, 0, 2]):
        np.testing.assert_array_equal(find(np.float32(data)), np.stack(np.nonzero(data)))
    assert find._native is None


@needs_builtins
def test_no_reference_is_lost_or_kept() -> None:
    model, x, wrong = compiled(TWO), image(5), image(5, 1)
    model(x)

    def counts() -> list[int]:
        return [sys.getrefcount(item) for item in (x, wrong, x.dtype, model, *model._names, np.ndarray, dict)]

    def work(number: int) -> None:
        for _ in range(number):
            model(x)
            model.run({"x": x})
            for call in (lambda: model(wrong), lambda: model.run({"x": wrong}), lambda: model.run({"y": x})):
                with pytest.raises(onnxc.ShapeError):
                    call()

    work(3)
    gc.collect()
    before = counts()
    work(100)
    gc.collect()
    assert all(abs(a - b) < 10 for a, b in zip(before, counts(), strict=True))
    result = model(x)[0]
    assert sys.getrefcount(result) == 2


@needs_builtins
def test_a_key_that_calls_the_model_while_it_is_looked_up() -> None:
    model, x, y = compiled(SUM), image(2, 3), image(2, 3) * 3
    found = []

    class Key(str):
        """Hashes like an input's name, and is asked whether it is that."""

        __slots__ = ()

        def __hash__(self) -> int:
            return hash("y")

        def __eq__(self, other: object) -> bool:
            found.append(model(y, y))
            return other == "y"

    model(x, y)
    for _ in range(2):
        np.testing.assert_array_equal(model.run({Key("other"): y, "x": x})["z"], x + y)
    assert found
    for result in found:
        np.testing.assert_array_equal(result, 2 * y)


@needs_builtins
def test_more_sizes_than_are_kept() -> None:
    model = compiled(TWO)
    for size in [*range(executable_module.SHAPES_KEPT + 10), *range(20)]:
        for _ in range(2):
            np.testing.assert_array_equal(model(image(size + 1))[0], -image(size + 1))
    native = model._native
    assert native is not None and len(native._settings) <= executable_module.SHAPES_KEPT
    assert len(model._workspaces) == 1


def test_threads_have_workspaces_of_their_own(way: str) -> None:
    """Large runs let the interpreter's lock go, small ones keep it; sizes change, and some calls are refused."""
    model = onnxc.compile(small_cnn())
    shapes = [(1 + i % 3, 3, 8 * (1 + i % 4), 8) for i in range(24)]
    expected = [model(image(*shape)) for shape in shapes]
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for step in range(3 * len(shapes)):
            i = (step * (number + 1) + number) % len(shapes)
            np.testing.assert_array_equal(model(image(*shapes[i])), expected[i])
            if step % 7 == number:
                with pytest.raises(onnxc.ShapeError):
                    model(image(2, 2))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(work, number) for number in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    assert isinstance(model, Executable) and len(model._workspaces) <= 5


def test_arrays_stay_while_they_are_in_use() -> None:
    """Another thread takes the inputs out of the dict while the model runs on them."""
    model = compiled("g (float[n, k] a, float[k, m] b) => (float[n, m] c) { c = MatMul (a, b) }")
    a = np.full((200, 300), 0.5, np.float32)
    expected = model(a, a.T.copy())
    feeds: dict[str, Any] = {}
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            feeds["a"], feeds["b"] = a.copy(), a.T.copy()

    feeds |= {"a": a.copy(), "b": a.T.copy()}
    other = threading.Thread(target=disturb)
    other.start()
    try:
        for _ in range(100):
            np.testing.assert_array_equal(model.run(feeds)["c"], expected)
    finally:
        stop.set()
        other.join()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=12))
def test_any_sequence_of_sizes(shapes: list[tuple[int, int]]) -> None:
    model = _any_sizes()
    for shape in shapes:
        x = image(*shape) if all(shape) else np.empty(shape, np.float32)
        np.testing.assert_array_equal(model(x, x), x + x)


@functools.cache
def _any_sizes() -> Executable:
    return compiled(SUM)
