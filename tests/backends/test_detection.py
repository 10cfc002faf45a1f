"""NonMaxSuppression against ONNX Runtime, and determinants against numpy."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from single_node import Array, assert_equal, compiled, model_of, run_node


def boxes_and_scores(batches: int, classes: int, count: int, centre: bool, seed: int) -> tuple[Array, Array]:
    """Boxes that overlap, some with their corners exchanged; scores of which some are equal."""
    random = np.random.default_rng(seed)
    first, size = random.random((batches, count, 2)), random.random((batches, count, 2)) * 0.5
    if centre:
        boxes = np.concatenate([first, size], -1)
    else:
        boxes = np.concatenate([first, first + size], -1)
        turned = random.random(count) < 0.3
        boxes[:, turned] = boxes[:, turned][..., [2, 3, 0, 1]]
    scores = random.integers(0, 8, (batches, classes, count)) / 8
    return boxes.astype(np.float32), scores.astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 1),
    st.none() | st.integers(0, 12),
    st.none() | st.sampled_from([0.0, 0.3, 0.9]),
    st.none() | st.sampled_from([0.0, 0.4, 2.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_non_max_suppression(
    batches: int,
    classes: int,
    count: int,
    centre: int,
    most: int | None,
    overlap: float | None,
    least: float | None,
    symbolic: bool,
    seed: int,
) -> None:
    boxes, scores = boxes_and_scores(batches, classes, count, bool(centre), seed)
    operands: dict[str, Array | None] = {
        "boxes": boxes,
        "scores": scores,
        "most": None if most is None else np.array([most]),
        "overlap": None if overlap is None else np.array([overlap], np.float32),
        "least": None if least is None else np.array([least], np.float32),
    }
    names = [name if array is not None else "" for name, array in operands.items()]
    inputs = {name: array for name, array in operands.items() if array is not None}
    node = helper.make_node("NonMaxSuppression", names, ["y"], center_point_box=centre)
    constants = {name: inputs.pop(name) for name in ("most", "overlap") if name in inputs and seed % 2}
    model = model_of([node], inputs, constants, ["y"], symbolic, opset=21)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert_equal(compiled(model, inputs), session.run(None, inputs))


def test_boxes_kept_are_gathered() -> None:
    """What detectors do with the result: the boxes, scores and classes of what is kept."""
    boxes, scores = boxes_and_scores(1, 3, 60, False, 4)
    nodes = [
        helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "overlap", "least"], ["kept"]),
        helper.make_node("Split", ["kept"], ["batch", "kind", "box"], axis=1, num_outputs=3),
        helper.make_node("Squeeze", ["box", "one"], ["number"]),
        helper.make_node("Gather", ["boxes", "number"], ["found"], axis=1),
        helper.make_node("GatherND", ["scores", "kept"], ["values"]),
    ]
    constants = {
        "most": np.array([10]), "overlap": np.array([0.4], np.float32), "least": np.array([0.2], np.float32),
        "one": np.array([1]),
    }  # fmt: skip
    inputs = {"boxes": boxes, "scores": scores}
    model = model_of(nodes, inputs, constants, ["found", "values", "kind"], opset=21)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = compiled(model, inputs)
    assert found[0].shape[1] > 3
    assert_equal(found, session.run(None, inputs))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5, 5), (3, 4, 4), (2, 3, 9, 9), (0, 3, 3), (40, 40)])
@pytest.mark.parametrize("symbolic", [False, True])
def test_determinant(shape: tuple[int, ...], symbolic: bool) -> None:
    for dtype, tolerance in (("float32", 2e-4), ("float64", 1e-10)):
        x = (np.random.default_rng(0).standard_normal(shape) / 2).astype(dtype)
        (found,) = run_node("Det", {"x": x}, symbolic=symbolic)
        wanted = np.linalg.det(x)
        assert found.dtype == x.dtype and found.shape == np.shape(wanted)
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def test_determinants_of_singular_and_permuted_matrices() -> None:
    x = np.array([[[1, 2, 3], [2, 4, 6], [1, 0, 1]], [[0, 1, 0], [0, 0, 2], [3, 0, 0]]], np.float32)
    (found,) = run_node("Det", {"x": x})
    np.testing.assert_allclose(found, [0, 6], atol=1e-6)
