"""onnxc as an ONNX backend: `onnx.backend.base.Backend`, for ONNX's own test suite and tools that speak it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend, BackendRep

from ..ir.errors import UnsupportedError
from .api import compile
from .deferred import Deferred
from .interface import Interface

TARGETS = {"CPU": "host", "CUDA": "cuda"}
"""ONNX's names of devices, and what is compiled for each."""


class CompiledModel(BackendRep):
    """A compiled model behind ONNX's interface."""

    def __init__(self, executable: Interface | Deferred) -> None:
        self.executable = executable

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs, in order, for inputs in order."""
        named = dict(zip([port.name for port in self.executable.inputs], inputs, strict=True))
        return tuple(self.executable.run(named).values())


class OnnxcBackend(Backend):
    """Compiles for this machine's CPU, or for its GPU as the device "CUDA"; nothing is interpreted."""

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device.split(":")[0] in TARGETS

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        try:
            cls.prepare(model, device)
        except UnsupportedError:
            return False
        return True

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> CompiledModel:
        # ONNX's tests compare with the definitions, some where rounding alone decides.
        options = {"winograd": "off", "strassen": "off", **kwargs}
        return CompiledModel(compile(model, target=TARGETS[device.split(":")[0]], **options))

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Sequence[np.ndarray], device: str = "CPU", **kwargs: Any) -> Any:
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> Any:
        """One node as a model of its own; its output types are inferred."""
        values = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for name, a in zip(node.input, inputs, strict=True)
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
        graph = onnx.helper.make_graph([node], "node", values, outputs)
        return cls.run_model(onnx.helper.make_model(graph), inputs, device, **kwargs)


prepare = OnnxcBackend.prepare
run_model = OnnxcBackend.run_model
run_node = OnnxcBackend.run_node
supports_device = OnnxcBackend.supports_device
is_compatible = OnnxcBackend.is_compatible
