"""onnxc: a compiler for neural networks. ONNX in, machine code out.

    model = onnxc.compile("model.onnx")     # a path, bytes or a ModelProto
    y = model(x)                            # numpy (or DLPack) in, numpy out
    model.save("model.onnxc"); model = onnxc.load("model.onnxc")

Importing it does no work and imports nothing but the errors: the compiler comes with the first use of a name.
"""

from typing import TYPE_CHECKING, Any

from .ir.errors import ModelError, OnnxcError, ShapeError, TargetError, UnsupportedError

if TYPE_CHECKING:
    from .compiler.api import Executable, compile, load
    from .ir.target import Target

__version__ = "0.1.0"
__all__ = [
    "Executable",
    "ModelError",
    "OnnxcError",
    "ShapeError",
    "Target",
    "TargetError",
    "UnsupportedError",
    "__version__",
    "compile",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "Target":
        from .ir.target import Target

        return Target
    from .compiler import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
