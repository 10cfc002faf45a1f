"""Calling compiled models: arguments of all kinds, many sizes, several threads, after fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxc
import pytest
from onnxc.backends.cpu import objects
from onnxc.compiler import executable as executable_module
from small_models import Array, image, model_of_text, small_cnn


def compiled(text: str, **weights: Array) -> onnxc.Executable:
    model = onnxc.compile(model_of_text(text, **weights))
    assert isinstance(model, onnxc.Executable)
    return model


@pytest.fixture(scope="module")
def cnn() -> onnxc.Executable:
    model = onnxc.compile(small_cnn())
    assert isinstance(model, onnxc.Executable)
    return model


@pytest.fixture(scope="module")
def total() -> onnxc.Executable:
    """z = x + y, both of the sizes [n, m]."""
    return compiled("g (float[n, m] x, float[n, m] y) => (float[n, m] z) { z = Add (x, y) }")


# Arguments


def test_by_position_and_by_name(total: onnxc.Executable) -> None:
    x, y = image(2, 3), image(2, 3) * 2
    for z in (total(x, y), total(x, y=y), total(y=y, x=x), total.run({"y": y, "x": x})["z"]):
        np.testing.assert_array_equal(z, x + y)
        assert z.flags.owndata and z.dtype == np.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: f(x), r"missing: y"),
        (lambda f, x: f(x, x, x), r"3 arguments for 2 inputs: x, y"),
        (lambda f, x: f(x, x=x), r"given twice, by position and by name; the inputs are x, y"),
        (lambda f, x: f(x, z=x), r"missing: y; unknown: z\); the model takes x: f32\[n, m\], y: f32\[n, m\]"),
        (lambda f, x: f.run({"x": x}), r"missing: y"),
        (lambda f, x: f(x, x[0]), r"input 'y' has shape \(3,\): it must have rank 2, y: f32\[n, m\]"),
        (lambda f, x: f(x, x[:1]), r"axis 0 of input 'y' is 1: it must be n.*\(n = 2 by axis 0 of input 'x'\)"),
        (lambda f, x: f(x, x[:, :2]), r"axis 1 of input 'y' is 2: it must be m.*\(m = 3 by axis 1 of input 'x'\)"),
        (lambda f, x: f(x, x.astype(np.float64)), r"input 'y' is of float64: it must be float32, y: f32\[n, m\]"),
        (lambda f, x: f(x, x.astype(np.int32)), r"input 'y' is of int32"),
        (lambda f, x: f(x, [["a", "b", "c"]] * 2), r"input 'y' is of <U1"),
    ],
)
def test_what_does_not_fit_is_named(total: onnxc.Executable, call: Callable[..., Any], message: str) -> None:
    with pytest.raises(onnxc.ShapeError, match=message):
        call(total, image(2, 3))


def unaligned(array: Array) -> Array:
    """The same numbers one byte off."""
    room = np.zeros(array.nbytes + 1, np.uint8)
    view = room[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned
    return view


class Exported:
    """Speaks DLPack and nothing else."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **named: Any) -> Any:
        return self.array.__dlpack__(**named)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class Subclass(np.ndarray):
    """As users of numpy make them."""


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.copy("F"),
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x[::-1].copy()[::-1],
        lambda x: x.astype(x.dtype.newbyteorder()),
        lambda x: x.view(np.dtype("<f4", metadata={"unit": "K"})),
        lambda x: np.broadcast_to(x, (2, 2, 3))[1],
        lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
        lambda x: x.view(Subclass),
        lambda x: memoryview(x),
        lambda x: x.tolist(),
        unaligned,
        Exported,
    ],
    ids=["Fortran", "strided", "reversed", "swapped", "metadata", "broadcast", "readonly", "subclass", "buffer",
         "list", "unaligned", "DLPack"],
)  # fmt: skip
def test_arrays_of_every_form(total: onnxc.Executable, form: Callable[[Array], Any]) -> None:
    x, y = image(2, 3), image(3, 2).reshape(2, 3)
    for _ in range(2):
        np.testing.assert_array_equal(total(form(x), y), x + y)
        np.testing.assert_array_equal(total(y, form(x)), x + y)


def test_scalars_and_empty_arrays(total: onnxc.Executable) -> None:
    scalar = compiled("g (float x, int64 k) => (float y, int64 j) { y = Neg (x) j = Neg (k) }")
    for x, k in ((np.array(2.5, np.float32), np.array(3)), (np.float32(2.5), np.int64(3)), (2.5, 3)):
        y, j = scalar(x, k)
        assert y.shape == j.shape == () and y == -2.5 and j == -3
    for shape in ((0, 3), (2, 0), (0, 0)):
        assert total(np.empty(shape, np.float32), np.empty(shape, np.float32)).shape == shape


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint16, np.int64, np.bool_, ml_dtypes.bfloat16])
def test_element_types(dtype: Any) -> None:
    names = {"bool_": "bool", "float64": "double"}
    name = names.get(dtype.__name__, dtype.__name__)
    model = compiled(f"g ({name}[n] x) => ({name}[m] y) {{ y = Concat <axis = 0> (x, x) }}")
    x = np.array([0, 1, 1, 0, 1]).astype(dtype)
    np.testing.assert_array_equal(model(x), np.concatenate([x, x]))
    assert model(x).dtype == dtype


def test_outputs_that_are_inputs_constants_or_one_another() -> None:
    weights = np.float32([1, 2, 3])
    model = compiled(
        "g (float[n] x) => (float[n] x, float[3] w, float[n] y, float[n] twin, float[n] same)"
        " { y = Neg (x) twin = Identity (y) same = Identity (x) }",
        w=weights,
    )
    x = image(4)
    results = model(x)
    for result, expected in zip(results, (x, weights, -x, -x, x), strict=True):
        np.testing.assert_array_equal(result, expected)
    pairs = [(a, b) for i, a in enumerate([x, weights, *results]) for b in results[max(i - 1, 0) :] if a is not b]
    assert not any(np.shares_memory(a, b) for a, b in pairs)
    results[1][:] = 0
    np.testing.assert_array_equal(model(x)[1], weights)


def test_no_nodes_and_no_inputs() -> None:
    through = compiled("g (float[n] x) => (float[n] x) { }")
    np.testing.assert_array_equal(through(image(3)), image(3))
    constant = compiled("g () => (float[2] w) { }", w=np.float32([1, 2]))
    np.testing.assert_array_equal(constant(), [1, 2])


# Sizes


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_many_sizes_cost_neither_memory_nor_compiling(cnn: onnxc.Executable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("compiled again")

    monkeypatch.setattr(objects.Compilation, "__init__", refuse)
    expected = cnn(image(1, 3, 16, 16))
    cnn(np.zeros((200, 3, 16, 16), np.float32))
    before = resident_bytes()
    for batch in [*range(1, 201), *range(200, 0, -1)]:
        scores = cnn(np.zeros((batch, 3, 16, 16), np.float32))
        assert scores.shape == (batch, 5)
    # Each size would cost 0.6 MB on average if its arena were kept: 240 MB in all.
    assert resident_bytes() - before < 16 << 20
    assert len(cnn._known) <= executable_module.SHAPES_KEPT
    np.testing.assert_array_equal(cnn(image(1, 3, 16, 16)), expected)


def test_sizes_and_plan_agree(cnn: onnxc.Executable) -> None:
    plan = cnn.plan.at(batch=3, height=9, width=7)
    cnn(image(3, 3, 9, 7))
    assert plan.arena_bytes == cnn._known[((3, 3, 9, 7),)].arena
    assert 0 < plan.lower_bound <= plan.arena_bytes <= cnn.plan.arena_bytes
    assert all(b.offset + b.bytes <= plan.arena_bytes and b.offset % 64 == 0 for b in plan.buffers)
    assert cnn.plan.arena_bytes == cnn.compiled.arena.size and cnn.plan.lower_bound == cnn.compiled.arena.lower_bound
    with pytest.raises(
        onnxc.ShapeError, match="sequence: the arena depends on no such symbol; on batch, height, width"
    ):
        cnn.plan.at(sequence=1)


def test_every_stage_has_a_text(cnn: onnxc.Executable) -> None:
    expected = {
        "import": "Conv(", "graph": "graph @cnn", "kernels": "softmax", "vectors": "softmax", "program": "program @cnn",
        "llvm": "define void @onnxc_run_0", "asm": "onnxc_run_0:",
    }  # fmt: skip
    for stage, text in expected.items():
        assert text in cnn.dump(stage), stage
    with pytest.raises(onnxc.OnnxcError, match="no stage is called 'cuda'"):
        cnn.dump("cuda")


def test_dumps_of_a_model_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXC_CACHE_DIR", str(tmp_path))
    (tmp_path / "cnn.onnx").write_bytes(small_cnn().SerializeToString())
    first, second = (onnxc.compile(tmp_path / "cnn.onnx") for _ in range(2))
    assert second.dump("program") == first.dump("program")


# Threads and processes


def test_calls_from_several_threads(cnn: onnxc.Executable) -> None:
    shapes = [(1 + i % 5, 3, 8 + i % 3, 8) for i in range(40)]
    expected = [cnn(image(*shape)) for shape in shapes]
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for step in range(len(shapes)):
            i = (step * (number + 1) + number) % len(shapes)
            np.testing.assert_array_equal(cnn(image(*shapes[i])), expected[i])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, number) for number in range(4)]:
            done.result()
    assert len(cnn._workspaces) <= 5


def test_calls_that_bind_sizes_from_several_threads() -> None:
    model = compiled("g (float[n] x) => (int64[1, k] y) { y = NonZero (x) }")

    def work(number: int) -> None:
        random = np.random.default_rng(number)
        for _ in range(100):
            x = (random.random(random.integers(0, 300)) < 0.5).astype(np.float32)
            np.testing.assert_array_equal(model(x), np.stack(np.nonzero(x)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_calls_after_fork() -> None:
    model = onnxc.compile(small_cnn(), threads=2)
    pixels = image(4, 3, 64, 64)
    expected = model(pixels)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            same = all(np.array_equal(model(pixels), expected) for _ in range(5))
            status = 0 if same and model(image(2, 3, 9, 9)).shape == (2, 5) else 2
        finally:
            os._exit(status)
    for _ in range(5):
        np.testing.assert_array_equal(model(pixels), expected)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_executable_goes_with_its_last_reference() -> None:
    """Its code is unloaded; the arrays that it gave stay."""
    model = compiled("g (float[n] x) => (float[n] y) { y = Neg (x) }")
    close = model._image.close
    result = model(image(3))
    assert close.alive
    del model
    assert not close.alive
    np.testing.assert_array_equal(result, -image(3))
