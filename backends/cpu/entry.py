"""The program's own code: what calls the kernels, with the addresses and sizes that the symbols give.

For each segment there are two functions. `onnxc_size_N(symbols, sizes)` writes to sizes[N] the bytes of the segment's
arena; `onnxc_run_N(table, symbols, threads)` runs it. `symbols` are i64 in the order of `Program.symbols`; `table`
holds the addresses of all inputs, outputs, constants and arenas, in the order of `table_order`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.dims import Dim, Sum, symbols
from ...ir.dtypes import DType
from ...ir.graph import Value as GraphValue
from ...ir.program import ALIGNMENT, ArenaSlot, Assign, Bind, Choose, Place, Program, Repeat, Run, Step, Steps, walk
from ...ir.target import Target
from .addresses import ModuleText, Value, quoted
from .bounds import DEFINITION
from .llvm import THREADS, FunctionRenderer


def table_order(program: Program) -> list[str]:
    """Names of the memories whose addresses the table holds; after them come the arenas, one per segment."""
    roles = {"input": 0, "output": 1, "constant": 2, "fault": 3}
    named = [memory for memory in program.memories.values() if memory.role in roles]
    return [memory.name for memory in sorted(named, key=lambda memory: roles[memory.role])]


def render_entry(program: Program, target: Target, checked: bool = False) -> str:
    """The LLVM module with the functions of all segments; with `checked` kernels also the memory where these report."""
    module = ModuleText(target, False)
    for number in range(len(program.segments)):
        _Entry(module, f"onnxc_size_{number}", program).sizes(number)
        _Entry(module, f"onnxc_run_{number}", program).run(number)
    lines = [f'target triple = "{target.triple}"\n', *([DEFINITION] if checked else [])]
    for name, kernel in program.kernels.items():
        arguments = ["ptr"] * len(kernel.parameters) + ["i64"] * (len(kernel.sizes) + 1)
        lines.append(f"declare void @{quoted(name)}({', '.join(arguments)})")
    lines += ["", *module.functions]
    features = f' "target-features"="{target.features}"' if target.features else ""
    lines.append(f'attributes #0 = {{ nounwind "no-builtins" "target-cpu"="{target.cpu}"{features} }}\n')
    return "\n".join(lines)


def render_sizes_check(
    name: str,
    target: Target,
    known: Sequence[str],
    assumptions: Sequence[tuple[Dim, Dim]],
    outputs: Sequence[GraphValue],
) -> str:
    """The text of a function (symbols, result) with the attributes #0. It writes 1 where the symbols fit a
    program, else 0.

    `known` are the first of its symbols. They fit where none is negative nor gives an output a negative size, and where
    what the program assumes of them is so.
    """
    function = FunctionRenderer(ModuleText(target, False), name)
    terms: list[str] = []
    for position, item in enumerate(known):
        at = function.emit_effect(f"getelementptr inbounds i64, ptr %symbols, i64 {position}")
        value = function.emit_effect(f"load i64, ptr {at}")
        function.frames[0].symbols[item] = (value, 0)
        terms.append(f"sge i64 {value}, 0")
    sizes = [dim for value in outputs for dim in value.shape if is_told(dim, known)]
    terms += [f"sge i64 {function.dim(dim)}, 0" for dim in sizes if not isinstance(dim, int)]
    rules = [(a, b) for a, b in assumptions if is_told(a, known) and is_told(b, known)]
    terms += [f"eq i64 {function.dim(a)}, {function.dim(b)}" for a, b in rules]
    fits = "true"
    for term in terms:
        fits = function.emit(f"and i1 {fits}, {function.emit(f'icmp {term}')}")
    function.lines.append(f"  store i64 {function.emit(f'zext i1 {fits} to i64')}, ptr %result")
    function.finish(["ptr %symbols", "ptr %result"], "internal ")
    (text,) = function.module.functions
    return text


def is_told(dim: Dim, known: Sequence[str]) -> bool:
    """Whether these symbols tell what a dim is."""
    return all(symbol.name in known for symbol in symbols(dim))


class _Entry(FunctionRenderer):
    """One function over the table and the symbols."""

    def __init__(self, module: ModuleText, name: str, program: Program) -> None:
        super().__init__(module, name)
        self.program = program
        self.position = {name: i for i, name in enumerate(program.symbols)}
        self.slots = {name: i for i, name in enumerate(table_order(program))}
        self.arena_offsets: dict[str, tuple[int, Value]] = {}
        for symbol in program.symbols:
            self.frames[0].symbols[symbol] = (f"%s.{self.position[symbol]}", 0)

    def sizes(self, number: int) -> None:
        """Writes the bytes of one segment's arena."""
        slots = self.program.plan.slots[number]
        self._load_symbols(slots, ())
        top: Value = 0
        for slot, offset in zip(slots, self._offsets(slots), strict=True):
            top = self._larger(top, self.arithmetic("add", offset, self._rounded(slot.bytes)))
        at = self.emit_effect(f"getelementptr inbounds i64, ptr %sizes, i64 {number}")
        self.lines.append(f"  store i64 {top}, ptr {at}")
        self.finish(["ptr %symbols", "ptr %sizes"], "")

    def run(self, number: int) -> None:
        """Runs the steps of one segment."""
        steps = self.program.segments[number]
        for segment in range(number + 1):
            slots = self.program.plan.slots[segment]
            self._load_symbols(slots, steps if segment == number else ())
            for slot, offset in zip(slots, self._offsets(slots), strict=True):
                self.arena_offsets[slot.memory] = (segment, offset)
        self.steps(steps)
        self.finish(["ptr %table", "ptr %symbols", f"i64 %{THREADS}"], "")

    # Symbols and addresses

    def _load_symbols(self, slots: Sequence[ArenaSlot], steps: Steps) -> None:
        """Loads the symbols that are known now and used by what follows."""
        bound = {step.symbol for step in walk(steps) if isinstance(step, Bind | Assign)}
        bound |= {step.index for step in walk(steps) if isinstance(step, Repeat)}
        for name in self._used(slots, steps):
            if name not in bound and f"%s.{self.position[name]}" == self.frames[0].symbols[name][0]:
                self._load_symbol(name)

    def _used(self, slots: Sequence[ArenaSlot], steps: Steps) -> list[str]:
        dims: list[Dim] = [slot.bytes for slot in slots]
        for step in walk(steps):
            if isinstance(step, Run):
                dims += [*step.sizes, *(place.offset for place in step.arguments)]
            elif isinstance(step, Bind):
                dims.append(step.place.offset)
            elif isinstance(step, Assign):
                dims.append(step.value)
            elif isinstance(step, Repeat) and step.trips is not None:
                dims.append(step.trips)
        return list(dict.fromkeys(symbol.name for dim in dims for symbol in symbols(dim)))

    def _load_symbol(self, name: str) -> None:
        at = self.emit_effect(f"getelementptr inbounds i64, ptr %symbols, i64 {self.position[name]}")
        value = self.emit_effect(f"load i64, ptr {at}")
        self.frames[-1].symbols[name] = (value, self.frames[-1].depth)

    def _set_symbol(self, name: str, value: Value) -> None:
        at = self.emit_effect(f"getelementptr inbounds i64, ptr %symbols, i64 {self.position[name]}")
        self.lines.append(f"  store i64 {value}, ptr {at}")
        self.frames[-1].symbols[name] = (value, self.frames[-1].depth)
        self.frames[-1].values.clear()

    def _rounded(self, size: Dim) -> Value:
        return self.dim((size + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT)

    def _larger(self, a: Value, b: Value) -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        if a == 0:
            return b
        return self.emit(f"call i64 @llvm.smax.i64(i64 {a}, i64 {b})")

    def _offsets(self, slots: Sequence[ArenaSlot]) -> list[Value]:
        """Where each slot begins: above all those below it."""
        found: list[Value] = [0] * len(slots)
        order = _bottom_up(slots)
        for index in order:
            offset: Value = 0
            for lower in slots[index].below:
                offset = self._larger(offset, self.arithmetic("add", found[lower], self._rounded(slots[lower].bytes)))
            found[index] = offset
        return found

    def address_of(self, place: Place) -> str:
        memory = self.program.memories[place.memory]
        if memory.role == "arena":
            segment, offset = self.arena_offsets[place.memory]
            entry = len(self.slots) + segment
        else:
            entry, offset = self.slots[place.memory], 0
        at = self.emit_effect(f"getelementptr inbounds ptr, ptr %table, i64 {entry}")
        base = self.emit_effect(f"load ptr, ptr {at}")
        extra = self.dim(place.offset * memory.dtype.bytes)
        total = self.arithmetic("add", offset, extra)
        return base if total == 0 else self.emit_effect(f"getelementptr inbounds i8, ptr {base}, i64 {total}")

    # Steps

    def steps(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self.begin_statement()
            if isinstance(step, Run):
                addresses = [f"ptr {self.address_of(place)}" for place in step.arguments]
                sizes = [f"i64 {self.dim(size)}" for size in step.sizes]
                self.lines.append(
                    f"  call void @{quoted(step.kernel)}({', '.join([*addresses, *sizes, f'i64 %{THREADS}'])})"
                )
            elif isinstance(step, Bind):
                self._set_symbol(step.symbol, self._integer_at(step.place, step.dtype))
            elif isinstance(step, Assign):
                self._set_symbol(step.symbol, self.dim(step.value))
            elif isinstance(step, Choose):
                self._choose(step)
            else:
                self._repeat(step)

    def _integer_at(self, place: Place, dtype: DType) -> str:
        loaded = self.emit_effect(f"load i{dtype.bits}, ptr {self.address_of(place)}")
        if dtype.bits == 64:
            return loaded
        return self.emit_effect(f"{'zext' if dtype.kind == 'uint' else 'sext'} i{dtype.bits} {loaded} to i64")

    def _truth_at(self, place: Place) -> str:
        loaded = self.emit_effect(f"load i8, ptr {self.address_of(place)}")
        return self.emit_effect(f"icmp ne i8 {loaded}, 0")

    def _inside(self, steps: Steps) -> None:
        self.frames.append(type(self.frames[0])(self.frames[-1].depth))
        self.steps(steps)
        self.frames.pop()

    def _reload(self, steps: Steps) -> None:
        """Symbols that a branch or loop may have set are read again after it."""
        for inner in walk(steps):
            name = inner.symbol if isinstance(inner, Bind | Assign) else None
            if isinstance(inner, Repeat) and inner.count is not None:
                name = inner.count
            if name is not None:
                self._load_symbol(name)

    def _choose(self, step: Choose) -> None:
        yes, no, done = self._new_label(), self._new_label(), self._new_label()
        self._branch(self._truth_at(step.condition), yes, no)
        for label, body in ((yes, step.then), (no, step.otherwise)):
            self._start(label)
            self._inside(body)
            self._jump(done)
        self._start(done)
        self._reload((step,))

    def _repeat(self, step: Repeat) -> None:
        """The loop's index lives in its symbol's memory: bodies are blocks of calls, not hot code."""
        test, body, done = self._new_label(), self._new_label(), self._new_label()
        trips = None if step.trips is None else self.dim(step.trips)
        at = self.emit_effect(f"getelementptr inbounds i64, ptr %symbols, i64 {self.position[step.index]}")
        self.lines.append(f"  store i64 0, ptr {at}")
        self._jump(test)
        self._start(test)
        index = self.emit_effect(f"load i64, ptr {at}")
        go = "true" if trips is None else self.emit_effect(f"icmp slt i64 {index}, {trips}")
        if step.condition is not None:
            go = self.emit_effect(f"and i1 {go}, {self._truth_at(step.condition)}")
        self._branch(go, body, done)
        self._start(body)
        self.frames.append(type(self.frames[0])(self.frames[-1].depth))
        self.frames[-1].symbols[step.index] = (index, self.frames[-1].depth)
        self.steps(step.body)
        self.frames.pop()
        following = self.emit_effect(f"add i64 {index}, 1")
        self.lines.append(f"  store i64 {following}, ptr {at}")
        self._jump(test)
        self._start(done)
        if step.count is not None:
            self._set_symbol(step.count, self.emit_effect(f"load i64, ptr {at}"))
        self._reload(step.body)


def _bottom_up(slots: Sequence[ArenaSlot]) -> list[int]:
    """An order in which every slot comes after those below it."""
    done: set[int] = set()
    order: list[int] = []

    def visit(index: int) -> None:
        stack = [(index, False)]
        while stack:
            current, ready = stack.pop()
            if ready:
                order.append(current)
            elif current not in done:
                done.add(current)
                stack.append((current, True))
                stack += [(lower, False) for lower in slots[current].below if lower not in done]

    for index in range(len(slots)):
        visit(index)
    return order


def is_constant(dim: Dim) -> bool:
    """Whether a dim is a number."""
    return not isinstance(dim, Sum)
