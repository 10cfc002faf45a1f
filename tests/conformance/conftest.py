"""`--record FILE` writes what passes of ONNX's suite, by operator: `make conformance` renews the recorded file."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from pathlib import Path

import onnx
import pytest

from .suite import KINDS, cases, failing, model_of

WHERE = {"test_onnx.py": "cpu", "test_onnx_cuda.py": "gpu"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write what passes of ONNX's suite to this file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record", None) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config.getoption("--record")))


class Recorder:
    """Gathers outcomes as they are reported, by the workers too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._passed: dict[str, set[str]] = {where: set() for where in WHERE.values()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        match = re.search(r"(\w+\.py)::test_case\[(.+)\]$", report.nodeid)
        if match and report.when == "call" and report.passed and match[1] in WHERE:
            self._passed[WHERE[match[1]]].add(match[2])

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(summary(self._passed), indent=1) + "\n")


def summary(passed: dict[str, set[str]]) -> dict[str, object]:
    """Counts of passed cases by suite and by operator, [on CPUs, on GPUs, in all], and what fails on CPUs and why."""
    suites = {kind: _counts([name for name in cases() if name.split("/")[0] == kind], passed) for kind in KINDS}
    operators: dict[str, list[str]] = {}
    for name in cases():
        operators.setdefault(operator_of(name), []).append(name)
    reasons = Counter((operator_of(name), reason) for name, reason in failing().items())
    return {
        "onnx": onnx.__version__,
        "opset": onnx.defs.onnx_opset_version(),
        "suites": suites,
        "operators": {name: _counts(found, passed) for name, found in sorted(operators.items()) if name},
        "failing": [[operator, reason, count] for (operator, reason), count in sorted(reasons.items())],
    }


def _counts(names: list[str], passed: dict[str, set[str]]) -> list[int]:
    return [*(sum(name in passed[where] for name in names) for where in WHERE.values()), len(names)]


@functools.cache
def operator_of(name: str) -> str:
    """The operator that a case of the node suite is about: of the model's, the one that its name begins with, else the
    first; "" for other suites. An expanded case is about what it expands."""
    kind, _, title = name.partition("/")
    if kind != "node":
        return ""
    whole = re.sub("_expanded.*", "", name)
    if whole != name and whole in cases():
        return operator_of(whole)
    plain = re.sub("^test_(ai_onnx_ml_)?|_", "", title).lower()
    nodes = [node.op_type for node in model_of(cases()[name]).graph.node]
    return max((op for op in nodes if plain.startswith(op.lower())), key=len, default=nodes[0])
