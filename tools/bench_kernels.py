"""Times single heavy kernels beside ONNX Runtime's, one thread, and as a share of the core's multiply-add peak.

    python -m onnxc.tools.bench_kernels resnet50 bert mobilenet

The images are channels-last for the kernels here and channels-first for ONNX Runtime, as each wants them.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends.cpu.build import scheduled
from ..backends.cpu.dot_products import Dot
from ..backends.cpu.jit import CodeImage
from ..backends.cpu.llvm import render_kernel
from ..backends.cpu.objects import compile_objects
from ..backends.cpu.schedules import schedule
from ..ir import loops as k
from ..ir import scalars as s
from ..ir.dims import evaluate, product
from ..ir.dtypes import F32, U32, of_numpy
from ..ir.graph import Node
from ..ir.ops import REGISTRY
from ..ir.scalars import Buffer, Scalar
from ..ir.target import Target
from ..ir.tensors import Tensor, buffer_tensor
from ..passes.regions import Call, Lowered, Region, anchor_tensor

Epilogue = Callable[..., Tensor | tuple[Tensor, ...]]
Array = np.ndarray[Any, Any]


def make_region(
    op: str,
    operands: Sequence[Any],
    attributes: Mapping[str, Any] | None = None,
    extras: Sequence[Any] = (),
    epilogue: Epilogue = lambda anchor, *extras: anchor,
    define: Callable[..., Tensor] | None = None,
) -> Region:
    """A region of one operator and an epilogue of its result and of `extras`.

    Operands are arrays, which are constants, or (shape, dtype) pairs. `define` takes the place of the operator's
    definition.
    """
    tensors, constants = [], {}
    for number, operand in enumerate([*operands, *extras]):
        name = f"x{number}"
        if isinstance(operand, np.ndarray):
            constants[name] = operand
            tensors.append(buffer_tensor(name, of_numpy(operand.dtype), operand.shape))
        else:
            shape, dtype = operand
            tensors.append(buffer_tensor(name, of_numpy(np.dtype(dtype)), shape))
    own, others = tensors[: len(operands)], tensors[len(operands) :]
    definition = define(*own) if define is not None else REGISTRY[op](own, attributes or {})[0]
    assert isinstance(definition, Tensor)

    def outputs(anchor: Tensor) -> list[tuple[Buffer, Tensor]]:
        results = epilogue(anchor, *others)
        results = results if isinstance(results, tuple) else (results,)
        return [(Buffer(f"y{i}", t.dtype, product(t.shape)), t) for i, t in enumerate(results)]

    return Region(
        op.lower(),
        tuple(tensors),
        tuple(outputs(anchor_tensor(definition.shape, definition))),
        Node(op, (), (), dict(attributes or {})),
        tuple(own),
        definition,
        constants,
        (op,),
        lambda: outputs(definition),
    )


class CompiledRegion:
    """The kernels of a lowered region as functions of this process."""

    def __init__(self, region: Region, lowered: Lowered, target: Target) -> None:
        self.region, self.lowered = region, lowered
        self.steps = [call for call in lowered.calls if isinstance(call, Call)]
        self.packed = {name: make() for name, make in lowered.packed.items()}
        self.kernels = [scheduled(call.kernel, target) for call in self.steps]
        named = [k.Kernel(f"kernel{i}", *_rest(kernel)) for i, kernel in enumerate(self.kernels)]
        modules = [(kernel.name, render_kernel(kernel, target, threaded=False)) for kernel in named]
        self._image = CodeImage(list(compile_objects(modules, target)), [name for name, _ in modules], target)
        self._functions = []
        for kernel in named:
            arguments = [ctypes.c_void_p] * len(kernel.parameters) + [ctypes.c_int64] * (len(kernel.sizes) + 1)
            self._functions.append(ctypes.CFUNCTYPE(None, *arguments)(self._image.address(kernel.name)))

    def memory(self, inputs: Sequence[Array], sizes: Mapping[str, int]) -> dict[str, Array]:
        """All buffers by name: the inputs, outputs and workspaces of some content, packed constants."""
        found: dict[str, Array] = {f"x{i}": np.ascontiguousarray(array) for i, array in enumerate(inputs)}
        for buffer, tensor in self.region.outputs:
            found[buffer.name] = np.full([evaluate(d, sizes) for d in tensor.shape], 123, buffer.dtype.numpy)
        for buffer in self.lowered.workspaces:
            found[buffer.name] = np.full(evaluate(buffer.size, sizes), 77, buffer.dtype.numpy)
        return found | self.packed

    def bound(self, memory: Mapping[str, Array], sizes: Mapping[str, int]) -> Callable[[], None]:
        """All kernels, one after the other, on the given memory (which must outlive it)."""
        calls: list[tuple[Any, tuple[int, ...]]] = []
        for call, function in zip(self.steps, self._functions, strict=True):
            pointers = [memory[name].ctypes.data for name in call.arguments]
            calls.append((function, (*pointers, *(evaluate(d, sizes) for d in call.sizes), 1)))

        def run() -> None:
            for function, arguments in calls:
                function(*arguments)

        return run


def _rest(kernel: k.Kernel) -> tuple[Any, ...]:
    return kernel.parameters, kernel.outputs, kernel.sizes, kernel.body, kernel.origin, kernel.aliases


def interleaved(functions: Sequence[Callable[[], None]], rounds: int = 9, seconds: float = 0.02) -> list[float]:
    """The least time of each function, in seconds; rounds of all of them alternate, so that all see the same load."""
    repeats = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        repeats.append(max(1, int(seconds / max(time.perf_counter() - start, 1e-7))))
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            for _ in range(repeats[i]):
                function()
            best[i] = min(best[i], (time.perf_counter() - start) / repeats[i])
    return best


def multiply_adds(target: Target, dot: Dot | None = None) -> tuple[Callable[[], None], float]:
    """What the core does at best: independent sums in registers, of products in f32 or by a dot product. Returns it
    and how many operations it does."""
    dtype = F32 if dot is None else dot.sums
    lanes, groups, chains, steps = target.lanes(dtype.bits), target.lanes(32), 12, 20_000
    sums = Buffer("sum", dtype, chains, "register", lanes)
    y = Buffer("y0", dtype, chains * lanes)
    factor = s.const(0.999, F32, lanes)
    body: list[k.Statement] = [k.Alloc(sums)]
    body += [k.Store(sums, i, s.const(i, dtype, lanes)) for i in range(chains)]
    changing = s.widen(s.cast(s.index(k.index_symbol("i", steps)), U32), groups)  # or products would be known before

    def added(total: Scalar, chain: int) -> Scalar:
        if dot is None:
            return s.fma(total, factor, factor)
        return dot(total, changing, s.const(0x3F003F00 + chain, U32, groups))

    step = [k.Store(sums, i, added(s.load(sums, i, lanes), i)) for i in range(chains)]
    body.append(k.For("i", steps, tuple(step)))
    body += [k.Store(y, i * lanes, s.load(sums, i, lanes)) for i in range(chains)]
    kernel = k.Kernel("peak", (y,), ("y0",), (), tuple(body))
    region = Region("peak", (), ((y, buffer_tensor("y0", dtype, (chains * lanes,))),))
    compiled = CompiledRegion(region, Lowered((Call(kernel, ("y0",), ()),)), target)
    memory = compiled.memory([], {})
    bound = compiled.bound(memory, {})

    def run(keep: object = (compiled, memory)) -> None:
        bound()

    return run, 2.0 * (1 if dot is None else dot.group) * chains * lanes * steps


@dataclass(frozen=True)
class Layer:
    """One operator on an image [1, size, size, channels] (or a matrix [size, channels], where `kernel` is 0)."""

    size: int
    channels: int
    filters: int
    kernel: int = 0
    stride: int = 1
    group: int = 1

    def __str__(self) -> str:
        if not self.kernel:
            return f"matmul {self.size}x{self.channels}x{self.filters}"
        name = "depthwise" if self.group > 1 else "conv"
        return f"{name}{self.kernel}x{self.kernel}s{self.stride} {self.channels}->{self.filters} @{self.size}"


RESNET50 = [
    Layer(*row)
    for row in [
        (224, 3, 64, 7, 2), (56, 64, 64, 1), (56, 64, 64, 3), (56, 64, 256, 1), (56, 256, 64, 1), (56, 256, 128, 1),
        (56, 128, 128, 3, 2), (28, 128, 512, 1), (56, 256, 512, 1, 2), (28, 512, 128, 1), (28, 128, 128, 3),
        (28, 512, 256, 1), (28, 256, 256, 3, 2), (14, 256, 1024, 1), (14, 1024, 256, 1), (14, 256, 256, 3),
        (14, 512, 512, 3, 2), (7, 512, 2048, 1), (7, 2048, 512, 1), (7, 512, 512, 3), (1, 2048, 1000),
    ]
]  # fmt: skip
BERT = [Layer(128, 768, 768), Layer(128, 768, 3072), Layer(128, 3072, 768), Layer(1, 768, 768), Layer(1, 768, 3072)]
MOBILENET = [
    Layer(112, 32, 32, 3, 1, 32), Layer(112, 96, 96, 3, 2, 96), Layer(56, 144, 144, 3, 1, 144),
    Layer(28, 192, 192, 3, 1, 192), Layer(14, 384, 384, 3, 1, 384), Layer(7, 960, 960, 3, 1, 960),
    Layer(28, 240, 240, 5, 1, 240), Layer(14, 576, 96, 1), Layer(7, 320, 1280, 1),
]  # fmt: skip
NETWORKS = {"resnet50": RESNET50, "bert": BERT, "mobilenet": MOBILENET}


def measure(layer: Layer, target: Target) -> str:
    """A line of the table."""
    random = np.random.default_rng(0)
    if not layer.kernel:
        x: Array = random.standard_normal((layer.size, layer.channels), np.float32)
        w: Array = random.standard_normal((layer.channels, layer.filters), np.float32)
        attributes: dict[str, Any] = {}
        node, operands = "MatMul", [(x.shape, "f4"), w]
        flops, peer = 2.0 * x.size * layer.filters, _runtime("MatMul", x, w, attributes)
    else:
        x = random.standard_normal((1, layer.size, layer.size, layer.channels), np.float32)
        w = random.standard_normal(
            (layer.filters, layer.channels // layer.group, layer.kernel, layer.kernel), np.float32
        )
        pads, strides = [layer.kernel // 2] * 4, [layer.stride] * 2
        plain: dict[str, Any] = {"pads": pads, "strides": strides, "group": layer.group}
        node, attributes, operands = "Conv", plain | {"layout": "channels_last"}, [(x.shape, "f4"), w]
        side = -(-layer.size // layer.stride)
        flops = 2.0 * side * side * w.size
        peer = _runtime("Conv", np.ascontiguousarray(np.moveaxis(x, -1, 1)), w, plain)
    region = make_region(node, operands, attributes)
    lowered = schedule(region, target)
    assert lowered is not None
    compiled = CompiledRegion(region, lowered, target)
    memory = compiled.memory([x, w], {})
    best, operations = multiply_adds(target)
    own, theirs, least = interleaved([compiled.bound(memory, {}), peer, best])
    speed = flops / own
    name = compiled.kernels[-1].name
    share = speed / (operations / least)
    return f"{layer!s:32} {name:32} {own * 1e6:9.1f} {speed / 1e9:8.1f} {share:8.2f} {own / theirs:9.2f}"


def _runtime(op: str, x: Array, w: Array, attributes: Mapping[str, Any]) -> Callable[[], None]:
    """The operator in ONNX Runtime; an image is reordered to its own layout and back as part of it."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", x.shape), ("y", None))
    ]
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x})[0]
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)

    def run(keep: object = (x, y)) -> None:
        session.run_with_iobinding(binding)

    return run


def main(names: Sequence[str]) -> None:
    target = Target.host()
    print(f"{'layer':32} {'kernel':32} {'us':>9} {'GFLOP/s':>8} {'of peak':>8} {'of ORT':>9}")
    for name in names or NETWORKS:
        for layer in NETWORKS[name]:
            print(measure(layer, target), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
