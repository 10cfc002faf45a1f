"""What the shapes of given inputs say about a program's symbols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.dims import Dim, Sum, as_symbol, evaluate, linear, symbol, symbols
from ..ir.errors import BroadcastError, ShapeError
from ..ir.graph import Value
from ..ir.program import MARK


def plain(dim: Dim) -> str:
    """A dim of a program as users know it: without the mark that programs put on the model's symbols."""
    return str(dim).replace('"', "").replace(MARK, "")


@dataclass(frozen=True)
class Port:
    """An input or output as users see it: its name, element type (short name) and shape of ints and dim texts."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @staticmethod
    def of(value: Value) -> Port:
        shape = tuple(d if isinstance(d, int) else plain(d) for d in value.shape)
        return Port(value.name, value.dtype.name, shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


def bind_symbols(
    inputs: Sequence[Value], shapes: Sequence[Sequence[int | None]], assumptions: Sequence[tuple[Dim, Dim]] = ()
) -> dict[str, int]:
    """The symbols' values that make the declared shapes the given ones, but for sizes that are None.

    Raises ShapeError naming the input, the axis and, where two inputs disagree, the other input too.
    """
    bound: dict[str, int] = {}
    source: dict[str, str] = {}
    waiting: list[tuple[Value, int, Dim, int]] = []
    for value, shape in zip(inputs, shapes, strict=True):
        if len(shape) != len(value.shape):
            raise ShapeError(
                f"input {value.name!r} has shape {tuple(shape)}: it must have rank {len(value.shape)}, {Port.of(value)}"
            )
        for axis, (dim, size) in enumerate(zip(value.shape, shape, strict=True)):
            name = as_symbol(dim)
            if size is None:
                continue
            if name is not None and name.name not in bound:
                bound[name.name] = size
                source[name.name] = f"axis {axis} of input {value.name!r}"
            elif not isinstance(dim, int) or dim != size:
                waiting.append((value, axis, dim, size))
    for value, axis, dim, size in sorted(waiting, key=lambda item: len(symbols(item[2]))):
        _solve(dim, size, bound, source, f"axis {axis} of input {value.name!r}")
        expected = evaluate(dim, bound)
        if expected != size:
            reason = ", ".join(f"{plain(symbol(s.name))} = {bound[s.name]} by {source[s.name]}" for s in symbols(dim))
            because = f" = {expected} ({reason})" if isinstance(dim, Sum) else ""
            raise ShapeError(
                f"axis {axis} of input {value.name!r} is {size}: it must be {plain(dim)}{because}, {Port.of(value)}"
            )
    for a, b in assumptions:
        if not all(s.name in bound for dim in (a, b) for s in symbols(dim)):
            continue
        if evaluate(a, bound) != evaluate(b, bound):
            places = ", ".join(
                f"{plain(symbol(s.name))} = {bound[s.name]} by {source[s.name]}" for dim in (a, b) for s in symbols(dim)
            )
            found = f"{evaluate(a, bound)} and {evaluate(b, bound)}"
            kind = BroadcastError if 1 in (evaluate(a, bound), evaluate(b, bound)) else ShapeError
            raise kind(f"the model needs {plain(a)} = {plain(b)}, but {found} differ ({places})")
    return bound


def _solve(dim: Dim, size: int, bound: dict[str, int], source: dict[str, str], where: str) -> None:
    """Binds the one unbound symbol of a linear dim such as `past + 1`."""
    unknown = [s for s in symbols(dim) if s.name not in bound]
    if len(unknown) != 1:
        if unknown:
            names = ", ".join(plain(symbol(s.name)) for s in unknown)
            raise ShapeError(f"{where} is {plain(dim)}: {names} cannot be told from the inputs")
        return
    split = linear(dim, unknown[0].name)
    if split is not None:
        factor, rest = evaluate(split[0], bound), evaluate(split[1], bound)
        if factor and (size - rest) % factor == 0 and (size - rest) // factor >= 0:
            bound[unknown[0].name] = (size - rest) // factor
            source[unknown[0].name] = where
            return
    raise ShapeError(f"{where} is {size}: no {plain(symbol(unknown[0].name))} makes it {plain(dim)}")


def check_names(given: Mapping[str, object], inputs: Sequence[Value]) -> None:
    """ShapeError where an input is missing or unknown."""
    expected = [value.name for value in inputs]
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    if missing or unknown:
        parts = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(unknown)
        raise ShapeError(
            f"inputs do not fit ({'; '.join(parts)}); the model takes {', '.join(map(str, map(Port.of, inputs)))}"
        )
