"""Regions made by hand, and their kernels run: as machine code, or by the interpreter with every access checked."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from kernel_interpreter import run_kernel
from onnxc.backends.cpu.build import scheduled
from onnxc.backends.cpu.jit import CodeImage
from onnxc.backends.cpu.llvm import render_kernel
from onnxc.backends.cpu.objects import assembly, compile_objects
from onnxc.ir.dims import evaluate, product
from onnxc.ir.dtypes import of_numpy
from onnxc.ir.graph import Node
from onnxc.ir.ops import REGISTRY
from onnxc.ir.scalars import Buffer
from onnxc.ir.target import Target
from onnxc.ir.tensors import Tensor, buffer_tensor
from onnxc.passes.regions import Call, Lowered, Region, anchor_tensor

Epilogue = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass
class Case:
    """A region with an anchor and an epilogue. Operands are arrays (constants) or (shape, dtype) pairs."""

    op: str
    operands: Sequence[Any]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    extras: Sequence[Any] = ()
    epilogue: Epilogue = lambda anchor, *extras: anchor
    define: Callable[..., Tensor] | None = None

    def region(self) -> Region:
        tensors, constants = [], {}
        for number, operand in enumerate([*self.operands, *self.extras]):
            name = f"x{number}"
            if isinstance(operand, np.ndarray):
                constants[name] = operand
                tensors.append(buffer_tensor(name, of_numpy(operand.dtype), operand.shape))
            else:
                shape, dtype = operand
                tensors.append(buffer_tensor(name, of_numpy(np.dtype(dtype)), shape))
        count = len(self.operands)
        if self.define is None:
            (definition,) = REGISTRY[self.op](tensors[:count], self.attributes)
        else:
            definition = self.define(*tensors[:count], **self.attributes)
        assert isinstance(definition, Tensor)
        found = self.epilogue(anchor_tensor(definition.shape, definition), *tensors[count:])
        inline = self.epilogue(definition, *tensors[count:])

        def outputs(results: Tensor | tuple[Tensor, ...]) -> list[tuple[Buffer, Tensor]]:
            results = results if isinstance(results, tuple) else (results,)
            return [(Buffer(f"y{i}", t.dtype, product(t.shape)), t) for i, t in enumerate(results)]

        node = Node(self.op, (), (), dict(self.attributes))
        return Region(
            self.op.lower(),
            tuple(tensors),
            tuple(outputs(found)),
            node,
            tuple(tensors[:count]),
            definition,
            constants,
            ("test",),
            lambda: outputs(inline),
        )


class Runner:
    """The kernels of a lowered region, compiled; or interpreted where `target` is None."""

    def __init__(self, region: Region, lowered: Lowered, target: Target | None, schedule_target: Target) -> None:
        self.region, self.lowered = region, lowered
        self.kernels = [scheduled(call.kernel, schedule_target) for call in lowered.calls if isinstance(call, Call)]
        self.functions: list[Any] = []
        self.packed = {name: make() for name, make in lowered.packed.items()}
        if target is None:
            return
        modules = []
        for number, kernel in enumerate(self.kernels):
            text = render_kernel(kernel, target, threaded=False)
            modules.append(
                (
                    f"k{number}",
                    text.replace(f"@{kernel.name}(", f"@k{number}(").replace(f"@{kernel.name}.", f"@k{number}."),
                )
            )
        names = [name for name, _ in modules]
        self.image = CodeImage(list(compile_objects(modules, target)), names, target)
        for number, kernel in enumerate(self.kernels):
            arguments = [ctypes.c_void_p] * len(kernel.parameters) + [ctypes.c_int64] * (len(kernel.sizes) + 1)
            self.functions.append(ctypes.CFUNCTYPE(None, *arguments)(self.image.address(f"k{number}")))

    def memory(self, inputs: Sequence[np.ndarray], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """All buffers by name."""
        found = {f"x{i}": np.ascontiguousarray(array) for i, array in enumerate(inputs)}
        for buffer, tensor in self.region.outputs:
            shape = [evaluate(d, sizes) for d in tensor.shape]
            found[buffer.name] = np.full(shape, 123, buffer.dtype.numpy)
        for buffer in self.lowered.workspaces:
            found[buffer.name] = np.full(evaluate(buffer.size, sizes), 77, buffer.dtype.numpy)
        return found | self.packed

    def calls(self, memory: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> list[Callable[[], None]]:
        """One function per kernel call."""
        found: list[Callable[[], None]] = []
        for number, call in enumerate(c for c in self.lowered.calls if isinstance(c, Call)):
            kernel = self.kernels[number]
            values = [evaluate(d, sizes) for d in call.sizes]
            if not self.functions:
                flat = {p.name: memory[n].reshape(-1) for p, n in zip(kernel.parameters, call.arguments, strict=True)}
                named = dict(zip(kernel.sizes, values, strict=True))
                found.append(lambda kernel=kernel, flat=flat, named=named: run_kernel(kernel, flat, named))
                continue
            pointers = [memory[name].ctypes.data for name in call.arguments]
            found.append(lambda f=self.functions[number], a=(*pointers, *values, 1): f(*a))
        return found

    def __call__(self, inputs: Sequence[np.ndarray], sizes: Mapping[str, int] | None = None) -> list[np.ndarray]:
        memory = self.memory(inputs, sizes or {})
        for call in self.calls(memory, sizes or {}):
            call()
        return [memory[buffer.name] for buffer, _ in self.region.outputs]


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
