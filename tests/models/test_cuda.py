"""Real models and topologies on a GPU, from the ONNX file through PyCUDA to the results: see `gpu.py`."""

from __future__ import annotations

import os

import onnxc
import pytest

from .engines import onnx_runtime
from .test_models import TOLERANCE, assert_closer_to_the_truth
from .zoo import MODELS, ZooModel, relative_difference

# Of ONNX's topologies those with random weights: with constant ones every result is the same number.
COMPILED = [model for model in MODELS.values() if not model.quantized and model.package != "onnx"]
ALL = os.environ.get("ONNXC_CUDA_CASES") == "all"
HALF_TOLERANCE = 2e-2
"""Of the largest value, where tensors are f16 or bf16 and sums are f32."""


@pytest.mark.parametrize("model", COMPILED, ids=lambda model: model.name)
def test_agrees_with_onnx_runtime(model: ZooModel, gpu: None) -> None:
    source = model.source()
    compiled, runtime = onnxc.compile(source, target="cuda"), onnx_runtime(source)
    # The kernels are emulated: of the sizes the smallest.
    inputs = min(model.cases().values(), key=lambda case: sum(array.size for array in case.values()))
    actual, expected = compiled.run(inputs), runtime(inputs)
    assert list(actual) == list(expected)
    worst = max(relative_difference(actual[name], expected[name]) for name in expected)
    if worst > TOLERANCE:
        assert_closer_to_the_truth(source, inputs, actual, expected, f"differs by {worst:.1e}")


HALF = ("khmersm", "mtcnn_onet", "silero_op18_ifless", "random_squeezenet", "magika", "ddddocr_common")
# These two find text by a threshold on a map that changes fast: f16 moves it by up to 4e-2 of its largest value.
FAR = ("ppocr_det", "ppocr_rec")
IN_HALF = [m for m in COMPILED if m.name not in FAR and (m.name in HALF or ALL)]


# Of bytes: results are those of ONNX Runtime, which rounds at the same places. The others take long to emulate.
QUANTIZED = [m for m in MODELS.values() if m.quantized and (ALL or m.name in ("tashkeel", "voicefilter"))]


@pytest.mark.parametrize("model", QUANTIZED, ids=lambda model: model.name)
def test_quantized_models_agree_with_onnx_runtime(model: ZooModel, gpu: None) -> None:
    source = model.source()
    inputs = min(model.cases().values(), key=lambda case: sum(array.size for array in case.values()))
    actual, expected = onnxc.compile(source, target="cuda").run(inputs), onnx_runtime(source)(inputs)
    # Where sums of reals decide between two steps, one byte may go the other way (dksplit).
    assert max(relative_difference(actual[name], expected[name]) for name in expected) <= 5e-3


@pytest.mark.parametrize("model", IN_HALF, ids=lambda model: model.name)
def test_agrees_in_f16(model: ZooModel, gpu: None) -> None:
    source = model.source()
    inputs = min(model.cases().values(), key=lambda case: sum(array.size for array in case.values()))
    actual = onnxc.compile(source, target="cuda", precision="f16").run(inputs)
    expected = onnx_runtime(source)(inputs)
    assert max(relative_difference(actual[name], expected[name]) for name in expected) <= HALF_TOLERANCE
