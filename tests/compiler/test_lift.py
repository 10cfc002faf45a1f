"""Every lift, by numbers: ONNX Runtime on the old model against ONNX's reference on the lifted graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxc.compiler.importer import Importer
from onnxc.compiler.weights import load_model
from onnxc.ir.dtypes import of_numpy
from onnxc.ir.errors import ModelError, UnsupportedError
from onnxc.ir.export import to_onnx
from onnxc.ir.graph import Attribute, Graph, Node, TensorType, Type, Value
from onnxc.ir.verify import verify_graph

Arrays = Mapping[str, np.ndarray]
RANDOM = np.random.default_rng(7)
OPERATORS = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}


class TypesByExample:
    """Type rules that run each node by ONNX's reference: lifts are tested apart from the operators' declarations."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = dict(arrays)
        self.values: Mapping[str, Sequence[object]] = {}

    def define(self, value: Value, array: np.ndarray) -> None:
        self._arrays[value.name] = array

    def outputs(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attributes: Mapping[str, Attribute],
        regions: Mapping[str, Graph] | None = None,
        output_names: Sequence[str] = ("out",),
        origin: Sequence[str] = (),
    ) -> tuple[Type, ...]:
        names = [name or f"{output_names[0]}.{index}" for index, name in enumerate(output_names)]
        any_type = TensorType(of_numpy(np.dtype(np.float32)), ())
        node = Node(op, tuple(inputs), tuple(Value(name, any_type) for name in names), attributes, regions or {})
        given = {value.name: self._arrays.get(value.name, _ones(value.type)) for value in node.reads}
        results = run(to_onnx(Graph("node", node.reads, node.outputs, (node,))), given)
        self._arrays.update(zip(names, results, strict=True))
        return tuple(TensorType(of_numpy(result.dtype), result.shape) for result in results)


def run(model: onnx.ModelProto, arrays: Arrays) -> list[np.ndarray]:
    """The model's outputs by ONNX's reference, or by ONNX Runtime for the reversed Scan that the reference lacks."""
    try:
        return ReferenceEvaluator(model).run(None, dict(arrays))
    except RuntimeError:
        return onnxruntime.InferenceSession(model.SerializeToString()).run(None, dict(arrays))


def _ones(type: Type) -> np.ndarray:
    assert isinstance(type, TensorType)
    return np.ones([dim if isinstance(dim, int) else 2 for dim in type.shape], type.dtype.numpy)


def model_of(nodes: Sequence[onnx.NodeProto], opset: int, arrays: Arrays, constants: Arrays, outputs: Arrays) -> Any:
    def info(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    graph = helper.make_graph(
        nodes,
        "test",
        [info(name, array) for name, array in arrays.items()],
        [info(name, array) for name, array in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    # ONNX Runtime wants an output type even where it can tell it.
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


def imported(model: onnx.ModelProto, arrays: Arrays, operators: set[str] = OPERATORS) -> Graph:
    proto, weights = load_model(model.SerializeToString())
    graph = Importer(proto, weights, TypesByExample(arrays), operators).graph(None, None)
    verify_graph(graph)
    return graph


def check(
    op: str, opset: int, arrays: Arrays, constants: Arrays | None = None, outputs: Sequence[Any] = (np.float32,),
    inputs: Sequence[str] | None = None, expected: Sequence[np.ndarray] | None = None, tolerance: float = 1e-5,
    **attributes: Any,
) -> Graph:  # fmt: skip
    """Imports a model of one node; its results must be those of ONNX Runtime (or `expected`). Returns the graph."""
    constants = constants or {}
    names = [f"y{index}" for index in range(len(outputs))]
    node = helper.make_node(op, inputs or [*arrays, *constants], names, name="the node", **attributes)
    wanted = {name: np.empty(0, dtype) for name, dtype in zip(names, outputs, strict=True) if dtype is not None}
    model = model_of([node], opset, arrays, constants, wanted)
    if expected is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        expected = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, dict(arrays))
    graph = imported(model, arrays)
    assert all(new.origin == ("the node",) for new in graph.nodes if new.op != "Constant")
    found = run(to_onnx(graph), arrays)
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)
    return graph


def f32(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes if node.op != "Constant"]


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, None])
def test_softmax_over_all_axes_from_one_on(op: str, axis: int | None) -> None:
    attributes = {} if axis is None else {"axis": axis}
    graph = check(op, 11, {"x": f32(2, 3, 4)}, **attributes)
    assert ops(graph) == ([op] if axis in (2, -1) else ["Flatten", op, "Shape", "Reshape"])


def test_softmax_over_one_wide_axis_stays_one_node() -> None:
    graph = check("Softmax", 11, {"x": f32(2, 3, 1, 1)})
    assert ops(graph) == ["Softmax"]
    assert graph.nodes[0].attributes["axis"] == 1


def test_softmax_of_opset_13_keeps_its_axis() -> None:
    graph = check("Softmax", 13, {"x": f32(2, 3, 4)}, axis=1)
    assert ops(graph) == ["Softmax"]


@pytest.mark.parametrize("limits", [{"min": -0.5, "max": 0.25}, {"min": 0.0}, {"max": 0.0}, {}])
def test_clip_limits_become_operands(limits: dict[str, float]) -> None:
    check("Clip", 6, {"x": f32(3, 4)}, **limits)


def test_clip_keeps_absent_minimum() -> None:
    graph = check("Clip", 10, {"x": f32(3, 4)}, max=0.5)
    assert graph.nodes[-1].inputs[1] is None


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pad(mode: str) -> None:
    check("Pad", 10, {"x": f32(3, 4)}, pads=[1, 0, 2, 1], mode=mode, value=1.5)


def test_slice() -> None:
    check("Slice", 9, {"x": f32(4, 5, 6)}, starts=[1, -3], ends=[3, 1000], axes=[0, 2])
    check("Slice", 9, {"x": f32(4, 5)}, starts=[1, 0], ends=[3, 2])


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMin",
                                "ReduceProd", "ReduceLogSumExp", "ReduceSumSquare"])  # fmt: skip
@pytest.mark.parametrize("opset", [7, 11, 12, 17])
def test_reductions(op: str, opset: int) -> None:
    if op == "ReduceSum" and opset > 12:
        check(op, opset, {"x": f32(2, 3, 4)}, {"axes": np.array([1])})
        return
    check(op, opset, {"x": f32(2, 3, 4)}, axes=[0, 2], keepdims=0)
    check(op, opset, {"x": f32(2, 3, 4)})


def test_squeeze_and_unsqueeze() -> None:
    check("Squeeze", 12, {"x": f32(1, 3, 1)}, axes=[2])
    check("Squeeze", 12, {"x": f32(1, 3, 1)})
    check("Unsqueeze", 12, {"x": f32(3, 4)}, axes=[0, 3])


def test_split() -> None:
    check("Split", 12, {"x": f32(6, 4)}, outputs=[np.float32] * 2, split=[2, 4])
    check("Split", 12, {"x": f32(6, 4)}, outputs=[np.float32] * 3)
    check("Split", 13, {"x": f32(6, 4)}, outputs=[np.float32] * 2)


def test_split_of_which_not_all_parts_are_read() -> None:
    graph = check("Split", 12, {"x": f32(6, 4)}, outputs=[np.float32, np.float32, None])
    assert graph.nodes[-1].attributes["num_outputs"] == 3


def test_top_k() -> None:
    check("TopK", 9, {"x": f32(3, 8)}, outputs=[np.float32, np.int64], k=3)
    check("TopK", 10, {"x": f32(3, 8)}, {"k": np.array([2])}, outputs=[np.float32, np.int64], axis=0)


def test_dropout_is_the_identity_at_inference() -> None:
    x = {"x": f32(3, 4)}
    assert ops(check("Dropout", 7, x, ratio=0.5)) == ["Identity"]
    assert ops(check("Dropout", 12, x, {"ratio": np.float32(0.5)})) == ["Identity"]
    assert ops(check("Dropout", 13, x, {"ratio": np.float32(0.5), "training": np.array(False)})) == ["Identity"]


@pytest.mark.parametrize("opset", [10, 13])
def test_dropout_mask(opset: int) -> None:
    x = f32(3, 4)
    graph = check("Dropout", opset, {"x": x}, outputs=[np.float32, np.bool_], expected=[x, np.ones((3, 4), np.bool_)])
    assert ops(graph) == ["Shape", "ConstantOfShape", "Identity"]


def test_dropout_in_training_draws_numbers() -> None:
    x = f32(3, 4)
    constants = {"ratio": np.float32(0.0), "training": np.array(True)}
    assert "RandomUniform" in ops(check("Dropout", 13, {"x": x}, constants, expected=[x]))[0]


@pytest.mark.parametrize("opset", [7, 9, 14])
def test_batch_normalization(opset: int) -> None:
    statistics = {"scale": f32(3), "bias": f32(3), "mean": f32(3), "variance": f32(3) ** 2}
    check("BatchNormalization", opset, {"x": f32(2, 3, 4, 5)}, statistics, epsilon=1e-3)


def test_batch_normalization_whose_statistics_nobody_reads_is_inference() -> None:
    statistics = {"scale": f32(3), "bias": f32(3), "mean": f32(3), "variance": f32(3) ** 2}
    x, (scale, bias, mean, variance) = f32(2, 3, 4), (v[:, None] for v in statistics.values())
    expected = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias
    outputs = [np.float32, None, None, None, None]
    graph = check("BatchNormalization", 9, {"x": x}, statistics, outputs=outputs, expected=[expected])
    assert "training_mode" not in graph.nodes[-1].attributes


def test_batch_normalization_in_training() -> None:
    statistics = {"scale": f32(3), "bias": f32(3), "mean": f32(3), "variance": f32(3) ** 2}
    x = f32(2, 3, 4)
    mean, variance = x.mean((0, 2)), x.var((0, 2))
    y = (x - mean[:, None]) / np.sqrt(variance[:, None] + 1e-5)
    y = y * statistics["scale"][:, None] + statistics["bias"][:, None]
    running = [0.9 * statistics[name] + 0.1 * now for name, now in (("mean", mean), ("variance", variance))]
    outputs = [np.float32] * 3
    check("BatchNormalization", 9, {"x": x}, statistics, outputs=outputs, expected=[y, *running])
    with pytest.raises(UnsupportedError, match="saved statistics"):
        check("BatchNormalization", 9, {"x": x}, statistics, outputs=[np.float32] * 4, expected=[])


def test_batch_normalization_per_element() -> None:
    statistics = {"scale": f32(3, 4), "bias": f32(3, 4), "mean": f32(3, 4), "variance": f32(3, 4) ** 2}
    check("BatchNormalization", 7, {"x": f32(2, 3, 4)}, statistics, spatial=0)


def test_group_normalization_per_group() -> None:
    x, scale, bias = f32(2, 6, 5), f32(3), f32(3)
    groups = x.reshape(2, 3, 10)
    normal = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-5)
    expected = (normal * scale[:, None] + bias[:, None]).reshape(x.shape)
    check("GroupNormalization", 18, {"x": x}, {"s": scale, "b": bias}, expected=[expected], num_groups=3)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("opset", [7, 9])
def test_upsample(mode: str, opset: int) -> None:
    scales = [1.0, 1.0, 2.0, 1.5]
    if opset == 7:
        check("Upsample", opset, {"x": f32(1, 2, 3, 4)}, mode=mode, scales=scales)
    else:
        check("Upsample", opset, {"x": f32(1, 2, 3, 4)}, {"s": np.array(scales, np.float32)}, mode=mode)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [(2.0, 2.0), (0.6, 0.6), (0.6, 2.0), (1.0, 1.7)])
def test_resize_of_opset_10(mode: str, scales: tuple[float, float]) -> None:
    check("Resize", 10, {"x": f32(1, 1, 5, 7)}, {"s": np.array([1, 1, *scales], np.float32)}, mode=mode)


def test_resize_with_empty_operands() -> None:
    empty = np.empty(0, np.float32)
    graph = check("Resize", 11, {"x": f32(1, 1, 4, 4)}, {"r": empty, "s": empty, "n": np.array([1, 1, 6, 8])})
    assert graph.nodes[-1].inputs[1:3] == (None, None)


def test_resize_half_pixel_for_nearest() -> None:
    constants = {"r": np.empty(0, np.float32), "s": np.array([1, 1, 0.6, 2.4], np.float32)}
    modes = {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "mode": "nearest"}
    check("Resize", 11, {"x": f32(1, 1, 9, 7)}, constants, nearest_mode="floor", **modes)
    with pytest.raises(UnsupportedError, match="tf_half_pixel_for_nn"):
        check("Resize", 11, {"x": f32(1, 1, 9, 7)}, constants, expected=[], nearest_mode="ceil", **modes)


def test_roi_align_without_half_pixel() -> None:
    rois = {"rois": np.array([[0, 0, 3, 3], [1, 1, 4, 4]], np.float32), "batch": np.array([0, 0])}
    check("RoiAlign", 10, {"x": f32(1, 1, 6, 6)}, rois, output_height=2, output_width=2, sampling_ratio=2)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_grid_sample(mode: str) -> None:
    grid = RANDOM.uniform(-1, 1, (1, 3, 4, 2)).astype(np.float32)
    check("GridSample", 16, {"x": f32(1, 2, 5, 6), "grid": grid}, mode=mode, tolerance=1e-4)


def test_dft_axis() -> None:
    x = f32(2, 8, 1)
    expected = np.fft.fft(x[..., 0], axis=1)
    check("DFT", 17, {"x": x}, expected=[np.stack([expected.real, expected.imag], -1).astype(np.float32)])


def test_cast_like() -> None:
    x, like = f32(3), np.zeros(1, np.float16)
    graph = check("CastLike", 15, {"x": x, "like": like}, outputs=[np.float16])
    assert ops(graph) == ["Cast"]


def test_cast_to_a_type_spelt_as_text() -> None:
    x = f32(3)
    check("Cast", 5, {"x": x}, outputs=[np.int32], expected=[x.astype(np.int32)], to="INT32")


def test_scatter_is_renamed() -> None:
    arrays = {"x": f32(3, 3), "i": np.array([[1, 0, 2]]), "u": f32(1, 3)}
    assert ops(check("Scatter", 9, arrays)) == ["ScatterElements"]


@pytest.mark.parametrize(("shape", "axis"), [((3,), 1), ((3, 4), 1), ((), 0), ((2, 3), 0)])
def test_old_broadcasting(shape: tuple[int, ...], axis: int) -> None:
    x, y = f32(2, 3, 4), f32(*shape)
    expected = x + y.reshape(shape + (1,) * (3 - axis - len(shape)))
    check("Add", 6, {"x": x, "y": y}, expected=[expected], broadcast=1, axis=axis)


def test_old_slope_per_channel() -> None:
    x, slope = f32(2, 3, 4), f32(3)
    check("PRelu", 6, {"x": x, "slope": slope}, expected=[np.where(x < 0, x * slope[:, None], x)])


def test_old_attributes() -> None:
    x = f32(2, 3)
    check("Reshape", 1, {"x": x}, expected=[x.reshape(3, 2)], shape=[3, 2], consumed_inputs=[0])
    check("Concat", 1, {"x": x, "y": x}, expected=[np.concatenate([x, x], 1)])


def test_a_form_without_a_successor_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r'"the node" \(Pad\).*"paddings".*export'):
        check("Pad", 1, {"x": f32(2, 3)}, expected=[], paddings=[0, 0, 1, 1])


def scan_body(batched: bool) -> onnx.GraphProto:
    info = helper.make_tensor_value_info
    return helper.make_graph(
        [helper.make_node("Add", ["sum", "next"], ["total"]), helper.make_node("Identity", ["total"], ["each"])],
        "body",
        [info("sum", TensorProto.FLOAT, [2]), info("next", TensorProto.FLOAT, [2])],
        [info("total", TensorProto.FLOAT, [2]), info("each", TensorProto.FLOAT, [2])],
    )


@pytest.mark.parametrize("reverse", [0, 1])
def test_scan_over_a_batch(reverse: int) -> None:
    arrays = {"start": f32(3, 2), "x": f32(3, 5, 2)}
    sequence = arrays["x"][:, ::-1] if reverse else arrays["x"]
    each = arrays["start"][:, None] + np.cumsum(sequence, 1)
    graph = check(
        "Scan", 8, arrays, inputs=["", "start", "x"], outputs=[np.float32] * 2, expected=[each[:, -1], each],
        body=scan_body(True), num_scan_inputs=1, directions=[reverse],
    )  # fmt: skip
    assert ops(graph) == ["Scan"]
    assert ops(graph.nodes[0].regions["body"]) == ["Scan"]


def test_schema_functions_are_expanded() -> None:
    cases: list[tuple[str, int, Arrays, dict[str, Any]]] = [
        ("Gelu", 20, {"x": f32(3, 4)}, {"approximate": "tanh"}),
        ("Elu", 6, {"x": f32(3, 4)}, {}),
        ("Elu", 6, {"x": f32(3, 4)}, {"alpha": 0.5}),
        ("HardSwish", 14, {"x": f32(3, 4)}, {}),
        ("LayerNormalization", 17, {"x": f32(3, 4), "s": f32(4), "b": f32(4)}, {"axis": -1}),
        ("Softmax", 13, {"x": f32(3, 4)}, {"axis": 0}),
        ("MeanVarianceNormalization", 13, {"x": f32(2, 3, 4, 4)}, {}),
    ]
    for op, opset, arrays, attributes in cases:
        node = helper.make_node(op, list(arrays), ["y"], name="call", **attributes)
        model = model_of([node], opset, arrays, {}, {"y": np.empty(0, np.float32)})
        graph = imported(model, arrays, OPERATORS - {op})
        assert op not in ops(graph)
        assert all(new.origin in (("call",), ()) for new in graph.walk() if new.op != "Constant")
        assert graph.outputs[0].name == "y"
        (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, dict(arrays))
        (found,) = run(to_onnx(graph), arrays)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_neither_compiled_nor_a_function_is_refused() -> None:
    model = model_of([helper.make_node("Det", ["x"], ["y"], name="d")], 13, {"x": f32(2, 2)}, {}, {"y": np.empty(0)})
    with pytest.raises(UnsupportedError, match=r'node "d" \(Det\): .*onnxc ops'):
        imported(model, {"x": f32(2, 2)}, OPERATORS - {"Det"})


def test_every_attribute_of_old_forms_is_lifted_or_known() -> None:
    """No operator since opset 7 has an attribute that the newest form lacks and that no lift handles."""
    from onnxc.compiler.lift import DROPPED, OPERANDS

    newest = {(s.domain, s.name): set(s.attributes) for s in onnx.defs.get_all_schemas()}
    left = set()
    for schema in onnx.defs.get_all_schemas_with_history():
        alive = onnx.defs.has(schema.name, 7, schema.domain) and onnx.defs.get_schema(schema.name, 7, schema.domain)
        if schema.domain or (alive and schema.since_version < alive.since_version):
            continue
        handled = {o.attribute for o in OPERANDS.get(schema.name, ()) if schema.since_version < o.version}
        before, dropped = DROPPED.get(schema.name, (0, ()))
        handled |= set(dropped) if schema.since_version < before else set()
        left |= {(schema.name, name) for name in set(schema.attributes) - newest["", schema.name] - handled}
    by_function = {("BatchNormalization", "spatial"), ("Scan", "directions")}
    assert left == by_function


def test_types_that_contradict_the_schema() -> None:
    arrays = {"x": f32(3), "y": np.ones(3, np.int32)}
    model = model_of([helper.make_node("Add", ["x", "y"], ["z"])], 13, arrays, {}, {"z": np.empty(0, np.float32)})
    with pytest.raises(ModelError, match=r"Add_0.*tensor\(int32\).*tensor\(float\)"):
        imported(model, arrays)
