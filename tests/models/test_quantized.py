"""Real models of 8-bit integers (LSTMs that tag letters, read pictures and filter voices) beside ONNX Runtime.

Their activations are quantised at run time: where a float lies within rounding between two integers, engines take
different ones, and what is computed of it differs by a step; so results agree closely, not in every bit.
"""

from __future__ import annotations

import numpy as np
import onnxc
import pytest
from onnxc.tools.check.measured import decibels

from .engines import onnx_runtime
from .zoo import MODELS, ZooModel

QUANTIZED = [model for model in MODELS.values() if model.quantized]
LEAST = 30.0
"""Signal to noise of our results beside ONNX Runtime's, in dB."""
TAGGERS = frozenset(("dksplit", "tashkeel", "ddddocr_common_old"))
"""Models whose outputs are scores of labels: the best must be the same."""


@pytest.mark.parametrize("model", QUANTIZED, ids=lambda model: model.name)
def test_agrees_with_onnx_runtime(model: ZooModel) -> None:
    source = model.source()
    compiled, runtime = onnxc.compile(source), onnx_runtime(source)
    for case, inputs in model.cases().items():
        actual, expected = compiled.run(inputs), runtime(inputs)
        assert list(actual) == list(expected)
        for name, wanted in expected.items():
            found = actual[name]
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), (case, name)
            gap = found.astype(np.float64) - wanted
            ratio = decibels(float(np.sum(wanted.astype(np.float64) ** 2)), float(np.sum(gap**2)))
            assert ratio > LEAST, f"{case}, {name}: {ratio:.1f} dB"
            if model.name in TAGGERS:
                np.testing.assert_array_equal(found.argmax(-1), wanted.argmax(-1), err_msg=f"{case}, {name}")
