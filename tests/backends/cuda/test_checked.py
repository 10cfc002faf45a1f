"""Whole models in the mode that finds data races, wrong addresses and misaligned accesses, from ONNX to results."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from gpu import emulated_gpu
from onnxc.backends.cuda import build
from onnxc.ir.loops import Kernel
from small_models import image, model_of_text, small_cnn


def rows() -> bytes:
    """A layer normalisation of long rows: the threads of a block share each."""
    text = """rows (float[n, 3000] x) => (float[n, 3000] y) { y = LayerNormalization (x, scale, bias) }"""
    ones = np.ones(3000, np.float32)
    return bytes(model_of_text(text, scale=ones, bias=ones).SerializeToString())


@pytest.mark.parametrize("precision", ["f32", "tf32", "f16", "bf16"])
def test_models_have_no_races(precision: str) -> None:
    with emulated_gpu(checked=True):
        model = onnxc.compile(small_cnn(), target="cuda", precision=precision)
        expected = onnxc.compile(small_cnn())
        for shape in ((1, 3, 8, 8), (2, 3, 9, 7)):
            np.testing.assert_allclose(model(image(*shape)), expected(image(*shape)), atol=2e-2)


def test_long_rows_have_no_races() -> None:
    with emulated_gpu(checked=True):
        model = onnxc.compile(rows(), target="cuda")
        np.testing.assert_allclose(model(image(3, 3000)), onnxc.compile(rows())(image(3, 3000)), atol=1e-5)


def test_a_missing_barrier_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    render = build.render_kernel

    def without_barriers(kernel: Kernel) -> str:
        return render(kernel).replace("barrier();", ";")

    with emulated_gpu(checked=True):
        monkeypatch.setattr(build, "render_kernel", without_barriers)
        model = onnxc.compile(rows(), target="cuda")
        with pytest.raises(onnxc.DeviceError, match="kernel"):
            model(image(3, 3000))


def test_a_read_behind_the_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    render = build.render_kernel

    def shifted(kernel: Kernel) -> str:
        return render(kernel).replace("x0[", "x0[1000000 + ").replace("(x0 +", "(x0 + 1000000 +")

    with emulated_gpu(checked=True):
        monkeypatch.setattr(build, "render_kernel", shifted)
        model = onnxc.compile(rows(), target="cuda")
        with pytest.raises(onnxc.DeviceError, match="kernel"):
            model(image(3, 3000))
