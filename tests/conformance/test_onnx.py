"""ONNX's own suite, compiled. A case that is listed as failing and passes must leave the list."""

from __future__ import annotations

import pytest
from onnxc.compiler.onnx_backend import OnnxcBackend

from .suite import assert_agrees, cases, data_sets, failing, model_of

LISTED = failing()


@pytest.mark.parametrize("name", sorted(cases()))
def test_case(name: str, request: pytest.FixtureRequest) -> None:
    if name in LISTED:
        request.applymarker(pytest.mark.xfail(strict=True, reason=LISTED[name]))
    case = cases()[name]
    prepared = OnnxcBackend.prepare(model_of(case))
    for inputs, outputs in data_sets(case):
        results = prepared.run(inputs)
        assert len(results) == len(outputs)
        for actual, expected in zip(results, outputs, strict=True):
            assert_agrees(actual, expected, case)


def test_list_names_cases() -> None:
    assert set(LISTED) <= set(cases())


def test_at_least_a_thousand_node_cases_pass() -> None:
    node = [name for name in cases() if name.startswith("node/")]
    assert len(node) - sum(name in LISTED for name in node) >= 1000
