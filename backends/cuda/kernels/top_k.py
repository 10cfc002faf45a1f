"""The best elements of each line, by a block for each, in ONNX's order: of equal ones that with the lower number first.

Values become unsigned keys of the same order. A short line is sorted whole in shared memory. Of a long one the key of
the last element that is wanted is found digit by digit, by histograms (radix select); then those that are wanted are
gathered and sorted. Where the last place is tied, numbers are selected the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ....ir import functions as f
from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, bounds, ceildiv, dim_min, product, symbol
from ....ir.dtypes import BOOL, F32, F64, I32, I64, U32, U64, DType
from ....ir.intrinsics import WARP
from ....ir.loops import Address, Alloc, Barrier, For, If, Intrinsic, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar, const, load
from ....ir.target import Target
from ....ir.tensors import Indices, flat_offset, normalize_axis, unflatten
from ....passes.regions import Lowered, Region
from ....passes.threads import BLOCK
from ...kernels.calls import Variable, arithmetic_type, attribute, present
from .groups import blocks_of, call_of, thread_index, where
from .prefix import block_prefix

SORTED = 2048
"""Elements up to which a line is sorted whole, and those wanted of a longer one at most."""
THREADS, MANY = 256, 1024
"""Threads of a block, and of one for lines of more than LONG elements."""
LONG = 8192
DIGITS = 256
"""Values of a digit."""
BEHIND = (1 << 31) - 1
"""The number of what fills up a list that is sorted: worse than any element's."""


@dataclass(frozen=True)
class Line:
    """A line of `extent` elements of which `wanted` are stored."""

    element: Callable[[Dim], Scalar]
    extent: Dim
    wanted: Dim
    largest: bool
    threads: int

    @property
    def thread(self) -> Dim:
        return thread_index(self.threads)

    @property
    def key_type(self) -> DType:
        return U64 if self.element(0).dtype.bits > 32 else U32

    def key(self, position: Dim) -> Scalar:
        """A number that is the greater the better the element is; the same for equal ones."""
        value, dtype = self.element(position), self.key_type
        top = const(1 << (dtype.bits - 1), dtype)
        if value.dtype.is_float:
            wide = s.cast(value, F64 if dtype == U64 else F32)
            bits = s.bitcast(wide + 0.0, dtype)  # minus zero is zero
            ordered = s.select((bits & top).equal(0), bits | top, ~bits)
            found = s.select(f.isnan(wide), const((1 << dtype.bits) - 1, dtype), ordered)
        elif value.dtype.kind == "int":
            found = s.bitcast(s.cast(value, I64 if dtype == U64 else I32), dtype) ^ top
        else:
            found = s.cast(value, dtype)
        return found if self.largest else ~found

    def over(self, count: Dim, body: Callable[[Dim], list[Statement]], name: str = "at") -> list[Statement]:
        """The body for `name` = 0, 1, ... below a count, dealt to the threads."""
        turns = ceildiv(count, self.threads)
        at = (k.index_symbol("turn", turns) if turns != 1 else 0) * self.threads + self.thread
        inside = s.index(symbol(name)) < s.index(count)
        statements = [Let(name, at), *where(inside, body(symbol(name, 0, count - 1)))]
        return [For("turn", turns, tuple(statements))] if turns != 1 else where(const(True, BOOL), statements)


def schedule(region: Region, target: Target) -> Lowered | None:
    """A block for each line; None where more elements may be wanted than shared memory sorts."""
    x = present(region, 0)
    arithmetic_type(region, x.dtype)
    axis = normalize_axis(attribute(region, "axis"), x.rank)
    (values, result), *rest = region.outputs
    most = bounds(result.shape[axis])[1]
    if most is None or most > SORTED or x.dtype.bits < 8:
        return None
    if 0 in result.shape:
        return Lowered(())
    extent, longest = x.shape[axis], bounds(x.shape[axis])[1]
    lines = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    where_line = unflatten(k.index_symbol(BLOCK, product(lines)), lines)

    def replaced(position: Dim) -> Indices:
        return (*where_line[:axis], position, *where_line[axis + 1 :])

    short = longest is not None and longest <= SORTED
    size = _power(longest if short and longest is not None else most)
    threads = max(WARP, min(THREADS, size // 2)) if short else MANY if longest is None or longest > LONG else THREADS
    wanted = dim_min(result.shape[axis], extent)
    largest = bool(attribute(region, "largest"))
    line = Line(lambda position: x.at(replaced(position)), extent, wanted, largest, threads)
    keys, numbers = Buffer("keys", line.key_type, size, "shared"), Buffer("numbers", I32, size, "shared")
    listing = _all(line, keys, numbers) if short else _best(line, keys, numbers)

    def put(place: Dim) -> list[Statement]:
        number = s.as_dim(s.cast(load(numbers, place), I64), 0, extent - 1)
        at = flat_offset(replaced(place), result.shape)
        stores: list[Statement] = [Store(values, at, x.at(replaced(number)))]
        return stores + [Store(buffer, at, s.index(number)) for buffer, _ in rest]

    body = [
        Alloc(keys),
        Alloc(numbers),
        *listing,
        *_sorted(line, keys, numbers, size),
        *line.over(wanted, put, "place"),
    ]
    grid = blocks_of(product(lines), threads, body)
    return Lowered((call_of(region, grid, [buffer for buffer, _ in region.outputs], (), "top_k"),))


def _power(number: int) -> int:
    """The least power of two that is not less, 2 at least."""
    return 1 << max(1, (number - 1).bit_length())


def _all(line: Line, keys: Buffer, numbers: Buffer) -> list[Statement]:
    """Lists the whole line, filled up."""
    size = keys.size

    def put(at: Dim) -> list[Statement]:
        inside = s.index(symbol("at")) < s.index(line.extent)
        mine = [Store(keys, at, line.key(at)), Store(numbers, at, s.cast(s.index(at), I32))]
        none = [Store(keys, at, const(0, keys.dtype)), Store(numbers, at, const(BEHIND, I32))]
        return where(inside, mine, none)

    return [*line.over(size, put), Barrier()]


def _sorted(line: Line, keys: Buffer, numbers: Buffer, size: int) -> list[Statement]:
    """Sorts a list, the best first, by Batcher's bitonic network."""
    phases = size.bit_length() - 1
    phase, stride = k.index_symbol("phase", phases), symbol("stride", 1)
    step = k.index_symbol("step", phase + 1)

    def exchanged(pair: Dim) -> list[Statement]:
        low = pair // stride * stride * 2 + pair % stride
        a, b = symbol("low", 0, size - 1), symbol("low", 0, size - 1) + stride
        names = [Variable(name, dtype) for name, dtype in (
            ("key_low", keys.dtype), ("key_high", keys.dtype), ("number_low", I32), ("number_high", I32)
        )]  # fmt: skip
        places = ((keys, a), (keys, b), (numbers, a), (numbers, b))
        first, second, one, two = (name.value for name in names)
        better = (first < second) | (first.equal(second) & (two < one))  # the second is
        falling = s.index(a // (symbol("run", 2)) % 2).equal(0)
        swap = (Store(keys, a, second), Store(keys, b, first), Store(numbers, a, two), Store(numbers, b, one))
        return [
            Let("low", low),
            *(name.define(load(buffer, at)) for name, (buffer, at) in zip(names, places, strict=True)),
            If(s.binary("eq", better, falling), swap),
        ]

    one = const(1, I64)
    steps = (
        Let("stride", s.binary("shl", one, s.index(phase - step))),
        *line.over(size // 2, exchanged, "pair"),
        Barrier(),
    )
    body = (Let("run", s.binary("shl", one, s.index(phase + 1))), For("step", phase + 1, steps))
    return [For("phase", phases, body)]


def _best(line: Line, keys: Buffer, numbers: Buffer) -> list[Statement]:
    """Lists those that are wanted of a long line, in no order, filled up."""
    size = keys.size
    histogram, chosen = Buffer("histogram", U32, DIGITS, "shared"), Buffer("chosen", U32, 3, "shared")
    bound, last = Variable("bound", line.key_type), Variable("last", U32)
    left, tied = Variable("left", U32), Variable("tied", U32)

    def turned(at: Dim) -> Scalar:
        """A number that is the greater the earlier the element is."""
        return ~s.cast(s.index(at), U32)

    def always(at: Dim) -> Scalar | None:
        return None

    def equal(at: Dim) -> Scalar | None:
        return line.key(at).equal(bound.value)

    by_key = _select(line, line.key, bound, always, left, tied, histogram, chosen)
    by_number = _select(line, turned, last, equal, left, tied, histogram, chosen)

    def is_wanted(at: Dim) -> Scalar:
        found = Variable("key", line.key_type)
        return (bound.value < found.value) | (found.value.equal(bound.value) & (last.value <= turned(at)))

    def with_key(at: Dim, body: tuple[Statement, ...]) -> list[Statement]:
        return [Variable("key", line.key_type).define(line.key(at)), If(is_wanted(at), body)]

    mine, slot = Variable("mine", I32), Variable("slot", I32)
    found, before, _ = block_prefix(mine.value, "add", line.threads, "wanted")

    def gathered(at: Dim) -> list[Statement]:
        place = s.as_dim(s.cast(slot.value, I64), 0, size - 1)
        key = Variable("key", line.key_type)
        puts = (Store(keys, place, key.value), Store(numbers, place, s.cast(s.index(at), I32)), slot.add(1))
        return with_key(at, puts)

    def fill(at: Dim) -> list[Statement]:
        return [Store(keys, at, const(0, keys.dtype)), Store(numbers, at, const(BEHIND, I32))]

    return [
        Alloc(histogram),
        Alloc(chosen),
        *line.over(size, fill),
        bound.define(0),
        last.define(0),
        tied.define(0),
        left.define(s.cast(s.index(line.wanted), U32)),
        *by_key,
        If(left.value < tied.value, tuple(by_number)),
        mine.define(0),
        *line.over(line.extent, lambda at: with_key(at, (mine.add(1),))),
        *found,
        slot.define(load(before, 0)),
        *line.over(line.extent, gathered),
        Barrier(),
    ]


def _select(
    line: Line,
    digits_of: Callable[[Dim], Scalar],
    bound: Variable,
    among: Callable[[Dim], Scalar | None],
    left: Variable,
    tied: Variable,
    histogram: Buffer,
    chosen: Buffer,
) -> list[Statement]:
    """Finds in `bound` the `left`-th greatest of some elements' numbers; then how many of those that have just this one
    are `left`, and how many there are, `tied`."""
    dtype, thread = bound.dtype, line.thread
    passes = dtype.bits // 8
    number = k.index_symbol("digit", passes)
    shift = s.cast(s.index((passes - 1 - number) * 8), dtype)
    above = s.cast(s.index((passes - number) * 8), dtype)

    def counted(at: Dim) -> list[Statement]:
        own = Variable("own", dtype)
        same = s.binary("shr", own.value, above).equal(s.binary("shr", bound.value, above))
        condition = among(at)
        digit = s.binary("shr", own.value, shift) & (DIGITS - 1)
        place = s.as_dim(s.cast(digit, I64), 0, DIGITS - 1)
        count = Intrinsic("atomic_add", (Address(histogram, place),), (const(1, U32),))
        return [
            own.define(digits_of(at)),
            If(same if condition is None else s.binary("and", condition, same), (count,)),
        ]

    greater, mine, value = Variable("greater", U32), Variable("count", U32), symbol("value", 0, DIGITS - 1)
    behind = s.select(s.index(thread) < s.index(value), load(histogram, value), const(0, U32))
    here = (greater.value < left.value) & (left.value <= greater.value + mine.value)
    tell = (
        Store(chosen, 0, s.cast(s.index(thread), U32)),
        Store(chosen, 1, left.value - greater.value),
        Store(chosen, 2, mine.value),
    )
    digit_of_thread = [
        greater.define(0),
        For("value", DIGITS, (greater.add(behind),)),
        mine.define(load(histogram, thread)),
        If(here, tell),
    ]
    first = s.index(thread) < s.index(DIGITS)
    steps = [
        *where(first, [Store(histogram, thread, const(0, U32))]),
        Barrier(),
        *line.over(line.extent, counted),
        Barrier(),
        *where(first, digit_of_thread),
        Barrier(),
        bound.set(bound.value | s.binary("shl", s.cast(load(chosen, 0), dtype), shift)),
        left.set(load(chosen, 1)),
        tied.set(load(chosen, 2)),
    ]
    return [For("digit", passes, tuple(steps))]
