"""One step of a vector loop: its body in so many lanes at once (see `passes.vectorize`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir import scalars as s
from ..ir.dims import Atom, Dim, Extremum, Opaque, Quotient, Sum, Symbol, atoms, bounds, known_le, linear, symbol
from ..ir.dtypes import BOOL, I8, I32, I64, U8, U32
from ..ir.intrinsics import LOOKUP
from ..ir.loops import Alias, Alloc, Block, Define, For, If, Let, Statement, Store
from ..ir.scalars import Buffer, Load, Rewriter, Scalar, Select

_UPDATES = ("add", "mul", "min", "max", "and", "or", "sub")
_SCALAR_INDEX_NODES = 3  # Nodes of a run-time index up to which every lane computes its own.
_GATHERED_NODES = 2048  # Scalar nodes that may stand in for vector loads in one step, before the code grows too large.

Key = tuple[str, Dim]


class NotVectorizable(Exception):
    """The loop has to stay serial."""


@dataclass(frozen=True)
class Update:
    """A store that combines a value with what it overwrites: `op` is the combination, `operands` one value, or two
    factors of a product that is added."""

    op: str
    operands: tuple[Scalar, ...]
    subtracts: bool = False


def as_update(store: Store) -> Update | None:
    """The store as an update of its own target, or None."""

    def target(scalar: Scalar) -> bool:
        return isinstance(scalar, Load) and scalar.buffer.name == store.buffer.name and scalar.offset == store.offset

    value = store.value
    if isinstance(value, s.Fma) and target(value.c):
        return Update("add", (value.a, value.b))
    if isinstance(value, s.Binary) and value.op in _UPDATES and value.lanes == 1:
        if target(value.left):
            return Update("add" if value.op == "sub" else value.op, (value.right,), value.op == "sub")
        if target(value.right) and value.op != "sub":
            return Update(value.op, (value.left,))
    return None


class _Guard(Rewriter):
    """Gives loads that only a condition makes safe that condition as a predicate."""

    def __init__(
        self, step: Step, condition: Scalar | None, sure: set[bytes], guarded: dict[bytes, bool] | None = None
    ):
        super().__init__()
        self.step, self.condition, self.sure = step, condition, sure
        self._guarded = {} if guarded is None else guarded

    def __call__(self, scalar: Scalar) -> Scalar:
        return super().__call__(scalar) if self._is_guarded(scalar) else scalar

    def _is_guarded(self, scalar: Scalar) -> bool:
        """Whether there is a load in it that may need a condition. Without this, a chain of selects whose parts all
        read the one before (roundings to float8) would be walked once for each path through it."""
        known = self._guarded.get(scalar.digest)
        if known is None:
            inner = [
                atom.value
                for dim in scalar.dims
                if isinstance(dim, Sum)
                for atom in atoms(dim)
                if isinstance(atom, Opaque) and isinstance(atom.value, Scalar)
            ]
            known = self._unsafe(scalar) or any(map(self._is_guarded, (*scalar.children, *inner)))
            self._guarded[scalar.digest] = known
        return known

    def _unsafe(self, scalar: Scalar) -> bool:
        """Whether it is a load from a place that may not be there."""
        if not isinstance(scalar, Load) or scalar.digest in self.sure or scalar.buffer.space == "register":
            return False
        return not (known_le(0, scalar.offset) and known_le(scalar.offset + 1, scalar.buffer.size))

    def rebuild(self, scalar: Scalar) -> Scalar:
        if isinstance(scalar, Select):
            if self.condition is None and not self.step.varies(scalar):
                return scalar
            condition = self(scalar.condition)
            yes, no = (
                _Guard(self.step, self._both(sign), self.sure, self._guarded)(part)
                for sign, part in ((condition, scalar.yes), (s.unary("not", condition), scalar.no))
            )
            return s.select(condition, yes, no)
        guarded = super().rebuild(scalar)
        if isinstance(guarded, Load) and self.condition is not None and self._unsafe(scalar):
            mine = guarded.predicate
            return replace(guarded, predicate=self._both(mine) if mine is not None else self.condition)
        return guarded

    def _both(self, condition: Scalar) -> Scalar:
        return condition if self.condition is None else s.binary("and", self.condition, condition)


def _sure_loads(scalar: Scalar) -> tuple[set[bytes], bool]:
    """The loads that no select guards, by digest, and whether there is a select at all."""
    found: set[bytes] = set()
    seen: set[bytes] = set()
    selects = False
    waiting = [scalar]
    while waiting:
        part = waiting.pop()
        if part.digest in seen:
            continue
        seen.add(part.digest)
        if isinstance(part, Load):
            found.add(part.digest)
        if isinstance(part, Select):
            selects = True
            waiting.append(part.condition)
        else:
            waiting += part.children
    return found, selects


def _fits_u32(dim: Dim) -> bool:
    lower, upper = bounds(dim)
    return lower is not None and lower >= 0 and upper is not None and upper < 1 << 32


class _Lane(Rewriter):
    """Rewrites scalar forms to what they are in one lane."""

    def __init__(self, step: Step, number: int):
        names: dict[str, Dim] = {name: symbol(each[number], None) for name, (_, each) in step.lane_names.items()}
        super().__init__(dims={step.lane: number, **names})
        self.step, self.number = step, number

    def rebuild(self, scalar: Scalar) -> Scalar:
        if isinstance(scalar, Load) and scalar.buffer.name in self.step.private:
            return self.step.element(self.step.vector(scalar), self.number)
        return super().rebuild(scalar)

    def _opaque(self, atom: Opaque) -> Dim:
        """A run-time value that takes some arithmetic is computed for all lanes at once."""
        assert isinstance(atom.value, Scalar)
        if self.step.varies(atom.value) and sum(1 for _ in s.walk(atom.value)) > _SCALAR_INDEX_NODES:
            return s.as_dim(self.step.element(self.step.vector(atom.value), self.number), atom.lower, atom.upper)
        return super()._opaque(atom)


class Step(Rewriter):
    """One step of so many lanes. As a rewriter it gives the scalar form of an expression in one lane, with the lane's
    number a symbol; `vector` gives all lanes of a scalar form."""

    def __init__(
        self,
        fresh: Callable[[str], str],
        lanes: int,
        index: str,
        base: Dim,
        accumulators: Mapping[Key, Buffer],
        left: Dim | None,
        rename: bool,
        lookups: int = 0,
    ):
        self.lookups = lookups
        self.lane = f"{index}.lane"
        super().__init__(dims={index: base + symbol(self.lane, 0, lanes - 1)})
        self.fresh, self.lanes, self.rename = fresh, lanes, rename
        self.accumulators, self.left = accumulators, left
        self.active: Scalar | None = None
        if left is not None:
            self.active = s.binary("lt", s.cast(s.Lanes(I64, lanes), I32), s.cast(s.index(left), I32))
        self.varying = {self.lane}
        self.lane_names: dict[str, tuple[Buffer, list[str]]] = {}
        self.sure: set[bytes] = set()
        self.private: dict[str, Buffer] = {}
        self.aliases: dict[str, tuple[Buffer, Dim]] = {}
        self.renamed: dict[str, Buffer] = {}
        self.gathered = self.work = 0
        self._varies: dict[bytes, bool] = {}
        self._vectors: dict[bytes, Scalar] = {}

    def check_cost(self) -> None:
        """Raises NotVectorizable where lanes one by one outweigh what vectors save."""
        if self.gathered > _GATHERED_NODES or (self.gathered and self.work <= 2):
            raise NotVectorizable

    # One lane.

    def rebuild(self, scalar: Scalar) -> Scalar:
        if scalar.lanes != 1:
            raise NotVectorizable
        result = super().rebuild(scalar)
        if isinstance(result, Load):
            if result.buffer.name in self.aliases:
                source, offset = self.aliases[result.buffer.name]
                return replace(result, buffer=source, offset=result.offset + offset)
            return replace(result, buffer=self.renamed.get(result.buffer.name, result.buffer))
        return result

    def _forget(self) -> None:
        for memory in (self._done, self._varies, self._vectors):
            memory.clear()

    def varies(self, scalar: Scalar) -> bool:
        """Whether a scalar form differs between lanes."""
        found = self._varies.get(scalar.digest)
        if found is None:
            private = isinstance(scalar, Load) and scalar.buffer.name in self.private
            found = private or any(map(self.varies, scalar.children)) or any(map(self.dim_varies, scalar.dims))
            self._varies[scalar.digest] = found
        return found

    def dim_varies(self, dim: Dim) -> bool:
        return isinstance(dim, Sum) and any(map(self._atom_varies, atoms(dim)))

    def _atom_varies(self, atom: Atom) -> bool:
        if isinstance(atom, Opaque):
            return isinstance(atom.value, Scalar) and self.varies(atom.value)
        return isinstance(atom, Symbol) and atom.name in self.varying

    def affine(self, dim: Dim) -> tuple[Dim, Dim] | None:
        """(stride, base) where the dim is base + stride*lane, else None."""
        if not self.dim_varies(dim):
            return 0, dim
        found = linear(dim, self.lane)
        return None if found is None or self.dim_varies(found[0]) or self.dim_varies(found[1]) else found

    # All lanes.

    def vector(self, scalar: Scalar) -> Scalar:
        """The values of a scalar form in all lanes; a scalar where they are all the same."""
        if not self.varies(scalar):
            return scalar
        found = self._vectors.get(scalar.digest)
        if found is None:
            found = self._vectors[scalar.digest] = self._vector(scalar)
            self.work += not isinstance(scalar, Load)
        return found

    def _vector(self, scalar: Scalar) -> Scalar:
        if isinstance(scalar, s.Index):
            return self.index_vector(scalar.dim)
        if isinstance(scalar, Load):
            return self.load_vector(scalar)
        if isinstance(scalar, s.Unary):
            return s.unary(scalar.op, self.vector(scalar.operand))
        if isinstance(scalar, s.Binary):
            return s.binary(scalar.op, self.vector(scalar.left), self.vector(scalar.right))
        if isinstance(scalar, Select):
            return s.select(self.vector(scalar.condition), self.vector(scalar.yes), self.vector(scalar.no))
        if isinstance(scalar, s.Cast):
            return s.cast(self.vector(scalar.operand), scalar.dtype, scalar.saturate)
        if isinstance(scalar, s.Bitcast):
            return s.bitcast(self.vector(scalar.operand), scalar.dtype)
        if isinstance(scalar, s.Fma):
            return s.fma(self.vector(scalar.a), self.vector(scalar.b), self.vector(scalar.c))
        if isinstance(scalar, s.Call):  # a dot product of the groups in each lane
            wide = tuple(s.widen(self.vector(argument), self.lanes) for argument in scalar.arguments)
            return s.Call(scalar.dtype, self.lanes, scalar.name, wide)
        raise NotVectorizable

    def element(self, vector: Scalar, number: int) -> Scalar:
        return s.Shuffle(vector.dtype, 1, vector, vector, (number,)) if vector.lanes > 1 else vector

    def one_by_one(self, scalar: Scalar) -> Scalar:
        """The vector of what a scalar form is in each lane; inactive lanes compute nothing and are zero."""
        first = self.in_lane(scalar, 0)
        self.gathered += self.lanes * sum(part.lanes == 1 for part in s.walk(first))
        if self.gathered > _GATHERED_NODES:
            raise NotVectorizable
        elements = (first, *(self.in_lane(scalar, number) for number in range(1, self.lanes)))
        return s.Vector(scalar.dtype, self.lanes, elements)

    def in_lane(self, scalar: Scalar, number: int) -> Scalar:
        value = _Lane(self, number)(scalar)
        if self.left is None:
            return value
        active = s.binary("lt", s.const(number, I64), s.index(self.left))
        return s.select(active, value, s.const(0, scalar.dtype))

    def index_vector(self, dim: Dim) -> Scalar:
        """An index in all lanes, an i64 vector or scalar."""
        steps = self.affine(dim)
        lane_numbers = s.Lanes(I64, self.lanes)
        if steps is not None:
            stride, base = steps
            scaled = lane_numbers if stride == 1 else s.binary("mul", lane_numbers, s.index(stride))
            return s.index(dim) if stride == 0 else scaled if base == 0 else s.binary("add", scaled, s.index(base))
        assert isinstance(dim, Sum)
        total: Scalar | None = None
        for monomial, coefficient in dim.terms:
            term: Scalar | None = s.const(coefficient, I64) if coefficient != 1 or not monomial else None
            for atom in monomial:
                alone = Sum((((atom,), 1),))
                if not self.dim_varies(alone):
                    factor = s.index(alone)
                elif isinstance(atom, Extremum):
                    parts = [self.index_vector(operand) for operand in atom.operands]
                    factor = parts[0]
                    for part in parts[1:]:
                        factor = s.binary(atom.kind, factor, part)
                elif isinstance(atom, Opaque) and isinstance(atom.value, Scalar):
                    factor = self.vector(s.cast(atom.value, I64))
                elif isinstance(atom, Symbol):
                    named = self.lane_names.get(atom.name)
                    factor = lane_numbers if named is None else s.load(named[0], 0, self.lanes)
                elif isinstance(atom, Quotient) and isinstance(atom.denominator, int) and _fits_u32(atom.numerator):
                    wide = s.cast(self.index_vector(atom.numerator), U32)
                    factor = s.cast(s.binary("div", wide, s.const(atom.denominator, U32)), I64)
                else:
                    factor = self.one_by_one(s.Index(I64, 1, alone))
                term = factor if term is None else s.binary("mul", term, factor)
            assert term is not None
            total = term if total is None else s.binary("add", total, term)
        assert total is not None
        return total

    def both(self, predicate: Scalar | None) -> Scalar | None:
        """A predicate for all lanes that also leaves out inactive ones."""
        if predicate is None:
            return self.active
        wide = s.widen(self.vector(predicate), self.lanes)
        return wide if self.active is None else s.binary("and", wide, self.active)

    def reversed(self, scalar: Scalar) -> Scalar:
        return s.Shuffle(scalar.dtype, self.lanes, scalar, scalar, tuple(range(self.lanes))[::-1])

    def load_vector(self, scalar: Load) -> Scalar:
        buffer = scalar.buffer
        if self.dim_varies(scalar.stride):
            raise NotVectorizable
        wide = self.private.get(buffer.name)
        if wide is not None:
            if self.dim_varies(scalar.offset) or scalar.predicate is not None:
                raise NotVectorizable
            return s.load(wide, scalar.offset * (1 if wide.space == "register" else self.lanes), self.lanes)
        steps = self.affine(scalar.offset)
        if steps is None:
            byte = self._looked_up(scalar)
            if byte is not None:
                tables = (s.load(buffer, start, self.lookups) for start in range(0, 256, self.lookups))
                return s.Call(scalar.dtype, self.lanes, LOOKUP, (s.widen(self.vector(byte), self.lanes), *tables))
            if scalar.predicate is not None:
                offset = _Guard(self, scalar.predicate, self.sure).dim(scalar.offset)
                scalar = replace(scalar, offset=offset)
            return self.one_by_one(scalar)
        stride, base = steps
        predicate = self.both(scalar.predicate)
        if stride == 0:
            assert predicate is not None
            once = s.load(buffer, base, 1, s.Horizontal(BOOL, 1, "or", predicate))
            return s.select(predicate, once, s.const(0, scalar.dtype))
        if stride == -1:
            turned = None if predicate is None else self.reversed(predicate)
            return self.reversed(s.load(buffer, base - (self.lanes - 1), self.lanes, turned))
        return s.load(buffer, base, self.lanes, predicate, stride)

    def _looked_up(self, load: Load) -> Scalar | None:
        """The byte that is the whole index into a table of 256 bytes, None where a load is no such look-up."""
        terms = load.offset.terms if isinstance(load.offset, Sum) else ()
        table = load.buffer.size == 256 and load.buffer.dtype in (U8, I8) and load.buffer.space != "register"
        if not self.lookups or not table or load.predicate is not None or len(terms) != 1:
            return None
        (monomial, factor), found = terms[0], None
        if factor == 1 and len(monomial) == 1 and isinstance(monomial[0], Opaque):
            found = monomial[0].value
        while isinstance(found, s.Cast) and found.dtype != U8 and found.operand.dtype.is_integer:
            found = found.operand
        return found if isinstance(found, Scalar) and found.dtype == U8 else None

    def expression(self, scalar: Scalar) -> Scalar:
        """An expression of the loop's body in all lanes; a scalar where they are all the same."""
        return self.lanes_of(self(scalar))

    def lanes_of(self, form: Scalar) -> Scalar:
        """All lanes of a scalar form, with the loads that its selects guard made safe."""
        self.sure, selects = _sure_loads(form)
        return self.vector(_Guard(self, None, self.sure)(form) if selects else form)

    # Statements.

    def block(self, block: Block) -> list[Statement]:
        return [new for statement in block for new in self.statement(statement)]

    def statement(self, statement: Statement) -> list[Statement]:
        if isinstance(statement, Store):
            return self.store(statement)
        if isinstance(statement, For):
            extent = self.dim(statement.extent)
            if self.dim_varies(extent) or statement.kind not in ("serial", "unrolled"):
                raise NotVectorizable
            return [replace(statement, extent=extent, body=tuple(self.block(statement.body)))]
        if isinstance(statement, Let):
            return self.let(statement)
        if isinstance(statement, Define):
            value = s.widen(self.expression(statement.value), self.lanes)
            return [Define(self.declare(statement.buffer), value)]
        if isinstance(statement, Alloc):
            return [Alloc(self.declare(statement.buffer))]
        if isinstance(statement, Alias):
            return self.alias(statement)
        if isinstance(statement, If):
            condition = self(statement.condition)
            if self.varies(condition):
                raise NotVectorizable
            return [If(condition, tuple(self.block(statement.then)), tuple(self.block(statement.otherwise)))]
        raise NotVectorizable

    def declare(self, buffer: Buffer) -> Buffer:
        """The vector form of a buffer that each iteration of the loop has for its own."""
        size = self.dim(buffer.size)
        if buffer.space not in ("register", "stack") or self.dim_varies(size) or buffer.lanes != 1:
            raise NotVectorizable
        self._forget()
        name = self.fresh(buffer.name) if self.rename else buffer.name
        self.renamed[buffer.name] = replace(buffer, name=name)
        if buffer.space == "register":
            self.private[name] = replace(buffer, name=name, size=size, lanes=self.lanes)
        else:
            self.private[name] = replace(buffer, name=name, size=size * self.lanes)
        return self.private[name]

    def let(self, statement: Let) -> list[Statement]:
        name = self.fresh(statement.name) if self.rename else statement.name
        value = self(statement.value) if isinstance(statement.value, Scalar) else self.dim(statement.value)
        self._forget()
        if not (self.varies(value) if isinstance(value, Scalar) else self.dim_varies(value)):
            self._bind(statement.name, name)
            return [Let(name, value)]
        form = value if isinstance(value, Scalar) else s.index(value)
        if isinstance(form, s.Index) and not any(isinstance(atom, Opaque) for atom in atoms(form.dim)):
            self._dims[statement.name] = form.dim
            return []
        self.gathered += self.lanes
        register = Buffer(self.fresh(name), I64, 1, "register", self.lanes)
        wide = s.widen(self.lanes_of(form), self.lanes)
        names = [self.fresh(name) for _ in range(self.lanes)]
        self._bind(statement.name, name)
        self.varying.add(name)
        self.lane_names[name] = register, names
        lanes = [Let(each, self.element(s.load(register, 0, self.lanes), k)) for k, each in enumerate(names)]
        return [Define(register, wide), *lanes]

    def _bind(self, old: str, new: str) -> None:
        self._dims.pop(old, None)
        if new != old:
            self._dims[old] = symbol(new, None)

    def alias(self, statement: Alias) -> list[Statement]:
        offset = self.dim(statement.offset)
        self._forget()
        if self.dim_varies(offset):
            if statement.condition is not None or statement.source.name in self.renamed:
                raise NotVectorizable
            source, start = self.aliases.get(statement.source.name, (statement.source, 0))
            self.aliases[statement.buffer.name] = source, start + offset
            return []
        condition = None if statement.condition is None else self(statement.condition)
        origin = statement.source.name
        if (condition is not None and self.varies(condition)) or origin in self.renamed or origin in self.aliases:
            raise NotVectorizable
        name = self.fresh(statement.buffer.name) if self.rename else statement.buffer.name
        self.renamed[statement.buffer.name] = replace(statement.buffer, name=name)
        self.aliases.pop(statement.buffer.name, None)
        return [replace(statement, buffer=self.renamed[statement.buffer.name], offset=offset, condition=condition)]

    def store(self, store: Store) -> list[Statement]:
        accumulator = self.accumulators.get((store.buffer.name, store.offset))
        if accumulator is not None:
            return [self.accumulate(store, accumulator)]
        form = s.load(store.buffer, store.offset, 1, store.predicate, store.stride)
        target = self(form)
        assert isinstance(target, Load)
        if store.value.lanes != 1 or self.dim_varies(target.stride):
            raise NotVectorizable
        value = s.widen(self.expression(store.value), self.lanes)
        self.work += 1
        wide = self.private.get(target.buffer.name)
        if wide is not None:
            if self.dim_varies(target.offset):
                raise NotVectorizable
            predicate = None if target.predicate is None else s.widen(self.vector(target.predicate), self.lanes)
            if wide.space != "register":
                return [Store(wide, target.offset * self.lanes, value, predicate)]
            if predicate is not None:
                value = s.select(predicate, value, s.load(wide, target.offset, self.lanes))
            return [Store(wide, target.offset, value)]
        predicate = self.both(target.predicate)
        steps = self.affine(target.offset)
        if steps is None:
            if any(isinstance(part, Load) and part.buffer.name == store.buffer.name for part in s.walk(store.value)):
                raise NotVectorizable
            self.gathered += 2 * self.lanes
            return [self._store_lane(target, value, predicate, number) for number in range(self.lanes)]
        stride, base = steps
        if stride == 0 and as_update(store) is not None:
            raise NotVectorizable
        assert stride != 0, f"every iteration of a vector loop writes {store.buffer}[{store.offset}]"
        if stride == -1:
            turned = None if predicate is None else self.reversed(predicate)
            return [Store(target.buffer, base - (self.lanes - 1), self.reversed(value), turned)]
        return [Store(target.buffer, base, value, predicate, stride)]

    def _store_lane(self, target: Load, value: Scalar, predicate: Scalar | None, number: int) -> Statement:
        allowed = None if predicate is None else self.element(predicate, number)
        return Store(target.buffer, _Lane(self, number).dim(target.offset), self.element(value, number), allowed)

    def accumulate(self, store: Store, accumulator: Buffer) -> Statement:
        """An update of a scalar outside the loop, made to a vector."""
        update = as_update(store)
        assert update is not None
        old = s.load(accumulator, 0, self.lanes)
        operands: Sequence[Scalar] = [self.expression(operand) for operand in update.operands]
        if len(operands) == 2:
            new = s.fma(operands[0], operands[1], old)
        else:
            new = s.binary("sub" if update.subtracts else update.op, old, operands[0])
        active = self.both(None if store.predicate is None else self(store.predicate))
        self.work += 1
        return Store(accumulator, 0, new if active is None else s.select(active, new, old))
