"""Object files of ELF, read and joined into one: what `ld -r` does, for what LLVM and this compiler emit.

After the System V ABI (generic, x86-64 and AArch64 supplements): 64-bit, little-endian, relocations with addends.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np

from ...ir.errors import TargetError

_FILE = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATIONS = np.dtype([("offset", "<u8"), ("info", "<u8"), ("addend", "<i8")])
_NOBITS, _SYMTAB, _STRTAB, _RELA = 8, 2, 3, 4
_ALLOCATED, _INFO_LINK = 2, 0x40
_GLOBAL, _WEAK = 1, 2
_UNDEFINED, _ABSOLUTE, _RESERVED = 0, 0xFFF1, 0xFF00
_OBJECT_SYMBOL = 1


@dataclass(frozen=True)
class Symbol:
    """A name for a place in a section; `section` is 0 where it is defined elsewhere. `info` holds binding and type."""

    name: str
    info: int
    section: int
    value: int
    size: int

    @property
    def binding(self) -> int:
        return self.info >> 4


@dataclass(frozen=True)
class Section:
    """Bytes that are loaded, and what is to be put into them. `parts` follow one another; `size` counts for .bss."""

    name: str
    kind: int
    flags: int
    alignment: int
    entry_bytes: int
    size: int
    parts: Sequence[bytes | memoryview]
    relocations: np.ndarray


@dataclass(frozen=True)
class ObjectFile:
    """Sections by their numbers in the file, and all symbols."""

    machine: int
    flags: int
    sections: Mapping[int, Section]
    symbols: Sequence[Symbol]

    @staticmethod
    def parse(content: bytes) -> ObjectFile:
        """Reads what LLVM wrote. Raises TargetError for another format than 64-bit little-endian ELF."""
        if content[:6] != b"\x7fELF\x02\x01":
            raise TargetError("native code is joined for targets with 64-bit little-endian ELF objects only")
        header = _FILE.unpack_from(content)
        machine, start, flags, count, names_at = header[2], header[6], header[7], header[12], header[13]
        heads = [_SECTION.unpack_from(content, start + i * _SECTION.size) for i in range(count)]

        def text(table: int, offset: int) -> str:
            begin = heads[table][4] + offset
            return content[begin : content.index(0, begin)].decode()

        symbols: list[Symbol] = []
        relocations: dict[int, np.ndarray] = {}
        for _, kind, _, _, offset, size, link, info, _, _ in heads:
            if kind == _SYMTAB:
                for at in range(offset, offset + size, _SYMBOL.size):
                    name, about, _, section, value, extent = _SYMBOL.unpack_from(content, at)
                    symbols.append(Symbol(text(link, name), about, section, value, extent))
            elif kind == _RELA:
                relocations[info] = np.frombuffer(content, _RELOCATIONS, size // _RELOCATIONS.itemsize, offset)
        sections = {}
        for number, (name, kind, bits, _, offset, size, _, _, alignment, entry) in enumerate(heads):
            if bits & _ALLOCATED:
                data = b"" if kind == _NOBITS else content[offset : offset + size]
                moved = relocations.get(number, np.empty(0, _RELOCATIONS))
                sections[number] = Section(text(names_at, name), kind, bits, alignment, entry, size, (data,), moved)
        return ObjectFile(machine, flags, sections, symbols)

    @property
    def undefined(self) -> list[str]:
        """Names that other files must define."""
        return [symbol.name for symbol in self.symbols[1:] if symbol.section == _UNDEFINED]


def data_object(
    like: ObjectFile, name: str, parts: Sequence[memoryview], alignment: int
) -> tuple[ObjectFile, list[int]]:
    """Read-only data behind a symbol, each part aligned; and the parts' offsets."""
    offsets: list[int] = []
    padded: list[bytes | memoryview] = []
    end = 0
    for part in parts:
        gap = -end % alignment
        offsets.append(end + gap)
        padded += [bytes(gap), part]
        end += gap + len(part)
    section = Section(".rodata", 1, _ALLOCATED, alignment, 0, end, padded, np.empty(0, _RELOCATIONS))
    symbols = [Symbol("", 0, 0, 0, 0), Symbol(name, _GLOBAL << 4 | _OBJECT_SYMBOL, 1, 0, end)]
    return ObjectFile(like.machine, like.flags, {1: section}, symbols), offsets


@dataclass
class _Strings:
    content: bytearray = field(default_factory=lambda: bytearray(1))
    known: dict[str, int] = field(default_factory=lambda: {"": 0})

    def add(self, text: str) -> int:
        if text not in self.known:
            self.known[text] = len(self.content)
            self.content += text.encode() + b"\0"
        return self.known[text]


def join(objects: Sequence[ObjectFile], exported: Set[str]) -> Iterator[bytes | memoryview]:
    """The pieces of one object file in which the objects find each other's symbols.

    Only the `exported` names stay visible, so that files of several models link into one program. Raises ValueError for
    a name that two objects define, or for an exported one that none does.
    """
    sections: list[Section] = []
    local: list[Symbol] = [Symbol("", 0, 0, 0, 0)]
    visible: dict[str, Symbol] = {}
    hidden: dict[str, int] = {}
    numbers: list[dict[int, int]] = []  # per object: the symbol's number here; negative: its place among the visible
    renumbered: list[dict[int, int]] = []
    for item in objects:
        renumbered.append({old: len(sections) + i + 1 for i, old in enumerate(item.sections)})
        sections += item.sections.values()
        mapping: dict[int, int] = {}
        for index, symbol in enumerate(item.symbols):
            inside = 0 < symbol.section < _RESERVED
            if inside and symbol.section in renumbered[-1]:
                number = renumbered[-1][symbol.section]
                moved = Symbol(symbol.name, symbol.info, number, symbol.value, symbol.size)
                if symbol.binding in (_GLOBAL, _WEAK):
                    if symbol.name in hidden or symbol.name in visible:
                        raise ValueError(f"the symbol {symbol.name} is defined twice")
                    if symbol.name in exported:
                        visible[symbol.name] = moved
                        continue
                    hidden[symbol.name] = len(local)
                    moved = Symbol(moved.name, moved.info & 15, number, moved.value, moved.size)
                mapping[index] = len(local)
                local.append(moved)
        numbers.append(mapping)
    if exported - visible.keys():
        raise ValueError(f"no object defines {', '.join(sorted(exported - visible.keys()))}")
    for item in objects:
        for symbol in item.symbols[1:]:
            if symbol.section == _UNDEFINED and symbol.name not in hidden and symbol.name not in visible:
                visible[symbol.name] = Symbol(symbol.name, symbol.info, 0, 0, 0)
    order = {name: len(local) + i for i, name in enumerate(visible)}
    for item, mapping in zip(objects, numbers, strict=True):
        for index, symbol in enumerate(item.symbols[1:], 1):
            if index not in mapping and symbol.section < _RESERVED:
                mapping[index] = hidden.get(symbol.name, order.get(symbol.name, 0))
    yield from _written(objects, sections, [*local, *visible.values()], len(local), numbers)


def _written(
    objects: Sequence[ObjectFile],
    sections: Sequence[Section],
    symbols: Sequence[Symbol],
    first_visible: int,
    numbers: Sequence[Mapping[int, int]],
) -> Iterator[bytes | memoryview]:
    names, section_names = _Strings(), _Strings()
    table = b"".join(_SYMBOL.pack(names.add(s.name), s.info, 0, s.section, s.value, s.size) for s in symbols)
    symbol_table = len(sections) + 1
    heads = [bytes(_SECTION.size)]
    body: list[bytes | memoryview] = []
    end = _FILE.size

    def place(
        name: str, kind: int, flags: int, alignment: int, parts: Sequence[bytes | memoryview], size: int, *rest: int
    ) -> None:
        nonlocal end
        gap = -end % max(alignment, 1)
        body.extend([bytes(gap), *parts])
        link, info, entry = rest
        heads.append(
            _SECTION.pack(section_names.add(name), kind, flags, 0, end + gap, size, link, info, alignment, entry)
        )
        end += gap + sum(map(len, parts))

    for section in sections:
        place(section.name, section.kind, section.flags, section.alignment, section.parts, section.size, 0, 0,
              section.entry_bytes)  # fmt: skip
    place(".symtab", _SYMTAB, 0, 8, [table], len(table), symbol_table + 1, first_visible, _SYMBOL.size)
    place(".strtab", _STRTAB, 0, 1, [bytes(names.content)], len(names.content), 0, 0, 0)
    place(".note.GNU-stack", 1, 0, 1, [], 0, 0, 0, 0)  # the code needs no executable stack
    target = 0
    for item, mapping in zip(objects, numbers, strict=True):
        lookup = np.zeros(len(item.symbols), np.uint64)
        lookup[list(mapping)] = list(mapping.values())
        for section in item.sections.values():
            target += 1
            if len(section.relocations):
                moved = section.relocations.copy()
                moved["info"] = lookup[moved["info"] >> 32] << 32 | moved["info"] & 0xFFFFFFFF
                name = f".rela{section.name}"
                place(name, _RELA, _INFO_LINK, 8, [moved.tobytes()], moved.nbytes, symbol_table, target,
                      _RELOCATIONS.itemsize)  # fmt: skip
    section_names.add(".shstrtab")
    place(".shstrtab", _STRTAB, 0, 1, [bytes(section_names.content)], len(section_names.content), 0, 0, 0)
    gap = -end % 8
    ident = b"\x7fELF\x02\x01\x01"
    yield _FILE.pack(ident, 1, objects[0].machine, 1, 0, 0, end + gap, objects[0].flags, _FILE.size, 0, 0,
                     _SECTION.size, len(heads), len(heads) - 1)  # fmt: skip
    yield from body
    yield bytes(gap) + b"".join(heads)
