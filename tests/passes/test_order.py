"""Order of steps for few live bytes: never worse than the order given, the best there is on small graphs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxc.passes.order import order_steps, peak_bytes


@dataclass
class Net:
    """Steps under construction: `add` appends one that reads values and writes one of `size` bytes."""

    reads: list[list[int]] = field(default_factory=list)
    writes: list[list[int]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    keep: set[int] = field(default_factory=set)

    def value(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def add(self, reads: Sequence[int], size: int) -> int:
        self.reads.append(list(reads))
        self.writes.append([self.value(size)])
        return self.writes[-1][0]

    def order(self) -> list[int]:
        order = order_steps(len(self.reads), self.reads, self.writes, self.sizes, frozenset(self.keep))
        assert sorted(order) == list(range(len(self.reads)))
        assert self.is_valid(order)
        return order

    def is_valid(self, order: Sequence[int]) -> bool:
        writer = {value: step for step, values in enumerate(self.writes) for value in values}
        position = {step: place for place, step in enumerate(order)}
        return all(
            position[writer[value]] < position[step]
            for step, values in enumerate(self.reads)
            for value in values
            if value in writer
        )

    def peak(self, order: Sequence[int]) -> int:
        """Straight from the definition: sum, at every step, what is written by then and kept or read from then on."""
        peaks = [0]
        for place, step in enumerate(order):
            written = {value for earlier in order[: place + 1] for value in self.writes[earlier]}
            read = {value for later in order[place:] for value in self.reads[later]}
            live = written & (read | self.keep | set(self.writes[step]))
            peaks.append(sum(self.sizes[value] for value in live))
        return max(peaks)

    def orders(self, begun: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
        written = {value for step in begun for value in self.writes[step]}
        missing = {value for step, values in enumerate(self.writes) if step not in begun for value in values}
        if len(begun) == len(self.reads):
            yield begun
        for step, values in enumerate(self.reads):
            if step not in begun and not missing & set(values) - written:
                yield from self.orders((*begun, step))


@st.composite
def nets(draw: st.DrawFn, steps: int, fan_in: int = 3) -> Net:
    net = Net()
    values = [net.value(0) for _ in range(draw(st.integers(0, 2)))]
    for _ in range(draw(st.integers(0, steps))):
        reads = draw(st.lists(st.sampled_from(values), max_size=fan_in)) if values else []
        values.append(net.add(reads, draw(st.integers(0, 20))))
        if draw(st.integers(0, 4)) == 0:
            values.append(net.value(draw(st.integers(0, 20))))
            net.writes[-1].append(values[-1])
    net.keep = draw(st.sets(st.sampled_from(values), max_size=2)) if values else set()
    return net


@settings(deadline=None)
@given(nets(steps=40))
def test_the_order_is_valid_and_never_worse(net: Net) -> None:
    given_order = range(len(net.reads))
    order = net.order()
    assert net.peak(order) <= net.peak(given_order)
    if net.peak(order) == net.peak(given_order):
        assert order == list(given_order)


@settings(deadline=None)
@given(nets(steps=6))
def test_small_graphs_get_the_best_order(net: Net) -> None:
    assert net.peak(net.order()) == min(map(net.peak, net.orders()))


@settings(deadline=None)
@given(nets(steps=12))
def test_the_peak_is_the_largest_sum_of_live_bytes(net: Net) -> None:
    for order in (net.order(), range(len(net.reads))):
        assert peak_bytes(order, net.reads, net.writes, net.sizes, frozenset(net.keep)) == net.peak(order)


def test_the_branch_that_shrinks_most_goes_first() -> None:
    """Of two branches that are joined, the one with the larger peak above its result must not wait for the other."""
    net = Net()
    image = net.add([], 10)
    narrow = net.add([net.add([image], 20)], 15)
    wide = net.add([net.add([image], 100)], 5)
    net.add([narrow, wide], 1)
    assert net.order() == [0, 3, 4, 1, 2, 5]
    assert net.peak(range(6)) == 10 + 15 + 100
    assert net.peak(net.order()) == 10 + 100 + 5


def test_branches_run_one_after_another_not_side_by_side() -> None:
    """A hundred branches of five layers, given layer by layer: at most one of them is wide at a time."""
    net = Net()
    branches = [net.add([], 10) for _ in range(100)]
    for layer in range(4):
        branches = [net.add([branch], 1 if layer == 3 else 10) for branch in branches]
    net.add(branches, 100)
    assert net.peak(range(501)) == 1010
    assert net.peak(net.order()) == 200


def test_regions_are_solved_exactly_by_themselves() -> None:
    """Twelve blocks in sequence, each of four branches: far too many downsets in all, few in each block."""
    block = Net()
    net = Net()
    for built, blocks in ((block, 1), (net, 12)):
        value = built.add([], 8)
        for _ in range(blocks):
            first = [built.add([value], size) for size in (30, 9, 25, 4)]
            value = built.add([built.add([x], size) for x, size in zip(first, (2, 8, 3, 4), strict=True)], 8)
    best = min(map(block.peak, block.orders()))
    assert best < block.peak(range(len(block.reads)))
    assert net.peak(net.order()) == best


def test_a_kept_result_waits_until_it_costs_nothing_more() -> None:
    net = Net()
    stem = net.add([], 10)
    net.keep.add(net.add([stem], 50))
    body = net.add([net.add([stem], 60)], 10)
    net.keep.add(net.add([body], 1))
    assert net.peak(range(5)) == 50 + 10 + 60
    assert net.peak(net.order()) == 10 + 60 + 10


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="step 0 reads a value that is not written before it"):
        order_steps(2, [[1], []], [[0], [1]], [1, 1], frozenset())
    with pytest.raises(ValueError, match="value 0 is written by step 0 and again by step 1"):
        order_steps(2, [[], []], [[0], [0]], [1], frozenset())
