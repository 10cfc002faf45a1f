"""What can run a model in these tests: an engine turns a model file, or its bytes, into a callable on named arrays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxc
import onnxruntime
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Model = Callable[[Arrays], Arrays]
Engine = Callable[[Path | bytes], Model]


def _session(source: Path | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # its warnings about these models' unused initializers are not our subject
    model = source if isinstance(source, bytes) else str(source)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx_runtime(source: Path | bytes) -> Model:
    """The model in ONNX Runtime, one thread."""
    session = _session(source)
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))


def compiled(source: Path | bytes) -> Model:
    """The model compiled by onnxc."""
    return onnxc.compile(source).run


ENGINES: dict[str, Engine] = {"onnxruntime": onnx_runtime, "onnxc": compiled}
