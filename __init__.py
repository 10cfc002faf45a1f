"""onnxc: a compiler for neural networks. ONNX in, machine code out.

    model = onnxc.compile("model.onnx")     # a path, bytes or a ModelProto
    y = model(x)                            # numpy (or DLPack) in, numpy out
    model.save("model.onnxc"); model = onnxc.load("model.onnxc")

Importing it does no work and imports nothing but the errors: the compiler comes with the first use of a name.
"""

from typing import TYPE_CHECKING, Any

from .ir.errors import (
    DeviceError,
    IndexRangeError,
    LimitError,
    ModelError,
    OnnxcError,
    ShapeError,
    TargetError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from .backends.cuda.runtime.arrays import GpuArray
    from .compiler.api import Executable, compile, load
    from .compiler.cuda_executable import CudaExecutable
    from .ir.target import Target
    from .tools.quantize.driver import quantize

__version__ = "0.1.0"
__all__ = [
    "CudaExecutable",
    "DeviceError",
    "Executable",
    "GpuArray",
    "IndexRangeError",
    "LimitError",
    "ModelError",
    "OnnxcError",
    "ShapeError",
    "Target",
    "TargetError",
    "UnsupportedError",
    "__version__",
    "compile",
    "load",
    "quantize",
]
_HOMES = {
    "CudaExecutable": ".compiler.cuda_executable",
    "GpuArray": ".backends.cuda.runtime.arrays",
    "Target": ".ir.target",
    "quantize": ".tools.quantize.driver",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, ".compiler.api"), __package__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
