"""The statements of a kernel as CUDA C."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ...ir import loops as k
from ...ir.dims import Dim
from ...ir.intrinsics import INTRINSICS
from ...ir.scalars import Broadcast, Buffer, Load, Scalar
from .expressions import ExpressionRenderer, Frame, Variable, from_memory, to_memory
from .names import HALF, bare, joined, memory_type, register_type

MANY = 4
"""Lanes from which on a loop moves them between a vector and registers."""


class StatementRenderer(ExpressionRenderer):
    """Appends the statements of one function. `written` are the buffers that may be stored to; `shared` tells where in
    the block's shared memory a shared buffer begins, in bytes."""

    def __init__(
        self, index_type: str, written: frozenset[str], shared: Mapping[str, int], rounds_products: bool = False
    ):
        super().__init__(index_type, rounds_products)
        self.written = set(written)
        self.shared = shared

    def block(self, statements: k.Block) -> None:
        """Statements in a scope of their own, between braces that the caller writes."""
        self.frames.append(Frame())
        before, self.indent = self.indent, self.indent + "    "
        for statement in statements:
            self.statement(statement)
        self.indent = before
        self.frames.pop()

    def statement(self, statement: k.Statement) -> None:
        _RENDER[type(statement)](self, statement)

    def _for(self, loop: k.For) -> None:
        assert loop.kind in ("serial", "unrolled"), f"a {loop.kind} loop cannot be rendered here"
        (extent,) = self.begin(loop.extent)
        limit = self.dim(extent)
        if loop.kind == "unrolled":
            assert isinstance(loop.extent, int), f"unrolled loop {loop.index} of unknown extent {loop.extent}"
            self.write("#pragma unroll")
        elif not limit.replace("_", "").isalnum():
            limit = self.define(self.index_type, limit, "n")
        name = self.unique(loop.index)
        step = f"++{name}" if loop.step == 1 else f"{name} += {loop.step}"
        self.write(f"for ({self.index_type} {name} = 0; {name} < {limit}; {step}) {{")
        self._inside(loop.body, {loop.index: name})
        self.write("}")
        self.release(name)

    def _inside(self, body: k.Block, symbols: Mapping[str, str]) -> None:
        self.frames.append(Frame(dict(symbols)))
        self.block(body)
        self.frames.pop()

    def _let(self, let: k.Let) -> None:
        (value,) = self.begin(let.value)
        if isinstance(value, Scalar):
            text = self.narrow(value)
            text = f"({self.index_type}){joined(self.value(value))}" if text is None else text
        else:
            text = self.dim(value)
        name = self.unique(let.name)
        self.write(f"const {self.index_type} {name} = {bare(text)};")
        self.frames[-1].symbols[let.name] = name

    def _alloc(self, alloc: k.Alloc) -> None:
        buffer = alloc.buffer
        name = self.unique(buffer.name)
        if buffer.space == "shared":
            kind = memory_type(buffer.dtype)
            self.write(f"{kind}* const {name} = ({kind}*)(shared + {self.shared[buffer.name]});")
            self.frames[-1].buffers[buffer.name] = Variable(name)
            return
        size = self._constant(buffer.size, buffer) * buffer.lanes
        in_registers = buffer.space == "register"
        kind = register_type(buffer.dtype) if in_registers else memory_type(buffer.dtype)
        single = in_registers and size == 1
        # Vectors of 16 bytes may be moved from and to what lies on the stack.
        self.write(f"{'' if in_registers else 'alignas(16) '}{kind} {name}{'' if single else f'[{size}]'};")
        self.frames[-1].buffers[buffer.name] = Variable(name, single)

    @staticmethod
    def _constant(size: Dim, buffer: Buffer) -> int:
        assert isinstance(size, int), f"{buffer} has no constant size"
        return size

    def _define(self, define: k.Define) -> None:
        buffer = define.buffer
        (value,) = self.begin(define.value)
        texts = self.lanes(value)
        name = self.unique(buffer.name)
        kind = register_type(buffer.dtype)
        if len(texts) == 1:
            self.write(f"{kind} {name} = {bare(texts[0])};")
        else:
            self.write(f"{kind} {name}[{len(texts)}] = {{{', '.join(map(bare, texts))}}};")
        self.frames[-1].buffers[buffer.name] = Variable(name, len(texts) == 1)

    def _alias(self, alias: k.Alias) -> None:
        offset, condition = self.begin(alias.offset, alias.condition)
        source = self.find_buffer(alias.source.name).name
        where = self.dim(offset)
        text = source if where == "0" else f"{source} + {where}"
        if alias.condition is not None:
            assert alias.otherwise is not None, f"{alias.buffer} has a condition but no other place"
            text = f"{joined(self.value(condition))} ? {text} : {self.find_buffer(alias.otherwise.name).name}"
        kind = memory_type(alias.buffer.dtype)
        constant = "" if alias.source.name in self.written else "const "
        if alias.buffer.dtype != alias.source.dtype:
            text = f"({constant}{kind}*)({text})"
        if not constant:
            self.written.add(alias.buffer.name)
        name = self.unique(alias.buffer.name)
        self.write(f"{constant}{kind}* const {name} = {text};")
        self.frames[-1].buffers[alias.buffer.name] = Variable(name)

    def _store(self, store: k.Store) -> None:
        guard = store.predicate
        if guard is not None and guard.lanes == 1 and store.value.lanes >= MANY:
            (guard,) = self.begin(guard)
            self.write(f"if ({bare(self.value(guard))}) {{")
            before, self.indent = self.indent, self.indent + "    "
            self._store(replace(store, predicate=None))
            self.indent = before
            self.write("}")
            return
        if self._moves_lanes(store):
            return
        predicate, offset, value, stride = self.begin(store.predicate, store.offset, store.value, store.stride)
        buffer, lanes = store.buffer, store.value.lanes
        if predicate is not None and predicate.lanes == 1:
            self.write(f"if ({bare(self.value(predicate))}) {{")
            before, self.indent = self.indent, self.indent + "    "
            self._write_lanes(buffer, offset, self.lanes(value), stride, store.aligned)
            self.indent = before
            self.write("}")
        elif predicate is None:
            self._write_lanes(buffer, offset, self.lanes(value), stride, store.aligned)
        else:
            texts = self.lanes(value)
            for lane, condition in enumerate(self.lanes(predicate)):
                target = self.element(buffer, offset, lane, stride)
                self.write(f"if ({bare(condition)}) {target} = {self._stored(buffer, texts[lane])};")
        assert lanes == value.lanes

    def _moves_lanes(self, store: k.Store) -> bool:
        """Writes an aligned load of many lanes into registers, or their store, as a loop over them, if it is one."""
        load, lanes = store.value, store.value.lanes
        if not isinstance(load, Load) or lanes < MANY or store.predicate is not None or store.stride != 1:
            return False
        offset, load = self.begin(store.offset, load)
        assert isinstance(load, Load)
        inward = store.buffer.space == "register"
        memory, private = (load.buffer, store.buffer) if inward else (store.buffer, load.buffer)
        plain = load.stride == 1 and (load.predicate is None or (inward and isinstance(load.predicate, Broadcast)))
        aligned = load.aligned if inward else store.aligned
        if private.space != "register" or private.lanes > 1 or memory.space == "register" or not (plain and aligned):
            return False
        size = self.pieces(memory.dtype, lanes, 1, True, memory)
        kind, name = memory_type(memory.dtype), self.find_buffer(private.name).name
        start = offset if inward else load.offset
        if inward:
            packs = [text.removesuffix(".lane[0]") for text in self.packed(load)[::size]]
        for piece in range(lanes // size):
            if not inward:
                packs = [*([] if piece == 0 else packs), self.unique("q")]
                self.write(f"Pack<{kind}, {size}> {packs[-1]};")
            first = self.dim(start + piece * size)
            own = f"{name}[{'l' if first == '0' else f'{first} + l'}]"
            there = f"{packs[piece]}.lane[l]"
            to, source = (own, from_memory(there, memory.dtype)) if inward else (there, self._stored(memory, own))
            self.write("#pragma unroll")
            self.write(f"for (int l = 0; l < {size}; ++l) {to} = {source};")
            if not inward:
                pointer = self.find_buffer(memory.name).name
                where = self.dim(offset + piece * size)
                self.write(f"*(Pack<{kind}, {size}>*)({pointer} + {where}) = {packs[-1]};")
        return True

    @staticmethod
    def _stored(buffer: Buffer, text: str) -> str:
        return bare(text if buffer.space == "register" else to_memory(text, buffer.dtype))

    def _write_lanes(self, buffer: Buffer, offset: Dim, texts: tuple[str, ...], stride: Dim, aligned: bool) -> None:
        size = self.pieces(buffer.dtype, len(texts), stride, aligned, buffer)
        if size == 1:
            for lane, text in enumerate(texts):
                self.write(f"{self.element(buffer, offset, lane, stride)} = {self._stored(buffer, text)};")
            return
        pack = f"Pack<{memory_type(buffer.dtype)}, {size}>"
        pointer = self.find_buffer(buffer.name).name
        for start in range(0, len(texts), size):
            values = ", ".join(self._stored(buffer, text) for text in texts[start : start + size])
            self.write(f"*({pack}*)({pointer} + {self.dim(offset + start)}) = {{{{{values}}}}};")

    def _if(self, statement: k.If) -> None:
        (condition,) = self.begin(statement.condition)
        self.write(f"if ({bare(self.value(condition))}) {{")
        self.block(statement.then)
        if statement.otherwise:
            self.write("} else {")
            self.block(statement.otherwise)
        self.write("}")

    def _while(self, loop: k.While) -> None:
        self.write("while (true) {")
        before, self.indent = self.indent, self.indent + "    "
        (condition,) = self.begin(loop.condition)
        self.write(f"if (!({bare(self.value(condition))})) break;")
        self.indent = before
        self.block(loop.body)
        self.write("}")

    def _barrier(self, barrier: k.Barrier) -> None:
        self.write("barrier();")

    def _intrinsic(self, call: k.Intrinsic) -> None:
        declared = INTRINSICS[call.name]
        assert len(call.places) == len(declared.reads) and len(call.values) == len(declared.values), call.name
        values = self.begin(*(place.offset for place in call.places), *call.values)[len(call.places) :]
        arguments = [self._address(place) for place in call.places]
        if call.name == "copy_async_wait":
            self.write(f"copy_async_wait<{bare(self.dim(_constant_of(values[0])))}>();")
            return
        arguments += [bare(self.value(value)) for value in values]
        name = call.name
        if name.startswith("atomic_") and call.places[0].buffer.dtype in HALF:
            name = f"{name}_{call.places[0].buffer.dtype}"  # in memory these are numbers of 16 bits: C cannot tell
        self.write(f"{name}({', '.join(arguments)});")

    def _address(self, place: k.Address) -> str:
        found = self.find_buffer(place.buffer.name)
        where = self.dim(place.offset)
        if found.is_scalar:
            return f"&{found.name}"
        return found.name if where == "0" else f"{found.name} + {where}"


def _constant_of(scalar: Scalar) -> int:
    value = getattr(scalar, "value", None)
    assert isinstance(value, int), "the number of pending groups must be a constant"
    return value


_RENDER: dict[type, Callable[[Any, Any], None]] = {
    k.For: StatementRenderer._for,
    k.Let: StatementRenderer._let,
    k.Alloc: StatementRenderer._alloc,
    k.Define: StatementRenderer._define,
    k.Alias: StatementRenderer._alias,
    k.Store: StatementRenderer._store,
    k.If: StatementRenderer._if,
    k.While: StatementRenderer._while,
    k.Barrier: StatementRenderer._barrier,
    k.Intrinsic: StatementRenderer._intrinsic,
}
