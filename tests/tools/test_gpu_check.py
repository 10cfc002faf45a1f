"""The check of GPUs: all of it on the stand-in driver, at small sizes; its parts, its limits, the README's table."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import numpy as np
import onnx
import onnxc
import pytest
from click.testing import CliRunner
from onnx import helper
from onnxc.ir.errors import OnnxcError
from onnxc.ir.target import Target
from onnxc.tools import gpu_check
from onnxc.tools.gpu import check, models, operators, report, shapes, speed, summary, table
from onnxc.tools.gpu.architectures import ARCHITECTURES, Architecture
from onnxc.tools.gpu.budget import Budget, Deadline
from onnxc.tools.gpu.operators import BY_ONNX, SEVERAL, Case, family_of, node_cases
from onnxc.tools.gpu.prepare import Prepared
from onnxc.tools.gpu.processes import Pool, Process, TaskError
from onnxc.tools.terminal import console
from small_models import image, model_of_text, small_cnn

Array = np.ndarray[Any, Any]
TARGET = Target.parse("cuda:sm_90")
README = Path(onnxc.__file__).parent / "README.md"
ABSENT = Architecture("absent", "no_such_library", lambda batch: (None, {}))


def case(op: str, expected: Callable[[Array], Array], **attributes: Any) -> Case:
    """A case of one operator on x [2, 3]."""
    x = np.linspace(0.1, 0.9, 6, dtype=np.float32).reshape(2, 3)
    return case_of(f"test_{op.lower()}", op, [helper.make_node(op, ["x"], ["y"], **attributes)], [x], expected(x))


def case_of(name: str, op: str, nodes: Sequence[onnx.NodeProto], inputs: Sequence[Array], expected: Array) -> Case:
    types = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in (*inputs, expected)]
    values = [helper.make_tensor_value_info(n, t, a.shape) for n, t, a in zip("xab", types, inputs, strict=False)]
    outputs = [helper.make_tensor_value_info("y", types[-1], expected.shape)]
    graph = helper.make_graph(list(nodes), name, values, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return Case(name, op, model.SerializeToString(), [(list(inputs), [expected])])


def some_cases() -> list[Case]:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    axes = helper.make_node("Squeeze", ["x", "a"], ["y"])  # the axis is an input: compiled when it is there
    return [
        case("Tanh", np.tanh),
        case("Sinh", np.sinh),  # wrong on the faulty GPU
        case("Acos", np.arccos),  # ends the process there
        case("Exp", np.exp),
        case("Softmax", lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
        case("Neg", lambda x: x),  # a wrong case: the CPU fails it too
        case_of("test_axes", "Squeeze", [axes], [x.reshape(2, 1, 3), np.array([1])], x),
    ]


def some_operators() -> list[shapes.Operator]:
    return [
        *[o for o in shapes.memory_bound(1 << 13) if o.kind in ("softmax", "transpose") and "56" not in o.name][:2],
        *shapes.products("f16", [(32, 32, 32)]),
        *shapes.products("tf32", [(4, 32, 16)]),
    ]


def timed_network(folder: Path) -> models.Subject:
    model = model_of_text(
        """timed (float[2, 16] x) => (float[2, 8] y) {
            hidden = MatMul (x, w)
            positive = Relu (hidden)
            y = Softmax (positive)
        }""",
        w=np.linspace(-1, 1, 128, dtype=np.float32).reshape(16, 8),
    )
    onnx.save(model, folder / "timed.onnx")
    return models.Subject("timed", str(folder / "timed.onnx"), None, 2, ("f16",), True)


# All of it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report of a check of a GPU that has faults."""
    if gpu.missing():
        pytest.skip(f"kernels cannot be run here: {gpu.missing()}")
    folder = tmp_path_factory.mktemp("models")
    (folder / "sub").mkdir()
    onnx.save(small_cnn(), folder / "sub" / "cnn.onnx")
    np.savez(folder / "sub" / "cnn.one.npz", image=image(1, 3, 6, 5))
    np.savez(folder / "sub" / "cnn.two.npz", image=image(2, 3, 4, 4))
    network = timed_network(tmp_path_factory.mktemp("networks"))
    plan = check.Plan(
        folders=[str(folder)],
        cases=some_cases,
        architectures=[ABSENT],
        operators=some_operators,
        networks=lambda: [network, models.Subject("absent", "", ABSENT, 1, ("f16",), True)],
        effort=check.Effort(rounds=3, seconds=1e-4, copy_bytes=1 << 16, product_size=64),
        jobs=2,
        setup="gpu_process:install_faulty",
    )
    path = tmp_path_factory.mktemp("report") / "report.json"
    found = check.run(plan, path, 60)
    return found.content, path


def test_the_report_is_written_and_says_what_it_is_about(whole: tuple[dict[str, Any], Path]) -> None:
    content, path = whole
    assert json.loads(path.read_text()) == content
    assert content["schema"] == report.SCHEMA
    assert content["complete"] and content["differs"] and content["stand_in"]
    assert "stand-in" in content["machine"]["gpu"]
    assert content["machine"]["architecture"] == "sm_90"
    assert content["versions"]["numpy"] == np.__version__
    assert set(content["parts"]) == {"operators", "models", "speed", "whole"}
    assert {part["state"] for part in content["parts"].values()} == {"done"}
    assert 0 < sum(part["seconds"] for part in content["parts"].values()) <= content["seconds"] + 1


def test_cases_are_told_by_family(whole: tuple[dict[str, Any], Path]) -> None:
    part = whole[0]["parts"]["operators"]
    assert part["families"] == {
        "elementwise": {"cases": 4, "agree": 2, "refused": 1, "fail": 2},
        "movement": {"cases": 1, "agree": 1, "refused": 0, "fail": 0},
        "reduction": {"cases": 1, "agree": 1, "refused": 0, "fail": 0},
    }
    wrong, died = part["failures"]
    assert (wrong["case"], wrong["family"]) == ("test_sinh", "elementwise")
    assert wrong["message"].startswith("output 0: 6 of 6 elements differ, at [0, 0] 1.00500")
    assert died["case"] == "test_acos" and died["message"]


def test_models_are_compared_in_all_precisions(whole: tuple[dict[str, Any], Path]) -> None:
    part = whole[0]["parts"]["models"]
    assert [(row["name"], row["precision"]) for row in part["rows"]] == [
        ("sub/cnn", precision) for precision in ("f32", "tf32", "f16", "bf16")
    ]
    for row in part["rows"]:
        assert row["message"] == "" and row["reference"] == "onnxruntime", row
        assert 0 <= row["difference"] <= row["tolerance"]
    assert part["rows"][0]["difference"] < part["rows"][3]["difference"]
    assert part["missing"] == {"absent": "torch, no_such_library not installed"} or "torch" not in str(part["missing"])


def test_speed_is_told_beside_what_was_measured(whole: tuple[dict[str, Any], Path]) -> None:
    part = whole[0]["parts"]["speed"]
    assert part["limits"]["copy"] > 0
    assert [row["kind"] for row in part["rows"]] == ["softmax", "softmax", "product", "product"]
    for row in part["rows"]:
        assert row["message"] == "" and row["kernels"], row
        assert row["least_us"] <= row["median_us"] <= row["most_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3, rel=0.05, abs=0.01)
    first, _, square, _ = part["rows"]
    assert first["bytes"] == 2 * (1 << 13) and "flops" not in first
    reached = first["bytes"] / (first["us"] / 1e6) / part["limits"]["copy"]
    assert first["mark"] == {
        "of": "copy",
        "share": 0.8,
        "reached": pytest.approx(reached, abs=1e-3),
        "met": reached >= 0.8,
    }
    assert square["flops"] == 2 * 32**3 and square["bytes"] == 3 * 32 * 32 * 2
    assert "mark" not in square  # there is no PyTorch to compare with here


def test_networks_are_timed_kernel_by_kernel(whole: tuple[dict[str, Any], Path]) -> None:
    part = whole[0]["parts"]["whole"]
    (row,) = part["rows"]
    assert (row["name"], row["batch"], row["precision"], row["message"]) == ("timed", 2, "f16", "")
    assert row["peers"]["onnxc"]["least_us"] > 0 and row["peers"]["onnxc"]["latency_us"] > 0
    assert row["absent"]["torch"]
    assert sum(kernel.get("flops", 0) for kernel in row["kernels"]) == 2 * 2 * 16 * 8
    assert all(kernel["us"] > 0 and kernel["bytes"] > 0 for kernel in row["kernels"])
    assert [kernel["from"] for kernel in row["kernels"] if "flops" in kernel] == [["MatMul_0", "Relu_1"]]
    assert "absent" in part["missing"]


def test_the_summary_tells_everything(whole: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]) -> None:
    summary.print_summary(whole[0], console())
    text = capsys.readouterr().out
    for word in ("stand-in", "elementwise", "sub/cnn", "of copy", "timed", "2 differ", "test_acos", "onnxc"):
        assert word in text


def test_without_time_all_is_skipped_and_said(tmp_path: Path) -> None:
    if gpu.missing():
        pytest.skip(f"kernels cannot be run here: {gpu.missing()}")
    plan = check.Plan(
        cases=some_cases,
        architectures=(),
        operators=list,
        networks=list,
        jobs=1,
        setup="gpu_process:install",
    )
    content = check.run(plan, tmp_path / "report.json", 0).content
    assert content["complete"] and not content["differs"]
    assert {name: part["state"] for name, part in content["parts"].items()} == dict.fromkeys(
        ("operators", "models", "speed", "whole"), "skipped"
    )


# The budget


class Seconds:
    """A clock that goes where it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def finished(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


def fake_check(tmp_path: Path, minutes: float, answer: Callable[[Seconds, Any], Any]) -> check.Check:
    """A check whose GPU does what `answer` says, on a clock that only it moves."""
    clock = Seconds()
    machine = {"gpu": "a GPU", "driver": None, "cuda_of_driver": "13.0"}
    found = report.Report.begun(tmp_path / "report.json", minutes, machine)
    process: Any = SimpleNamespace(call=lambda function, *arguments, timeout: answer(clock, arguments[0]))
    return check.Check(
        check.Plan(),
        Budget.of(minutes, clock),
        found,
        None,
        SimpleNamespace(),
        process,
        tmp_path,
        lambda line: None,  # type: ignore[arg-type]
    )


def test_a_part_may_take_what_others_left() -> None:
    clock = Seconds()
    budget = Budget.of(10, clock)
    assert budget.part("operators").left == pytest.approx(168)
    clock.now += 30
    assert budget.part("models").left == pytest.approx(258)
    assert budget.seconds == 30
    clock.now += 600
    assert budget.part("whole").left == 0 and not budget.part("whole").fits(0)
    assert Deadline(clock.now + 5, clock).fits(4.9)


def test_what_would_not_end_in_time_is_not_begun(tmp_path: Path) -> None:
    def answer(clock: Seconds, operator: Any) -> Any:
        clock.now += 12.0
        return {"us": 1.0, "message": ""} if isinstance(operator, shapes.Operator) else {"copy": 1e12}

    run = fake_check(tmp_path, 1, answer)  # 44 seconds for this part: 12 for the limits, two times 12, and no third
    listed = list(shapes.products("f16", [(m, 8, 8) for m in range(1, 6)]))
    prepared = Prepared("", (), 0.0)
    waiting = [(operator, finished(prepared)) for operator in listed[:4]] + [(listed[4], Future())]
    run.part("speed", lambda: speed.check_speed(run, waiting))
    part = json.loads((tmp_path / "report.json").read_text())["parts"]["speed"]
    assert [row["name"] for row in part["rows"]] == ["1x8x8", "2x8x8"]
    assert part["state"] == "shortened"
    assert part["notes"] == ["3 of 5 operators were not measured: 3x8x8, 4x8x8, 5x8x8"]
    assert waiting[4][1].cancelled()


def test_a_hang_is_a_failure_but_the_end_of_the_time_is_none(tmp_path: Path) -> None:
    def answer(clock: Seconds, operator: Any) -> Any:
        if not isinstance(operator, shapes.Operator):
            return {"copy": 1e12}
        clock.now += 1.0
        raise TaskError("Timeout", "no answer")

    waiting = [(operator, finished(Prepared("", (), 0.0))) for operator in shapes.products("f16", [(8, 8, 8)])]
    for minutes, messages, state in ((10, ["Timeout: no answer"], "done"), (0.5, [], "shortened")):
        run = fake_check(tmp_path, minutes, answer)
        run.part("speed", lambda run=run: speed.check_speed(run, waiting))  # type: ignore[misc]
        part = run.report.content["parts"]["speed"]
        assert ([row["message"] for row in part["rows"]], part["state"]) == (messages, state)


def test_a_report_is_written_while_a_part_goes_on(tmp_path: Path) -> None:
    seen = []

    def answer(clock: Seconds, artifact: Any) -> str:
        clock.now += 0.05
        if (tmp_path / "report.json").exists():
            seen.append(json.loads((tmp_path / "report.json").read_text())["parts"]["operators"])
        return ""

    run = fake_check(tmp_path, 10, answer)
    cases = [some_cases()[0]] * 300
    run.part("operators", lambda: operators.check_operators(run, [(c, finished(Prepared("", (), 0.0))) for c in cases]))
    assert seen[0]["families"]["elementwise"]["agree"] == operators.TOLD


def test_cases_stop_where_the_time_is_over(tmp_path: Path) -> None:
    def answer(clock: Seconds, artifact: Any) -> str:
        clock.now += 10.0
        return ""

    run = fake_check(tmp_path, 1, answer)  # 16.8 seconds for this part
    cases = some_cases()[:4]
    run.part("operators", lambda: operators.check_operators(run, [(c, finished(Prepared("", (), 0.0))) for c in cases]))
    part = run.report.content["parts"]["operators"]
    assert part["families"]["elementwise"]["cases"] == 2
    assert part["notes"] == ["2 of 4 cases were not run: no time was left"]


def test_a_part_that_breaks_off_ends_nothing_else(tmp_path: Path) -> None:
    run = fake_check(tmp_path, 1, lambda clock, what: None)
    run.part("models", lambda: math.sqrt(-1))
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["parts"]["models"]["state"] == "failed" and content["differs"]
    assert list(report.failures(content)) == ["part models: ValueError: expected a nonnegative input, got -1.0"] or (
        "ValueError" in content["parts"]["models"]["notes"][0]
    )


def test_models_that_cannot_be_compared_are_no_differences(tmp_path: Path) -> None:
    run = fake_check(tmp_path, 1, lambda clock, what: {"difference": 0.5, "message": "differs by 0.5"})
    compiled = {"f32": Prepared("", (), 0.0), "f16": "UnsupportedError: no"}
    ready = models.Ready("", {}, "onnxruntime", compiled)
    waiting = {
        finished(ready): models.Subject("bad", "bad.onnx"),
        finished(TaskError("NotComparable", "the reference fails: no such input")): models.Subject("odd", "odd.onnx"),
        finished(TaskError("Timeout", "no answer")): models.Subject("slow", "slow.onnx"),
    }
    run.part("models", lambda: models.check_models(run, waiting))
    part = run.report.content["parts"]["models"]
    assert part["missing"] == {"odd": "the reference fails: no such input"}
    messages = {(row["name"], row["precision"]): row["message"] for row in part["rows"]}
    assert messages == {
        ("bad", "f32"): "differs by 0.5",
        ("bad", "f16"): "UnsupportedError: no",
        ("slow", "all"): "Timeout: no answer",
    }
    assert len(list(report.failures(run.report.content))) == 3


# Processes


def test_a_process_outlives_errors_and_is_replaced_when_it_dies_or_hangs() -> None:
    with Process() as process:
        assert process.call(math.sqrt, 4, timeout=60) == 2
        with pytest.raises(TaskError, match="ValueError: invalid literal") as error:
            process.call(int, "x", timeout=60)
        assert error.value.kind == "ValueError" and "int" in error.value.details
        assert process.starts == 1
        with pytest.raises(TaskError, match="ProcessDied: the process ended with code 3"):
            process.call(os._exit, 3, timeout=60)
        with pytest.raises(TaskError, match="Timeout: no answer within 0 s"):
            process.call(time.sleep, 1000, timeout=0.2)
        assert process.call(math.sqrt, 9, timeout=60) == 3
        assert process.starts == 3


def test_a_pool_takes_the_most_urgent_first_and_ends_at_once() -> None:
    with Pool(1) as pool:
        first = pool.submit(time.sleep, 0.3, timeout=60)
        late = pool.submit(time.time, timeout=60, priority=2)
        soon = pool.submit(time.time, timeout=60, priority=1)
        assert first.result(60) is None
        assert soon.result(60) < late.result(60)
        busy = pool.submit(time.sleep, 1000, timeout=2000)
        waiting = pool.submit(time.time, timeout=60)
        while not busy.running():
            time.sleep(0.01)
    assert isinstance(busy.exception(60), TaskError)
    assert waiting.cancelled()


# Cases, models, reports


def test_cases_of_the_suite_have_their_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def proto(*ops: str) -> onnx.ModelProto:
        nodes = [helper.make_node(op, ["x"], [f"y{i}"], domain="") for i, op in enumerate(ops)]
        return helper.make_model(helper.make_graph(nodes, "g", [], []))

    suite = [
        SimpleNamespace(name="test_softmax", model=proto("Constant", "Softmax"), data_sets=[], rtol=1, atol=2),
        SimpleNamespace(name="test_softmax_expanded_ver18", model=proto("Exp", "Div"), data_sets=[], rtol=1, atol=2),
        SimpleNamespace(name="test_two", model=proto("Exp", "Div"), data_sets=[], rtol=1, atol=2),
    ]
    monkeypatch.setattr("onnx.backend.test.loader.load_model_tests", lambda kind: suite)
    found = node_cases()
    assert [(c.name, c.op, c.rtol) for c in found] == [
        ("test_softmax", "Softmax", 1),
        ("test_softmax_expanded_ver18", "Softmax", 1),
        ("test_two", "", 1),
    ]
    assert [family_of(c.op) for c in found] == ["reduction", "reduction", SEVERAL]
    assert (family_of("Conv"), family_of("NoSuchOperator")) == ("contraction", BY_ONNX)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        ([np.zeros(2)], [np.zeros(2)], ""),
        ([np.array([1.0, math.nan])], [np.array([1.0005, math.nan])], ""),
        ([np.zeros(2)], [], "1 outputs: there are 0"),
        ([np.zeros(2)], [np.zeros(3)], "output 0 is float64[2]: it must be float64[3]"),
        ([[np.zeros(2)]], [np.zeros(2)], "output 0 is <class 'list'>"),
        ([np.array([[1, 2], [3, 5]])], [np.array([[1, 2], [3, 4]])], "1 of 4 elements differ, at [1, 1] 5 for 4"),
        ([np.array(2.0)], [np.array(1.0)], "1 of 1 elements differ, at [] 2.0 for 1.0"),
        ([np.array(["a", "b"], object)], [np.array(["a", "c"], object)], "1 of 2 elements differ, at [1] b for c"),
    ],
)
def test_differences_of_cases(actual: Any, expected: Any, message: str) -> None:
    found = operators.difference(actual, expected, 1e-3, 1e-7)
    assert message in found and bool(message) == bool(found)


def test_differences_of_models_are_relative_to_the_largest_value() -> None:
    a = np.array([1.0, -200.0, 3.0], np.float32)
    assert models.relative_difference(a + np.float32(0.5), a) == pytest.approx(0.0025)
    assert models.relative_difference(a, a.astype(np.float64)) == math.inf
    assert models.relative_difference(np.array([math.nan], "f4"), a[:1]) == math.inf
    assert models.relative_difference(np.array([math.inf, math.nan]), np.array([math.inf, math.nan])) == 0
    integers = np.array([1, 2])
    assert models.relative_difference(integers, integers[::-1]) == math.inf
    assert models.relative_difference(integers, integers[::-1], exact=False) == 0


def test_inputs_come_from_files_or_are_made_up(tmp_path: Path) -> None:
    onnx.save(small_cnn(), tmp_path / "a.onnx")
    (subject,) = models.subjects_of([str(tmp_path)], [])
    assert (subject.name, subject.missing) == ("a", "")
    ready = models.ready(models.Subject("a", subject.file, precisions=()), TARGET, str(tmp_path / "x"))
    ((inputs, outputs),) = ready.cases.values()
    assert inputs["image"].shape == (1, 3, 224, 224) and outputs["scores"].shape == (1, 5)
    np.savez(tmp_path / "a.npz", image=image(4, 3, 5, 5))
    ready = models.ready(models.Subject("a", subject.file, precisions=()), TARGET, str(tmp_path / "x"))
    assert [inputs["image"].shape for inputs, _ in ready.cases.values()] == [(4, 3, 5, 5)]
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(Exception, match=r"."):
        models.ready(models.Subject("b", str(tmp_path / "broken.onnx")), TARGET, str(tmp_path / "x"))


def test_without_onnx_runtime_the_cpu_is_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(small_cnn(), tmp_path / "a.onnx")
    np.savez(tmp_path / "a.npz", image=image(1, 3, 5, 5))
    subject = models.Subject("a", str(tmp_path / "a.onnx"), precisions=())
    expected = models.ready(subject, TARGET, str(tmp_path / "x"))
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    ours = models.ready(subject, TARGET, str(tmp_path / "x"))
    assert (expected.reference, ours.reference) == ("onnxruntime", "onnxc on the CPU")
    np.testing.assert_allclose(ours.cases[""][1]["scores"], expected.cases[""][1]["scores"], rtol=1e-5)


def test_architectures_have_names_of_their_own() -> None:
    assert len({a.name for a in ARCHITECTURES}) == len(ARCHITECTURES) > 12
    names = {(subject.name, subject.batch) for subject in check.networks()}
    assert names == {(name, batch) for name in ("resnet50", "bert-base", "gpt2-step") for batch in (1, 32)}


# The command and the README


def real(content: Mapping[str, Any]) -> dict[str, Any]:
    """A report as if made on a GPU."""
    machine = {"gpu": "NVIDIA Imaginary", "driver": "1.2", "cuda_of_driver": "13.0"}
    return {**content, "stand_in": False, "machine": machine, "versions": {**content["versions"], "torch": "2.0"}}


def test_the_readme_tells_what_the_kept_report_does() -> None:
    text = README.read_text(encoding="utf-8")
    assert table.PART.renewed(text, table.figures(table.kept_report())) == text, "run `make readme`"
    if table.kept_report() is None:
        assert table.UNMEASURED in text
    with pytest.raises(ValueError, match="lacks the lines"):
        table.PART.renewed(text.replace(table.PART.end, ""), "")


def test_a_report_of_no_gpu_gives_no_figures(whole: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    with pytest.raises(OnnxcError, match="was made on stand-in for an H200: its figures are of no GPU"):
        table.kept_report(whole[1])
    path = tmp_path / "report.json"
    assert table.kept_report(path) is None
    for change, message in (({"complete": False}, "broke off"), ({"schema": 0}, "schema 0")):
        path.write_text(json.dumps({**real(whole[0]), **change}))
        with pytest.raises(OnnxcError, match=message):
            table.kept_report(path)


def test_the_table_has_the_figures_of_the_report(whole: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    content = real(whole[0])
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    text = table.figures(table.kept_report(path))
    assert text.startswith(f"NVIDIA Imaginary, driver 1.2, PyTorch 2.0, {content['date'][:10]}. Of ONNX's 6 node cases")
    assert "that the CPU passes 4 agree; of 4 comparisons of models" in text
    (row,) = content["parts"]["whole"]["rows"]
    assert f"| timed | 2 | {row['peers']['onnxc']['median_us']:.0f} |  |  |  |" in text
    assert "| softmax | f32 | 2 |" in text and "| product | tf32 | 1 |" in text


@pytest.mark.parametrize(("differs", "code"), [(False, 0), (True, 1)])
def test_the_exit_code_tells_whether_something_differs(
    differs: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[tuple[check.Plan, float]] = []

    def run(plan: check.Plan, output: Path, minutes: float, say: Callable[[str], None]) -> report.Report:
        plans.append((plan, minutes))
        found = report.Report.begun(output, minutes, {"gpu": "a GPU", "driver": None, "cuda_of_driver": "13.0"})
        if differs:
            found.part("operators")["failures"] = [{"case": "c", "family": "f", "message": "m"}]
        found.write(1.0, complete=True)
        return found

    monkeypatch.setattr(gpu_check, "run", run)
    output = tmp_path / "report.json"
    result = CliRunner().invoke(gpu_check.main, ["--output", str(output), "--models", str(tmp_path), "--minutes", "3"])
    assert result.exit_code == code, result.output
    assert json.loads(output.read_text())["differs"] == differs
    assert plans[0][0].folders == (str(tmp_path),) and plans[0][1] == 3


def test_without_a_gpu_the_command_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any) -> report.Report:
        raise TaskError("TargetError", "NVIDIA's driver is not installed")

    monkeypatch.setattr(gpu_check, "run", run)
    result = CliRunner().invoke(gpu_check.main, ["--output", str(tmp_path / "report.json")])
    assert result.exit_code == 2
    assert "NVIDIA's driver is not installed" in result.output
