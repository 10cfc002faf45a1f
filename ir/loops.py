"""The kernel language: one fused loop nest as explicit statements over scalar and vector expressions.

A kernel is rendered to LLVM IR and to CUDA C from this form alone. Every decision of a schedule (tiles, vectors,
registers, threads) is visible here and in its printed text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeAlias

from . import scalars as s
from .atoms import NOTHING, lazy
from .dims import Dim, Opaque, Sum, atoms, symbol
from .dtypes import DType
from .scalars import Buffer, Scalar

KINDS = ("serial", "unrolled", "vector", "parallel", "grid", "block")


@dataclass(frozen=True)
class For:
    """The body for index = 0, step, 2*step, ... < extent.

    `kind`: serial; unrolled (constant extent); vector (becomes explicit lanes by `passes.vectorize`, a tail included);
    parallel (iterations are independent, threads share them); on a GPU grid (each iteration is a block of threads;
    these loops stand outermost) and block (each is a thread; one loop of constant extent within the grid loops, whose
    body is what one thread does).
    """

    index: str
    extent: Dim
    body: Block
    kind: str = "serial"
    step: int = 1


@dataclass(frozen=True)
class Let:
    """Names an i64 for the rest of the enclosing block; dims then use it as a symbol."""

    name: str
    value: Dim | Scalar


@dataclass(frozen=True)
class Define:
    """A register variable: `buffer` (space "register") starts with the value; loads of it read the variable."""

    buffer: Buffer
    value: Scalar


@dataclass(frozen=True)
class Alloc:
    """Private memory for the enclosing block: stack or registers or shared, undefined at first."""

    buffer: Buffer


@dataclass(frozen=True)
class Alias:
    """Names an address within another buffer: `name[i]` is `source[offset + i]`, or `otherwise[i]` where the condition
    is false.

    Row pointers of tiled kernels; `otherwise` is where a row outside the image points to (a row of zeros). What is read
    by a `fresh` name is read where it stands, not kept in a register from before."""

    buffer: Buffer
    source: Buffer
    offset: Dim
    condition: Scalar | None = None
    otherwise: Buffer | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Store:
    """Writes `value` (all its lanes, `stride` apart) from a flat element offset on; lanes with a false predicate are
    left alone. `aligned` as of `Load`."""

    buffer: Buffer
    offset: Dim
    value: Scalar
    predicate: Scalar | None = None
    stride: Dim = 1
    aligned: bool = False


@dataclass(frozen=True)
class If:
    """One of two blocks, by a scalar condition."""

    condition: Scalar
    then: Block
    otherwise: Block = ()


@dataclass(frozen=True)
class While:
    """The body as long as the condition (which reads registers) holds."""

    condition: Scalar
    body: Block


@dataclass(frozen=True)
class Barrier:
    """All threads of a GPU block wait for each other here."""


@dataclass(frozen=True)
class Address:
    """Element `offset` of a buffer, as an operand of an intrinsic."""

    buffer: Buffer
    offset: Dim = 0

    def __str__(self) -> str:
        return f"{self.buffer.name}[{self.offset}]"


@dataclass(frozen=True)
class Intrinsic:
    """An operation of the machine that is no expression, e.g. a matrix multiply-accumulate over registers of a warp.

    `ir.intrinsics` declares by its name which addresses and values it takes, and what it reads and writes.
    """

    name: str
    places: tuple[Address, ...] = ()
    values: tuple[Scalar, ...] = ()


Statement: TypeAlias = "For | Let | Define | Alloc | Alias | Store | If | While | Barrier | Intrinsic"
Block: TypeAlias = tuple[Statement, ...]


@dataclass(frozen=True)
class Kernel:
    """A function of buffers and sizes.

    `parameters` are the buffers in order, `outputs` the names of those that are written; parameters never overlap,
    unless `aliases` says so. `sizes` are the symbols whose values are passed (all i64).
    """

    name: str
    parameters: tuple[Buffer, ...]
    outputs: tuple[str, ...]
    sizes: tuple[str, ...]
    body: Block
    origin: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return print_kernel(self)

    @lazy
    def digest(self) -> str:
        """What `kernel_digest` tells of it."""
        return kernel_digest(self)


def children(statement: Statement) -> tuple[Block, ...]:
    """The blocks inside a statement."""
    if isinstance(statement, For | While):
        return (statement.body,)
    if isinstance(statement, If):
        return statement.then, statement.otherwise
    return ()


def walk(block: Block) -> Iterator[Statement]:
    """Every statement of a block, outer before inner."""
    for statement in block:
        yield statement
        for inner in children(statement):
            yield from walk(inner)


def rebuild(block: Block, rewriter: s.Rewriter, buffers: Mapping[str, Buffer] | None = None) -> Block:
    """`block` with every expression and index rewritten, and buffers that statements name replaced by name."""
    renamed = buffers or {}

    def buffer(old: Buffer) -> Buffer:
        new = renamed.get(old.name, old)
        return replace(new, size=rewriter.dim(new.size))

    def optional(scalar: Scalar | None) -> Scalar | None:
        return None if scalar is None else rewriter(scalar)

    result: list[Statement] = []
    for st in block:
        if isinstance(st, For):
            result.append(replace(st, extent=rewriter.dim(st.extent), body=rebuild(st.body, rewriter, buffers)))
        elif isinstance(st, Let):
            result.append(Let(st.name, rewriter(st.value) if isinstance(st.value, Scalar) else rewriter.dim(st.value)))
        elif isinstance(st, Define):
            result.append(Define(buffer(st.buffer), rewriter(st.value)))
        elif isinstance(st, Alloc):
            result.append(Alloc(buffer(st.buffer)))
        elif isinstance(st, Alias):
            offset, otherwise = rewriter.dim(st.offset), st.otherwise and buffer(st.otherwise)
            condition = optional(st.condition)
            result.append(Alias(buffer(st.buffer), buffer(st.source), offset, condition, otherwise, st.fresh))
        elif isinstance(st, Store):
            offset, stride = rewriter.dim(st.offset), rewriter.dim(st.stride)
            value, predicate = rewriter(st.value), optional(st.predicate)
            result.append(Store(buffer(st.buffer), offset, value, predicate, stride, st.aligned))
        elif isinstance(st, Intrinsic):
            places = tuple(Address(buffer(place.buffer), rewriter.dim(place.offset)) for place in st.places)
            result.append(Intrinsic(st.name, places, tuple(map(rewriter, st.values))))
        elif isinstance(st, If):
            then, otherwise_block = rebuild(st.then, rewriter, buffers), rebuild(st.otherwise, rewriter, buffers)
            result.append(If(rewriter(st.condition), then, otherwise_block))
        elif isinstance(st, While):
            result.append(While(rewriter(st.condition), rebuild(st.body, rewriter, buffers)))
        else:
            result.append(st)
    return tuple(result)


def loop(index: str, extent: Dim, body: Sequence[Statement], kind: str = "serial", step: int = 1) -> Statement:
    return For(index, extent, tuple(body), kind, step)


def index_symbol(name: str, extent: Dim) -> Dim:
    """The dim of a loop index in [0, extent)."""
    return symbol(name, 0, extent - 1)


_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "lt": "<", "le": "<=", "eq": "==", "ne": "!=",
    "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>",
}  # fmt: skip


_NAMED_FROM = 400  # Nodes, repetitions counted.


def print_scalar(scalar: Scalar) -> str:
    """The expression on one line. In a large one, parts that occur again are named where first met: `#1=(a + b)`."""
    parts = list(s.walk(scalar, into_dims=False))
    sizes: dict[bytes, int] = {}
    uses: dict[bytes, int] = {}
    for part in parts:
        sizes[part.digest] = 1 + sum(sizes[child.digest] for child in part.children)
        for child in part.children:
            uses[child.digest] = uses.get(child.digest, 0) + 1
    large = sizes[scalar.digest] > _NAMED_FROM
    names: dict[bytes, str] = {}

    def text(part: Scalar) -> str:
        if not large or uses.get(part.digest, 0) < 2 or sizes[part.digest] < 3:
            return _spell(part, text)
        if part.digest not in names:
            spelt = _spell(part, text)
            names[part.digest] = f"#{len(names) + 1}"
            return f"{names[part.digest]}={spelt}"
        return names[part.digest]

    return text(scalar)


def _spell(scalar: Scalar, text: Callable[[Scalar], str]) -> str:
    kind = f"{scalar.dtype}x{scalar.lanes}" if scalar.lanes > 1 else str(scalar.dtype)
    if isinstance(scalar, s.Const):
        return str(scalar.value).lower() if isinstance(scalar.value, bool) else repr(scalar.value)
    if isinstance(scalar, s.Varying):
        return f"one_of{scalar.values}"
    if isinstance(scalar, s.Index):
        return str(scalar.dim)
    if isinstance(scalar, s.Lanes):
        return f"lanes({scalar.lanes})"
    if isinstance(scalar, s.Load):
        span = f" : {scalar.lanes}" if scalar.lanes > 1 else ""
        span += f" : {scalar.stride}" if scalar.stride != 1 else ""
        guard = " aligned" * scalar.aligned
        guard += f" if {text(scalar.predicate)}" if scalar.predicate is not None else ""
        return f"{scalar.buffer.name}[{scalar.offset}{span}{guard}]"
    if isinstance(scalar, s.Unary):
        return f"{scalar.op}({text(scalar.operand)})"
    if isinstance(scalar, s.Binary):
        if scalar.op in _INFIX:
            return f"({text(scalar.left)} {_INFIX[scalar.op]} {text(scalar.right)})"
        return f"{scalar.op}({text(scalar.left)}, {text(scalar.right)})"
    if isinstance(scalar, s.Select):
        return f"select({text(scalar.condition)}, {text(scalar.yes)}, {text(scalar.no)})"
    if isinstance(scalar, s.Cast | s.Bitcast):
        how = "bits_as " if isinstance(scalar, s.Bitcast) else "saturated " if scalar.saturate else ""
        return f"{how}{kind}({text(scalar.operand)})"
    if isinstance(scalar, s.Fma):
        return f"fma({text(scalar.a)}, {text(scalar.b)}, {text(scalar.c)})"
    if isinstance(scalar, s.Broadcast):
        return f"{kind}({text(scalar.operand)})"
    if isinstance(scalar, s.Horizontal):
        return f"horizontal_{scalar.op}({text(scalar.operand)})"
    if isinstance(scalar, s.Reduce):
        ranges = ", ".join(f"{name} < {extent}" for name, extent in scalar.ranges)
        return f"reduce_{scalar.op}({ranges}: {text(scalar.body)})"
    if isinstance(scalar, s.Element):
        return f"{scalar.tensor}[{', '.join(map(str, scalar.indices))}]"
    name = scalar.name if isinstance(scalar, s.Call) else type(scalar).__name__.lower()
    tail = f", {list(scalar.pick)}" if isinstance(scalar, s.Shuffle) else ""
    return f"{name}({', '.join(map(text, scalar.children))}{tail})"


def _print_block(block: Block, indent: str) -> Iterator[str]:
    for statement in block:
        if isinstance(statement, For):
            step = f" step {statement.step}" if statement.step != 1 else ""
            yield f"{indent}{statement.kind} for {statement.index} < {statement.extent}{step}:"
            yield from _print_block(statement.body, indent + "  ")
        elif isinstance(statement, While):
            yield f"{indent}while {statement.condition}:"
            yield from _print_block(statement.body, indent + "  ")
        elif isinstance(statement, If):
            yield f"{indent}if {statement.condition}:"
            yield from _print_block(statement.then, indent + "  ")
            if statement.otherwise:
                yield f"{indent}else:"
                yield from _print_block(statement.otherwise, indent + "  ")
        elif isinstance(statement, Let):
            yield f"{indent}let {statement.name} = {statement.value}"
        elif isinstance(statement, Define):
            yield f"{indent}var {statement.buffer.name} = {statement.value}"
        elif isinstance(statement, Alloc):
            b = statement.buffer
            width = f"x{b.lanes}" if b.lanes > 1 else ""
            yield f"{indent}{b.space} {b.name}: {b.dtype}{width}[{b.size}]"
        elif isinstance(statement, Alias):
            guard = f" if {statement.condition} else {statement.otherwise}" if statement.condition is not None else ""
            kind = "fresh pointer" if statement.fresh else "pointer"
            yield f"{indent}{kind} {statement.buffer.name} = {statement.source.name} + {statement.offset}{guard}"
        elif isinstance(statement, Store):
            span = f" : {statement.value.lanes}" if statement.value.lanes > 1 else ""
            span += f" : {statement.stride}" if statement.stride != 1 else ""
            guard = " aligned" * statement.aligned
            guard += f" if {statement.predicate}" if statement.predicate is not None else ""
            yield f"{indent}{statement.buffer.name}[{statement.offset}{span}{guard}] = {statement.value}"
        elif isinstance(statement, Intrinsic):
            yield f"{indent}{statement.name}({', '.join(map(str, (*statement.places, *statement.values)))})"
        else:
            yield f"{indent}barrier"


def print_kernel(kernel: Kernel) -> str:
    """The text of a kernel, as `onnxc dump --stage kernels` shows it."""
    parameters = ", ".join(
        f"{'out ' if buffer.name in kernel.outputs else ''}{buffer.name}: {buffer.dtype}[{buffer.size}]"
        for buffer in kernel.parameters
    )
    sizes = f"; {', '.join(kernel.sizes)}" if kernel.sizes else ""
    origin = f"  // from {', '.join(kernel.origin)}\n" if kernel.origin else ""
    return f"{origin}kernel {kernel.name}({parameters}{sizes}):\n" + "\n".join(_print_block(kernel.body, "  ")) + "\n"


def kernel_digest(kernel: Kernel) -> str:
    """Identifies what a kernel does, its name and origin aside; the same in every process, quick where text would be
    long: shared subexpressions count once."""
    parts: list[bytes] = []
    buffers: dict[int, bytes] = {}

    def add(item: Any) -> None:
        kind = item.__class__
        if kind is int or kind is str or item is None:
            parts.append(f"{item};".encode())
        elif isinstance(item, Scalar):
            parts.append(item.digest)
        elif isinstance(item, tuple):
            parts.append(b"(")
            for entry in item:
                add(entry)
            parts.append(b")")
        elif kind is Buffer and id(item) in buffers:
            parts.append(buffers[id(item)])
        elif (names := _members(kind)) is not None:
            first = len(parts)
            parts.append(kind.__name__.encode())
            for name in names:
                add(getattr(item, name))
            if kind is Buffer:
                buffers[id(item)] = b"".join(parts[first:])
        else:
            parts.append(f"{item};".encode())

    add((kernel.parameters, kernel.outputs, kernel.sizes, kernel.body, kernel.aliases))
    return hashlib.blake2b(b"".join(parts), digest_size=5).hexdigest()


@cache
def _members(kind: Any) -> tuple[str, ...] | None:
    """The fields of what counts by its fields."""
    return tuple(member.name for member in fields(kind)) if is_dataclass(kind) and kind is not Sum else None


PLAIN = frozenset((int, float, str, bool, DType, Buffer, type(None)))
"""Types of what expressions hold beside parts that are expressions."""


def free_sizes(block: Block, buffers: Sequence[Buffer] = ()) -> tuple[str, ...]:
    """Names of the symbols that statements (and the sizes of buffers) use and do not bind: what a kernel is told."""
    found: dict[str, None] = {}
    bound: set[str] = set()

    def see(*items: Dim | Scalar | None) -> None:
        for item in items:
            free = NOTHING if item is None or isinstance(item, int) else item.free
            if not free <= found.keys():
                found.update(dict.fromkeys(sorted(free)))

    for statement in walk(block):
        if isinstance(statement, For):
            bound.add(statement.index)
            see(statement.extent)
        elif isinstance(statement, Let):
            bound.add(statement.name)
            see(statement.value)
        elif isinstance(statement, Define):
            see(statement.value)
        elif isinstance(statement, Alloc):
            see(statement.buffer.size)
        elif isinstance(statement, Alias):
            see(statement.offset, statement.condition)
        elif isinstance(statement, Store):
            see(statement.offset, statement.value, statement.predicate, statement.stride)
        elif isinstance(statement, If | While):
            see(statement.condition)
        elif isinstance(statement, Intrinsic):
            see(*(place.offset for place in statement.places), *statement.values)
    for buffer in buffers:
        see(buffer.size)
    return tuple(name for name in found if name not in bound)


def used_buffers(body: Block, candidates: Sequence[Buffer]) -> tuple[Buffer, ...]:
    """Those of the candidates that statements read or write, in order."""
    names = {part.buffer.name for part in parts(body) if isinstance(part, s.Load)}
    for statement in walk(body):
        if isinstance(statement, Alias):
            names |= {statement.source.name} | ({statement.otherwise.name} if statement.otherwise else set())
        elif isinstance(statement, Store):
            names.add(statement.buffer.name)
        elif isinstance(statement, Intrinsic):
            names |= {place.buffer.name for place in statement.places}
    return tuple(buffer for buffer in candidates if buffer.name in names)


def parts(body: Block) -> list[Scalar]:
    """All expressions that statements hold, what they are made of, and run-time values in dims: objects once each."""
    found: list[Scalar] = []
    seen: set[int] = set()

    def see(item: object) -> None:
        if isinstance(item, Scalar):
            if id(item) not in seen:
                seen.add(id(item))
                found.append(item)
                for content in item._contents:
                    if content.__class__ not in PLAIN:
                        see(content)
        elif isinstance(item, Sum):
            if item.has_opaque and id(item) not in seen:
                seen.add(id(item))
                for atom in atoms(item):
                    if isinstance(atom, Opaque):
                        see(atom.value)
        elif isinstance(item, tuple):
            for entry in item:
                see(entry)

    for statement in walk(body):
        if isinstance(statement, Intrinsic):
            see((*(place.offset for place in statement.places), *statement.values))
        for part in ("value", "predicate", "condition", "offset", "stride", "extent"):
            see(getattr(statement, part, None))
    return found
