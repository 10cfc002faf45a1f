"""What compiling leaves of a model: all that running needs, and nothing of the graph, its weights or the program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..ir.dims import Dim, evaluate, symbols
from ..ir.errors import ModelError, ShapeError, TargetError, UnsupportedError
from ..ir.graph import Value
from ..ir.program import ALIGNMENT, ALIGNMENTS, MARK, ArenaPlan, Program, walk
from ..ir.target import Target

if TYPE_CHECKING:
    from ..backends.cpu.build import Built
    from ..backends.cuda.build import Built as BuiltForGpu
    from ..backends.cuda.runtime.code import DeviceCode

_SYSTEM_FEATURES = """
    cldemote clflushopt clwb clzero enqcmd fsgsbase fxsr hreset invpcid kl mwaitx pconfig pku prefetchi prfchw ptwrite
    rdpid rdpru rdrnd rdseed rtm sahf serialize sgx shstk tsxldtrk uintr waitpkg wbnoinvd widekl xsave xsavec xsaveopt
    xsaves
"""
"""Features that LLVM never uses on its own: code that was compiled with them runs without."""


@dataclass(frozen=True)
class Buffer:
    """A block of the arena: bytes, offset in bytes, and the first and the last step of the program that touch it."""

    name: str
    bytes: int
    offset: int
    first: int
    last: int


@dataclass(frozen=True)
class MemoryPlan:
    """The arena at given sizes of the symbols: no plan for these buffers can need fewer bytes than `lower_bound`."""

    sizes: Mapping[str, int]
    arena_bytes: int
    lower_bound: int
    buffers: tuple[Buffer, ...]
    layout: ArenaPlan = field(repr=False, compare=False)
    alignment: int = ALIGNMENT

    @staticmethod
    def of(layout: ArenaPlan, sizes: Mapping[str, int] | None = None, alignment: int = ALIGNMENT) -> MemoryPlan:
        """The plan with these sizes, by the model's names, in place of those that the layout was made for; every buffer
        begins at a multiple of `alignment` bytes."""
        known = {name.removeprefix(MARK): size for name, size in layout.hints.items()}
        unknown = sorted(set(sizes or {}) - set(known))
        if unknown:
            raise ShapeError(
                f"{', '.join(unknown)}: the arena depends on no such symbol; on {', '.join(known) or 'none'}"
            )
        known |= sizes or {}
        values = {f"{MARK}{name}": size for name, size in known.items()}
        buffers: list[Buffer] = []
        total = bound = 0
        for segment in layout.slots:
            # What takes over another buffer's place has no span of its own, and nothing lies above it alone.
            slots = [slot for slot in segment if slot.memory in layout.lifetimes]
            spans = [layout.lifetimes[slot.memory] for slot in slots]
            sizes_here = [evaluate(slot.bytes, values) for slot in slots]
            room = [-(-size // alignment) * alignment for size in sizes_here]
            offsets: dict[int, int] = {}
            waiting = list(range(len(slots)))
            while waiting:
                placed = [i for i in waiting if offsets.keys() >= set(slots[i].below)]
                if not placed:
                    raise ModelError("the layout of the arena is damaged: buffers lie above themselves")
                offsets |= {i: max((offsets[j] + room[j] for j in slots[i].below), default=0) for i in placed}
                waiting = [i for i in waiting if i not in offsets]
            live = [sum(r for r, (a, b) in zip(room, spans, strict=True) if a <= step <= b) for step, _ in spans]
            buffers += [
                Buffer(slot.memory, sizes_here[i], total + offsets[i], *spans[i]) for i, slot in enumerate(slots)
            ]
            total += max((offsets[i] + room[i] for i in offsets), default=0)
            bound += max(live, default=0)
        return MemoryPlan(known, total, bound, tuple(buffers), layout, alignment)

    def at(self, **sizes: int) -> MemoryPlan:
        """The plan at other sizes: `plan.at(batch=8)`. ShapeError for a symbol that the arena does not depend on."""
        return MemoryPlan.of(self.layout, sizes, self.alignment)


@dataclass(frozen=True)
class Compiled:
    """Code, weights and the description of a model that is compiled for `target`: a CPU runs `objects`, a GPU `device`.

    The code's table of addresses holds the inputs, the outputs and the constants in these orders, then the records of
    `checks` (messages for what they find) if there are any, then the arenas, one per segment. `ready` tells for each
    output the segment before which its shape is known: 0 where the inputs tell it. `kernels` names, for each kernel,
    the ONNX nodes it was made of; `texts` are the stages of the model that are kept as text; `program` gives the
    program without its constants, None in what was loaded. `donated` are pairs (output, input) that are one memory, in
    which runs only write what is new (`passes.append`).
    """

    name: str
    target: Target
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    symbols: tuple[str, ...]
    assumptions: tuple[tuple[Dim, Dim], ...]
    segments: int
    ready: tuple[int, ...]
    arena: ArenaPlan
    objects: tuple[bytes, ...]
    constants: Mapping[str, np.ndarray]
    kernels: Mapping[str, tuple[str, ...]]
    texts: Mapping[str, str]
    program: Callable[[], Program] | None = None
    device: DeviceCode | None = None
    checks: tuple[str, ...] = ()
    donated: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def of_gpu(built: BuiltForGpu, constants: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> Compiled:
        """What was built for GPUs of a program that holds no constants, with these in the form that the code reads."""
        from ..backends.cuda.runtime.code import DeviceCode

        program = built.program
        held = {name: array for name, array in constants.items() if program.memories[name].role == "constant"}
        return Compiled._of(program, built.target, held, texts, device=DeviceCode.of(built))

    @staticmethod
    def of(built: Built, constants: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> Compiled:
        """What was built of a program that holds no constants, with these in the form that the code reads."""
        from ..backends.cpu.entry import table_order

        program = built.program
        order = table_order(program)
        ports = [*(value.name for value in program.inputs), *program.results]
        assert order[: len(ports)] == ports, "inputs and outputs come first in the table of addresses"
        held = {name: constants[name] for name in order[len(ports) :] if program.memories[name].role == "constant"}
        return Compiled._of(program, built.target, held, texts, built.objects)

    @staticmethod
    def _of(
        program: Program,
        target: Target,
        constants: Mapping[str, np.ndarray],
        texts: Mapping[str, str],
        objects: tuple[bytes, ...] = (),
        device: DeviceCode | None = None,
    ) -> Compiled:
        return Compiled(
            name=program.name,
            target=target,
            inputs=program.inputs,
            outputs=program.outputs,
            symbols=program.symbols,
            assumptions=program.assumptions,
            segments=len(program.segments),
            ready=tuple(_ready(program, value) for value in program.outputs),
            arena=program.plan,
            objects=objects,
            constants={name: np.ascontiguousarray(array) for name, array in constants.items()},
            kernels={name: kernel.origin for name, kernel in program.kernels.items()},
            texts=texts,
            program=lambda: program,
            device=device,
            checks=program.checks,
        )

    @property
    def weights(self) -> dict[str, memoryview]:
        """The bytes of the constants by name, in the order of the table."""
        return {name: array.reshape(-1).view(np.uint8).data for name, array in self.constants.items()}

    @cached_property
    def plan(self) -> MemoryPlan:
        """The arena at the sizes that it was planned for."""
        return MemoryPlan.of(self.arena, alignment=ALIGNMENTS[self.target.kind])

    def dump(self, stage: str) -> str:
        """The text of a stage: import, graph, program, kernels; of a CPU vectors, llvm or asm; of a GPU cuda, ptx, sass
        or resources.

        UnsupportedError for a stage that a loaded artifact does not hold.
        """
        if stage in self.texts:
            return self.texts[stage]
        if self.program is None:
            held = ", ".join(self.texts)
            raise UnsupportedError(
                f"an artifact holds no text of the stage {stage!r}, only {held}; compile the model to see it"
            )
        from .dump import stage_text

        return stage_text(stage, self.program(), self.target)


def here(target: Target) -> Target:
    """The target with the facts of this machine's GPU where it is "cuda" alone. TargetError where this machine lacks
    what the target's code may use."""
    if target.kind == "cuda":
        from ..backends.cuda.runtime.driver import open_device

        facts = open_device().facts
        if target.name != "cuda":
            return target
        return replace(Target.of_gpu(facts.capability), name="cuda", multiprocessors=facts.multiprocessors)
    check_runs_here(target)
    return target


def check_runs_here(target: Target) -> None:
    """TargetError where this machine's CPU lacks what the target's code may use."""
    host = Target.host()
    if target.architecture != host.architecture or ("linux" in target.triple) != ("linux" in host.triple):
        raise TargetError(f"code for {target.triple} cannot run on this machine, which is {host.triple}")
    lacking = sorted(target.enabled - host.enabled - set(_SYSTEM_FEATURES.split()))
    if lacking:
        missing = ", ".join(lacking)
        raise TargetError(f"code for {target.cpu} cannot run on this machine ({host.cpu}), which lacks {missing}")


def _ready(program: Program, value: Value) -> int:
    """The first segment before which the output's shape is known; 0 where the inputs tell it."""
    names = {symbol.name for dim in value.shape for symbol in symbols(dim)}
    segment = 0
    for number, steps in enumerate(program.segments):
        for step in walk(steps):
            name = getattr(step, "symbol", None) or getattr(step, "count", None)
            if name in names:
                segment = max(segment, number + 1)
    return segment
