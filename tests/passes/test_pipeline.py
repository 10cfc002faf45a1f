"""The passes before fusion, all of them: on ONNX's own cases and on real models, same numbers, and twice is once."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
from models.engines import onnx_runtime
from models.zoo import MODELS, relative_difference
from node_cases import node_cases
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxc.compiler.importer import import_model
from onnxc.ir.errors import OnnxcError
from onnxc.ir.export import to_onnx
from onnxc.passes import DEFAULT_PIPELINE
from pass_checks import transformed

GRAPH_PASSES = DEFAULT_PIPELINE.partition(",merge-products")[0]
SLICES = 16
RANDOM = ("bernoulli", "randn", "random", "multinomial")
MODEL_NAMES = (
    "random_shufflenet", "random_inception_v2", "random_densenet121", "ppocr_rec", "ppocr_cls", "nudenet", "khmersm",
    "basic_pitch", "silero_op18_ifless", "silero_16k_sequence", "ddddocr_det", "mtcnn_pnet",
)  # fmt: skip


def outputs_alike(expected: np.ndarray, actual: np.ndarray) -> bool:
    """Whether two outputs are the same but for rounding."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    if expected.dtype.kind in "fcV":
        wide = np.complex128 if expected.dtype.kind == "c" else np.float64
        return bool(np.allclose(actual.astype(wide), expected.astype(wide), rtol=1e-4, atol=1e-5, equal_nan=True))
    return bool(np.all(actual == expected))


@pytest.mark.parametrize("part", range(SLICES))
def test_onnx_cases(part: int) -> None:
    """Half of the cases as they are, the other half with their inputs as constants, so that all of it folds."""
    tried = 0
    for number, (name, case) in enumerate(sorted(node_cases().items())):
        inputs, expected = case.data_sets[0]
        plain = all(isinstance(array, np.ndarray) for array in (*inputs, *expected))
        if number % SLICES != part or not plain or any(word in name for word in RANDOM):
            continue
        model = onnx.ModelProto.FromString(case.model.SerializeToString())
        feeds = dict(zip([value.name for value in model.graph.input], inputs, strict=True))
        if number // SLICES % 2:
            model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in feeds.items())
            del model.graph.input[:]
        try:
            graph = import_model(model)
        except OnnxcError:
            continue
        feeds = {value.name: feeds[value.name] for value in graph.inputs}
        before = to_onnx(graph)
        after = to_onnx(transformed(GRAPH_PASSES, graph, verified=False))
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            results = [ReferenceEvaluator(each).run(None, feeds) for each in (before, after)]
        for wanted, found in zip(*results, strict=True):
            assert outputs_alike(np.asarray(wanted), np.asarray(found)), name
        tried += 1
    assert tried > 40


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_real_models(name: str) -> None:
    """Under the names of the model's outputs."""
    model = MODELS[name]
    source = model.source()
    graph = transformed(GRAPH_PASSES, import_model(source))
    expected, actual = onnx_runtime(source), onnx_runtime(to_onnx(graph).SerializeToString())
    for inputs in list(model.cases().values())[:2]:
        wanted, found = expected(inputs), actual(inputs)
        assert found.keys() == wanted.keys()
        for key, array in wanted.items():
            assert relative_difference(found[key], array) < 1e-4
