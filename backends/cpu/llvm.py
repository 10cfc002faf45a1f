"""Kernels as LLVM IR text: one function per kernel, and one more per parallel loop.

A kernel becomes `void @NAME(ptr, ..., i64, ..., i64 threads)`: its parameters, its sizes, and how many threads its
parallel loops may use. A parallel loop's body is a function of the names it needs and a range of iterations; the pool
calls it through a context on the caller's stack (backends/cpu/runtime).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ...ir import loops as k
from ...ir import scalars as s
from ...ir.dims import bounds
from ...ir.errors import UnsupportedError
from ...ir.loops import free_sizes
from ...ir.scalars import Scalar
from ...ir.target import Target
from .addresses import (
    Frame,
    Memory,
    ModuleText,
    Registers,
    Value,
    mangled,
    memory_type,
    quoted,
    register_type,
)
from .expressions import ExpressionRenderer

STACK_LIMIT = 256 << 10
"""Bytes of private memory a kernel may have on a stack; more must come as a parameter."""


def render_kernel(kernel: k.Kernel, target: Target, threaded: bool = True, checked: bool = False) -> str:
    """The LLVM module of one kernel. Without `threaded`, parallel loops are plain loops and nothing is left undefined;
    `checked` kernels check their accesses to memory (see `bounds`).

    Raises UnsupportedError for an element type that the CPU backend cannot compute with.
    """
    module = ModuleText(target, threaded)
    if checked:
        origin = f" (from {', '.join(kernel.origin)})" if kernel.origin else ""
        module.checked = f"kernel {kernel.name}{origin}"
    function = FunctionRenderer(module, kernel.name)
    aliased = {name for pair in kernel.aliases for name in pair}
    arguments = []
    for buffer in kernel.parameters:
        attributes = ["noalias"] * (buffer.name not in aliased) + ["readonly"] * (buffer.name not in kernel.outputs)
        memory = Memory(f"%{quoted(buffer.name)}", " ".join(attributes), frozenset({buffer.name}))
        function.frames[0].buffers[buffer.name] = memory
        arguments.append(f"ptr {memory.attributes} {memory.pointer}".replace("  ", " "))
    for size in kernel.sizes:
        function.frames[0].symbols[size] = (f"%{quoted(size)}", 0)
        arguments.append(f"i64 %{quoted(size)}")
    function.frames[0].symbols[THREADS] = (f"%{THREADS}", 0)
    if checked:
        for buffer in kernel.parameters:
            if not set(free_sizes((), (buffer,))) - set(kernel.sizes):
                memory = function.memory(buffer)
                room = function.dim(buffer.size * buffer.dtype.bytes)
                function.frames[0].buffers[buffer.name] = replace(memory, base=memory.pointer, bytes=room)
    function.block(kernel.body)
    function.finish([*arguments, f"i64 %{THREADS}"], "")
    return _module_text(module, kernel)


def _module_text(module: ModuleText, kernel: k.Kernel) -> str:
    target = module.target
    width = f' "prefer-vector-width"="{target.vector_bits}" "min-legal-vector-width"="{target.vector_bits}"'
    features = f' "target-features"="{target.features}"' if target.features else ""
    parts = [f"; from {', '.join(kernel.origin)}"] if kernel.origin else []
    parts.append(f'target triple = "{target.triple}"\n')
    if module.zeros:
        parts.append(f"@.zeros = private unnamed_addr constant [{module.zeros} x i8] zeroinitializer, align 64\n")
    if module.spare:
        parts.append(f"@.spare = internal global [{module.spare} x i8] zeroinitializer, align 64\n")
    for text, name in module.messages.items():
        content = "".join(f"\\{byte:02X}" for byte in text.encode())
        parts.append(f'{name} = private constant [{len(text.encode()) + 1} x i8] c"{content}\\00"')
    if any(f"@{POOL}(" in text for text in module.functions):
        parts.append(f"declare void @{POOL}(ptr, ptr, i64, i32)\n")
    parts += [*module.helpers.values(), *module.functions]
    # no-builtins: loops that copy or fill must not become calls of memcpy or memset.
    parts.append(f'attributes #0 = {{ nounwind "no-builtins" "target-cpu"="{target.cpu}"{features}{width} }}\n')
    for turns, number in module.turns.items():
        parts.append(f'!{number} = !{{!"branch_weights", i32 {min(turns - 1, 1 << 24)}, i32 1}}')
    return "\n".join(parts)


POOL = "onnxc_parallel_for"
THREADS = ".threads"


class FunctionRenderer(ExpressionRenderer):
    """One function: its statements, its stack, and (for the body of a parallel loop) what it takes from outside."""

    def __init__(self, module: ModuleText, name: str, outer: FunctionRenderer | None = None):
        super().__init__(module)
        self.name = name
        self.outer = outer
        self.captured: list[tuple[str, str, str]] = []  # type, attributes, value outside; inside it is %c.<number>
        self.captured_memory: list[Memory] = []
        self._label = "entry"
        self._allocas: list[str] = []
        self._stack_bytes = 0

    def finish(self, arguments: Sequence[str], linkage: str) -> None:
        """Adds the function's text to the module."""
        attributes = "#0" if self.outer is None else "noinline #0"
        head = f"define {linkage}void @{quoted(self.name)}({', '.join(arguments)}) {attributes} {{\nentry:"
        self.module.functions.append("\n".join([head, *self._allocas, *self.lines, "  ret void\n}\n"]))

    # Names from outside

    def _capture(self, kind: str, value: str, attributes: str = "") -> str:
        self.captured.append((kind, attributes, value))
        return f"%c.{len(self.captured) - 1}"

    def capture_symbol(self, name: str) -> tuple[Value, int]:
        if self.outer is None:
            return super().capture_symbol(name)
        value, _ = self.outer.find_symbol(name)
        entry = (value if isinstance(value, int) else self._capture("i64", value), 0)
        self.frames[0].symbols[name] = entry
        return entry

    def capture_buffer(self, name: str) -> Memory | Registers:
        if self.outer is None:
            return super().capture_buffer(name)
        entry = self.outer.find_buffer(name)
        if isinstance(entry, Memory):
            inside = Memory(self._capture("ptr", entry.pointer, entry.attributes), entry.attributes, entry.roots)
            if entry.bytes is not None:
                size = entry.bytes if isinstance(entry.bytes, int) else self._capture("i64", entry.bytes)
                inside = replace(inside, base=self._capture("ptr", entry.base), bytes=size)
            self.captured_memory.append(inside)
            self.frames[0].buffers[name] = inside
            return inside
        # Register variables keep their values at the loop: threads cannot share them.
        slots = []
        for slot in entry.slots:
            value = self._capture(entry.type, self.outer.emit_effect(f"load {entry.type}, ptr {slot}"))
            slots.append(self._alloca(entry.type))
            self._allocas.append(f"  store {entry.type} {value}, ptr {slots[-1]}")
        variables = Registers(tuple(slots), entry.type)
        self.frames[0].buffers[name] = variables
        return variables

    # Statements

    def block(self, statements: k.Block, depth: int = 0, /, **symbols: tuple[Value, int]) -> None:
        """Statements in a frame of their own; `depth` counts the loops entered with it."""
        self.frames.append(Frame(self.frames[-1].depth + depth, dict(symbols)))
        for statement in statements:
            self.begin_statement()
            _RENDER[type(statement)](self, statement)
        self.frames.pop()
        self.begin_statement()

    def _new_label(self) -> str:
        return self.fresh()[1:]

    def _start(self, label: str) -> None:
        self.lines.append(f"{label}:")
        self._label = label

    def _branch(self, condition: str, yes: str, no: str) -> None:
        self.lines.append(f"  br i1 {condition}, label %{yes}, label %{no}")

    def _jump(self, label: str) -> None:
        self.lines.append(f"  br label %{label}")

    def _alloca(self, kind: str, align: int = 0) -> str:
        name = self.fresh()
        self._allocas.append(f"  {name} = alloca {kind}{f', align {align}' if align else ''}")
        return name

    def _for(self, loop: k.For) -> None:
        assert loop.kind in ("serial", "unrolled", "parallel"), f"a {loop.kind} loop cannot be rendered for the CPU"
        if loop.kind == "parallel" and self.module.threaded and self.outer is None:
            self._parallel(loop)
            return
        extent = self.dim(loop.extent)
        if isinstance(extent, int) and (loop.kind == "unrolled" or extent <= loop.step):
            for position in range(0, extent, loop.step):
                self.block(loop.body, **{loop.index: (position, 0)})
            return
        assert loop.kind != "unrolled", f"unrolled loop {loop.index} of unknown extent {loop.extent}"
        self._loop(loop, 0, extent, (bounds(loop.extent)[0] or 0) < 1)

    def _loop(self, loop: k.For, begin: Value, end: Value, maybe_empty: bool) -> None:
        """The body for index = begin, begin + step, ... < end: tested at the end, as LLVM wants it."""
        body, done = self._new_label(), self._new_label()
        if maybe_empty:
            self._branch(self.emit(f"icmp slt i64 {begin}, {end}"), body, done)
        else:
            self._jump(body)
        before = self._label
        self._start(body)
        number, following = self.fresh()[2:], self.fresh()
        index = f"%{quoted(f'{loop.index}.{number}')}"
        place = len(self.lines)
        self.lines.append("")
        self.block(loop.body, 1, **{loop.index: (index, self.frames[-1].depth + 1)})
        self.lines[place] = f"  {index} = phi i64 [ {begin}, %{before} ], [ {following}, %{self._label} ]"
        self.lines.append(f"  {following} = add nuw nsw i64 {index}, {loop.step}")
        again = self.emit_effect(f"icmp slt i64 {following}, {end}")
        self._branch(again, body, done)
        if isinstance(loop.extent, int):
            self.lines[-1] += f", !prof !{self.module.weights(-(-loop.extent // loop.step))}"
        self._start(done)

    def _parallel(self, loop: k.For) -> None:
        """Calls the body's function: directly for one thread, else by the pool with a context of what it needs."""
        count = self.dim((loop.extent + (loop.step - 1)) // loop.step)
        body = FunctionRenderer(self.module, f"{self.name}.parallel.{len(self.module.functions)}", self)
        chunk = k.For(loop.index, loop.extent, loop.body, "serial", loop.step)
        begin, end = "%.begin", "%.end"
        if loop.step != 1:
            begin, end = (str(body.arithmetic("mul", position, loop.step)) for position in (begin, end))
        body._loop(chunk, begin, end, True)
        # An alias from outside points into memory that is captured too: neither may claim to be the only way there.
        outside = body.captured_memory
        shared = {root for memory in outside if "noalias" not in memory.attributes for root in memory.roots}
        overlapping = {memory.pointer for memory in outside if memory.roots & shared}
        formal, actual, fields = [], [], []
        for number, (kind, flags, value) in enumerate(body.captured):
            if f"%c.{number}" in overlapping:
                flags = flags.replace("noalias", "").strip()
            formal.append(f"{kind} {flags} %c.{number}".replace("  ", " "))
            actual.append(f"{kind} {value}")
            fields.append(kind)
        body.finish([*formal, "i64 %.begin", "i64 %.end"], "internal ")
        name, entry = quoted(body.name), quoted(f"{body.name}.entry")
        context = f"{{ {', '.join(fields)} }}"
        lines = [f"define internal void @{entry}(ptr %context, i64 %begin, i64 %end) #0 {{"]
        for number, kind in enumerate(fields):
            lines.append(f"  %p.{number} = getelementptr inbounds {context}, ptr %context, i64 0, i32 {number}")
            lines.append(f"  %v.{number} = load {kind}, ptr %p.{number}")
        passed = ", ".join([*(f"{kind} %v.{number}" for number, kind in enumerate(fields)), "i64 %begin", "i64 %end"])
        self.module.functions.append("\n".join([*lines, f"  call void @{name}({passed})\n  ret void\n}}\n"]))

        serial, pool, done = self._new_label(), self._new_label(), self._new_label()
        threads = self.find_symbol(THREADS)[0]
        self._branch(self.emit(f"icmp sle i64 {threads}, 1"), serial, pool)
        self._start(serial)
        self.lines.append(f"  call void @{name}({', '.join([*actual, 'i64 0', f'i64 {count}'])})")
        self._jump(done)
        self._start(pool)
        place = self._alloca(context)
        for number, field in enumerate(actual):
            at = self.emit_effect(f"getelementptr inbounds {context}, ptr {place}, i64 0, i32 {number}")
            self.lines.append(f"  store {field}, ptr {at}")
        workers = self.emit_effect(f"trunc i64 {threads} to i32")
        self.lines.append(f"  call void @{POOL}(ptr @{entry}, ptr {place}, i64 {count}, i32 {workers})")
        self._jump(done)
        self._start(done)

    def _let(self, let: k.Let) -> None:
        if isinstance(let.value, Scalar):
            entry: tuple[Value, int] = (self.expression(let.value), self.frames[-1].depth)
            if not str(entry[0]).startswith("%"):
                entry = (int(entry[0]), 0)
        else:
            entry = self._dim(let.value)
        self.frames[-1].symbols[let.name] = entry

    def _alloc(self, alloc: k.Alloc) -> None:
        buffer = alloc.buffer
        size = self.dim(buffer.size)
        assert isinstance(size, int), f"{buffer} has no constant size: pass it as a parameter"
        if buffer.space == "register":
            kind = register_type(buffer.dtype, buffer.lanes)
            self.frames[-1].buffers[buffer.name] = Registers(tuple(self._alloca(kind) for _ in range(size)), kind)
            return
        assert buffer.space == "stack", f"{buffer} in {buffer.space} memory on a CPU"
        self._stack_bytes += size * buffer.dtype.bytes
        assert self._stack_bytes <= STACK_LIMIT, f"{self.name} wants {self._stack_bytes} bytes of stack"
        pointer = self._alloca(f"[{size} x {memory_type(buffer.dtype)}]", 64)
        room = size * buffer.dtype.bytes
        self.frames[-1].buffers[buffer.name] = Memory(pointer, "noalias", frozenset({buffer.name}), pointer, room)

    def _define(self, define: k.Define) -> None:
        buffer, kind = define.buffer, register_type(define.buffer.dtype, define.buffer.lanes)
        value = self.expression(define.value)
        slot = self._alloca(kind)
        self.frames[-1].buffers[buffer.name] = Registers((slot,), kind)
        self.lines.append(f"  store {kind} {value}, ptr {slot}")

    def _alias(self, alias: k.Alias) -> None:
        source = self.memory(alias.source)
        pointer = self.address(alias.source, alias.offset, alias.condition is None)
        roots, base, size = source.roots, source.base, source.bytes
        if alias.condition is not None:
            assert alias.otherwise is not None, f"{alias.buffer} has a condition but no other place"
            other = self.memory(alias.otherwise)
            roots |= other.roots
            condition = self.expression(alias.condition)
            pointer = self.emit(f"select i1 {condition}, ptr {pointer}, ptr {other.pointer}")
            if size is not None and other.bytes is not None and self.module.checked:
                base = self.emit(f"select i1 {condition}, ptr {base}, ptr {other.base}")
                size = self.emit(f"select i1 {condition}, i64 {size}, i64 {other.bytes}")
            else:
                size = None
        if alias.fresh:
            effects = "nounwind willreturn memory(inaccessiblemem: readwrite)"
            pointer = self.emit_effect(f'call ptr asm sideeffect "", "=r,0"(ptr {pointer}) {effects}')
        self.frames[-1].buffers[alias.buffer.name] = Memory(pointer, "", roots, base, size)

    def _store(self, store: k.Store) -> None:
        predicate = None if store.predicate is None else self.expression(store.predicate)
        write = self._write_register if store.buffer.space == "register" else self._write
        if predicate is None or store.value.lanes > 1:
            write(store, predicate)
            return
        yes, done = self._new_label(), self._new_label()
        self._branch(predicate, yes, done)
        self._start(yes)
        self.frames.append(Frame(self.frames[-1].depth))
        write(store, None)
        self.frames.pop()
        self._jump(done)
        self._start(done)

    def _write_register(self, store: k.Store, mask: str | None) -> None:
        value = self.expression(store.value)
        slot, kind = self.register(store.buffer, store.offset, store.value.lanes)
        if mask is not None:
            old = self.emit_effect(f"load {kind}, ptr {slot}")
            value = self.emit(f"select <{store.value.lanes} x i1> {mask}, {kind} {value}, {kind} {old}")
        self.lines.append(f"  store {kind} {value}, ptr {slot}")

    def _write(self, store: k.Store, mask: str | None) -> None:
        buffer, lanes = store.buffer, store.value.lanes
        value = self.memory_value(store.value)
        kind, align = memory_type(buffer.dtype, lanes), buffer.dtype.bytes
        pointer = self.address(buffer, store.offset, mask is None)
        stride: Value = 1 if lanes == 1 else self.dim(store.stride)
        if self.module.checked and mask is not None:
            mask = self.inside_lanes(buffer, pointer, lanes, stride, mask, "writes")
        elif self.module.checked:
            allowed = self.inside(buffer, pointer, lanes, stride, "true", "writes")
            spare, still = self.spare(buffer, lanes, stride)
            pointer = self.emit(f"select i1 {allowed}, ptr {pointer}, ptr {spare}")
            if not isinstance(stride, int):
                stride = self.emit(f"select i1 {allowed}, i64 {stride}, i64 {still}")
        name = mangled(kind)
        if stride == 1 and _first_lane_alone(store.predicate) and not self.module.checked:
            # LLVM 22 makes of a truncation and a store of one known lane a store of all that there was to truncate.
            one = self.emit(f"extractelement {kind} {value}, i64 0")
            self.lines.append(f"  store {memory_type(buffer.dtype)} {one}, ptr {pointer}, align {align}")
        elif mask is None and stride == 1:
            self.lines.append(f"  store {kind} {value}, ptr {pointer}, align {align}")
        elif stride == 1:
            arguments = f"{kind} {value}, ptr {pointer}, i32 {align}, <{lanes} x i1> {mask}"
            self.lines.append(f"  call void @llvm.masked.store.{name}.p0({arguments})")
        elif mask is None:
            for lane in range(lanes):
                at = self.element(buffer, pointer, self.arithmetic("mul", stride, lane))
                one = self.emit(f"extractelement {kind} {value}, i64 {lane}")
                self.lines.append(f"  store {memory_type(buffer.dtype)} {one}, ptr {at}, align {align}")
        else:
            pointers = f"<{lanes} x ptr> {self.element_pointers(buffer, pointer, lanes, stride)}"
            arguments = f"{kind} {value}, {pointers}, i32 {align}, <{lanes} x i1> {mask}"
            self.lines.append(f"  call void @llvm.masked.scatter.{name}.v{lanes}p0({arguments})")

    def _if(self, statement: k.If) -> None:
        condition = self.expression(statement.condition)
        if condition in ("true", "false"):
            self.block(statement.then if condition == "true" else statement.otherwise)
            return
        yes, no, done = self._new_label(), self._new_label(), self._new_label()
        self._branch(condition, yes, no if statement.otherwise else done)
        for label, body in ((yes, statement.then), (no, statement.otherwise)):
            if label == yes or body:
                self._start(label)
                self.block(body)
                self._jump(done)
        self._start(done)

    def _while(self, loop: k.While) -> None:
        test, body, done = self._new_label(), self._new_label(), self._new_label()
        self._jump(test)
        self._start(test)
        self.frames.append(Frame(self.frames[-1].depth + 1))
        self._branch(self.expression(loop.condition), body, done)
        self._start(body)
        self.block(loop.body)
        self.frames.pop()
        self._jump(test)
        self._start(done)

    def _intrinsic(self, statement: k.Intrinsic) -> None:
        if statement.name != "prefetch":
            raise UnsupportedError(f"{statement.name} has no meaning in a CPU kernel")
        (place,) = statement.places
        pointer = self.address(place.buffer, place.offset, False)
        self.lines.append(f"  call void @llvm.prefetch.p0(ptr {pointer}, i32 0, i32 3, i32 1)")  # a read, all caches

    def _barrier(self, barrier: k.Barrier) -> None:
        raise UnsupportedError("a barrier has no meaning in a CPU kernel")


def _first_lane_alone(predicate: Scalar | None) -> bool:
    """Whether a predicate is lanes < 1."""
    if not isinstance(predicate, s.Binary) or predicate.op != "lt" or predicate.lanes == 1:
        return False
    lanes, limit = predicate.left, predicate.right
    while isinstance(limit, s.Broadcast | s.Cast):
        limit = limit.operand
    while isinstance(lanes, s.Cast):
        lanes = lanes.operand
    return isinstance(lanes, s.Lanes) and isinstance(limit, s.Const) and limit.value == 1


_RENDER: dict[type, Callable[[Any, Any], None]] = {
    k.For: FunctionRenderer._for,
    k.Let: FunctionRenderer._let,
    k.Define: FunctionRenderer._define,
    k.Alloc: FunctionRenderer._alloc,
    k.Alias: FunctionRenderer._alias,
    k.Store: FunctionRenderer._store,
    k.If: FunctionRenderer._if,
    k.While: FunctionRenderer._while,
    k.Barrier: FunctionRenderer._barrier,
    k.Intrinsic: FunctionRenderer._intrinsic,
}
