"""`onnxc check` on whole models: inputs that are made up, who says what is right, rounding, and the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnxc.backends.cuda import schedules as gpu_schedules
from onnxc.compiler.importer import import_model
from onnxc.compiler.options import Options
from onnxc.ir.errors import ShapeError
from onnxc.passes.algebra import Rules
from onnxc.tools import cli
from onnxc.tools.check.bisect import find_fault, subject_of_graph
from onnxc.tools.check.engine import Build, Case, Checker
from onnxc.tools.check.evaluate import Evaluator, by_onnxc, by_reference, by_runtime
from onnxc.tools.check.inputs import made_inputs, ports_of, shapes_for
from onnxc.tools.check.subject import subject_of
from onnxc.tools.check.uses import Uses
from planted_faults import after_pass, change_nodes, hundred_nodes, spoil_kernel, swap_operands
from small_models import model_of_text, small_cnn


def case_of(model: onnx.ModelProto, oracle: str = "auto", seed: int = 0, **arrays: Any) -> Case:
    return Checker(model, Options(), oracle).case(seed, arrays)


def made(model: onnx.ModelProto, seed: int = 0) -> dict[str, Any]:
    """The inputs that are made up for a model."""
    shapes = shapes_for(ports_of(model.graph, subject_of(model).constants), {}, {})
    return made_inputs(import_model(model, shapes=shapes), {}, {}, np.random.default_rng(seed))


# Inputs.


def test_indices_are_in_range_whatever_lies_between() -> None:
    model = model_of_text(
        """g (int32[4, 7] ids, int64[3] rows, float[5, 2] x, int64[2, 6] pairs) => (z, y, w) {
            shifted = Add (ids, three)
            wide = Cast <to = 7> (shifted)
            column = Unsqueeze (wide, axis)
            z = Gather (table, column)
            y = GatherElements <axis = 0> (x, pair)
            pair = Reshape (rows, shape)
            turned = Transpose <perm = [1, 0]> (pairs)
            w = GatherND (grid, turned)
        }""",
        three=np.int32(3),
        axis=np.int64([0]),
        shape=np.int64([3, 1]),
        table=np.zeros((11, 2), np.float32),
        grid=np.zeros((50, 2), np.float32),
    )
    seen = [made(model, seed) for seed in range(20)]
    ids = np.concatenate([arrays["ids"].reshape(-1) for arrays in seen])
    assert (ids.min(), ids.max()) == (-3, 7), "the table has 11 rows, and 3 is added"
    rows = np.concatenate([arrays["rows"] for arrays in seen])
    assert (rows.min(), rows.max()) == (0, 4)


def test_masks_lengths_sizes_and_what_is_compared() -> None:
    model = model_of_text(
        """g (int64[2, 8] mask, float[2, 8] scores, int32[2] lengths, int64 rate, float[6, 2, 3] x, float[2] positive)
            => (masked, states, yes, root) {
            floats = Cast <to = 1> (mask)
            blocked = Sub (one, floats)
            large = Mul (blocked, low)
            masked = Add (scores, large)
            states = RNN <hidden_size = 4> (x, w, r, "", lengths)
            yes = Equal (rate, sixteen)
            root = Log (positive)
        }""",
        one=np.float32(1),
        low=np.float32(-10000),
        sixteen=np.int64(16000),
        w=np.zeros((1, 4, 3), np.float32),
        r=np.zeros((1, 4, 4), np.float32),
    )
    for seed in range(5):
        arrays = made(model, seed)
        assert set(np.unique(arrays["mask"])) <= {0, 1} and arrays["mask"][:, 0].all()
        assert arrays["lengths"].min() >= 1 and arrays["lengths"].max() <= 6
        assert arrays["rate"] == 16000
        assert arrays["positive"].min() > 0


def test_a_role_is_found_inside_a_loop() -> None:
    model = model_of_text(
        """g (int64[3] ids) => (float[2] y) {
            y = Loop (trips, yes, zero) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t) {
                d = Identity (c)
                id = Gather (ids, i)
                row = Gather (table, id)
                t = Add (s, row)
            }>
        }""",
        trips=np.int64(3),
        yes=np.bool_(True),
        zero=np.zeros(2, np.float32),
        table=np.zeros((5, 2), np.float32),
    )
    graph = import_model(model)
    role = Uses(graph).role(graph.inputs[0])
    assert (role.low, role.high) == (0, 4)


def test_numbers_that_are_compared_with_a_table_are_in_it() -> None:
    """A one-hot encoding that is written as a comparison."""
    model = model_of_text(
        "g (int32[1, 50] letters) => (y) { column = Unsqueeze (letters, axis) y = Equal (column, table) }",
        axis=np.int64([2]),
        table=np.arange(100, 357, dtype=np.int32),
    )
    letters = made(model)["letters"]
    assert letters.min() >= 100 and letters.max() > 200


def test_parts_and_classes_fit() -> None:
    model = model_of_text(
        """g (float[7, 3] x, int64[2] parts, int64[5] classes) => (a, b, one) {
            a, b = Split (x, parts)
            one = OneHot (classes, depth, values)
        }""",
        depth=np.int64(7),
        values=np.float32([0, 1]),
    )
    for seed in range(10):
        arrays = Checker(model, Options()).evaluated(seed, {})[0]
        assert arrays["parts"].sum() == 7 and arrays["parts"].min() >= 0
        assert arrays["classes"].min() >= 0 and arrays["classes"].max() < 7


def test_sizes_grow_until_the_model_can_be_evaluated() -> None:
    model = model_of_text(
        "g (float[1, 1, n] x) => (y) { y = Conv (x, w) }", w=np.ones((1, 1, 300), np.float32)
    )  # fmt: skip
    assert case_of(model).inputs["x"].shape == (1, 1, 512)


# Who says what is right.


def test_engines_evaluate_alike() -> None:
    model = small_cnn()
    subject = subject_of(model)
    image = np.random.default_rng(0).standard_normal((2, 3, 8, 9), np.float32)
    found = [
        Evaluator(subject, (engine,))({"image": image}).values["scores"]
        for engine in ("reference", "onnxruntime", "onnxc")
    ]
    wide = Evaluator(subject, wide=True)({"image": image}).values["scores"]
    assert wide.dtype == np.float64
    for scores in found:
        np.testing.assert_allclose(scores, wide, rtol=1e-5)


def test_an_operator_that_the_reference_lacks_is_evaluated_by_another() -> None:
    model = model_of_text("g (float[4] x) => (float[4] y) { h = com.microsoft.QuickGelu (x) y = Neg (h) }")
    model.opset_import.add(domain="com.microsoft", version=1)
    case = case_of(model)
    assert case.good
    assert case.judge.reference.engines["QuickGelu_0"] == "onnxruntime"
    alone = Evaluator(subject_of(model), ("reference", "onnxc"))(case.inputs)
    assert alone.engines == {"QuickGelu_0": "onnxc", "Neg_1": "reference"}
    np.testing.assert_allclose(alone.values["y"], case.actual["y"], rtol=1e-6)


def test_the_reference_is_overruled_where_it_stands_alone() -> None:
    """onnx.reference drops two axes of a GlobalMaxPool over one axis."""
    model = model_of_text("g (float[2, 3, 5] x) => (float[2, 3, 1] y) { y = GlobalMaxPool (x) }")
    subject = subject_of(model)
    x = np.random.default_rng(0).standard_normal((2, 3, 5), np.float32)
    part = subject.model(subject.nodes, {"x": x}, ["y"])
    shapes = {engine(part, {"x": x})[0].shape for engine in (by_runtime, by_onnxc)}
    assert shapes == {(2, 3, 1)}
    if by_reference(part, {"x": x})[0].shape == (2, 3, 1):
        pytest.skip("this version of onnx computes it rightly")
    case = case_of(model)
    assert case.good
    (dispute,) = case.judge.reference.disputes
    assert (dispute.operator, dispute.winner, dispute.loser) == ("GlobalMaxPool", "onnxruntime", "reference")
    alone = case_of(model, "reference")
    assert alone.verdicts[0].status == "reference alone" and alone.good


@pytest.mark.parametrize("oracle", ["reference", "onnxruntime", "f64"])
def test_every_oracle_agrees_with_a_right_compiler(oracle: str) -> None:
    assert case_of(small_cnn(), oracle).good


def test_graphs_of_every_stage_are_evaluated() -> None:
    """A split that two kernels repeat for themselves: their bodies use the same names."""
    model = model_of_text(
        """g (float[2, 8, 4] x) => (float[2, 4, 4] y, float[2, 4, 4] z) {
            h = Exp (x)
            a, b = Split <axis = 1> (h, sizes)
            y = Softmax <axis = 2> (a)
            z = Softmax <axis = 1> (b)
        }""",
        sizes=np.int64([4, 4]),
    )
    checker = Checker(model, Options())
    case = checker.case()
    for stage in checker.build.stages:
        found = Evaluator(subject_of_graph(stage.graph), ("onnxruntime",))(case.inputs)
        for name, value in zip(("y", "z"), stage.graph.outputs, strict=True):
            assert case.judge.compare(name, found.values[value.name]).same, (stage, name)


def test_random_values_are_not_compared() -> None:
    model = model_of_text("g (float[4] x) => (float[4] y) { n = RandomNormalLike (x) y = Add (x, n) }")
    case = case_of(model)
    assert case.good and case.verdicts[0].status == "random"


# Rounding.


def test_what_cancels_is_explained_by_measuring() -> None:
    model = model_of_text(
        """g (float[64] x) => (float[64] y) {
            more = Mul (x, factor)
            back = Div (more, factor)
            y = Sub (back, x)
        }""",
        factor=np.float32(3.3),
    )
    case = case_of(model, x=np.random.default_rng(0).standard_normal(64, np.float32))
    assert case.good
    assert case.judge.noise is not None and case.judge.noise.spread["y"].max() > 0


def test_a_near_tie_is_told_from_a_wrong_index() -> None:
    model = model_of_text(
        """g (float[2, 64] x, float[64, 3] w) => (int64[2] k) {
            y = MatMul (x, w)
            k = ArgMax <axis = 1, keepdims = 0> (y)
        }"""
    )
    random = np.random.default_rng(0)
    x, column = random.standard_normal((2, 64), np.float32), random.standard_normal((64, 1), np.float32)
    twins = np.concatenate([column, column, column], axis=1)
    judge = case_of(model, x=x, w=twins).judge
    expected = judge.reference.values["k"]
    assert judge.compare("k", (expected + 1) % 3).reason == "near a tie"
    apart = np.concatenate([column, column + 1, column - 1], axis=1)
    judge = case_of(model, x=x, w=apart).judge
    assert not judge.compare("k", (judge.reference.values["k"] + 1) % 3).same


def test_a_fault_is_not_explained_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_kernel(monkeypatch, lambda region: "conv8" in region.origin)
    case = case_of(hundred_nodes())
    (verdict,) = case.verdicts
    assert verdict.status == "differs"
    assert verdict.agreement == {"onnxruntime": (False, True), "f64": (False, True)}


def test_narrow_precision_is_judged_by_its_own_roundoff() -> None:
    checker = Checker(hundred_nodes(3), Options(precision="bf16"))
    case = checker.case()
    assert case.good
    assert not Checker(hundred_nodes(3), Options()).case().judge.compare("probability", case.actual["probability"]).same


def test_what_underflows_in_narrow_precision_differs() -> None:
    random = np.random.default_rng(0)
    lines = [f"v{i + 1} = MatMul (v{i}, w)" for i in range(12)]
    model = model_of_text(
        f"g (float[4, 64] v0) => (float[4, 64] v12) {{ {' '.join(lines)} }}",
        w=random.normal(0, 0.002, (64, 64)).astype(np.float32),
    )
    assert case_of(model).good
    case = Checker(model, Options(precision="f16")).case()
    assert not np.any(case.actual["v12"]) and not case.good


def test_values_between_kernels() -> None:
    checker = Checker(hundred_nodes(3), Options())
    found = checker.per_node(checker.case())
    names = {difference.name for difference in found.values}
    assert found.total == 27 and {"residual0:0", "residual2:0", "classify:0", "probability"} <= names
    assert "erf1:0" not in names, "it is fused away"
    assert all(difference.same for difference in found.values)
    noises = [difference.noise_db for difference in found.values]
    assert noises == sorted(noises), "worst first"


def test_values_of_a_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(small_cnn(), Options(target="cuda"))
    case = checker.case()
    assert case.good and all(difference.same for difference in checker.per_node(case).values)
    spoil_kernel(monkeypatch, lambda region: "Softmax_5" in region.origin, gpu_schedules)
    checker = Checker(small_cnn(), Options(target="cuda"))
    case = checker.case()
    fault = find_fault(checker, case)
    assert not case.good and fault is not None
    assert fault.kind == "kernel" and fault.nodes == ("Softmax_5",) and len(fault.kernels) == 1


# The command.


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, ["check", *arguments], standalone_mode=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(hundred_nodes(3), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_exit_codes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.run(["check", str(path)]) == 0
    assert cli.run(["check", str(path), "--save", "x.onnx"]) == 2
    assert cli.run(["check", str(path), "--input", "nothing=1"]) == 2
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x01broken")
    assert cli.run(["check", str(tmp_path / "broken.onnx")]) == 3
    odd = model_of_text("g (float[2] x) => (float[2] y) { y = own.Unknown (x) }")
    odd.opset_import.add(domain="own", version=1)
    onnx.save(odd, tmp_path / "unknown.onnx")
    assert cli.run(["check", str(tmp_path / "unknown.onnx")]) == 4
    spoil_kernel(monkeypatch, lambda region: "classify" in region.origin)
    assert cli.run(["check", str(path)]) == 1


def test_json_of_a_model_that_is_right(path: Path) -> None:
    result = run(str(path), "--json", "--seeds", "2", "--per-node", "--bisect")
    found: Mapping[str, Any] = json.loads(result.output)
    assert found["same"] and found["fault"] is None and found["oracle"]["nodes"] == {"reference": 27}
    assert [case["seed"] for case in found["cases"]] == [0, 1]
    assert found["cases"][0]["inputs"] == {"image": {"dtype": "float32", "shape": [1, 8, 4, 4]}}
    (output,) = found["cases"][1]["outputs"]
    assert output["status"] == "same" and output["max_abs"] <= output["limit"] and output["excess"] < 1
    assert found["per_node"]["total"] == 27


def test_a_fault_is_named_and_saved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = change_nodes(lambda n: n.op == "Div" and n.origin == ("div1",), swap_operands)
    after_pass(monkeypatch, Rules, swapped)
    small = path.with_name("small.onnx")
    result = run(str(path), "--json", "--bisect", "--save", str(small))
    fault = json.loads(result.output)["fault"]
    assert result.return_value == 1
    assert fault["kind"] == "pass" and fault["pass"]["name"] == "rules"
    assert fault["part"]["nodes"] == ["div1"]
    assert fault["part"]["files"] == [str(small), str(small.with_suffix(".npz"))]
    assert cli.run(["check", str(small), "--input", str(small.with_suffix(".npz"))]) == 1
    text = run(str(path), "--bisect", "--save", str(small)).output
    assert re.search(r"at fault: pass rules \(\d+\)", text) and "1 nodes (div1)" in text and "DIFFERS" in text
    monkeypatch.undo()
    assert cli.run(["check", str(small), "--input", str(small.with_suffix(".npz"))]) == 0


def test_given_inputs_and_sizes(path: Path) -> None:
    np.save(path.with_name("image.npy"), np.ones((2, 8, 4, 4), np.float32))
    found = json.loads(run(str(path), "--json", "--input", f"image={path.with_name('image.npy')}").output)
    assert found["cases"][0]["inputs"]["image"]["shape"] == [2, 8, 4, 4]
    found = json.loads(run(str(path), "--json", "--dim", "batch=3").output)
    assert found["cases"][0]["inputs"]["image"]["shape"] == [3, 8, 4, 4]


def test_a_refusal_is_a_difference(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(build: Build, inputs: Mapping[str, Any]) -> dict[str, Any]:
        raise ShapeError("axis 1 is odd")

    monkeypatch.setattr(Build, "run", refuse)
    found = json.loads(run(str(path), "--json", "--bisect", "--per-node").output)
    (output,) = found["cases"][0]["outputs"]
    assert not found["same"] and output["reason"].endswith("refuses these inputs: axis 1 is odd")
    assert "refuses these inputs" in run(str(path), "--bisect").output
