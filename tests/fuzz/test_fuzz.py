"""Random graphs, compiled and compared: the same 2,000 at each run; what fuzzing found before; what is drawn at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from fuzz.compare import check, check_run
from fuzz.loop import FOUND, saved
from fuzz.operators import DRAWN, NOT_DRAWN, reason
from fuzz.shrink import shrunk
from fuzz.strategies import case_by, cases
from hypothesis import Phase, given, settings
from onnx import helper
from onnxc.ir.ops import REGISTRY

GRAPHS, ITEMS = 2000, 100
REFUSED = 0.05
"""The part of the graphs that may be refused."""


@pytest.mark.parametrize("item", range(ITEMS))
def test_random_graphs(item: int) -> None:
    """A fixed seed each: `make fuzz` goes on with others."""
    count, refused = GRAPHS // ITEMS, []
    for seed in range(item * count, (item + 1) * count):
        case = case_by(seed)
        outcome = check(case.model, case.inputs, case.expected)
        if outcome.message:
            small = shrunk(case, lambda part: bool(check(part.model, part.inputs, part.expected).message))
            again = check(small.model, small.inputs, small.expected)
            pytest.fail(f"seed {seed}: {again.message or outcome.message}\n{small!r}")
        if outcome.refused:
            refused.append(f"seed {seed}: {outcome.refused}")
    assert len(refused) <= max(2, REFUSED * count), refused


@settings(max_examples=20, phases=[Phase.generate, Phase.shrink], derandomize=True)
@given(cases(sizes=(1, 2, 3)))
def test_strategy(case: object) -> None:
    """The same as a hypothesis strategy."""
    outcome = check(case.model, case.inputs, case.expected)  # type: ignore[attr-defined]
    assert not outcome.message, outcome.message


@pytest.mark.parametrize("path", sorted(FOUND.glob("*.onnx")), ids=lambda path: path.stem)
def test_found(path: Path) -> None:
    """What fuzzing has found stays right."""
    model, runs = saved(path)
    outcome = check(model, runs)
    assert not outcome.message, outcome.message


@pytest.mark.parametrize("op", DRAWN)
def test_is_drawn(op: str) -> None:
    """A declared operator is drawn by its declaration and schema, or its entry makes nodes of it."""
    seen = (node.op_type for seed in range(2) for node in case_by(seed, (1,), (op,)).model.graph.node)
    assert op.rpartition(".")[2] in seen


def test_all_declared() -> None:
    """Each declared operator is drawn or listed with a reason, not both."""
    for op in REGISTRY:
        assert (op in DRAWN) != bool(reason(op)), op
    assert not set(NOT_DRAWN) - set(REGISTRY), "listed but not declared"


def test_a_wrong_model_is_told() -> None:
    """A result that is off by one element fails, whatever the tolerance."""
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3])
    graph = helper.make_graph(
        [helper.make_node("Sin", ["x"], ["y"])], "sine", [value], [helper.make_empty_tensor_value_info("y")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    x = np.array([1.0, 2.0, 3.0], np.float32)
    right = np.sin(x)
    assert not check(model, [{"x": x}], [{"y": right}]).message
    wrong, reference = {"y": right + np.float32([0, 1e-5, 0])}, ("the reference", lambda model: {"y": right})
    assert check_run(model, {"x": x}, wrong, [reference]).message
    assert not check_run(model, {"x": x}, wrong, [reference, ("another", lambda model: wrong)]).message
