"""Kernels that check themselves (`ONNXC_CHECK_BOUNDS=1`): every access to memory, against the buffer that it names.

An access that does not lie in its buffer is not made: zeros are read in its place, and what would be written is lost.
It is told in a memory of the code image, which calls look at when all has run. Vectors are checked as a whole, those
with a mask lane by lane. Aliases are checked against the buffer that they point into.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...ir.dims import Dim, symbol
from ...ir.loops import free_sizes
from ...ir.program import Choose, Program, Repeat, Run, Step, Steps
from ...ir.scalars import Buffer
from .addresses import AddressRenderer, Memory, Value
from .violations import VIOLATION as VIOLATION
from .violations import raise_violation as raise_violation
from .violations import wanted as wanted

DEFINITION = f"@{VIOLATION} = global [3 x i64] zeroinitializer, align 64\n"

_INSIDE = f"""@{VIOLATION} = external global [3 x i64]
define internal i1 @.inside(ptr %p, ptr %base, i64 %bytes, i64 %first, i64 %end, i1 %enabled, ptr %what) noinline #0 {{
  %to = ptrtoint ptr %p to i64
  %from = ptrtoint ptr %base to i64
  %offset = sub i64 %to, %from
  %low = add i64 %offset, %first
  %high = add i64 %offset, %end
  %above = icmp sge i64 %low, 0
  %below = icmp sle i64 %high, %bytes
  %within = and i1 %above, %below
  %without = xor i1 %within, true
  %bad = and i1 %without, %enabled
  br i1 %bad, label %report, label %done
report:
  %message = ptrtoint ptr %what to i64
  store i64 %low, ptr getelementptr (i64, ptr @{VIOLATION}, i64 1)
  store i64 %bytes, ptr getelementptr (i64, ptr @{VIOLATION}, i64 2)
  store i64 %message, ptr @{VIOLATION}
  br label %done
done:
  %allowed = and i1 %within, %enabled
  ret i1 %allowed
}}
"""


class BoundsRenderer(AddressRenderer):
    """Appends checks of accesses."""

    def inside(self, buffer: Buffer, pointer: str, lanes: int, stride: Value, enabled: str, verb: str) -> str:
        """Whether an access to `lanes` elements from a pointer on is enabled and inside of its buffer."""
        memory, size = self.memory(buffer), buffer.dtype.bytes
        if memory.bytes is None:
            return enabled
        if isinstance(stride, int):
            reach = (lanes - 1) * stride * size
            first, end = str(min(0, reach)), str(max(0, reach) + size)
        else:
            reach_value = self.emit(f"mul i64 {stride}, {(lanes - 1) * size}")
            first = self.intrinsic("smin", "i64", reach_value, "0")
            end = self.emit(f"add i64 {self.intrinsic('smax', 'i64', reach_value, '0')}, {size}")
        return self._checked(memory, pointer, first, end, enabled, buffer, verb)

    def inside_lanes(self, buffer: Buffer, pointer: str, lanes: int, stride: Value, mask: str, verb: str) -> str:
        """The lanes of a mask whose accesses are inside."""
        memory, size = self.memory(buffer), buffer.dtype.bytes
        if memory.bytes is None:
            return mask
        kind = f"<{lanes} x i1>"
        result = mask
        for lane in range(lanes):
            first = self.arithmetic("mul", self.arithmetic("mul", stride, lane), size)
            end = self.arithmetic("add", first, size)
            enabled = self.emit(f"extractelement {kind} {mask}, i64 {lane}")
            allowed = self._checked(memory, pointer, str(first), str(end), enabled, buffer, verb)
            result = self.emit(f"insertelement {kind} {result}, i1 {allowed}, i64 {lane}")
        return result

    def spare(self, buffer: Buffer, lanes: int, stride: Value) -> tuple[str, str]:
        """A place where a store outside of its buffer may go, for element 0, and its condition's stand-in stride."""
        span = (lanes - 1) * (abs(stride) if isinstance(stride, int) else 0) + 1
        self.module.spare = max(self.module.spare, span * buffer.dtype.bytes)
        before = (lanes - 1) * -stride if isinstance(stride, int) and stride < 0 else 0
        return self.element(buffer, "@.spare", before), "0"

    def _checked(
        self, memory: Memory, pointer: str, first: str, end: str, enabled: str, buffer: Buffer, verb: str
    ) -> str:
        self.module.helpers[".inside"] = _INSIDE
        text = f"{self.module.checked} {verb} outside of its buffer {buffer.name}: {buffer.dtype}[{buffer.size}]"
        what = self.module.messages.setdefault(text, f"@.message.{len(self.module.messages)}")
        return self.emit(
            f"call i1 @.inside(ptr {pointer}, ptr {memory.base}, i64 {memory.bytes}, i64 {first}, i64 {end},"
            f" i1 {enabled}, ptr {what})"
        )


def with_buffer_sizes(program: Program) -> Program:
    """The program with kernels that are told all symbols in the sizes of their buffers, where the program has them."""
    known = set(program.symbols)
    added: dict[str, tuple[str, ...]] = {}
    kernels = {}
    for name, kernel in program.kernels.items():
        sizes = free_sizes((), kernel.parameters)
        added[name] = tuple(size for size in sizes if size not in kernel.sizes and size in known)
        kernels[name] = replace(kernel, sizes=(*kernel.sizes, *added[name]))

    def steps(found: Steps) -> Iterator[Step]:
        for step in found:
            if isinstance(step, Run):
                more: tuple[Dim, ...] = tuple(symbol(size, None) for size in added[step.kernel])
                yield replace(step, sizes=(*step.sizes, *more))
            elif isinstance(step, Choose):
                yield replace(step, then=tuple(steps(step.then)), otherwise=tuple(steps(step.otherwise)))
            elif isinstance(step, Repeat):
                yield replace(step, body=tuple(steps(step.body)))
            else:
                yield step

    return replace(program, kernels=kernels, segments=tuple(tuple(steps(segment)) for segment in program.segments))
