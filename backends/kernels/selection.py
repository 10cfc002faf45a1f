"""Operators that choose elements: TopK, NonZero, Compress, Unique. All but TopK find out the size of their result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ...ir import scalars as s
from ...ir.dims import Dim, as_symbol, dim_max, dim_min, product, symbol
from ...ir.dtypes import BOOL, I64
from ...ir.loops import For, If, Let, Statement, Store, While
from ...ir.scalars import Buffer, Scalar, const, load
from ...ir.target import Target
from ...ir.tensors import Indices, Tensor, compute, flat_offset, normalize_axis, reduce_tensor, unflatten
from ...passes.nests import build_nests
from ...passes.regions import BindSymbol, Lowered, Region
from .calls import Variable, arithmetic_type, attribute, call, over, present
from .sorting import Heap, less, merge_sort

# Elements whose extremum is compared with the worst of the best before each of them is.
CHUNK = 64
COUNT = Buffer("count", I64)


def replaced(indices: Sequence[Dim], axis: int, position: Dim) -> Indices:
    return (*indices[:axis], position, *indices[axis + 1 :])


def bind_count(size: Dim) -> BindSymbol:
    """What makes the size of a result known: it is a symbol whose value a kernel wrote to the buffer `count`."""
    name = as_symbol(size)
    assert name is not None, f"{size} is no symbol"
    return BindSymbol(name.name, COUNT.name)


def top_k(region: Region, target: Target) -> Lowered:
    """A heap per line along the axis, in the memory of the results."""
    x = present(region, 0)
    arithmetic_type(region, x.dtype)
    axis = normalize_axis(attribute(region, "axis"), x.rank)
    largest = bool(attribute(region, "largest"))
    (values, result), *rest = region.outputs
    numbers = rest[0][0] if rest else Buffer("numbers", I64, result.size)
    extent = x.shape[axis]
    size = dim_min(result.shape[axis], extent)

    def before(a: Scalar, b: Scalar) -> Scalar:
        return less(b, a) if largest else less(a, b)

    def line(indices: Indices) -> list[Statement]:
        def element(position: Dim) -> Scalar:
            return x.at(replaced(indices, axis, position))

        start, stride = flat_offset(replaced(indices, axis, 0), result.shape), product(result.shape[axis + 1 :])
        heap = Heap(values, numbers, start, stride, size, before)
        found = [*heap.fill(element), *_offer_rest(heap, element, extent, largest), *heap.sorted()]
        return [If(s.index(0) < s.index(size), tuple(found))]

    lines = over(replaced(x.shape, axis, 1), line, "line", extent, target)
    return Lowered((call(region, "top_k", [lines], [numbers]),), () if rest else (numbers,))


def _offer_rest(heap: Heap, element: Callable[[Dim], Scalar], extent: Dim, largest: bool) -> Iterator[Statement]:
    """All elements behind the first ones, by chunks whose best is looked at first."""
    left = extent - heap.size
    chunks: Dim = 0
    if heap.stride == 1 and not (isinstance(left, int) and left < 2 * CHUNK):
        chunks = left // CHUNK
        start = heap.size + symbol("chunk", 0, chunks - 1) * CHUNK
        op, best = ("max", "best") if largest else ("min", "best")
        extremum = Variable(best, heap.values.dtype)
        inside = symbol("inside", 0, CHUNK - 1)
        combined = s.binary(op, extremum.value, element(start + inside))
        bound = (extremum.value, heap.worst()) if largest else (heap.worst(), extremum.value)
        each = For("inside", CHUNK, (heap.offer(element(start + inside), start + inside),))
        body = (
            extremum.define(s.IDENTITY[op](extremum.dtype)),
            For("inside", CHUNK, (extremum.set(combined),), "vector"),
            If(~(bound[0] <= bound[1]), (each,)),  # also where either is no number
        )
        yield For("chunk", chunks, body)
    rest = left - chunks * CHUNK
    number = extent - rest + symbol("rest", 0, rest - 1)
    yield For("rest", rest, (heap.offer(element(number), number),))


def is_set(x: Scalar) -> Scalar:
    return s.cast(x, BOOL)


def non_zero(region: Region, target: Target) -> Lowered:
    """Counts, then writes the indices of each element found."""
    x = present(region, 0)
    arithmetic_type(region, x.dtype)
    result, tensor = region.outputs[0]
    total = reduce_tensor("add", (), I64, x.shape, lambda i, r: s.cast(is_set(x.at(r)), I64), x)
    counting = call(region, "count_nonzero", build_nests([(COUNT, total)]), [COUNT])
    found, at = Variable("found"), symbol("found_at", 0, tensor.shape[1] - 1)
    indices = [symbol(f"i{a}", 0, d - 1) for a, d in enumerate(x.shape)]
    stores = [Store(result, axis * tensor.shape[1] + at, s.index(index)) for axis, index in enumerate(indices)]
    body: Sequence[Statement] = [If(is_set(x.at(indices)), (Let("found_at", found.value), *stores, found.add(1)))]
    for axis in reversed(range(x.rank)):
        body = [For(f"i{axis}", x.shape[axis], tuple(body))]
    listing = call(region, "list_nonzero", [found.define(0), *body])
    return Lowered((counting, bind_count(tensor.shape[1]), listing), (COUNT,))


def compress(region: Region, target: Target) -> Lowered:
    """Lists the positions where the condition holds, then gathers."""
    x, condition = present(region, 0), present(region, 1)
    axis = attribute(region, "axis")
    along = None if axis is None else normalize_axis(axis, x.rank)
    (result, tensor) = region.outputs[0]
    extent = x.size if along is None else x.shape[along]
    limit = dim_min(condition.shape[0], extent)
    positions = Buffer("positions", I64, limit)
    found, i = Variable("found"), symbol("i", 0, limit - 1)
    hit = If(condition.at((i,)), (Store(positions, found.index(limit - 1), s.index(i)), found.add(1)))
    listing = [found.define(0), For("i", limit, (hit,)), Store(COUNT, 0, found.value)]

    def element(*i: Dim) -> Scalar:
        position = s.as_dim(load(positions, i[along or 0]), 0, extent - 1)
        return x.at(unflatten(position, x.shape) if along is None else replaced(i, along, position))

    gathering = build_nests([(result, compute(tensor.shape, tensor.dtype, element, x))])
    return Lowered(
        (
            call(region, "list_true", listing, [positions, COUNT]),
            bind_count(tensor.shape[along or 0]),
            call(region, "gather_true", gathering, [positions]),
        ),
        (positions, COUNT),
    )


def unique(region: Region, target: Target) -> Lowered:
    """Sorts the numbers of the elements (or slices): equal ones then follow one another, the first occurrence first."""
    x = present(region, 0)
    arithmetic_type(region, x.dtype)
    axis = attribute(region, "axis")
    along = None if axis is None else normalize_axis(axis, x.rank)
    extent = x.size if along is None else x.shape[along]
    size = as_symbol(region.outputs[0][1].shape[along or 0])
    assert size is not None
    order = Buffer("order", I64, extent * 2)
    first, group, counts, renamed = (Buffer(name, I64, extent) for name in ("first", "group", "counts", "renamed"))
    others = [] if along is None else [d for a, d in enumerate(x.shape) if a != along]

    def element(number: Dim, within: Dim = 0) -> Scalar:
        if along is None:
            return x.at(unflatten(number, x.shape))
        rest = list(unflatten(within, others))
        return x.at((*rest[:along], number, *rest[along:]))

    def before(a: Dim, b: Dim, result: Variable) -> list[Statement]:
        if along is None:
            return [result.set(less(element(a), element(b)))]
        within, going = Variable("within"), Variable("comparing", BOOL)
        here = symbol("here", 0, product(others) - 1)
        smaller, greater = less(element(a, here), element(b, here)), less(element(b, here), element(a, here))
        return [
            result.set(False),
            within.define(0),
            going.define(s.index(0) < s.index(product(others))),
            While(
                going.value,
                (
                    Let("here", within.value),
                    result.set(smaller),
                    within.add(1),
                    going.set(~(result.value | greater) & (within.value < s.index(product(others)))),
                ),
            ),
        ]

    position = symbol("i", 0, extent - 1)
    sorting, source = merge_sort(order, 0, extent, extent, before)
    found, differs = Variable("found"), Variable("differs", BOOL)
    one, two = symbol("one", 0, extent - 1), symbol("two", 0, extent - 1)
    last = found.index(extent - 1, None) - 1
    grouping: list[Statement] = [
        found.define(0),
        For(
            "i",
            extent,
            (
                Let("one", load(order, source.index() + dim_max(0, position - 1))),
                Let("two", load(order, source.index() + position)),
                differs.define(s.index(position).equal(0)),
                If(s.index(0) < s.index(position), tuple(before(one, two, differs))),
                If(
                    differs.value,
                    (
                        Store(first, found.index(extent - 1), s.index(two)),
                        Store(counts, found.index(extent - 1), const(0, I64)),
                        found.add(1),
                    ),
                ),
                Store(counts, last, load(counts, last) + 1),
                Store(group, two, found.value - 1),
            ),
        ),
        Store(COUNT, 0, found.value),
    ]
    numbering: list[Statement] = [For("i", extent, (Store(order, position, s.index(position)),), "vector")]
    is_sorted = bool(attribute(region, "sorted"))
    if not is_sorted:
        grouping += _by_occurrence(extent, first, group, renamed, counts, order)
    scratch = [order, first, group, counts, *([] if is_sorted else [renamed])]
    finding = call(region, "find_unique", [*numbering, *sorting, *grouping], [*scratch, COUNT])

    def value(*i: Dim) -> Scalar:
        number = s.as_dim(load(first, i[along or 0]), 0, extent - 1)
        return element(number) if along is None else x.at(replaced(i, along, number))

    def copied(source: Buffer, tensor: Tensor) -> Tensor:
        return compute(tensor.shape, I64, lambda i: load(source, i))

    (result, tensor), *rest = region.outputs
    outputs = [(result, compute(tensor.shape, tensor.dtype, value, x))]
    outputs += [(b, copied(source, t)) for (b, t), source in zip(rest, (first, group, counts), strict=False)]
    listing = call(region, "list_unique", build_nests(outputs), scratch)
    return Lowered((finding, bind_count(tensor.shape[along or 0]), listing), (*scratch, COUNT))


def _by_occurrence(
    extent: Dim, first: Buffer, group: Buffer, renamed: Buffer, counts: Buffer, order: Buffer
) -> Iterator[Statement]:
    """Numbers the groups by their first occurrence: an element that is its group's first gives it the next number."""
    position, found = symbol("i", 0, extent - 1), Variable("number")
    old, new = symbol("old", 0, extent - 1), symbol("new", 0, extent - 1)
    yield found.define(0)
    yield For(
        "i",
        extent,
        (
            Let("old", load(group, position)),
            If(
                load(first, old).equal(s.index(position)),
                (
                    Store(renamed, old, found.value),
                    Let("new", found.value),
                    # The halves of `order` are free by now: they hold the results until all groups are renumbered.
                    Store(order, new, s.index(position)),
                    Store(order, extent + new, load(counts, old)),
                    found.add(1),
                ),
            ),
            Store(group, position, load(renamed, old)),
        ),
    )
    copies = (Store(first, position, load(order, position)), Store(counts, position, load(order, extent + position)))
    yield For("i", found.index(extent), copies)
