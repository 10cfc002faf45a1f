"""The check that every plan passes in tests: it tells planted overlaps, at the sizes planned for and at others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxc
import pytest
from onnx import helper
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options
from onnxc.ir.program import ArenaPlan, Program
from onnxc.ir.target import Target
from onnxc.passes import lower
from plan_hook import check_arenas, checking_plans
from single_node import model_of


def chain(symbolic: bool) -> onnx.ModelProto:
    """Products with weights, one after another, the first added to the last."""
    x, weights = np.zeros((3, 40), np.float32), np.eye(40, dtype=np.float32)
    nodes = [helper.make_node("MatMul", ["x" if i == 0 else f"h{i - 1}", f"w{i}"], [f"h{i}"]) for i in range(5)]
    nodes.append(helper.make_node("Add", ["h0", "h4"], ["s"]))
    nodes.append(helper.make_node("MatMul", ["s", "w0"], ["y"]))
    return model_of(nodes, {"x": x}, {f"w{i}": weights * (i + 1) for i in range(5)}, ["y"], symbolic)


def program(symbolic: bool) -> Program:
    target = Target.host()
    return program_of(graph_of(chain(symbolic), Options(target=target)), target)


def check(program: Program, plan: ArenaPlan) -> None:
    check_arenas(plan, program.memories, program.segments, program.kernels)


@pytest.mark.parametrize("symbolic", [False, True])
def test_a_memory_put_onto_another_is_told(symbolic: bool) -> None:
    made = program(symbolic)
    check(made, made.plan)
    (slots,) = made.plan.slots
    assert len(slots) > 2
    told = 0
    for i, slot in enumerate(slots):
        if slot.below:
            moved = (*slots[:i], replace(slot, below=()), *slots[i + 1 :])
            with pytest.raises(AssertionError, match="share"):
                check(made, replace(made.plan, slots=(moved,)))
            told += 1
    assert told


def test_a_plan_for_one_size_is_told_at_others() -> None:
    made = program(True)
    (slots,) = made.plan.slots
    upper = next(i for i, slot in enumerate(slots) if slot.below)
    # Right for the sizes planned for, where what lies below is no larger than this constant.
    (lower_one,) = slots[upper].below[:1]
    fixed = replace(slots[lower_one], bytes=64)
    with pytest.raises(AssertionError):
        check(made, replace(made.plan, slots=((*slots[:lower_one], fixed, *slots[lower_one + 1 :]),)))


def test_a_memory_without_a_place_is_told() -> None:
    made = program(False)
    (slots,) = made.plan.slots
    last = len(slots) - 1
    rest = tuple(replace(s, below=tuple(b for b in s.below if b != last)) for s in slots[:-1])
    with pytest.raises(AssertionError, match="differ"):
        check(made, replace(made.plan, slots=(rest,)))


def test_plans_of_all_compiles_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with checking_plans() as seen:
        onnxc.compile(chain(False))
        assert len(seen) == 1 and seen[0] > 2
    planned = lower.plan_arena

    def broken(*arguments: object) -> ArenaPlan:
        plan = planned(*arguments)  # type: ignore[arg-type]
        return replace(plan, slots=tuple(tuple(replace(s, below=()) for s in slots) for slots in plan.slots))

    monkeypatch.setattr(lower, "plan_arena", broken)
    with checking_plans(), pytest.raises(AssertionError, match="share"):
        onnxc.compile(chain(False))
