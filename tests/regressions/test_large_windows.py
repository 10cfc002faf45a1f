"""Pooling windows that are larger than the image."""

from __future__ import annotations

import numpy as np
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
