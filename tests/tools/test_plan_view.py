"""The memory plan as people see it: the numbers agree with an independent check, the map shows what lies where."""

import onnxc
import pytest
from onnxc.compiler.compiled import Buffer, MemoryPlan
from onnxc.compiler.driver import graph_of, program_of
from onnxc.compiler.options import Options
from onnxc.ir.program import ArenaPlan
from onnxc.passes import DEFAULT_PIPELINE
from onnxc.tools import demo
from onnxc.tools.commands.plan import without_fusion
from onnxc.tools.plan_view import PlanView, arena_map, bytes_text
from plan_checker import check_plan

BUFFERS = (Buffer("large", 200, 0, 0, 1), Buffer("high", 200, 200, 1, 3), Buffer("small", 100, 0, 3, 3))
VIEW = PlanView.of(MemoryPlan({}, 400, 400, BUFFERS, ArenaPlan((), 400, 400)))


def test_the_map_shows_each_buffer_where_and_while_it_lives() -> None:
    assert [line.plain for line in arena_map(VIEW, 4, 4)] == [".BBB", ".BBB", "AA..", "AA.C"]
    assert [line.plain for line in arena_map(VIEW, 8, 2)] == ["..BBBBBB", "AAAA..CC"]


def test_cells_show_what_fills_most_of_them() -> None:
    # Two steps a column: "high" is alive in one of the first two steps and in both others.
    lines = [line.plain for line in arena_map(VIEW, 2, 4)]
    assert lines[0] == "BB"
    assert lines[2] == "A."


@pytest.mark.parametrize("fused", [True, False])
def test_the_view_agrees_with_an_independent_check(fused: bool) -> None:
    options = Options() if fused else Options(pipeline=without_fusion(DEFAULT_PIPELINE))
    program = program_of(graph_of(demo.FILES / "digits.onnx", options), onnxc.Target.host())
    view = PlanView.of(MemoryPlan.of(program.plan), program)
    check_plan([(b.first, b.last, b.offset, b.bytes) for b in view.buffers], view.plan.arena_bytes)
    live = [sum(b.bytes for b in view.buffers if b.first <= step <= b.last) for step in range(view.steps)]
    assert live[view.peak] == max(live) <= view.plan.lower_bound <= view.plan.arena_bytes
    assert view.plan.sizes == {"batch": 32}
    assert view.peak_origin


def test_sizes_are_readable() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1024, 5 << 19, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.000 KiB",
        "2.500 MiB",
        "3.000 GiB",
    ]
