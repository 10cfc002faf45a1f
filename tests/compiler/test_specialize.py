"""Models compiled for values that runs bring: which compiled form a call reaches, and how directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from against_onnxruntime import assert_agree
from onnxc.compiler.deferred import Deferred
from onnxc.compiler.specialize import SpecializingExecutable
from onnxc.ir.errors import ShapeError
from small_models import model_of_text

SUMS = """sums (float[rows, 3] x, int64[1] axis) => (float[n] y) {
    y = ReduceSum <keepdims = 0> (x, axis)
}"""


def sums() -> onnx.ModelProto:
    return model_of_text(SUMS)


def case(axis: int, rows: int = 4) -> dict[str, Any]:
    return {"x": np.random.default_rng(rows).random((rows, 3), np.float32), "axis": np.array([axis])}


def compiled(model: onnx.ModelProto) -> SpecializingExecutable:
    executable = onnxc.compile(model)
    assert isinstance(executable, SpecializingExecutable)
    return executable


def test_later_calls_find_the_form_of_their_values() -> None:
    executable = compiled(sums())
    for _ in range(3):
        for axis, rows in ((0, 4), (1, 4), (0, 5), (-1, 2)):
            inputs = case(axis, rows)
            np.testing.assert_allclose(executable.run(inputs)["y"], inputs["x"].sum(axis), rtol=1e-6)
            np.testing.assert_allclose(executable(*inputs.values()), inputs["x"].sum(axis), rtol=1e-6)


def test_what_reaches_a_known_form_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    executable = compiled(sums())
    expected = executable.run(case(0))["y"]

    def refused(*_: Any) -> Any:
        raise AssertionError("a form that is known was looked for anew")

    monkeypatch.setattr(SpecializingExecutable, "specialized", refused)
    np.testing.assert_array_equal(executable.run(case(0))["y"], expected)
    with pytest.raises(AssertionError):
        executable.run(case(1))
    with pytest.raises(AssertionError):
        executable.run(case(0) | {"axis": np.array([0], np.int32)})


def test_arguments_that_do_not_fit_are_told_after_those_that_did() -> None:
    executable = compiled(sums())
    executable.run(case(0))
    wrong: list[Mapping[str, Any]] = [
        {"x": case(0)["x"]},
        {"axis": case(0)["axis"]},
        {**case(0), "z": np.zeros(1)},
        {"x": case(0)["x"], "z": np.array([0])},
        {**case(0), "x": np.zeros((4, 3))},
        {**case(0), "x": np.zeros((4, 2), np.float32)},
    ]
    for inputs in wrong:
        with pytest.raises(ShapeError):
            executable.run(inputs)


def test_lists_and_numbers_are_taken_too() -> None:
    executable = compiled(sums())
    for _ in range(2):
        np.testing.assert_array_equal(executable.run({"x": [[1.0, 2.0, 4.0]], "axis": [1]})["y"], [7.0])


def test_a_form_that_was_dropped_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """More settings than forms are kept: routes to dropped ones go with them."""
    monkeypatch.setattr("onnxc.compiler.specialize.KEPT", 2)
    executable = compiled(
        model_of_text("tiled (float[n] x, int64[m] shape) => (float[k] y) { y = Reshape (x, shape) }")
    )
    for ones in (1, 2, 3, 1, 1):
        shape = np.array([1] * ones + [12])
        assert executable.run({"x": np.arange(12, dtype=np.float32), "shape": shape})["y"].shape == tuple(shape)


def test_serving_is_what_runs_the_inputs() -> None:
    executable = compiled(sums())
    served = executable.serving(case(0))
    assert not isinstance(served, Deferred) and [port.name for port in served.inputs] == ["x"]
    assert executable.serving(case(0, 9)) is served and executable.serving(case(1)) is not served


def test_forms_agree_with_onnxruntime() -> None:
    assert_agree(sums(), case(0), case(1), case(0, 7))
