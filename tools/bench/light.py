"""The nine `light` topologies of ONNX's backend tests, as they are and with random weights.

Their weights are ConstantOfShape nodes: every weight of a tensor is the same number, so every class gets the same
probability, and a compiler that mixes up channels would go unnoticed. `random_light` gives each tensor values
spread as in a trained network, which keeps activations in range and makes each output depend on all of them.
"""

import zlib
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
from numpy.typing import NDArray
from onnx import numpy_helper

NAMES = (
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "shufflenet",
    "squeezenet",
    "vgg19",
    "zfnet512",
)
LOGIT_SPREAD = 2.0  # standard deviation aimed at before the softmax


def light_path(name: str) -> Path:
    """Where the onnx package keeps the model."""
    return Path(onnx.backend.test.__file__).parent / "data" / "light" / f"light_{name}.onnx"


def image_input(name: str) -> str:
    """Name of the one graph input that is not a weight."""
    graph = onnx.load(light_path(name)).graph
    weights = {tensor.name for tensor in graph.initializer}
    (image,) = (str(value.name) for value in graph.input if value.name not in weights)
    return image


def random_light(name: str) -> onnx.ModelProto:
    """The topology with each weight drawn anew, by its role in the node that reads it; seeded by the weight's name."""
    model = onnx.load(light_path(name))
    graph = model.graph
    old = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {name: list(tensor.dims) for name, tensor in old.items() if tensor.data_type == onnx.TensorProto.FLOAT}
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in old:
            shapes[node.output[0]] = numpy_helper.to_array(old[node.input[0]]).tolist()
    roles = _roles(graph)
    drawn = shapes.keys() & roles.keys()
    nodes = [node for node in graph.node if node.output[0] not in drawn]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for name, tensor in old.items() if name not in drawn and name in read]
    image = [value for value in graph.input if value.name not in old]
    for field, values in ((graph.node, nodes), (graph.initializer, kept), (graph.input, image)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
    for weight in sorted(drawn):
        content = _draw(weight, shapes[weight], *roles[weight]).tobytes()
        graph.initializer.add(name=weight, dims=shapes[weight], data_type=onnx.TensorProto.FLOAT, raw_data=content)
    model.ir_version = 8  # from 4 on an initializer need not be an input
    return model


def _roles(graph: onnx.GraphProto) -> dict[str, tuple[str, bool]]:
    """Weight name -> its role, and whether its reader is the last layer with weights."""
    position = {
        "Conv": ("kernel", "shift"),
        "Gemm": ("matrix", "shift"),
        "BatchNormalization": ("scale", "shift", "shift", "variance"),
        "Mul": ("scale",),
        "Add": ("shift",),
    }
    behind = {node.output[0]: node.input[0] for node in graph.node if node.op_type in ("Unsqueeze", "Reshape")}
    last = [node for node in graph.node if node.op_type in ("Conv", "Gemm")][-1]
    return {
        behind.get(name, name): (role, node is last)
        for node in graph.node
        if node.op_type in position
        for name, role in zip(node.input[1:], position[node.op_type], strict=False)
    }


def _draw(name: str, shape: list[int], role: str, is_last: bool) -> NDArray[np.float32]:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if role == "variance":
        return random.uniform(1.5, 2.5, shape).astype(np.float32)
    if role == "scale":
        return random.uniform(0.6, 1.2, shape).astype(np.float32)
    values = random.standard_normal(shape, np.float32)
    if role == "shift":
        return 0.1 * values
    fan_in = np.prod(shape[1:])  # [out, in, ...], also Gemm's: all of these models have transB = 1
    spread = LOGIT_SPREAD if is_last else np.sqrt(2)  # He et al. 2015: keeps the second moment through a ReLU
    values *= np.float32(spread / np.sqrt(fan_in))
    return values
