"""Profiles: the walked program gives what the compiled one gives, and every call is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxc
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from onnxc.compiler.driver import compiled_model
from onnxc.compiler.options import Options
from onnxc.ir.program import Run, walk
from onnxc.ir.target import Target
from onnxc.passes.work import Load
from onnxc.tools.bench.limits import Limits, limits_of
from onnxc.tools.bench.profile import Walker, profile
from onnxc.tools.cli import cli

DIGITS = str(Path(__file__).parents[2] / "tools" / "digits.onnx")


def test_walked_as_compiled() -> None:
    x = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
    compiled = compiled_model(DIGITS, Options(Target.host(), threads=1))
    entries, outputs = profile(compiled, {"image": x}, 1, runs=2, least=0.0)
    np.testing.assert_array_equal(outputs[0], onnxc.compile(DIGITS, threads=1)(x))
    assert compiled.program is not None
    runs = [step for segment in compiled.program().segments for step in walk(segment) if isinstance(step, Run)]
    assert [entry.kernel for entry in entries] == [run.kernel for run in runs]
    assert all(entry.load.bytes > 0 and len(entry.seconds) == 2 for entry in entries)


def test_loops_branches_and_sizes_of_the_run() -> None:
    """x summed up `n` times while it is small, and the places of what is then above 1."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["v", "x"], ["w"]),
            helper.make_node("ReduceMax", ["w"], ["top"], keepdims=0),
            helper.make_node("Less", ["top", "limit"], ["go"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, ["k"]),
        ],
        [
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, ["k"]),
        ],
    )
    nodes = [
        helper.make_node("Loop", ["n", "", "x"], ["y"], body=body),
        helper.make_node("Greater", ["y", "one"], ["large"]),
        helper.make_node("NonZero", ["large"], ["places"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["k"]),
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["k"]),
            helper.make_tensor_value_info("places", TensorProto.INT64, [1, "found"]),
        ],
        [
            helper.make_tensor("limit", TensorProto.FLOAT, [], [3.0]),
            helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    walker = Walker(compiled_model(model, Options(Target.host())), 1)
    executable = onnxc.compile(model)
    for n in (0, 2, 50):
        fed = {"x": np.array([0.1, 0.3, 0.5], np.float32), "n": np.array(n)}
        for mine, expected in zip(walker.run(fed), executable.run(fed).values(), strict=True):
            np.testing.assert_array_equal(mine, expected)


def test_limits_keep_the_best(tmp_path: Path) -> None:
    file = tmp_path / "limits.json"
    first = limits_of(Target.host(), file)
    second = limits_of(Target.host(), file)
    assert second.flops >= first.flops > 0
    assert all(second.bandwidth[size] >= speed > 0 for size, speed in first.bandwidth.items())


def test_least_time() -> None:
    limits = Limits(1e9, {"dot4_u8_i8": 2e9}, {1 << 14: 4e9, 1 << 20: 1e9})
    assert limits.least_seconds(Load(1e9, 0, 10, {})) == 1
    assert limits.least_seconds(Load(1.0, 0, 1 << 24, {})) == pytest.approx((1 << 24) / 1e9)
    assert limits.least_seconds(Load(1e9, 0, 10, {}), threads=2) == 0.5
    assert limits.least_seconds(Load(1e9, 0, 10, {"dot4_u8_i8": 2e9, "dot2_i16_i16": 1e9})) == 3


def test_command() -> None:
    result = CliRunner().invoke(cli, ["bench", DIGITS, "--profile", "--top", "3"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "of limit" in result.output and "conv" in result.output.lower()
