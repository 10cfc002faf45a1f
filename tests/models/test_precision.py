"""Real models in 16 bits against the same in f32."""

import numpy as np
import onnxc
import pytest

from .zoo import MODELS, relative_difference

TOLERANCE = 2e-2
"""Of the largest value. Models are not listed where rounding the weights alone moves an output that far."""
NAMES = (
    "basic_pitch",  # a logarithm of the spectrum that it makes first
    "ddddocr_common",
    "ddddocr_common_old",  # quantizes what it computes
    "khmersm",
    "magika",
    "mtcnn_rnet",
    "ppocr_cls",
    "silero_openvino_16k",
)


@pytest.mark.parametrize("precision", ["f16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_f32(name: str, precision: str) -> None:
    source = MODELS[name].source()
    narrow, wide = onnxc.compile(source, precision=precision), onnxc.compile(source)
    for case, inputs in MODELS[name].cases().items():
        actual, expected = narrow.run(inputs), wide.run(inputs)
        for output, array in expected.items():
            assert relative_difference(actual[output], array) <= TOLERANCE, f"{case}: {output}"
        assert any(not np.array_equal(actual[output], array) for output, array in expected.items())
