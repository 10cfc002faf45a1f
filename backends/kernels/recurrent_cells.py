"""The cells of recurrent layers: what becomes of the sums for one hidden unit. Gates are named as ONNX names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...ir import functions as f
from ...ir import scalars as s
from ...ir.dims import Dim, product
from ...ir.dtypes import F32, DType
from ...ir.errors import ModelError
from ...ir.loops import Define, Statement, Store
from ...ir.scalars import Buffer, Scalar, const, load
from ...ir.tensors import Tensor, compute, flat_offset
from ...passes.regions import Region
from . import rational
from .calls import attribute, operand, present
from .rational import Quotient

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
# What the name of a layer begins with whose weights are integers.
QUANTIZED = "com.microsoft.DynamicQuantize"
RATIONAL: Mapping[str, Callable[[Scalar], Quotient]] = {"sigmoid": rational.sigmoid, "tanh": rational.tanh}
_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


@dataclass(frozen=True)
class Unit:
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


def _clipped(
    function: Callable[[Scalar, float, float], Scalar], alpha: float, beta: float, clip: float | None, x: Scalar
) -> Scalar:
    return function(x if clip is None else f.minimum(f.maximum(x, -clip), clip), alpha, beta)


@dataclass(frozen=True)
class Weights:
    """Weights [directions, rows, columns]: their definition as floats and, where they are constants, their array.

    With `scale` [directions, rows] the array holds integers, i8 or i16 less their zero point, to be multiplied by it.
    """

    tensor: Tensor
    array: np.ndarray | None
    scale: np.ndarray | None = None

    def floats(self) -> np.ndarray:
        assert self.array is not None
        return self.array if self.scale is None else self.array * self.scale[:, :, None]


def _stored_as_integers(region: Region, position: int, scales: int, dtype: DType) -> Weights:
    """Weights that lie as [directions, columns, rows], with scales and perhaps zero points."""
    values, scale, zero = present(region, position), present(region, scales), operand(region, scales + 1)

    def per_row(x: Tensor, d: Dim, row: Dim) -> Scalar:
        return s.cast(x.at((d,) if x.rank == 1 else (d, row)), dtype)

    def element(d: Dim, row: Dim, column: Dim) -> Scalar:
        value = s.cast(values.at((d, column, row)), dtype)
        return (value if zero is None else value - per_row(zero, d, row)) * per_row(scale, d, row)

    tensor = compute((values.shape[0], values.shape[2], values.shape[1]), dtype, element, values, scale)
    arrays = [None if x is None else region.elements(x) for x in (values, scale, zero)]
    if arrays[0] is None or arrays[1] is None or (zero is not None and arrays[2] is None):
        return Weights(tensor, None)
    array, factors = arrays[0].transpose(0, 2, 1), arrays[1].reshape(arrays[1].shape[0], -1)
    if arrays[2] is not None and arrays[2].any():
        array = array.astype(np.int16) - arrays[2].reshape(arrays[2].shape[0], -1, 1)
    if array.dtype != np.int8:
        low, high = int(array.min(initial=0)), int(array.max(initial=0))
        array = array.astype(np.int8 if low >= -128 and high <= 127 else np.int16)
    return Weights(tensor, array, np.broadcast_to(factors, array.shape[:2]).astype(dtype.numpy))


class Cells:
    """A layer's operands, its states in memory, and the statements of its gates.

    x is [steps, batch, input], states are [directions, batch, hidden]; with `layout` the batch of x comes first.
    """

    def __init__(self, region: Region) -> None:
        assert region.anchor is not None
        self.region, self.op = region, region.anchor.op.removeprefix(QUANTIZED)
        self.x = present(region, 0)
        self.bias, self.lengths, self.initial_h = (operand(region, position) for position in (3, 4, 5))
        lstm = self.op == "LSTM"
        self.initial_c, self.peephole = (operand(region, position) if lstm else None for position in (6, 7))
        self.dtype = F32 if self.x.dtype.bits < 32 else self.x.dtype
        if self.op == region.anchor.op:
            tensors = present(region, 1), present(region, 2)
            self.w, self.r = (Weights(f.cast(x, self.dtype), region.constant(x)) for x in tensors)
            self.layout = bool(attribute(region, "layout"))
        else:
            self.w, self.r = (_stored_as_integers(region, at, 6 + 2 * at, self.dtype) for at in (1, 2))
            self.layout = False
        self.batch, self.steps = self.x.shape[:2] if self.layout else self.x.shape[1::-1]
        self.direction = attribute(region, "direction")
        self.directions = 2 if self.direction == "bidirectional" else 1
        hidden = region.outputs[0][1].shape[-1]
        assert isinstance(hidden, int), f"{region.name}: {hidden} hidden units"
        self.hidden = hidden
        self.gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[self.op]
        self.late_reset = self.op == "GRU" and bool(attribute(region, "linear_before_reset"))
        self.states = (self.directions, self.batch, self.hidden)
        size = product(self.states)
        self.projection = Buffer("projection", self.dtype, product((size, self.steps, self.gates)))
        self.state = Buffer("state", self.dtype, size * 2)  # of the last step and of this one
        self.cell = Buffer("cell", self.dtype, size)
        self.update, self.reset = Buffer("update", self.dtype, size), Buffer("reset", self.dtype, size)
        self.activations = self._activations()
        self.rational = False
        """Whether sigmoid and tanh may be quotients of polynomials, with an error of 2e-7 of one."""

    def _activations(self) -> list[list[Activation]]:
        """Per direction its activations, clipped where the layer asks for that."""
        names = self._names
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
        return [found[d * count : (d + 1) * count] for d in range(self.directions)]

    @property
    def _names(self) -> Sequence[str]:
        """Of the activations of all directions."""
        return attribute(self.region, "activations") or _DEFAULTS[self.op] * 2

    def _quotient(self, number: int, x: Scalar) -> Quotient | None:
        """An activation that is a quotient in all directions."""
        names = {name.lower() for name in self._names[number :: len(_DEFAULTS[self.op])][: self.directions]}
        found = [RATIONAL[name] for name in names if name in RATIONAL]
        if not self.rational or len(names) != 1 or not found:
            return None
        clip = attribute(self.region, "clip")
        return found[0](x if clip is None else f.minimum(f.maximum(x, -clip), clip))

    def activate(self, at: Unit, number: int, x: Scalar) -> Scalar:
        quotient = self._quotient(number, x)
        if quotient is not None:
            return quotient.value()
        results = [functions[number](x) for functions in self.activations]
        if len(results) == 1 or results[0] == results[1]:
            return results[0]
        return s.select(s.index(at.direction).equal(0), *results)

    def offset(self, at: Unit) -> Dim:
        return flat_offset((at.direction, at.row, at.unit), self.states)

    def previous(self, at: Unit) -> Scalar:
        return load(self.state, at.step % 2 * product(self.states) + self.offset(at))

    def projected(self, at: Unit, gate: Dim) -> Dim:
        """Where the products with the input lie."""
        outer = (at.row, at.time) if self.layout else (at.time, at.row)
        shape = (self.directions, *self.x.shape[:2], self.gates * self.hidden)
        return flat_offset((at.direction, *outer, gate * self.hidden + at.unit), shape)

    def _sum(self, at: Unit, gate: int, total: Scalar | None = None) -> Scalar:
        """The products with the input, and with the state; the latter are None where they have been added."""
        given = load(self.projection, self.projected(at, gate))
        return given if total is None else given + total

    def _recurrent_bias(self, at: Unit, gate: int) -> Scalar:
        if self.bias is None:
            return const(0, self.dtype)
        return s.cast(self.bias.at((at.direction, (self.gates + gate) * self.hidden + at.unit)), self.dtype)

    def _peep(self, at: Unit, gate: int, x: Scalar, cell: Scalar) -> Scalar:
        if self.peephole is None:
            return x
        weight = self.peephole.at((at.direction, gate * self.hidden + at.unit))
        return s.fma(s.cast(weight, self.dtype), cell, x)

    def lstm(self, at: Unit, totals: Sequence[Scalar | None]) -> Iterator[Statement]:
        i, o, forget, c = (self._sum(at, gate, total) for gate, total in enumerate(totals))
        old = load(self.cell, self.offset(at))
        i, forget = self._peep(at, 0, i, old), self._peep(at, 2, forget, old)
        new = Buffer(f"new_cell{at.tag}", self.dtype, 1, "register")
        yield Define(new, self._new_cell(at, i, forget, c, old))
        o = self._peep(at, 1, o, load(new, 0))
        shown, factor = self._quotient(0, o), self._quotient(2, load(new, 0))
        if shown is not None and factor is not None:
            yield from self._store(at, (shown * factor).value())
        else:
            yield from self._store(at, self.activate(at, 0, o) * self.activate(at, 2, load(new, 0)))
        yield Store(self.cell, self.offset(at), at.where_active(load(new, 0), old))

    def _new_cell(self, at: Unit, i: Scalar, forget: Scalar, c: Scalar, old: Scalar) -> Scalar:
        """i * c + forget * old after the activations; where these are quotients with one division."""
        coupled = bool(attribute(self.region, "input_forget"))
        taken, kept, candidate = self._quotient(0, i), self._quotient(0, forget), self._quotient(1, c)
        if taken is not None and kept is not None and candidate is not None:
            kept = Quotient(taken.below - taken.above, taken.below) if coupled else kept
            return (taken * candidate + kept * old).value()
        i = self.activate(at, 0, i)
        forget = -(i - 1) if coupled else self.activate(at, 0, forget)
        return s.fma(i, self.activate(at, 1, c), forget * old)

    def rnn(self, at: Unit, totals: Sequence[Scalar | None]) -> Iterator[Statement]:
        yield from self._store(at, self.activate(at, 0, self._sum(at, 0, totals[0])))

    def gru(self, at: Unit, totals: Sequence[Scalar | None]) -> Iterator[Statement]:
        update, reset, inner = (
            self._recurrent_bias(at, gate) + total for gate, total in enumerate(totals) if total is not None
        )
        z, r = (self.activate(at, 0, self._sum(at, gate, total)) for gate, total in enumerate((update, reset)))
        yield from self._blend(at, z, self.activate(at, 1, s.fma(r, inner, self._sum(at, 2))))

    def gru_gates(self, at: Unit, totals: Sequence[Scalar | None]) -> Iterator[Statement]:
        z, r = (self.activate(at, 0, self._sum(at, gate, totals[gate])) for gate in (0, 1))
        yield Store(self.update, self.offset(at), z)
        yield Store(self.reset, self.offset(at), r * self.previous(at))

    def gru_candidate(self, at: Unit, totals: Sequence[Scalar | None]) -> Iterator[Statement]:
        candidate = self.activate(at, 1, self._sum(at, 2, totals[0]))
        yield from self._blend(at, load(self.update, self.offset(at)), candidate)

    def _blend(self, at: Unit, z: Scalar, candidate: Scalar) -> Iterator[Statement]:
        """(1 - z) * candidate + z * state."""
        yield from self._store(at, s.fma(z, self.previous(at) - candidate, candidate))

    def _store(self, at: Unit, value: Scalar) -> Iterator[Statement]:
        """The new state of a unit, as state and as output."""
        new = Buffer(f"new_state{at.tag}", self.dtype, 1, "register")
        yield Define(new, value)
        target, tensor = self.region.outputs[0]
        shown = at.where_active(load(new, 0), const(0, self.dtype))
        where = (at.row, at.time, at.direction) if self.layout else (at.time, at.direction, at.row)
        yield Store(target, flat_offset((*where, at.unit), tensor.shape), s.cast(shown, tensor.dtype))
        after = (1 - at.step % 2) * product(self.states) + self.offset(at)
        yield Store(self.state, after, at.where_active(load(new, 0), self.previous(at)))
