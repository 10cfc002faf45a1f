"""Offsets in one arena: every plan is proved by the independent checker."""

import csv
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxc.passes.arena import Buffer, Plan, generalise, offsets_for, plan_offsets
from plan_checker import check_plan

MINIMALLOC = Path(__file__).parent / "minimalloc"


@st.composite
def instances(draw: st.DrawFn, largest: int = 2000, most: int = 14) -> list[Buffer]:
    lifetimes = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=most))
    sizes = draw(st.lists(st.integers(0, largest), min_size=len(lifetimes), max_size=len(lifetimes)))
    pairs = enumerate(zip(lifetimes, sizes, strict=True))
    return [Buffer(f"b{number}", size, first, first + length) for number, ((first, length), size) in pairs]


def check(buffers: Sequence[Buffer], offsets: Sequence[int], arena_size: int) -> None:
    check_plan([(b.first, b.last, o, b.size) for b, o in zip(buffers, offsets, strict=True)], arena_size)


def round_up(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment


def live_peak(buffers: Sequence[Buffer], alignment: int) -> int:
    return max(
        (sum(round_up(b.size, alignment) for b in buffers if b.first <= step <= b.last) for step in range(20)),
        default=0,
    )


@settings(deadline=None)
@given(instances(), st.sampled_from([1, 16, 64, 48]))
def test_plans_are_valid(buffers: list[Buffer], alignment: int) -> None:
    plan = plan_offsets(buffers, alignment=alignment)
    check(buffers, plan.offsets, plan.size)
    assert all(offset % alignment == 0 for offset in plan.offsets)
    assert plan.lower_bound == live_peak(buffers, alignment) <= plan.size
    ends = (o + round_up(b.size, alignment) for o, b in zip(plan.offsets, buffers, strict=True))
    assert plan.size == max(ends, default=0)


@settings(deadline=None)
@given(instances(largest=6))
def test_the_search_never_loses_to_the_greedy_orders(buffers: list[Buffer]) -> None:
    greedy, searched = (plan_offsets(buffers, alignment=1, effort=effort) for effort in (0, 50))
    check(buffers, searched.offsets, searched.size)
    assert searched.size <= greedy.size


def lowest_arena(buffers: Sequence[Buffer]) -> int:
    """The smallest arena by brute force: in some order, a plan that cannot be lowered puts each on those before it."""

    def height(order: Sequence[Buffer]) -> int:
        top: list[int] = []
        for place, buffer in enumerate(order):
            under = (
                end
                for end, other in zip(top, order[:place], strict=True)
                if buffer.first <= other.last and other.first <= buffer.last
            )
            top.append(max(under, default=0) + buffer.size)
        return max(top, default=0)

    return min(map(height, permutations(buffers)))


@settings(deadline=None)
@given(instances(largest=9, most=6))
def test_small_instances_get_the_smallest_arena(buffers: list[Buffer]) -> None:
    assert plan_offsets(buffers, alignment=1, effort=1000).size == lowest_arena(buffers)


def test_the_smallest_arena_may_exceed_the_bound() -> None:
    """Every step of these is full at 5 bytes, yet no plan has 5: the search must not believe in its bound."""
    rows = [(3, 0, 3), (2, 0, 4), (2, 4, 7), (1, 4, 5), (1, 5, 5), (1, 5, 7), (2, 6, 9), (3, 8, 9)]
    buffers = [Buffer(f"b{number}", *row) for number, row in enumerate(rows)]
    plan = plan_offsets(buffers, alignment=1)
    assert (plan.lower_bound, plan.size, lowest_arena(buffers)) == (5, 6, 6)


@settings(deadline=None)
@given(instances(), st.data())
def test_a_generalised_plan_holds_for_any_sizes(buffers: list[Buffer], data: st.DataObject) -> None:
    plan = plan_offsets(buffers)
    below = generalise(buffers, plan)
    offsets = offsets_for(below, [buffer.size for buffer in buffers])
    check(buffers, offsets, plan.size)
    assert all(new <= old for new, old in zip(offsets, plan.offsets, strict=True))

    sizes = data.draw(st.lists(st.integers(0, 2000), min_size=len(buffers), max_size=len(buffers)))
    others = [Buffer(b.name, size, b.first, b.last) for b, size in zip(buffers, sizes, strict=True)]
    moved = offsets_for(below, sizes)
    check(others, moved, max((o + round_up(s, 64) for o, s in zip(moved, sizes, strict=True)), default=0))
    assert all(offset % 64 == 0 for offset in moved)


@settings(deadline=None)
@given(instances())
def test_a_generalised_plan_names_only_what_lies_directly_below(buffers: list[Buffer]) -> None:
    below = generalise(buffers, plan_offsets(buffers))

    def reachable(start: int) -> set[int]:
        return {start}.union(*(reachable(other) for other in below[start]))

    for direct in below:
        for one in direct:
            assert not any(one in reachable(other) for other in direct if other != one)


def test_the_rule_of_a_stack() -> None:
    buffers = [Buffer("a", 100, 0, 2), Buffer("b", 64, 1, 3), Buffer("c", 10, 3, 4), Buffer("d", 10, 2, 3)]
    assert generalise(buffers, Plan((0, 128, 0, 192), 256, 256)) == ((), (0, 2), (), (1,))
    assert offsets_for(((), (0, 2), (), (1,)), [10, 10, 300, 10]) == (0, 320, 0, 384)


def test_simple_instances_reach_the_bound() -> None:
    """The five buffers of MiniMalloc's example, and a chain of layers of which two are live together."""
    rows = [(0, 2, 4), (3, 8, 4), (0, 8, 4), (9, 20, 4), (0, 20, 4)]
    buffers = [Buffer(f"b{number}", size, first, last) for number, (first, last, size) in enumerate(rows)]
    plan = plan_offsets(buffers, alignment=1)
    assert plan.size == plan.lower_bound == 12
    chain = [Buffer(f"layer{step}", 4096 * (1 + step % 3), step, step + 1) for step in range(200)]
    assert plan_offsets(chain).size == 4096 * 5


def test_mobilenet_v1_reaches_its_published_bound() -> None:
    """4.594 MiB in f32: Pisarchyk & Lee 2020, table 1."""
    shapes = [
        (112, 32),
        (112, 32),
        (112, 64),
        (56, 64),
        (56, 128),
        (56, 128),
        (56, 128),
        (28, 128),
        (28, 256),
        (28, 256),
    ]
    shapes += [(28, 256), (14, 256), (14, 512), *[(14, 512)] * 10, (7, 512), (7, 1024), (7, 1024), (7, 1024), (1, 1024)]
    buffers = [Buffer(f"{i}", 4 * side**2 * c, i, i + 1) for i, (side, c) in enumerate(shapes)]
    plan = plan_offsets(buffers)
    check(buffers, plan.offsets, plan.size)
    assert round(plan.size / 2**20, 3) == 4.594


def test_residual_blocks_and_skip_connections_reach_the_bound() -> None:
    """An encoder and decoder whose halves are joined by skip connections, each of three layers and a residual."""
    depth, buffers = 6, []
    for level in range(depth):
        size, begin, end = 2**20 >> level, 5 * level, 5 * (2 * depth - level)
        buffers += [Buffer(f"down{level}.{i}", size, begin + i, begin + i + 1 + 2 * (i == 0)) for i in range(3)]
        buffers += [
            Buffer(f"skip{level}", size, begin + 3, end),
            Buffer(f"pool{level}", size // 4, begin + 4, begin + 5),
        ]
        buffers += [Buffer(f"up{level}.{i}", size, end + i, end + i + 1 + 2 * (i == 0)) for i in range(4)]
    plan = plan_offsets(buffers)
    check(buffers, plan.offsets, plan.size)
    assert plan.size == plan.lower_bound


@pytest.mark.parametrize(
    ("instance", "effort", "reached"),
    # All are known to fit into 1,048,576 bytes; C, D and J need less.
    [(name, 100, 1048576) for name in "ABEFGHIK"] + [("C", 100, 1039360), ("D", 300, 1037312), ("J", 100, 1035264)],
)
def test_minimalloc(instance: str, effort: int, reached: int) -> None:
    with (MINIMALLOC / f"{instance}.1048576.csv").open() as file:
        rows = [(row["id"], *(int(row[key]) for key in ("size", "lower", "upper"))) for row in csv.DictReader(file)]
    buffers = [Buffer(name, size, lower, upper - 1) for name, size, lower, upper in rows]
    plan = plan_offsets(buffers, effort=effort)
    check(buffers, plan.offsets, plan.size)
    assert plan.size <= reached
    check(buffers, offsets_for(generalise(buffers, plan), [b.size for b in buffers]), plan.size)


def test_no_bytes_need_no_arena() -> None:
    assert plan_offsets([]) == Plan((), 0, 0)
    assert plan_offsets([Buffer("a", 0, 0, 9)]) == Plan((0,), 0, 0)
    assert generalise([], plan_offsets([])) == ()
    assert offsets_for((), []) == ()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="alignment must be at least 1 byte, not 0"):
        plan_offsets([Buffer("a", 1, 0, 1)], alignment=0)
    with pytest.raises(ValueError, match=r"name='a'.*not before its first"):
        plan_offsets([Buffer("a", 1, 1, 0)])
    with pytest.raises(ValueError, match=r"name='b'.*size of at least 0"):
        plan_offsets([Buffer("b", -1, 0, 0)])


@pytest.mark.parametrize(
    ("intervals", "size", "message"),
    [
        ([(0, 1, 0, 8), (2, 3, 4, 8), (3, 5, 11, 8)], 20, "buffers 1 and 2 share 1 bytes at step 3"),
        ([(0, 1, 0, 8), (2, 3, 8, 8)], 15, "buffer 1 at 8 \\+ 8 is outside the arena of 15 bytes"),
        ([(0, 1, -1, 8)], 15, "buffer 0 at -1 \\+ 8 is outside"),
        ([(1, 0, 0, 8)], 15, "buffer 0 is no buffer"),
        ([(0, 9, 0, 8), (3, 3, 4, 1)], 8, "buffers 0 and 1 share 1 bytes at step 3"),
    ],
)
def test_the_checker_names_what_is_wrong(intervals: list[tuple[int, int, int, int]], size: int, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_plan(intervals, size)


def test_the_checker_accepts_neighbours_in_space_and_in_time() -> None:
    check_plan([(0, 1, 0, 8), (1, 2, 8, 8), (2, 3, 0, 8), (2, 3, 12, 0)], 16)
