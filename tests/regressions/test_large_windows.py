"""Pooling windows that are larger than the image."""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from against_onnxruntime import assert_agree
from small_models import model_of_text


def test_windows_that_reach_far_beyond_the_image() -> None:
    """A global average as EfficientNet is exported: a window of hundreds of pixels, as many as there are counting."""
    model = model_of_text(
        """pooled (float[batch, 2, height, width] x) => (float[batch, 2, p, q] y, float[batch, 2, r, s] z) {
            y = AveragePool <kernel_shape = [320, 320], ceil_mode = 1, pads = [160, 160, 160, 160]> (x)
            z = MaxPool <kernel_shape = [3, 40], strides = [2, 2], pads = [1, 20, 1, 20]> (x)
        }"""
    )
    random = np.random.default_rng(0)
    assert_agree(model, *({"x": random.random((b, 2, h, w), np.float32)} for b, h, w in ((1, 3, 2), (2, 7, 12))))


@pytest.mark.parametrize("attributes", ["", "count_include_pad = 1", "pads = [1, 2, 0, 1], count_include_pad = 1"])
def test_average_of_a_window_that_ceil_mode_clips_to_the_image(attributes: str) -> None:
    """A global average as PyTorch exports EfficientNet's: one window, much larger than the image, clipped to it."""
    model = model_of_text(
        f"""pooled (float[2, 3, 7, 5] x) => (float[2, 3, 1, 1] y) {{
            y = AveragePool <kernel_shape = [1280, 640], strides = [1280, 640], ceil_mode = 1
                {attributes and ", " + attributes}> (x)
        }}"""
    )
    assert_agree(model, {"x": np.random.default_rng(1).random((2, 3, 7, 5), np.float32)})


def test_greatest_and_norm_of_windows_that_ceil_mode_clips() -> None:
    model = model_of_text(
        """pooled (float[2, 3, 5, 6] x) => (float[2, 3, 1, 1] y, float[2, 3, 1, 1] z) {
            y = MaxPool <kernel_shape = [7, 7], strides = [4, 4], ceil_mode = 1> (x)
            z = LpPool <kernel_shape = [8, 7], strides = [9, 9], pads = [1, 0, 1, 0], ceil_mode = 1> (x)
        }"""
    )
    x = np.random.default_rng(2).standard_normal((2, 3, 5, 6)).astype(np.float32)
    y, z = onnxc.compile(model)(x)
    np.testing.assert_array_equal(y, x.max((2, 3), keepdims=True))
    np.testing.assert_allclose(z, np.sqrt((x * x).sum((2, 3), keepdims=True)), rtol=1e-6)


def test_a_window_larger_than_the_image_that_leaves_no_output_is_refused() -> None:
    model = model_of_text(
        """pooled (float[1, 1, 5, 5] x) => (float[1, 1, 0, 0] y) {
            y = MaxPool <kernel_shape = [7, 7], strides = [2, 2], ceil_mode = 1> (x)
        }"""
    )
    with pytest.raises(onnxc.OnnxcError, match="a window of 7 is larger than axis 0 of 5"):
        onnxc.compile(model)
