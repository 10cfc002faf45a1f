"""onnxc: a compiler for neural networks. ONNX in, machine code out.

    model = onnxc.compile("model.onnx")     # a path, bytes or a ModelProto
    y = model(x)                            # numpy (or DLPack) in, numpy out
"""

from .compiler.api import Executable, compile
from .ir.errors import ModelError, OnnxcError, ShapeError, TargetError, UnsupportedError
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
]
