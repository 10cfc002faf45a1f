"""PyTorch beside the compiled code, where it is installed and has the GPU: operators, and whole networks."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .architectures import Architecture, halved
from .clock import Clock, Function, interleaved

Array = np.ndarray[Any, Any]


def torch_on_gpu() -> Any:
    """PyTorch; None where it is not installed or does not see the GPU."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    return torch if torch.cuda.is_available() else None


def why_not() -> str:
    """Why there is no PyTorch to compare with; nothing where there is."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    return "" if torch_on_gpu() is not None else "PyTorch does not see the GPU"


def tensor_of(torch: Any, array: Array) -> Any:
    """An array as a tensor on the GPU."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(array).cuda()


def _convolution(torch: Any, x: Any, w: Any, padding: int, stride: int, groups: int) -> Function:
    # The image comes as [N, H, W, C] in memory, which PyTorch calls channels_last.
    image, filters = x.permute(0, 3, 1, 2), w.contiguous(memory_format=torch.channels_last)
    convolve = torch.nn.functional.conv2d
    return lambda: convolve(image, filters, None, stride, padding, 1, groups).permute(0, 2, 3, 1)


def _attention(torch: Any, q: Any, k: Any, v: Any, causal: bool) -> Function:
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _layer_norm(torch: Any, x: Any, scale: Any, bias: Any) -> Function:
    return lambda: torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias)


OPERATORS: Mapping[str, Callable[..., Function]] = {
    "sigmoid": lambda torch, x: lambda: torch.sigmoid(x),
    "add": lambda torch, a, b: lambda: a + b,
    "gelu": lambda torch, x: lambda: torch.nn.functional.gelu(x),
    "softmax": lambda torch, x: lambda: torch.softmax(x, -1),
    "layer_norm": _layer_norm,
    "rms_norm": lambda torch, x, scale: lambda: torch.nn.functional.rms_norm(x, x.shape[-1:], scale, 1e-5),
    "permute": lambda torch, x, order: lambda: x.permute(order).contiguous(),
    "sum": lambda torch, x, axis: lambda: x.sum(axis),
    "matmul": lambda torch, a, b: lambda: torch.matmul(a, b),
    "convolution": _convolution,
    "attention": _attention,
}
"""By name: from PyTorch and tensors to a function that gives the result."""


def set_precision(torch: Any, precision: str) -> None:
    """Whether PyTorch may compute products of f32 in tf32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True


def captured(torch: Any, function: Callable[[], Any], repeats: int = 1) -> tuple[Function, Any]:
    """A function as a CUDA graph that runs it so often; its result, written anew by each replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for _ in range(repeats):
            result = function()
    return graph.replay, result


def product_rates(size: int, clock: Clock, rounds: int, seconds: float) -> dict[str, float]:
    """Operations a second of PyTorch's (cuBLAS's) product of square matrices, by precision."""
    torch = torch_on_gpu()
    if torch is None:
        return {}
    found = {}
    for precision in ("f16", "bf16", "tf32", "f32"):
        set_precision(torch, precision)
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        product = partial(torch.matmul, a, b, out=torch.empty_like(a))
        times = interleaved(clock, {"product": (product, None)}, rounds, seconds)
        found[precision] = 2.0 * size**3 / times["product"].median
    return found


# Networks


class Network:
    """A network of PyTorch on the GPU, in f16."""

    def __init__(self, torch: Any, architecture: Architecture, batch: int) -> None:
        self.torch = torch
        module, inputs = architecture.build(batch)
        with torch.no_grad():
            set_precision(torch, "f32")
            exact = module.cuda()(*(halved(torch, inputs)[name].to(x.dtype).cuda() for name, x in inputs.items()))
            self.reference: Array = exact.float().cpu().numpy()
        self.inputs = {name: x.cuda() for name, x in halved(torch, inputs).items()}
        pictures = [x.dim() == 4 and x.shape[1] == 3 for x in self.inputs.values()]
        self.module = module.half()
        self._arguments = list(self.inputs.values())
        if all(pictures):
            self.module = self.module.to(memory_format=torch.channels_last)
            self._arguments = [x.contiguous(memory_format=torch.channels_last) for x in self._arguments]

    def eager(self) -> tuple[Function, Callable[[], Any]]:
        """A function that runs it, and one that gives its last result."""
        return self._function(self.module)

    def compiled(self) -> tuple[Function, Callable[[], Any]]:
        """By torch.compile, tuned to the most."""
        return self._function(self.torch.compile(self.module, mode="max-autotune"))

    def graph(self) -> tuple[Function, Callable[[], Any]]:
        """As a CUDA graph of what runs eagerly."""
        replay, result = captured(self.torch, lambda: self.module(*self._arguments))
        return replay, lambda: result

    def _function(self, module: Callable[..., Any]) -> tuple[Function, Callable[[], Any]]:
        results: list[Any] = [None]

        def run() -> None:
            with self.torch.no_grad():
                results[0] = module(*self._arguments)

        for _ in range(3):
            run()
        return run, lambda: results[0]


def warmed(architecture: Architecture, batch: int) -> dict[str, float]:
    """Has torch.compile tune a network, whose results other processes find in its cache: the seconds that took, and
    those that compiling takes from then on."""
    torch = torch_on_gpu()
    network = Network(torch, architecture, batch)
    found = {}
    for name in ("cold_s", "warm_s"):
        torch._dynamo.reset()
        start = time.perf_counter()
        network.compiled()
        found[name] = round(time.perf_counter() - start, 1)
    return found


def on_host(result: Any) -> Array:
    """A result of any peer as an array of f32."""
    array: Sequence[Any] | Array = result.float().cpu().numpy() if hasattr(result, "cpu") else np.asarray(result)
    return np.asarray(array, np.float32)
