"""What a GPU runs of a compiled model, as an artifact holds it: images, launches and the program's steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....ir.dims import Dim, parse_dim, symbol, symbols
from ....ir.dtypes import BY_NAME
from ....ir.program import MARK, Assign, Bind, Choose, Memory, Place, Repeat, Run, Step, Steps, dim_text
from ..launch import Launch

if TYPE_CHECKING:
    from ..build import Built

ROLES = ("input", "output", "constant", "arena", "fault")


@dataclass(frozen=True)
class DeviceCode:
    """Kernels as machine code and the steps that call them.

    `images` are, by architecture ("sm_90": a cubin, "compute_90": PTX), those of the kernels by name. `sizes` names
    each kernel's size symbols in the order in which they are passed. `results` are the memories of the outputs.
    """

    images: Mapping[str, Mapping[str, bytes]]
    launches: Mapping[str, Launch]
    sizes: Mapping[str, tuple[str, ...]]
    segments: tuple[Steps, ...]
    memories: Mapping[str, Memory]
    results: tuple[str, ...]

    @staticmethod
    def of(built: Built) -> DeviceCode:
        """What was built of a program."""
        program = built.program
        return DeviceCode(
            images=built.images,
            launches=built.launches,
            sizes={name: kernel.sizes for name, kernel in program.kernels.items()},
            segments=program.segments,
            memories=program.memories,
            results=program.results,
        )


def encode(code: DeviceCode) -> dict[str, Any]:
    """All but the images, for JSON. Dims are texts over the program's names of the symbols, without their mark."""
    return {
        "kernels": {
            name: [
                dim_text(launch.grid),
                launch.threads,
                launch.shared_bytes,
                launch.index_bits,
                _bare(code.sizes[name]),
            ]
            for name, launch in code.launches.items()
        },
        "segments": [_encode_steps(steps) for steps in code.segments],
        "memories": [[m.name, m.dtype.name, dim_text(m.size), m.role, m.segment] for m in code.memories.values()],
        "results": list(code.results),
    }


def decode(found: Mapping[str, Any], images: Mapping[str, Mapping[str, bytes]]) -> DeviceCode:
    """What `encode` made, with the images. KeyError, TypeError or ValueError where it is damaged."""
    launches: dict[str, Launch] = {}
    sizes: dict[str, tuple[str, ...]] = {}
    for name, (grid, threads, shared, bits, names) in found["kernels"].items():
        launches[name] = Launch(_dim(grid), _integer(threads, 1), _integer(shared), _integer(bits))
        sizes[name] = tuple(MARK + size for size in names)
        if not {s.name for s in symbols(launches[name].grid)} <= set(sizes[name]) or bits not in (32, 64):
            raise ValueError(f"kernel {name!r} is damaged")
    memories = {
        name: Memory(name, BY_NAME[dtype], _dim(size), _one_of(role, ROLES), _integer(segment))
        for name, dtype, size, role, segment in found["memories"]
    }
    decoder = _Decoder(memories, sizes)
    return DeviceCode(
        images=images,
        launches=launches,
        sizes=sizes,
        segments=tuple(map(decoder.steps, found["segments"])),
        memories=memories,
        results=tuple(_one_of(name, memories) for name in found["results"]),
    )


class _AnyName(dict[str, Dim]):
    """Every name is a symbol of the program, which may have any value."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Dim:
        return symbol(MARK + name, None)


_SYMBOLS: Mapping[str, Dim] = _AnyName()


def _dim(text: str | int) -> Dim:
    return text if isinstance(text, int) else parse_dim(text, _SYMBOLS)


def _bare(names: Iterable[str]) -> list[str]:
    return [name.removeprefix(MARK) for name in names]


def _integer(value: Any, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is not an integer from {least} up")
    return value


def _one_of(name: Any, known: Iterable[str]) -> str:
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{name!r} is unknown")
    return name


def _encode_place(place: Place | None) -> list[Any] | None:
    return None if place is None else [place.memory, dim_text(place.offset)]


def _encode_steps(steps: Steps) -> list[list[Any]]:
    return [_encode_step(step) for step in steps]


def _encode_step(step: Step) -> list[Any]:
    if isinstance(step, Run):
        places = [_encode_place(place) for place in step.arguments]
        return ["run", step.kernel, places, [dim_text(size) for size in step.sizes], list(step.origin)]
    if isinstance(step, Bind):
        symbol_name = step.symbol.removeprefix(MARK)
        return ["bind", symbol_name, _encode_place(step.place), step.dtype.name, step.least]
    if isinstance(step, Assign):
        return ["assign", step.symbol.removeprefix(MARK), dim_text(step.value)]
    if isinstance(step, Choose):
        return ["choose", _encode_place(step.condition), _encode_steps(step.then), _encode_steps(step.otherwise)]
    trips = None if step.trips is None else dim_text(step.trips)
    count = None if step.count is None else step.count.removeprefix(MARK)
    index = step.index.removeprefix(MARK)
    return ["repeat", index, trips, _encode_place(step.condition), _encode_steps(step.body), count]


@dataclass(frozen=True)
class _Decoder:
    memories: Mapping[str, Memory]
    kernels: Mapping[str, Sequence[str]]

    def steps(self, found: Sequence[Sequence[Any]]) -> Steps:
        return tuple(self.step(*item) for item in found)

    def step(self, kind: str, *parts: Any) -> Step:
        match kind, parts:
            case "run", (kernel, places, sizes, origin):
                if len(sizes) != len(self.kernels[kernel]):
                    raise ValueError(f"kernel {kernel!r} is called with {len(sizes)} sizes")
                return Run(kernel, tuple(map(self.place, places)), tuple(map(_dim, sizes)), tuple(origin))
            case "bind", (name, place, dtype, least):
                return Bind(MARK + name, self.place(place), BY_NAME[dtype], least)
            case "assign", (name, value):
                return Assign(MARK + name, _dim(value))
            case "choose", (condition, then, otherwise):
                return Choose(self.place(condition), self.steps(then), self.steps(otherwise))
            case "repeat", (index, trips, condition, body, count):
                return Repeat(
                    MARK + index,
                    None if trips is None else _dim(trips),
                    None if condition is None else self.place(condition),
                    self.steps(body),
                    None if count is None else MARK + count,
                )
        raise ValueError(f"there is no step {kind!r} of {len(parts)} parts")

    def place(self, found: Sequence[Any]) -> Place:
        name, offset = found
        return Place(_one_of(name, self.memories), _dim(offset))
