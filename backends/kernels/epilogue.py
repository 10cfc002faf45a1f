"""What happens to the sums of a contraction before they are stored: bias, residual, activation, permuted outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...ir import loops as k
from ...ir import scalars as s
from ...ir.dims import Dim, Sum, as_symbol, linear, product, symbol
from ...ir.dtypes import DType
from ...ir.loops import For, Statement, Store
from ...ir.scalars import Buffer, Load, Scalar
from ...ir.tensors import Indices, Tensor, flat_offset, unflatten
from ...passes.nests import build_nests
from ...passes.regions import ANCHOR, Lowered, Region, anchor_tensor
from ...passes.vector_step import NotVectorizable, Step
from .calls import call

_BASE = "column.base"


def accumulator_leaf(dtype: DType, column: Dim) -> Load:
    """What stands for a finished sum in an expression that is made into vectors along `column`."""
    return Load(dtype, 1, Buffer("accumulator", dtype, 1 << 40), column, None, 1)


def anchor_indices(shape: Sequence[Dim]) -> Indices:
    """A symbol per axis of an anchor; 0 where the extent is 1."""
    return tuple(0 if d == 1 else symbol(f"o{a}", 0, d - 1) for a, d in enumerate(shape))


@dataclass(frozen=True)
class Result:
    """One output of a region: where the element for some indices of the anchor is stored, and its value."""

    buffer: Buffer
    offset: Dim
    value: Scalar


@dataclass(frozen=True)
class Epilogue:
    """The outputs of a region as functions of the anchor's indices; `column` is the name of the index of its last axis.

    The values read the anchor's sum as `accumulator_leaf`.
    """

    results: tuple[Result, ...]
    column: str
    dtype: DType
    patterns: dict[tuple[int, Dim | None], list[Store] | None] = field(default_factory=dict, compare=False, repr=False)

    @property
    def cost(self) -> int:
        """Operations for one element, stores included."""
        seen: set[bytes] = set()
        nodes = [node for result in self.results for node in s.walk(result.value, seen, into_dims=False)]
        math = sum(8 for node in nodes if isinstance(node, s.Unary) and node.op in s.MATH)
        return math + len(self.results) + sum(not isinstance(node, (*s.LITERALS, s.Broadcast)) for node in nodes)

    def linear(self, dims: Mapping[str, Dim]) -> bool:
        """Whether every address is linear in the column, with `dims` for the other indices."""
        rewriter = s.Rewriter(dims=dims)
        found = [rewriter.dim(result.offset) for result in self.results]
        for result in self.results:
            found += [part.offset for part in s.walk(rewriter(result.value)) if isinstance(part, Load)]
        return all(linear(offset, self.column) is not None for offset in found)

    def stores(
        self, dims: Mapping[str, Dim], base: Dim, lanes: int, total: Scalar, left: Dim | None = None
    ) -> list[Store]:
        """Stores for the columns base, base+1, ... of which `total` holds the sums; only `left` of them where given.

        `dims` are the other indices. Raises NotVectorizable where lanes would have to be done one by one.
        """
        pattern = self._pattern(lanes, left)
        if pattern is None:
            return self._vectors(s.Rewriter(dims=dims), base, lanes, total, left)

        def leaf(node: Scalar) -> Scalar | None:
            return total if isinstance(node, Load) and node.buffer.name == "accumulator" else None

        at = s.Rewriter(leaf, {**dims, _BASE: base})
        return [
            replace(st, offset=at.dim(st.offset), value=at(st.value), predicate=st.predicate and at(st.predicate))
            for st in pattern
        ]

    def _pattern(self, lanes: int, left: Dim | None) -> list[Store] | None:
        """The stores for a base that is a symbol, made once; None where it must be known for contiguous addresses."""
        key = lanes, left
        if key not in self.patterns:
            accumulator = replace(accumulator_leaf(self.dtype, 0), lanes=lanes)
            try:
                self.patterns[key] = self._vectors(s.Rewriter(), symbol(_BASE), lanes, accumulator, left)
            except NotVectorizable:
                self.patterns[key] = None
        return self.patterns[key]

    def _vectors(self, rewriter: s.Rewriter, base: Dim, lanes: int, total: Scalar, left: Dim | None) -> list[Store]:
        step = Step(_no_names, lanes, self.column, base, {}, left, False)
        statements: list[Store] = []

        def leaf(node: Scalar) -> Scalar | None:
            return total if isinstance(node, Load) and node.buffer.name == "accumulator" else None

        for result in self.results:
            value, offset = rewriter(result.value), rewriter.dim(result.offset)
            for statement in step.store(Store(result.buffer, offset, value)):
                assert isinstance(statement, Store)
                if statement.value.lanes != lanes:
                    raise NotVectorizable
                statements.append(replace(statement, value=s.Rewriter(leaf)(statement.value)))
        if step.gathered:
            raise NotVectorizable
        return statements

    def loop(
        self, dims: Mapping[str, Dim], base: Dim, extent: Dim, scratch: Buffer, start: Dim, index: str
    ) -> Statement:
        """A vector loop over the columns base + [0, extent) whose sums lie in `scratch` from `start` on."""
        at = k.index_symbol(index, extent)
        rewriter = s.Rewriter(dims={**dims, self.column: base + at})

        def leaf(node: Scalar) -> Scalar | None:
            found = isinstance(node, Load) and node.buffer.name == "accumulator"
            return s.load(scratch, start + at) if found else None

        sums = s.Rewriter(leaf)
        body = [Store(r.buffer, rewriter.dim(r.offset), rewriter(sums(r.value))) for r in self.results]
        return For(index, extent, tuple(body), "vector")


def _no_names(name: str) -> str:
    """Where a vector form would have to bind new names."""
    raise NotVectorizable


def epilogue(
    region: Region, indices: Indices, anchor_shape: Sequence[Dim], element: Scalar, column: str, dtype: DType
) -> Epilogue | None:
    """The region's outputs over the anchor's `indices`, `element` being the anchor's value over a sum of type `dtype`.

    None where an output does not have exactly one element for each of the anchor's.
    """
    results: list[Result] = []
    for buffer, tensor in region.outputs:
        where = _inverse(tensor, indices, anchor_shape)
        if where is None:
            return None

        def leaf(node: Scalar) -> Scalar | None:
            return element if isinstance(node, s.Element) and node.tensor == ANCHOR else None

        value = s.Rewriter(leaf)(tensor.at(where))
        results.append(Result(buffer, flat_offset(where, tensor.shape), value))
    return Epilogue(tuple(results), column, dtype)


def through_memory(region: Region, schedule: Callable[[Region], Lowered | None]) -> Lowered | None:
    """The anchor alone by `schedule` into a workspace, and the outputs from there by a loop nest.

    For epilogues that need other elements of the anchor than their own.
    """
    anchor = region.anchor_output
    assert anchor is not None
    memory = Buffer("anchor_memory", anchor.dtype, anchor.size)
    alone = replace(region, outputs=((memory, anchor_tensor(anchor.shape, anchor)),), inline=None)
    lowered = schedule(alone)
    if lowered is None:
        return None

    def leaf(node: Scalar) -> Scalar | None:
        if isinstance(node, s.Element) and node.tensor == ANCHOR:
            return s.load(memory, flat_offset(node.indices, anchor.shape))
        return None

    def over_memory(tensor: Tensor) -> Tensor:
        return replace(tensor, element=lambda i: s.Rewriter(leaf)(tensor.at(i)), buffer=None, _memo={})

    outputs = [(buffer, over_memory(tensor)) for buffer, tensor in region.outputs]
    after = call(region, region.name, build_nests(outputs), (memory,))
    return replace(lowered, calls=(*lowered.calls, after), workspaces=(*lowered.workspaces, memory))


def _inverse(tensor: Tensor, indices: Indices, shape: Sequence[Dim]) -> Indices | None:
    """The indices of the tensor whose element is made of the anchor's element at `indices`."""
    if product(tensor.shape) != product(shape):
        return None
    candidates: list[Indices] = []
    kept = [i for i, d in zip(indices, shape, strict=True) if d != 1]
    if [d for d in tensor.shape if d != 1] == [d for d in shape if d != 1]:
        remaining = iter(kept)
        candidates.append(tuple(0 if d == 1 else next(remaining) for d in tensor.shape))
    candidates.append(unflatten(flat_offset(indices, shape), tensor.shape))
    solved = _solve(tensor, indices)
    if solved is not None:
        candidates.append(solved)
    return next((where for where in candidates if _matches(tensor, where, indices)), None)


def _anchor_reads(value: Scalar) -> list[s.Element]:
    return [node for node in s.walk(value) if isinstance(node, s.Element) and node.tensor == ANCHOR]


def _matches(tensor: Tensor, where: Indices, indices: Indices) -> bool:
    reads = _anchor_reads(tensor.at(where))
    return bool(reads) and all(
        all(own == 0 or found == own for own, found in zip(indices, read.indices, strict=True)) for read in reads
    )


def _solve(tensor: Tensor, indices: Indices) -> Indices | None:
    """Inverts a permutation of axes, some of them split: an index h*64 + d gives h = index // 64, d = index % 64."""
    probes = tuple(0 if d == 1 else symbol(f"p{a}", 0, d - 1) for a, d in enumerate(tensor.shape))
    reads = _anchor_reads(tensor.at(probes))
    if not reads:
        return None
    found: dict[str, Dim] = {}
    for own, read in zip(indices, reads[0].indices, strict=True):
        if isinstance(read, int):
            continue
        digits: list[tuple[Dim, str, Dim]] = []
        for term, coefficient in read.terms:
            digit = [atom for atom in term if getattr(atom, "name", "").startswith("p")]
            scale = product([coefficient, *(Sum((((atom,), 1),)) for atom in term if atom not in digit)])
            if len(digit) != 1 or as_symbol(Sum((((digit[0],), 1),))) is None:
                return None
            digits.append((scale, digit[0].name, digit[0].upper + 1))  # type: ignore[union-attr, operator]
        rest, scale = own, 1
        while digits:
            # The digit of this scale: its extent times the scale is the next digit's scale.
            this = [digit for digit in digits if digit[0] == scale]
            if len(this) != 1 or this[0][1] in found:
                return None
            digits.remove(this[0])
            found[this[0][1]] = rest % this[0][2] if digits else rest
            rest, scale = rest // this[0][2], scale * this[0][2]
    if any(as_symbol(p) is not None and str(p) not in found for p in probes):
        return None
    return tuple(0 if p == 0 else found[str(p)] for p in probes)
