"""Recurrent layers: LSTM, GRU, RNN.

The products with the inputs are one matrix product over all steps. Then one kernel walks the steps: a block of hidden
units, as wide as a vector, multiplies its slice of the recurrent weights (packed so that a block's gates lie together)
with a few rows of the state, applies the gates and stores the new state. Gates are named as in ONNX's documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ....ir import functions as f
from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_max, dim_min, product, symbol
from ....ir.dtypes import F32, I64
from ....ir.errors import ModelError
from ....ir.graph import Node
from ....ir.loops import Define, For, If, Let, Statement, Store
from ....ir.ops import REGISTRY
from ....ir.scalars import Buffer, Scalar, const, load
from ....ir.target import Target
from ....ir.tensors import Tensor, compute, flat_offset
from ....passes.lower import generic
from ....passes.nests import build_nests
from ....passes.regions import Lowered, Region, anchor_tensor
from . import gemm
from .calls import attribute, call, operand, present

# Accumulators in flight that hide the latency of a multiply-add.
ACCUMULATORS = 8
# Multiply-adds per step from which the hidden units of one row are worth sharing among threads.
SHARED_STEP = 1 << 18

Activation = Callable[[Scalar], Scalar]
# Per activation: the function of (x, alpha, beta), and the defaults of alpha and beta where it has them.
_ACTIVATIONS: Mapping[str, tuple[Callable[[Scalar, float, float], Scalar], float | None, float | None]] = {
    "relu": (lambda x, a, b: f.maximum(x, 0), None, None),
    "tanh": (lambda x, a, b: f.tanh(x), None, None),
    "sigmoid": (lambda x, a, b: f.logistic(x), None, None),
    "affine": (lambda x, a, b: x * a + b, 1.0, 0.0),
    "leakyrelu": (lambda x, a, b: f.where(x < 0, x * a, x), 0.01, None),
    "thresholdedrelu": (lambda x, a, b: f.where(x > a, x, 0), 1.0, None),
    "scaledtanh": (lambda x, a, b: f.tanh(x * b) * a, 1.0, 1.0),
    "hardsigmoid": (lambda x, a, b: f.minimum(f.maximum(x * a + b, 0), 1), 0.2, 0.5),
    "elu": (lambda x, a, b: f.where(x < 0, (f.exp(x) - 1) * a, x), 1.0, None),
    "softsign": (lambda x, a, b: x / (f.absolute(x) + 1), None, None),
    "softplus": (lambda x, a, b: f.maximum(x, 0) + f.log1p(f.exp(-f.absolute(x))), None, None),
}
_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


@dataclass(frozen=True)
class _Unit:
    """Where a finished sum belongs: `row` of the batch, hidden unit, step (of the walk) and time (of the sequence).

    `active` tells whether the row's sequence has not ended, None where all have one length.
    """

    direction: Dim
    row: Dim
    unit: Dim
    step: Dim
    time: Dim
    active: Scalar | None
    tag: str

    def where_active(self, yes: Scalar, no: Scalar) -> Scalar:
        return yes if self.active is None else s.select(self.active, yes, no)


@dataclass(frozen=True)
class _Phase:
    """One walk over the hidden units: the gates from `first` on whose sums over a state it forms, and their use."""

    first: int
    gates: int
    source: Callable[[_Unit], Scalar]
    finish: Callable[[_Unit, Sequence[Scalar]], Iterator[Statement]]
    packed: Buffer


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a recurrent layer; None where the number of hidden units is not known."""
    return _Layer(region, target).lowered() if isinstance(present(region, 2).shape[2], int) else None


class _Layer:
    def __init__(self, region: Region, target: Target) -> None:
        assert region.anchor is not None
        self.region, self.target, self.op = region, target, region.anchor.op
        self.x, self.w, self.r = (present(region, position) for position in range(3))
        self.bias, self.lengths, self.initial_h = (operand(region, position) for position in (3, 4, 5))
        lstm = self.op == "LSTM"
        self.initial_c, self.peephole = (operand(region, position) if lstm else None for position in (6, 7))
        self.dtype = F32 if self.x.dtype.bits < 32 else self.x.dtype
        self.layout = bool(attribute(region, "layout"))
        self.batch, self.steps = self.x.shape[:2] if self.layout else self.x.shape[1::-1]
        self.directions = self.w.shape[0]
        self.direction = attribute(region, "direction")
        self.hidden: int = self.r.shape[2]  # type: ignore[assignment]
        self.gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[self.op]
        self.late_reset = self.op == "GRU" and bool(attribute(region, "linear_before_reset"))
        self.lanes = max(1, target.lanes(self.dtype.bits))
        self.blocks = -(-self.hidden // self.lanes)
        self.states = (self.directions, self.batch, self.hidden)
        size = product(self.states)
        self.projection = Buffer("projection", self.dtype, product((size, self.steps, self.gates)))
        self.state = Buffer("state", self.dtype, size * 2)  # of the last step and of this one
        self.cell = Buffer("cell", self.dtype, size)
        self.update, self.reset = Buffer("update", self.dtype, size), Buffer("reset", self.dtype, size)
        self.activations = self._activations()
        self.phases = self._phases()

    def _activations(self) -> list[list[Activation]]:
        """Per direction its activations, clipped where the layer asks for that."""
        names = attribute(self.region, "activations") or _DEFAULTS[self.op] * 2
        alphas, betas = (iter(attribute(self.region, f"activation_{n}") or ()) for n in ("alpha", "beta"))
        clip = attribute(self.region, "clip")
        found: list[Activation] = []
        for name in names:
            if name.lower() not in _ACTIVATIONS:
                raise ModelError(f"{self.op}: {name!r} is no activation; there are {', '.join(_ACTIVATIONS)}")
            function, alpha, beta = _ACTIVATIONS[name.lower()]
            a = 0.0 if alpha is None else next(alphas, alpha)
            b = 0.0 if beta is None else next(betas, beta)
            found.append(partial(_clipped, function, a, b, clip))
        count = len(_DEFAULTS[self.op])
        return [found[d * count : (d + 1) * count] for d in range(int(str(self.directions)))]

    def _activate(self, at: _Unit, number: int, x: Scalar) -> Scalar:
        results = [functions[number](x) for functions in self.activations]
        if len(results) == 1 or results[0] == results[1]:
            return results[0]
        return s.select(s.index(at.direction).equal(0), *results)

    def _phases(self) -> list[_Phase]:
        def phase(first: int, gates: int, source: Callable[[_Unit], Scalar], finish: object) -> _Phase:
            size = int(str(self.directions)) * self.blocks * self.hidden * gates * self.lanes
            packed = Buffer(f"recurrent{first}", self.dtype, size)
            return _Phase(first, gates, source, finish, packed)  # type: ignore[arg-type]

        if self.op == "LSTM":
            return [phase(0, 4, self._previous, self._lstm)]
        if self.op == "RNN":
            return [phase(0, 1, self._previous, self._rnn)]
        if self.late_reset:
            return [phase(0, 3, self._previous, self._gru)]
        return [
            phase(0, 2, self._previous, self._gru_gates),
            phase(2, 1, lambda at: load(self.reset, self._offset(at)), self._gru_candidate),
        ]

    def lowered(self) -> Lowered:
        kernels = self._input_product()
        packed = dict(kernels.packed)
        calls = list(kernels.calls)
        scratch = [self.projection, self.state, self.cell, self.update, self.reset]
        weights = self.region.constant(self.r)
        for phase in self.phases:
            if weights is not None:
                packed[phase.packed.name] = partial(self._pack, weights, phase)
            else:
                body = build_nests([(phase.packed, self._packed_definition(phase))])
                calls.append(call(self.region, f"{self.region.name}_pack", body, [phase.packed]))
            scratch.append(phase.packed)
        body = (*self._initial(), self._walk(), *self._final())
        calls.append(call(self.region, f"{self.dtype}_{self.region.name}_x{self.hidden}", body, scratch))
        used = {name for item in calls for name in getattr(item, "arguments", ())} - packed.keys()
        return Lowered(
            tuple(calls), (*kernels.workspaces, *(buffer for buffer in scratch if buffer.name in used)), packed
        )

    # The products with the inputs, and the weights.

    def _input_product(self) -> Lowered:
        """projection[d, ..., n] = x . w[d, n] + biases, the axes between in the order of the input's."""
        region, bias = self.region, self.bias
        columns = self.gates * self.hidden
        x, w = f.cast(self.x, self.dtype), f.cast(self.w, self.dtype)
        node = Node("Einsum", (), (), {"equation": "abi,dni->dabn"})
        (products,) = REGISTRY[node.op]((x, w), node.attributes)
        assert isinstance(products, Tensor)
        shape = products.shape

        def biased(sums: Tensor) -> list[tuple[Buffer, Tensor]]:
            def element(*i: Dim) -> Scalar:
                total = sums.at(i)
                if bias is not None:
                    total = total + s.cast(bias.at((i[0], i[3])), self.dtype)
                    if not self.late_reset:
                        total = total + s.cast(bias.at((i[0], i[3] + columns)), self.dtype)
                return total

            return [(self.projection, compute(shape, self.dtype, element, sums))]

        part = replace(
            region,
            name=f"{region.name}_input",
            outputs=tuple(biased(anchor_tensor(shape, products))),
            anchor=node,
            operands=(x, w),
            anchor_output=products,
            inline=lambda: biased(products),
        )
        found = gemm.schedule(part, self.target) or generic(part, self.target)
        assert found is not None
        return found

    def _pack(self, weights: np.ndarray, phase: _Phase) -> np.ndarray:
        """[directions, blocks, hidden (summed), gates, lanes], the last block filled up with zeros."""
        directions, hidden = int(str(self.directions)), self.hidden
        gates = weights.reshape(directions, self.gates, hidden, hidden)[:, phase.first : phase.first + phase.gates]
        padded = np.zeros((directions, phase.gates, self.blocks * self.lanes, hidden), self.dtype.numpy)
        padded[:, :, :hidden] = gates
        blocks = padded.reshape(directions, phase.gates, self.blocks, self.lanes, hidden)
        return np.ascontiguousarray(blocks.transpose(0, 2, 4, 1, 3)).reshape(-1)

    def _packed_definition(self, phase: _Phase) -> Tensor:
        shape = (self.directions, self.blocks, self.hidden, phase.gates, self.lanes)

        def element(*i: Dim) -> Scalar:
            unit = i[1] * self.lanes + i[4]
            row = self.r.at((i[0], (i[3] + phase.first) * self.hidden + unit, i[2]))
            return s.select(s.index(unit) < s.index(self.hidden), s.cast(row, self.dtype), const(0, self.dtype))

        return compute(shape, self.dtype, element, self.r)

    # The states before the first step and after the last one.

    def _initial(self) -> k.Block:
        def state(initial: Tensor | None, *i: Dim) -> Scalar:
            if initial is None:
                return const(0, self.dtype)
            return s.cast(initial.at((i[1], i[0], i[2]) if self.layout else i), self.dtype)

        outputs = [(self.state, compute((2, *self.states), self.dtype, lambda *i: state(self.initial_h, *i[1:])))]
        if self.op == "LSTM":
            outputs.append((self.cell, compute(self.states, self.dtype, lambda *i: state(self.initial_c, *i))))
        return build_nests(outputs)

    def _final(self) -> k.Block:
        def read(buffer: Buffer, start: Dim, *i: Dim) -> Scalar:
            direction, row = (i[1], i[0]) if self.layout else (i[0], i[1])
            offset = start + flat_offset((direction, row, i[2]), self.states)
            return s.cast(load(buffer, offset), self.x.dtype)

        starts = [(self.state, self.steps % 2 * product(self.states)), (self.cell, 0)]
        return build_nests(
            [
                (buffer, compute(tensor.shape, tensor.dtype, partial(read, *source)))
                for (buffer, tensor), source in zip(self.region.outputs[1:], starts, strict=False)
            ]
        )

    # The walk over the steps.

    def _walk(self) -> Statement:
        step, directions = k.index_symbol("step", self.steps), self.directions
        single = self.batch == 1 and self.gates * self.hidden**2 >= SHARED_STEP and self.target.threads > 1
        if single and directions == 1:
            body: list[Statement] = []
            for phase in self.phases:
                block = k.index_symbol("block", self.blocks)
                whole = tuple(self._tile(phase, 0, 0, 1, step, block, self.lanes))
                last = tuple(self._tile(phase, 0, 0, 1, step, block, self._left))
                if self._left != self.lanes:
                    whole = (If(s.index(block) < self.blocks - 1, whole, last),)
                body.append(For("block", self.blocks, whole, "parallel"))
            return For("step", self.steps, tuple(body))
        groups, share, count = self._split()
        direction, first = k.index_symbol("direction", directions), symbol("first")  # perhaps behind the last row
        task = k.index_symbol("task", directions * groups)
        here: list[Statement] = [Let("direction", task // groups), Let("first", task % groups * share)]
        rows: Dim = self.batch
        if groups > 1 and share * groups != self.batch:
            here.append(Let("rows", dim_max(0, dim_min(share, self.batch - first))))
            rows = symbol("rows", 0, share)
        elif groups > 1:
            rows = share
        inside: list[Statement] = []
        for phase in self.phases:
            tiles = partial(self._rows, phase, direction, first, rows, count, step)
            whole_blocks = self.hidden // self.lanes
            if whole_blocks:
                block = k.index_symbol("block", whole_blocks)
                inside.append(For("block", whole_blocks, tuple(tiles(block, self.lanes))))
            if self._left != self.lanes:
                inside += tiles(whole_blocks, self._left)
        work = product((self.batch, self.steps, directions, self.gates, self.hidden**2))
        kind = "serial" if isinstance(work, int) and work < SHARED_STEP else "parallel"
        return For("task", directions * groups, (*here, For("step", self.steps, tuple(inside))), kind)

    def _split(self) -> tuple[int, Dim, int]:
        """(groups, rows of the batch in each, rows of a tile): groups go to threads, tiles share a load of weights."""
        most = max(1, min(8, (self.target.vector_registers - 8) // max(p.gates for p in self.phases)))
        groups = max(1, self.target.threads // int(str(self.directions)))
        if not isinstance(self.batch, int):
            return groups, ceildiv(self.batch, groups * most) * most, most
        groups = min(groups, max(self.batch, 1))
        share = -(-max(self.batch, 1) // groups)
        tiles = -(-share // most)
        count = -(-share // tiles)
        return groups, min(tiles * count, share), count

    @property
    def _left(self) -> int:
        """Hidden units in the last block."""
        return self.hidden - (self.blocks - 1) * self.lanes

    def _rows(
        self, phase: _Phase, direction: Dim, first: Dim, rows: Dim, count: int, step: Dim, block: Dim, valid: int
    ) -> Iterator[Statement]:
        """One block of hidden units for all rows of a task: tiles of `count` rows, then smaller ones."""
        sizes = [count]
        if isinstance(rows, int):
            sizes += [rows % count] if rows % count else []
        else:
            sizes += [1 << bit for bit in reversed(range(4)) if 1 << bit < count]
        done: Dim = 0
        for size in sizes:
            tiles = (rows - done) // size
            row = k.index_symbol("tile", tiles)
            if tiles != 0:
                body = tuple(self._tile(phase, direction, first + done + row * size, size, step, block, valid))
                yield For("tile", tiles, body)
            done = done + tiles * size

    def _tile(
        self, phase: _Phase, direction: Dim, row: Dim, count: int, step: Dim, block: Dim, valid: int
    ) -> Iterator[Statement]:
        """One block of hidden units for `count` rows: sums over the state, then the gates."""
        lane = k.index_symbol("lane", valid)
        units: list[_Unit] = []
        for number in range(count):
            lets, time, active = self._time(direction, row + number, step, str(number))
            yield from lets
            units.append(_Unit(direction, row + number, block * self.lanes + lane, step, time, active, str(number)))
        copies = max(1, ACCUMULATORS // (count * phase.gates))
        sums = {
            (r, g, u): Buffer(f"sum{r}_{g}_{u}", self.dtype, 1, "register")
            for r in range(count)
            for g in range(phase.gates)
            for u in range(copies)
        }
        panel = (direction * self.blocks + block) * self.hidden

        def step_of_sum(depth: Dim, copy: int) -> Iterator[Statement]:
            for g in range(phase.gates):
                weight = load(phase.packed, ((panel + depth) * phase.gates + g) * self.lanes + lane)
                for r in range(count):
                    total = sums[r, g, copy]
                    value = phase.source(replace(units[r], unit=depth))
                    yield Store(total, 0, s.fma(value, weight, load(total, 0)))

        body: list[Statement] = [Define(total, const(0, self.dtype)) for total in sums.values()]
        whole, rest = divmod(self.hidden, copies)
        depth = k.index_symbol("depth", whole) * copies
        if whole:
            body.append(For("depth", whole, tuple(st for u in range(copies) for st in step_of_sum(depth + u, u))))
        for position in range(rest):
            body += step_of_sum(whole * copies + position, position)
        for r, unit in enumerate(units):
            totals = [_tree([load(sums[r, g, u], 0) for u in range(copies)]) for g in range(phase.gates)]
            body += phase.finish(unit, totals)
        yield For("lane", valid, tuple(body), "vector")

    def _time(self, direction: Dim, row: Dim, step: Dim, tag: str) -> tuple[list[Statement], Dim, Scalar | None]:
        """Which element of a row's sequence a step sees, and whether there is one; it names lengths by statements."""
        if self.lengths is None:
            turned = self.steps - 1 - step
            if self.direction == "bidirectional":
                return [], step + direction * (turned - step), None
            return [], turned if self.direction == "reverse" else step, None
        length = symbol(f"length{tag}", 0, self.steps)
        given = s.cast(self.lengths.at((row,)), I64)
        lets: list[Statement] = [Let(f"length{tag}", f.minimum(f.maximum(given, 0), s.index(self.steps)))]
        active = s.index(step) < s.index(length)
        if self.direction == "forward":
            return lets, step, active
        turned = length - 1 - step
        time = turned if self.direction == "reverse" else step + direction * (turned - step)
        lets.append(Let(f"time{tag}", s.select(active, s.index(time), s.index(step))))
        return lets, symbol(f"time{tag}", 0, self.steps - 1), active

    # Gates.

    def _offset(self, at: _Unit) -> Dim:
        return flat_offset((at.direction, at.row, at.unit), self.states)

    def _previous(self, at: _Unit) -> Scalar:
        return load(self.state, at.step % 2 * product(self.states) + self._offset(at))

    def _sum(self, at: _Unit, gate: int, total: Scalar | None = None) -> Scalar:
        """The products with the input, and with the state."""
        outer = (at.row, at.time) if self.layout else (at.time, at.row)
        shape = (self.directions, *self.x.shape[:2], self.gates * self.hidden)
        given = load(self.projection, flat_offset((at.direction, *outer, gate * self.hidden + at.unit), shape))
        return given if total is None else given + total

    def _recurrent_bias(self, at: _Unit, gate: int) -> Scalar:
        if self.bias is None:
            return const(0, self.dtype)
        return s.cast(self.bias.at((at.direction, (self.gates + gate) * self.hidden + at.unit)), self.dtype)

    def _peep(self, at: _Unit, gate: int, x: Scalar, cell: Scalar) -> Scalar:
        if self.peephole is None:
            return x
        weight = self.peephole.at((at.direction, gate * self.hidden + at.unit))
        return s.fma(s.cast(weight, self.dtype), cell, x)

    def _lstm(self, at: _Unit, totals: Sequence[Scalar]) -> Iterator[Statement]:
        i, o, forget, c = (self._sum(at, gate, total) for gate, total in enumerate(totals))
        old = load(self.cell, self._offset(at))
        i = self._activate(at, 0, self._peep(at, 0, i, old))
        forget = self._activate(at, 0, self._peep(at, 2, forget, old))
        if attribute(self.region, "input_forget"):
            forget = -(i - 1)
        new = Buffer(f"new_cell{at.tag}", self.dtype, 1, "register")
        yield Define(new, s.fma(i, self._activate(at, 1, c), forget * old))
        o = self._activate(at, 0, self._peep(at, 1, o, load(new, 0)))
        yield from self._store(at, o * self._activate(at, 2, load(new, 0)))
        yield Store(self.cell, self._offset(at), at.where_active(load(new, 0), old))

    def _rnn(self, at: _Unit, totals: Sequence[Scalar]) -> Iterator[Statement]:
        yield from self._store(at, self._activate(at, 0, self._sum(at, 0, totals[0])))

    def _gru(self, at: _Unit, totals: Sequence[Scalar]) -> Iterator[Statement]:
        z, r = (
            self._activate(at, 0, self._sum(at, gate, totals[gate] + self._recurrent_bias(at, gate))) for gate in (0, 1)
        )
        inner = totals[2] + self._recurrent_bias(at, 2)
        yield from self._blend(at, z, self._activate(at, 1, s.fma(r, inner, self._sum(at, 2))))

    def _gru_gates(self, at: _Unit, totals: Sequence[Scalar]) -> Iterator[Statement]:
        z, r = (self._activate(at, 0, self._sum(at, gate, totals[gate])) for gate in (0, 1))
        yield Store(self.update, self._offset(at), z)
        yield Store(self.reset, self._offset(at), r * self._previous(at))

    def _gru_candidate(self, at: _Unit, totals: Sequence[Scalar]) -> Iterator[Statement]:
        candidate = self._activate(at, 1, self._sum(at, 2, totals[0]))
        yield from self._blend(at, load(self.update, self._offset(at)), candidate)

    def _blend(self, at: _Unit, z: Scalar, candidate: Scalar) -> Iterator[Statement]:
        """(1 - z) * candidate + z * state."""
        yield from self._store(at, s.fma(z, self._previous(at) - candidate, candidate))

    def _store(self, at: _Unit, value: Scalar) -> Iterator[Statement]:
        """The new state of a unit, as state and as output."""
        new = Buffer(f"new_state{at.tag}", self.dtype, 1, "register")
        yield Define(new, value)
        target, tensor = self.region.outputs[0]
        shown = at.where_active(load(new, 0), const(0, self.dtype))
        where = (at.row, at.time, at.direction) if self.layout else (at.time, at.direction, at.row)
        yield Store(target, flat_offset((*where, at.unit), tensor.shape), s.cast(shown, tensor.dtype))
        after = (1 - at.step % 2) * product(self.states) + self._offset(at)
        yield Store(self.state, after, at.where_active(load(new, 0), self._previous(at)))


def _clipped(
    function: Callable[[Scalar, float, float], Scalar], alpha: float, beta: float, clip: float | None, x: Scalar
) -> Scalar:
    return function(x if clip is None else f.minimum(f.maximum(x, -clip), clip), alpha, beta)


def _tree(parts: list[Scalar]) -> Scalar:
    """The sum, added in pairs."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) // 2 * 2 :]
    return parts[0]
