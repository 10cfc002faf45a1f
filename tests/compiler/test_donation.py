"""Caches that a caller donates: a decoder's step appends to them in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from onnx import TensorProto, helper
from onnxc.ir.errors import ModelError, ShapeError, UnsupportedError
from onnxc.ir.text import print_graph
from onnxc.passes.append import donations, with_donations
from onnxc.passes.pipeline import parse_pipeline, run_pipeline
from pass_checks import filecheck, parsed

Array = np.ndarray[Any, Any]
HEADS, WIDTH = 2, 8


def step(mask: bool = False, past: str | int = "past") -> onnx.ModelProto:
    """One step of attention, whose query sees all keys, the new one too; a mask has the length of all of them."""
    f32 = TensorProto.FLOAT
    info = helper.make_tensor_value_info
    inputs = [info(name, f32, [1, HEADS, 1, WIDTH]) for name in ("q", "k", "v")]
    inputs += [info(name, f32, [1, HEADS, past, WIDTH]) for name in ("past_k", "past_v")]
    inputs += [info("mask", f32, [1, 1, 1, "past + 1"])] * mask
    nodes = [
        helper.make_node("Concat", ["past_k", "k"], ["all_k"], axis=2),
        helper.make_node("Concat", ["past_v", "v"], ["all_v"], axis=-2),
        helper.make_node("Transpose", ["all_k"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "turned"], ["products"]),
        helper.make_node("Add", ["products", "mask"], ["scores"]),
        helper.make_node("Softmax", ["scores" if mask else "products"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "all_v"], ["y"]),
    ]
    outputs = [info("y", f32, None)] + [info(name, f32, None) for name in ("all_k", "all_v")]
    nodes = [node for node in nodes if mask or node.op_type != "Add"]
    return helper.make_model(helper.make_graph(nodes, "step", inputs, outputs))


def expected(q: Array, keys: Array, values: Array, mask: Any = 0) -> Array:
    scores = np.einsum("bhqd,bhkd->bhqk", q, keys).astype(np.float64) + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), values)  # type: ignore[no-any-return]


def caches(room: int, filled: int, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    found = {name: np.full((1, HEADS, room, WIDTH), 99, np.float32) for name in ("past_k", "past_v")}
    for array in found.values():
        array[:, :, :filled] = random.normal(size=(1, HEADS, filled, WIDTH))
    return found


def new(seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=(1, HEADS, 1, WIDTH)).astype(np.float32) for name in ("q", "k", "v")}


@pytest.mark.parametrize("mask", [False, True])
def test_steps_append_to_the_arrays_of_the_caller(mask: bool) -> None:
    model = onnxc.compile(step(mask), donate=True)
    assert [port.name for port in model.inputs][5:] == (["mask"] if mask else ["past"])
    arrays = caches(room=6, filled=2)
    keys, values = (arrays[name][:, :, :2].copy() for name in ("past_k", "past_v"))
    for number in range(2, 6):
        given = new(number)
        keys, values = (np.concatenate(pair, axis=2) for pair in ((keys, given["k"]), (values, given["v"])))
        bias = np.random.default_rng(number).normal(size=(1, 1, 1, number + 1)).astype(np.float32)
        result = model.run({**given, **arrays, **({"mask": bias} if mask else {"past": number})})
        assert result["all_k"] is arrays["past_k"] and result["all_v"] is arrays["past_v"]
        np.testing.assert_array_equal(arrays["past_k"][:, :, : number + 1], keys)
        np.testing.assert_array_equal(arrays["past_v"][:, :, : number + 1], values)
        assert (arrays["past_k"][:, :, number + 1 :] == 99).all()
        np.testing.assert_allclose(result["y"], expected(given["q"], keys, values, bias if mask else 0), atol=2e-6)
    with pytest.raises(ShapeError, match="past_k"):
        model.run({**new(0), **arrays, **({"mask": np.zeros((1, 1, 1, 7), np.float32)} if mask else {"past": 6})})


def test_some_inputs_alone_and_a_known_length() -> None:
    model = onnxc.compile(step(past=3), donate=["past_v"])
    arrays, given = caches(room=5, filled=3), new(1)
    past_k = arrays["past_k"][:, :, :3].copy()
    result = model.run({**given, "past_k": past_k, "past_v": arrays["past_v"]})
    assert result["all_v"] is arrays["past_v"] and result["all_k"].shape == (1, HEADS, 4, WIDTH)
    keys, values = np.concatenate([past_k, given["k"]], axis=2), arrays["past_v"][:, :, :4]
    np.testing.assert_array_equal(values[:, :, 3:], given["v"])
    np.testing.assert_allclose(result["y"], expected(given["q"], keys, values), atol=2e-6)


def test_artifacts_keep_what_is_donated(tmp_path: Path) -> None:
    saved = onnxc.compile(step(), donate=True).save(tmp_path / "step.onnxc")  # type: ignore[union-attr]
    model, arrays, given = onnxc.load(saved), caches(room=4, filled=1), new(2)
    result = model.run({**given, **arrays, "past": 1})
    assert result["all_k"] is arrays["past_k"]
    np.testing.assert_array_equal(arrays["past_k"][:, :, 1:2], given["k"])


def test_what_is_donated_is_the_array_itself() -> None:
    model = onnxc.compile(step(), donate=True)
    arrays = caches(room=4, filled=1)
    for bad in (arrays["past_k"].astype(np.float32, order="F"), arrays["past_k"].tolist()):
        with pytest.raises(ShapeError, match="past_k' is donated"):
            model.run({**new(0), **arrays, "past_k": bad, "past": 1})
    arrays["past_v"].flags.writeable = False
    with pytest.raises(ShapeError, match=r"past_v' is donated.*writeable"):
        model.run({**new(0), **arrays, "past": 1})


def test_what_cannot_be_donated() -> None:
    with pytest.raises(ModelError, match=r"'q' cannot be donated.*past_k, past_v"):
        onnxc.compile(step(), donate=["q"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])
    relu = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [x]))
    relu.graph.output[0].name = "y"
    with pytest.raises(ModelError, match="no input can be donated"):
        onnxc.compile(relu, donate=True)
    with pytest.raises(UnsupportedError, match="CPUs only"):
        onnxc.compiler.driver.compiled_model(step(), onnxc.compiler.options.Options("cuda:sm_90", donate=("*",)))


def test_a_donated_input_has_room_and_its_readers_see_what_is_filled() -> None:
    text = """
    // CHECK: graph @g(%past: f32[2, n+spare+3, 4], %x: f32[2, 1, 4], %z: f32[2, 2, 4], %n: u8[n, 0])
    // CHECK: -> (%all: f32[2, n+spare+3, 4], %y: f32[2, n+3, 4])
    // CHECK: %[[NEW:.*]] = Concat(%x, %z) {axis = 1} : f32[2, 3, 4]
    // CHECK: %all = onnxc.Append(%past, %[[NEW]]) {axis = 1, start = [n]}
    // CHECK: %[[SEEN:.*]] = Slice(%all) {starts = [0], ends = [n+3], axes = [1], steps = [1]} : f32[2, n+3, 4]
    // CHECK: %y = Neg(%[[SEEN]])
    graph @g(%past: f32[2, n, 4], %x: f32[2, 1, 4], %z: f32[2, 2, 4]) -> (%all: f32[2, n+3, 4], %y: f32[2, n+3, 4]) {
      %all = Concat(%past, %x, %z) {axis = 1} : f32[2, n+3, 4]
      %y = Neg(%all) : f32[2, n+3, 4]
    }
    """
    graph = with_donations(parsed(text), ["past"])
    filecheck(text, print_graph(graph))
    assert donations(graph) == (("all", "past"),)
    run_pipeline(graph, parse_pipeline("canonicalize,fold,cleanup,fuse"))


def test_what_others_read_is_not_donated() -> None:
    graph = parsed(
        """
        graph @g(%past: f32[n, 4], %x: f32[1, 4]) -> (%all: f32[n+1, 4], %y: f32[n, 4]) {
          %all = Concat(%past, %x) {axis = 0} : f32[n+1, 4]
          %y = Neg(%past) : f32[n, 4]
        }
        """
    )
    with pytest.raises(ModelError, match="here none"):
        with_donations(graph, ["past"])
