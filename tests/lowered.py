"""Lowered regions run: as machine code, or by the interpreter with every access checked; and their inner loops."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from kernel_interpreter import run_kernel
from onnxc.backends.cpu.build import scheduled
from onnxc.backends.cpu.llvm import render_kernel
from onnxc.backends.cpu.objects import assembly
from onnxc.ir.dims import evaluate
from onnxc.ir.loops import Kernel
from onnxc.ir.target import Target
from onnxc.passes.regions import Call, Lowered, Region
from onnxc.tools.bench_kernels import CompiledRegion


def run(
    region: Region,
    lowered: Lowered,
    target: Target,
    inputs: Sequence[np.ndarray],
    sizes: Mapping[str, int] | None = None,
    interpret: bool = False,
) -> list[np.ndarray]:
    """The outputs of a region; `interpret`ed, not by machine code."""
    compiled = CompiledRegion(region, lowered, target)
    sizes = sizes or {}
    memory = compiled.memory(inputs, sizes)
    if interpret:
        for kernel, call in zip(compiled.kernels, compiled.steps, strict=True):
            flat = {p.name: memory[n].reshape(-1) for p, n in zip(kernel.parameters, call.arguments, strict=True)}
            values = [evaluate(dim, sizes) for dim in call.sizes]
            run_kernel(kernel, flat, dict(zip(kernel.sizes, values, strict=True)))
    else:
        compiled.bound(memory, sizes)()
    return [memory[buffer.name] for buffer, _ in region.outputs]


_MULTIPLY = re.compile(r"\s(vfn?madd\w+|v?mulps|fmla|fmul)\s")
_BRANCH = re.compile(r"\s(?:j\w+|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+,.*,)\s+(\.L\w+)$")
_STORE = re.compile(
    r"\smov\w+\s+%[xyz]mm\d+, .*\(%(?!rsp)|\svmov\w+\s+%[xyz]mm\d+, .*\(%(?!rsp)|\sst[rp]\s+[qdsv].*\[(?!sp)"
)
_SPILL = re.compile(r"[xyz]mm.*\(%rsp\)|\(%rsp\).*[xyz]mm|[qdsv]\d+.*\[sp")


def summing_loops(lowered: Lowered, target: Target) -> list[str]:
    """The innermost loops of sums of products in the kernels' assembly: many multiply-adds, and nothing stored."""
    return [loop for call in lowered.calls if isinstance(call, Call) for loop in summing_loops_of(call.kernel, target)]


def summing_loops_of(kernel: Kernel, target: Target) -> list[str]:
    """Those of one kernel."""
    return [loop for loop in multiplying_loops(kernel, target) if not _STORE.search(loop)]


def multiplying_loops(kernel: Kernel, target: Target, multiply: re.Pattern[str] = _MULTIPLY) -> list[str]:
    """The innermost loops of a kernel's assembly with many multiply-adds."""
    found: list[str] = []
    text = assembly(render_kernel(scheduled(kernel, target), target, threaded=False), target)
    blocks: dict[str, str] = {}
    label = ""
    for line in text.splitlines():
        start = re.match(r"(\.L\w+):", line)
        label = start.group(1) if start else label
        blocks[label] = blocks.get(label, "") + line + "\n"
        end = _BRANCH.search(line)
        if end and end.group(1) == label and len(multiply.findall(blocks[label])) >= 4:
            found.append(blocks[label])
    return found


def spills(loop: str) -> bool:
    """Whether a loop keeps vectors on the stack."""
    return _SPILL.search(loop) is not None
