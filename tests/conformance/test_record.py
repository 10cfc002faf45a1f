"""The recorded run of ONNX's suite, from which the README's table is made."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx
from onnxc.tools.conformance_table import markdown

from .conftest import operator_of
from .suite import FAILING_CUDA, KINDS, cases, failing

RECORD = json.loads(Path(__file__).with_name("record.json").read_text())
README = Path(__file__).parents[2] / "README.md"


def test_readme_holds_the_record() -> None:
    assert markdown(RECORD) in README.read_text()


def test_record_is_of_these_lists() -> None:
    """`make conformance` must be run after a list got shorter; with another onnx the numbers are others."""
    if RECORD["onnx"] != onnx.__version__:
        assert RECORD["suites"].keys() == set(KINDS)
        return
    lost = Counter(name.split("/")[0] for name in failing())
    lost_on_gpus = Counter(name.split("/")[0] for name in {**failing(), **failing(FAILING_CUDA)})
    total = Counter(name.split("/")[0] for name in cases())
    for kind in KINDS:
        assert RECORD["suites"][kind] == [total[kind] - lost[kind], total[kind] - lost_on_gpus[kind], total[kind]]
    reasons = Counter((operator_of(name), reason) for name, reason in failing().items())
    assert {(operator, reason): count for operator, reason, count in RECORD["failing"]} == reasons
