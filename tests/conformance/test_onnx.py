"""ONNX's own suite, compiled. A case that is listed as failing and passes must leave the list."""

from __future__ import annotations

import pytest

from .suite import cases, check_case, failing

LISTED = failing()


@pytest.mark.parametrize("name", sorted(cases()))
def test_case(name: str, request: pytest.FixtureRequest) -> None:
    if name in LISTED:
        request.applymarker(pytest.mark.xfail(strict=True, reason=LISTED[name]))
    check_case(name)


def test_list_names_cases() -> None:
    assert set(LISTED) <= set(cases())


def test_at_least_a_thousand_node_cases_pass() -> None:
    node = [name for name in cases() if name.startswith("node/")]
    assert len(node) - sum(name in LISTED for name in node) >= 1000
