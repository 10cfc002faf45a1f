"""Selects that are safe to evaluate on both sides: what a condition forbids to read becomes part of the load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..ir import scalars as s
from ..ir.dims import Opaque, Sum, atoms
from ..ir.dtypes import BOOL
from ..ir.intrinsics import LOOKUP
from ..ir.scalars import Scalar


def guard_loads(root: Scalar) -> Scalar:
    """`root` where no load reads what a Select's condition forbids: the condition becomes part of its predicate.

    What is computed whichever way the selects go stays unguarded. A predicate also guards loads in its load's index.
    """
    return _Guard(None, {}).run(root) if _needs_guards(root) else root


def _reads_memory(scalar: Scalar) -> bool:
    return isinstance(scalar, s.Load) and scalar.buffer.space != "register"


def _index_values(scalar: Scalar) -> Iterator[Scalar]:
    """The run-time values in the index dims."""
    for dim in scalar.dims:
        if isinstance(dim, Sum):
            for atom in atoms(dim):
                if isinstance(atom, Opaque) and isinstance(atom.value, Scalar):
                    yield atom.value


def _needs_guards(root: Scalar) -> bool:
    """Whether a load is only made under a condition; by identity alone, so that most expressions are cleared fast."""
    always: dict[int, Scalar] = {}
    waiting = [root]
    branches: list[Scalar] = []
    while waiting:
        scalar = waiting.pop()
        if id(scalar) in always:
            continue
        always[id(scalar)] = scalar
        if isinstance(scalar, s.Select):
            waiting.append(scalar.condition)
            branches += scalar.yes, scalar.no
            continue
        waiting += scalar.children
        (branches if isinstance(scalar, s.Load) and scalar.predicate is not None else waiting).extend(
            _index_values(scalar)
        )
    while branches:
        scalar = branches.pop()
        if id(scalar) in always:
            continue
        always[id(scalar)] = scalar
        if _reads_memory(scalar):
            return True
        branches += scalar.children
        branches += _index_values(scalar)
    return False


def _always_evaluated(root: Scalar, selects: dict[bytes, frozenset[bytes]]) -> set[bytes]:
    """Digests of all that is computed whichever way the selects in `root` go."""
    found: set[bytes] = set()
    waiting = [root]
    while waiting:
        scalar = waiting.pop()
        if scalar.digest in found:
            continue
        found.add(scalar.digest)
        if isinstance(scalar, s.Select):
            if scalar.digest not in selects:
                yes, no = (_always_evaluated(branch, selects) for branch in (scalar.yes, scalar.no))
                selects[scalar.digest] = frozenset(yes & no)
            found |= selects[scalar.digest]
            waiting.append(scalar.condition)
            continue
        waiting += scalar.children
        if not (isinstance(scalar, s.Load) and scalar.predicate is not None):
            waiting += _index_values(scalar)
    return found


class _Guard(s.Rewriter):
    """Rewrites under a guard; what an enclosing guard's expression always computes is left to that guard's rewriter."""

    def __init__(
        self, guard: Scalar | None, owners: Mapping[bytes, _Guard], selects: dict[bytes, frozenset[bytes]] | None = None
    ):
        """`selects` holds what both ways of a select compute, found once for all rewriters of an expression."""
        super().__init__()
        self._guard = guard
        self._owners = dict(owners)
        self._selects = {} if selects is None else selects

    def run(self, root: Scalar) -> Scalar:
        for digest in _always_evaluated(root, self._selects):
            self._owners.setdefault(digest, self)
        return self(root)

    def __call__(self, scalar: Scalar) -> Scalar:
        owner = self._owners.get(scalar.digest, self)
        return super().__call__(scalar) if owner is self else owner(scalar)

    def _under(self, condition: Scalar) -> _Guard:
        return _Guard(condition if self._guard is None else both(self._guard, condition), self._owners, self._selects)

    def _before(self, shuffle: s.Shuffle, start: int) -> _Guard:
        """For an operand of a shuffle, its lanes from `start` on: a lane is wanted where one that it goes to is."""
        assert self._guard is not None
        guard = _with_lanes(self._guard, shuffle.lanes)
        place = {lane - start: position for position, lane in enumerate(shuffle.pick)}
        count = shuffle.left.lanes
        if isinstance(guard, s.Broadcast) or len(place) < shuffle.lanes:
            guard = _with_lanes(s.Horizontal(BOOL, 1, "or", guard), count)
        else:
            none = s.widen(s.const(False, BOOL), guard.lanes)
            guard = s.Shuffle(BOOL, count, guard, none, tuple(place.get(lane, guard.lanes) for lane in range(count)))
        return self._instead(guard)

    def _instead(self, guard: Scalar) -> _Guard:
        """A rewriter under another guard than this one's, for what this one owns too."""
        owners = {digest: owner for digest, owner in self._owners.items() if owner is not self}
        return _Guard(guard, owners, self._selects)

    def _look_up(self, call: s.Call) -> Scalar:
        """A look-up's guard is that of its bytes; each may ask for any element of the tables: they are read whole."""
        assert self._guard is not None
        guard = self._guard.operand if isinstance(self._guard, s.Broadcast) else self._guard
        whole = self._instead(s.Horizontal(BOOL, 1, "or", guard) if guard.lanes > 1 else guard)
        numbers, *tables = call.arguments
        return replace(call, arguments=(self(numbers), *map(whole, tables)))

    def rebuild(self, scalar: Scalar) -> Scalar:
        if isinstance(scalar, s.Select):
            condition = self(scalar.condition)
            yes, no = self._under(condition).run(scalar.yes), self._under(negated(condition)).run(scalar.no)
            return s.select(condition, yes, no)
        if isinstance(scalar, s.Shuffle) and self._guard is not None and self._guard.lanes > 1:
            left, right = self._before(scalar, 0), self._before(scalar, scalar.left.lanes)
            return replace(scalar, left=left(scalar.left), right=right(scalar.right))
        if isinstance(scalar, s.Call) and scalar.name == LOOKUP and self._guard is not None:
            return self._look_up(scalar)
        if not isinstance(scalar, s.Load):
            return super().rebuild(scalar)
        predicate = None if scalar.predicate is None else self(scalar.predicate)
        if _reads_memory(scalar) and self._guard is not None:
            guard = _with_lanes(self._guard, scalar.lanes)
            predicate = guard if predicate is None else both(predicate, guard)
        inside = self if predicate is None else _Guard(predicate, self._owners, self._selects)
        offset, stride = inside.dim(scalar.offset), inside.dim(scalar.stride)
        return s.load(scalar.buffer, offset, scalar.lanes, predicate, stride, scalar.aligned)


def negated(condition: Scalar) -> Scalar:
    """The opposite of a bool, without a double negation."""
    if isinstance(condition, s.Broadcast):
        return s.widen(negated(condition.operand), condition.lanes)
    if isinstance(condition, s.Unary) and condition.op == "not":
        return condition.operand
    return s.unary("not", condition)


def both(a: Scalar, b: Scalar) -> Scalar:
    """a and b; of two scalars in every lane, it is one in every lane again."""
    lanes = s.lane_count(a, b)
    a, b = _with_lanes(a, lanes), _with_lanes(b, lanes)
    if isinstance(a, s.Broadcast) and isinstance(b, s.Broadcast):
        return s.widen(s.binary("and", a.operand, b.operand), lanes)
    return a if a == b else s.binary("and", a, b)


def _with_lanes(guard: Scalar, lanes: int) -> Scalar:
    """A guard for a load of other lanes than its own: whether any lane wants it."""
    if guard.lanes == lanes:
        return guard
    if isinstance(guard, s.Broadcast):
        guard = guard.operand
    if guard.lanes > 1:
        guard = s.Horizontal(BOOL, 1, "or", guard)
    return s.widen(guard, lanes)
