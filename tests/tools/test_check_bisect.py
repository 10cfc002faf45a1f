"""`onnxc check --bisect`: faults planted in passes and in the code generator are named, with the smallest part."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnxc.compiler import driver, importer
from onnxc.compiler.options import Options
from onnxc.passes import lower, plan
from onnxc.passes.algebra import Rules
from onnxc.passes.fold import Fold
from onnxc.passes.fuse import Fuse
from onnxc.passes.layout import Layout
from onnxc.passes.scale import Scale
from onnxc.tools.check.bisect import Fault, find_fault
from onnxc.tools.check.engine import Checker
from planted_faults import (
    after_pass,
    change_nodes,
    comes_from,
    hundred_nodes,
    spoil_constant,
    spoil_kernel,
    swap_operands,
)
from small_models import model_of_text


def fault_of(model: onnx.ModelProto) -> Fault:
    """The fault that is found; prints how long that took."""
    start = time.perf_counter()
    checker = Checker(model, Options())
    case = checker.case()
    assert not case.good
    fault = find_fault(checker, case)
    assert fault is not None
    trials = fault.part.trials if fault.part else None
    print(f"{time.perf_counter() - start:.2f} s, {trials} parts tried: {fault.culprit}, nodes {fault.nodes}")
    return fault


def test_a_right_compiler_has_no_fault() -> None:
    checker = Checker(hundred_nodes(), Options())
    case = checker.case()
    assert case.good
    assert find_fault(checker, case) is None


def test_a_constant_folded_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = comes_from("conv5", "norm5")
    spoil = change_nodes(lambda n: n.op == "Constant" and wanted(n) and n.output.shape == (8, 8, 3, 3), spoil_constant)
    after_pass(monkeypatch, Scale, spoil)
    fault = fault_of(hundred_nodes())
    assert fault.kind == "pass" and fault.stage is not None and fault.stage.name == "scale"
    assert fault.part is not None and fault.part.nodes == ("conv5", "norm5")
    assert fault.part.difference.name == "norm5:0" and not fault.part.difference.same


def test_a_value_folded_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    after_pass(monkeypatch, Fold, change_nodes(lambda n: n.op == "Constant" and n.origin == ("root",), spoil_constant))
    fault = fault_of(hundred_nodes())
    assert fault.stage is not None and str(fault.stage) == "fold (2)"
    assert fault.part is not None and len(fault.part.nodes) == 1 and fault.part.nodes[0].startswith("div")


def test_operands_swapped_by_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    after_pass(monkeypatch, Rules, change_nodes(lambda n: n.op == "Div" and n.origin == ("div3",), swap_operands))
    fault = fault_of(hundred_nodes())
    assert fault.stage is not None and fault.stage.name == "rules"
    assert fault.nodes == ("div3",)
    assert fault.part is not None and fault.part.nodes == ("div3",)


def test_a_wrong_permutation_of_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = change_nodes(
        lambda n: n.op == "Transpose" and n.attributes["perm"] == (0, 3, 1, 2),
        lambda n: replace(n, attributes={"perm": (0, 3, 2, 1)}),
    )
    after_pass(monkeypatch, Layout, turned)
    fault = fault_of(hundred_nodes())
    assert fault.stage is not None and fault.stage.name == "layout"
    assert fault.part is not None and len(fault.part.nodes) <= 2


def test_a_wrong_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    less = change_nodes(lambda n: n.op == "Add" and n.origin == ("residual7",), lambda n: replace(n, op="Sub"))
    after_pass(monkeypatch, Fuse, less)
    fault = fault_of(hundred_nodes())
    assert fault.stage is not None and fault.stage.name == "fuse"
    assert "residual7" in fault.nodes
    assert fault.part is not None and "residual7" in fault.part.nodes and len(fault.part.nodes) <= 2


def test_a_node_imported_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = change_nodes(lambda n: n.op == "Erf", lambda n: replace(n, op="Tanh"))
    monkeypatch.setattr(driver, "import_model", lambda *a, **k: wrong(importer.import_model(*a, **k)))
    fault = fault_of(hundred_nodes())
    assert fault.kind == "import" and fault.culprit == "the import of the model"
    assert fault.part is not None and len(fault.part.nodes) == 1 and fault.part.nodes[0].startswith("erf")


@pytest.mark.parametrize("guilty", ["conv8", "softmax", "classify"])
def test_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, guilty: str) -> None:
    spoil_kernel(monkeypatch, lambda region: guilty in region.origin)
    fault = fault_of(hundred_nodes())
    assert fault.kind == "kernel" and fault.stage is None
    assert guilty in fault.nodes and len(fault.kernels) == 1
    assert fault.part is not None and fault.part.nodes == (guilty,)


def test_buffers_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    right = plan.plan_arena

    def overlapping(*arguments: Any, **options: Any) -> Any:
        found = right(*arguments, **options)
        slots = tuple(tuple(replace(slot, below=()) for slot in segment) for segment in found.slots)
        return replace(found, slots=slots, offsets=dict.fromkeys(found.offsets, 0))

    monkeypatch.setattr(lower, "plan_arena", overlapping)
    fault = fault_of(hundred_nodes(4))
    assert fault.kind == "plan" and "memory plan" in fault.culprit
    assert fault.part is not None and len(fault.part.nodes) < 16


def test_the_smallest_part_is_a_model_that_shows_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    after_pass(monkeypatch, Rules, change_nodes(lambda n: n.op == "Div" and n.origin == ("div3",), swap_operands))
    part = fault_of(hundred_nodes()).part
    assert part is not None
    onnx.checker.check_model(part.model)
    assert [node.name for node in part.model.graph.node] == ["div3"]
    assert set(part.inputs) == {value.name for value in part.model.graph.input}
    again = Checker(part.model, Options()).case(arrays=part.inputs)
    assert not again.good


def test_a_fault_of_symbolic_sizes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    after_pass(
        monkeypatch,
        Rules,
        change_nodes(lambda n: n.op == "Div" and "div3" in n.origin and not n.output.tensor.static, swap_operands),
    )
    part = fault_of(hundred_nodes()).part
    assert part is not None and part.nodes == ("div3",)
    assert part.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_fault_in_a_branch_is_of_the_if(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of_text(
        """g (float[4] x, bool c) => (float[4] y) {
            h = Neg (x)
            z = If (c) <
                then_branch = t () => (float[4] a) { a = Exp (h) },
                else_branch = e () => (float[4] b) { b = Abs (h) }
            >
            y = Relu (z)
        }"""
    )
    for branch, name in zip(model.graph.node[1].attribute, ("inner_exp", "inner_abs"), strict=True):
        branch.g.node[0].name = name
    swapped = change_nodes(lambda n: n.op == "Exp", lambda n: replace(n, op="Tanh"))
    after_pass(monkeypatch, Rules, swapped)
    checker = Checker(model, Options())
    case = checker.case(arrays={"c": np.bool_(True)})
    fault = find_fault(checker, case)
    assert fault is not None and fault.stage is not None and fault.stage.name == "rules"
    assert fault.part is not None and fault.part.nodes == ("If_1",)
