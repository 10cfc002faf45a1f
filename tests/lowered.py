"""Lowered regions run: as machine code, or by the interpreter with every access checked; and their hot loops."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from kernel_interpreter import run_kernel
from onnxc.backends.cpu.build import scheduled
from onnxc.backends.cpu.llvm import render_kernel
from onnxc.backends.cpu.objects import assembly
from onnxc.ir.dims import evaluate
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


def hot_loops(lowered: Lowered, target: Target, instruction: str) -> list[str]:
    """The innermost loops in the kernels' assembly with at least four of an instruction (a regular expression)."""
    found = []
    for call in lowered.calls:
        if not isinstance(call, Call):
            continue
        text = assembly(render_kernel(scheduled(call.kernel, target), target, threaded=False), target)
        blocks: dict[str, str] = {}
        label = ""
        for line in text.splitlines():
            start = re.match(r"(\.L\w+):", line)
            label = start.group(1) if start else label
            blocks[label] = blocks.get(label, "") + line + "\n"
            if re.search(rf"\sj\w+\s+{re.escape(label)}$", line) and len(re.findall(instruction, blocks[label])) >= 4:
                found.append(blocks[label])
    return found
