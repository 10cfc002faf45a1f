"""Fast Fourier transforms: DFT and STFT of lengths known when the model is compiled.

Stockham's form, which needs no reordering (Van Loan, Computational Frameworks for the FFT, 1992): a stage of radix r
reads r numbers that lie far apart, and writes them near each other. As many lines as a vector has lanes interleave,
so all stages are vectors, whatever their stride. Prime factors above 5 are summed by a table of the roots of unity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import numpy as np

from ...ir import scalars as s
from ...ir.dims import Dim, ceildiv, dim_min, product, symbol
from ...ir.dtypes import F32
from ...ir.loops import Define, For, Let, Statement, Store
from ...ir.ops.spectral import frames, imaginary_part, points
from ...ir.scalars import Buffer, Scalar, const, load
from ...ir.target import Target
from ...ir.tensors import Tensor, flat_offset, normalize_axis, unflatten
from ...passes.regions import Lowered, Region
from .calls import attribute, call, operand, over, present

Complex = tuple[Scalar, Scalar]
# Prime factors up to this are written out, larger ones summed in loops.
UNROLLED = 5


def dft(region: Region, target: Target) -> Lowered | None:
    """Along one axis; None where the length is not known."""
    x = present(region, 0)
    axis = region.static.get("axis")
    along = normalize_axis(-2 if axis is None else axis[0], x.rank)
    inverse, onesided = bool(attribute(region, "inverse")), bool(attribute(region, "onesided"))
    length = points(x, along, region.static.get("dft_length"), inverse and onesided)
    if not isinstance(length, int) or length < 2:
        return None
    return _Transform(region, target, x, along, length, inverse, onesided).lowered()


def stft(region: Region, target: Target) -> Lowered | None:
    """Along the windowed frames, which are read where they lie in the signal."""
    step, length = region.static["frame_step"], region.static.get("frame_length")
    x = frames(present(region, 0), step, operand(region, 2), length)
    if not isinstance(x.shape[2], int) or x.shape[2] < 2:
        return None
    return _Transform(region, target, x, 2, x.shape[2], False, bool(attribute(region, "onesided"))).lowered()


def radices(length: int) -> list[int]:
    """Factors whose product is the length: fours, then primes."""
    found: list[int] = []
    for radix in (4, 2, 3, 5):
        while length % radix == 0:
            found.append(radix)
            length //= radix
    divisor = 7
    while length > 1:
        if divisor * divisor > length:
            divisor = length
        while length % divisor == 0:
            found.append(divisor)
            length //= divisor
        divisor += 2
    return found


def times(a: Complex, b: Complex) -> Complex:
    return s.fma(a[0], b[0], -(a[1] * b[1])), s.fma(a[0], b[1], a[1] * b[0])


@dataclass(frozen=True)
class _Stage:
    """One stage: its radix, how many numbers the stages before have made one, and how many are left; the factors of its
    results lie in the table from `waves` on [radix, left], the roots of unity of a large radix from `roots` on."""

    radix: int
    done: int
    left: int
    waves: int
    roots: int


class _Transform:
    def __init__(
        self, region: Region, target: Target, x: Tensor, axis: int, length: int, inverse: bool, onesided: bool
    ) -> None:
        self.region, self.target, self.x, self.axis, self.length = region, target, x, axis, length
        self.inverse, self.onesided, self.sign = inverse, onesided, 1 if inverse else -1
        self.dtype = F32 if x.dtype.bits < 32 else x.dtype
        self.lines = product((*x.shape[:axis], *x.shape[axis + 1 : -1]))
        lanes = max(1, target.lanes(self.dtype.bits))
        self.together = 1 if isinstance(self.lines, int) and self.lines < lanes // 2 else lanes
        self.groups = ceildiv(self.lines, self.together)
        self.size = length * self.together
        self.work = Buffer("work", self.dtype, self.groups * self.size * 4)
        self.stages: list[_Stage] = []
        done = at = 0
        for done, radix in zip(accumulate([1, *radices(length)], mul), radices(length), strict=False):
            left = length // (done * radix)
            waves = 2 * radix * left
            self.stages.append(_Stage(radix, done, left, at, at + waves))
            at += waves + (2 * radix if radix > UNROLLED else 0)
        self.waves = Buffer("waves", self.dtype, at)

    def lowered(self) -> Lowered:
        body = [*self._fill()]
        for number, stage in enumerate(self.stages):
            body += self._stage(stage, number % 2)
        body += self._results(len(self.stages) % 2)
        work = self.size * 16
        tasks = over((self.groups,), lambda i: [Let("group", s.index(i[0])), *body], "task", work, self.target)
        made = call(self.region, f"{self.dtype}_fft_{self.length}", [tasks], [self.work, self.waves])
        packed = {self.waves.name: self._table} if self.waves.name in made.arguments else {}
        return Lowered((made,), (self.work,), packed)

    def _table(self) -> np.ndarray:
        parts: list[np.ndarray] = []
        for stage in self.stages:
            j, p = np.mgrid[: stage.radix, : stage.left]
            turns = [(j * p) / (stage.radix * stage.left)]
            if stage.radix > UNROLLED:
                turns.append(np.arange(stage.radix) / stage.radix)
            for turn in turns:
                parts += [np.cos(2 * np.pi * turn).reshape(-1), self.sign * np.sin(2 * np.pi * turn).reshape(-1)]
        return np.concatenate(parts).astype(self.dtype.numpy)

    # Memory: for each group of lines two halves, each with real parts and imaginary parts [length, together].

    @property
    def _group(self) -> Dim:
        return symbol("group", 0, self.groups - 1)

    def _at(self, half: int, part: int, position: Dim) -> Dim:
        return self._group * (4 * self.size) + (2 * half + part) * self.size + position

    def _line(self, number: Dim) -> list[Dim]:
        """The indices of a line, the axis and the parts left out."""
        axes = [*range(self.axis), *range(self.axis + 1, self.x.rank - 1)]
        wide = [a for a in axes if self.x.shape[a] != 1]
        where = dict(zip(wide, unflatten(number, [self.x.shape[a] for a in wide]), strict=True)) if wide else {}
        return [where.get(a, 0) for a in axes]

    def _fill(self) -> Iterator[Statement]:
        """The input, cut or with zeros behind it; of half a spectrum, the other half too."""
        half = self.length // 2 + 1
        mirrored = self.inverse and self.onesided
        count = dim_min(half if mirrored else self.length, self.x.shape[self.axis])
        line, t = symbol("line", 0, self.lines - 1), symbol("t", 0, self.length - 1)
        where = self._line(line)

        def part(position: Dim, number: int) -> Scalar:
            at = (*where[: self.axis], position, *where[self.axis :])
            value = s.cast(imaginary_part(self.x, at) if number else self.x.at((*at, 0)), self.dtype)
            return s.select(s.index(position) < s.index(count), value, const(0, self.dtype))

        stores = []
        for number in range(2):
            value = part(t, number)
            if mirrored:
                image = part(self.length - t, number)
                value = s.select(s.index(t) < s.index(half), value, -image if number else image)
            stores.append(Store(self.work, self._at(0, number, t * self.together + symbol("beside")), value))
        line_number = dim_min(self._group * self.together + symbol("beside", 0, self.together - 1), self.lines - 1)
        inner = (Let("line", s.index(line_number)), For("t", self.length, tuple(stores), "vector"))
        yield For("beside", self.together, inner)

    def _results(self, half: int) -> Iterator[Statement]:
        result, tensor = self.region.outputs[0]
        line, t = symbol("line", 0, self.lines - 1), symbol("t", 0, tensor.shape[self.axis] - 1)
        where = self._line(line)
        stores = []
        for number in range(int(str(tensor.shape[-1]))):
            value = load(self.work, self._at(half, number, t * self.together + symbol("beside")))
            if number == 1 and self.x.shape[-1] == 1:  # of real numbers, the mean and the fastest wave are real
                alone = s.index(t).equal(0) | s.index(2 * t).equal(self.length)
                value = s.select(alone, const(0, self.dtype), value)
            scaled = value * (1 / self.length) if self.inverse else value
            place = flat_offset((*where[: self.axis], t, *where[self.axis :], number), tensor.shape)
            stores.append(Store(result, place, s.cast(scaled, tensor.dtype)))
        first = self._group * self.together
        inner = (
            Let("line", s.index(first + symbol("beside"))),
            For("t", tensor.shape[self.axis], tuple(stores), "vector"),
        )
        yield Let("valid", s.index(dim_min(self.together, self.lines - first)))
        yield For("beside", symbol("valid", 0, self.together), inner)

    # Stages.

    def _stage(self, stage: _Stage, half: int) -> Iterator[Statement]:
        """All results of one stage, read in one half of the memory and written in the other."""
        run = stage.done * self.together
        across = run == 1  # the first stage of one line: the numbers left lie beside one another
        extents = (1, stage.left) if across else (stage.left, run)
        p = symbol("inner", 0, stage.left - 1) if across else symbol("outer", 0, stage.left - 1)
        q = 0 if across else symbol("inner", 0, run - 1)

        def read(k: Dim) -> Complex:
            position = (p + k * stage.left) * run + q
            return load(self.work, self._at(half, 0, position)), load(self.work, self._at(half, 1, position))

        def write(j: Dim, value: Complex) -> Iterator[Statement]:
            if stage.left != 1 and j != 0:
                at = stage.waves + j * stage.left + p
                value = times(value, (load(self.waves, at), load(self.waves, at + stage.radix * stage.left)))
            for number in range(2):
                yield Store(self.work, self._at(1 - half, number, (p * stage.radix + j) * run + q), value[number])

        if stage.radix > UNROLLED:
            sum_of = symbol("j", 0, stage.radix - 1)
            inner = For("inner", extents[1], tuple(self._summed(stage, sum_of, read, write)), "vector")
            yield For("outer", extents[0], (For("j", stage.radix, (inner,)),))
            return
        statements: list[Statement] = []
        inputs: list[Complex] = []
        for k in range(stage.radix):
            names = [Buffer(f"{part}{k}", self.dtype, 1, "register") for part in ("real", "imaginary")]
            statements += [Define(name, value) for name, value in zip(names, read(k), strict=True)]
            inputs.append((load(names[0], 0), load(names[1], 0)))
        for j, value in enumerate(self._butterfly(inputs)):
            statements += write(j, value)
        yield For("outer", extents[0], (For("inner", extents[1], tuple(statements), "vector"),))

    def _summed(
        self,
        stage: _Stage,
        j: Dim,
        read: Callable[[Dim], Complex],
        write: Callable[[Dim, Complex], Iterator[Statement]],
    ) -> Iterator[Statement]:
        """Result j of a radix that is too large to be written out."""
        k = symbol("k", 0, stage.radix - 1)
        at = stage.roots + j * k % stage.radix
        value = times(read(k), (load(self.waves, at), load(self.waves, at + stage.radix)))
        sums = [Buffer(name, self.dtype, 1, "register") for name in ("real", "imaginary")]
        yield from (Define(total, const(0, self.dtype)) for total in sums)
        added = (Store(total, 0, load(total, 0) + part) for total, part in zip(sums, value, strict=True))
        yield For("k", stage.radix, tuple(added))
        yield from write(j, (load(sums[0], 0), load(sums[1], 0)))

    def _butterfly(self, x: Sequence[Complex]) -> list[Complex]:
        """The transform of two, four, or an odd number of values."""

        def add(a: Complex, b: Complex) -> Complex:
            return a[0] + b[0], a[1] + b[1]

        def subtract(a: Complex, b: Complex) -> Complex:
            return a[0] - b[0], a[1] - b[1]

        def scaled(a: Complex, factor: float) -> Complex:
            return a[0] * factor, a[1] * factor

        def turned(a: Complex) -> Complex:
            """A quarter turn, in the direction of this transform."""
            return (-a[1], a[0]) if self.sign > 0 else (a[1], -a[0])

        if len(x) == 2:
            return [add(x[0], x[1]), subtract(x[0], x[1])]
        if len(x) == 4:
            even, odd = self._butterfly(x[::2]), self._butterfly(x[1::2])
            quarter = turned(odd[1])
            return [add(even[0], odd[0]), add(even[1], quarter), subtract(even[0], odd[0]), subtract(even[1], quarter)]
        size = len(x)
        sums = [add(x[k], x[size - k]) for k in range(1, size // 2 + 1)]
        differences = [subtract(x[k], x[size - k]) for k in range(1, size // 2 + 1)]
        total = x[0]
        for pair in sums:
            total = add(total, pair)
        results = [total] * size
        for j in range(1, size // 2 + 1):
            same, crossed = x[0], (const(0, self.dtype), const(0, self.dtype))
            for k, (pair, difference) in enumerate(zip(sums, differences, strict=True), 1):
                turn = 2 * math.pi * (j * k % size) / size
                same, crossed = (
                    add(same, scaled(pair, math.cos(turn))),
                    add(crossed, scaled(difference, math.sin(turn))),
                )
            results[j], results[size - j] = add(same, turned(crossed)), subtract(same, turned(crossed))
        return results
