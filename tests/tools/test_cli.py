"""The command line as a person and as a script use it: what each command prints, and how it fails."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxc.tools import cli, demo

DIGITS = str(demo.FILES / "digits.onnx")
WEIGHT = np.random.default_rng(2).normal(size=(4, 8)).astype(np.float32)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def onnxc_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command line in this process."""
    monkeypatch.delenv("ONNXC_DEBUG", raising=False)

    def command(*arguments: object) -> Outcome:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return command


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """y = softmax(relu(x @ weight)), with x [batch, 4]."""
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"], name="times weight"),
        helper.make_node("Relu", ["product"], ["positive"], name="positive"),
        helper.make_node("Softmax", ["positive"], ["y"], name="share"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(WEIGHT, "weight")],
    )
    path = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def small_result(x: NDArray[Any], activation: Callable[[Any], Any] = lambda v: np.maximum(v, 0)) -> NDArray[Any]:
    exponents = np.exp(activation(x.astype(np.float64) @ WEIGHT))
    return np.asarray(exponents / exponents.sum(1, keepdims=True))


# --- run ------------------------------------------------------------------------------------------------------------


def test_run_with_a_file_gives_the_models_result(onnxc_command: Command, small: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(5).normal(size=(3, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    outcome = onnxc_command("run", small, "--input", f"x={tmp_path}/x.npy", "--output", f"y={tmp_path}/y.npy")
    assert (outcome.code, outcome.err) == (0, "")
    assert "y       float32  [3, 8]" in outcome.out
    assert np.allclose(np.load(tmp_path / "y.npy"), small_result(x), atol=1e-6)


def test_run_makes_up_what_is_missing_and_says_so(onnxc_command: Command, small: Path, tmp_path: Path) -> None:
    first, second = (onnxc_command("run", small, "--seed", 4, "--save", tmp_path / name) for name in "ab")
    assert first.code == 0
    assert first.err == "x: f32[batch, 4]: not given, random f32[1, 4]\n"
    assert (first.out, first.err) == (second.out, second.err)
    assert np.array_equal(np.load(tmp_path / "a/y.npy"), np.load(tmp_path / "b/y.npy"))
    other = onnxc_command("run", small, "--seed", 5)
    assert other.out != first.out


def test_run_for_scripts(onnxc_command: Command, small: Path) -> None:
    outcome = onnxc_command("run", small, "--input", "x=1,0,0,0", "--repeat", 3, "--json")
    record = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    expected = small_result(np.array([[1, 0, 0, 0]]))[0]
    facts = record["outputs"]["y"]
    assert (facts["shape"], facts["dtype"], facts["not_finite"]) == ([1, 8], "float32", 0)
    assert facts["first"] == pytest.approx(expected[: len(facts["first"])].tolist(), abs=1e-6)
    assert (facts["min"], facts["max"]) == pytest.approx((expected.min(), expected.max()), abs=1e-6)
    assert record["run_seconds"]["runs"] == 3
    assert 0 < record["run_seconds"]["min"] <= record["run_seconds"]["median"]


def test_run_shows_what_is_not_finite(onnxc_command: Command, small: Path) -> None:
    outcome = onnxc_command("run", small, "--input", "x=nan,0,0,0", "--json")
    facts = json.loads(outcome.out)["outputs"]["y"]
    assert (facts["min"], facts["not_finite"]) == (None, 8)
    assert facts["first"][0] == "nan"
    assert "not finite" in onnxc_command("run", small, "--input", "x=nan,0,0,0").out


@pytest.mark.parametrize("options", [("--dim", "batch=6"), ("--shape", "x=6x4")])
def test_run_specialised(onnxc_command: Command, small: Path, options: tuple[str, str]) -> None:
    outcome = onnxc_command("run", small, "--input", "x=ones", "--json", *options)
    assert json.loads(outcome.out)["outputs"]["y"]["shape"] == [6, 8]


def test_time_passes(onnxc_command: Command, small: Path) -> None:
    outcome = onnxc_command("run", small, "--input", "x=ones", "--time-passes", "--pipeline", "cleanup,fuse")
    named = [line.split("ms")[1].split()[0] for line in outcome.err.splitlines()]
    assert named == ["cleanup", "fuse", "import,", "in"]


def test_run_in_16_bits(onnxc_command: Command, small: Path, tmp_path: Path) -> None:
    """From the model, and from the text that shows which tensors are narrow."""
    text = tmp_path / "narrow.txt"
    assert onnxc_command("dump", small, "--precision", "f16", "-o", text).code == 0
    assert "f16[4, 8]" in text.read_text()
    x = np.random.default_rng(6).normal(size=(2, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    for source, *options in ((small, "--precision", "f16"), (text, "--weights", small)):
        outcome = onnxc_command("run", source, *options, "--input", tmp_path / "x.npy", "--save", tmp_path)
        assert outcome.code == 0, outcome.err
        difference = np.abs(np.load(tmp_path / "y.npy") - small_result(x)).max()
        assert 1e-6 < difference < 1e-2
    refused = onnxc_command("run", small, "--precision", "tf32")
    assert refused.code == 4
    assert "only f32, f16, bf16" in refused.err


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "SMALL", "--input", "z=ones"], 2, "the model has no input z; it takes x: f32[batch, 4]"),
        (["run", "SMALL", "--input", "x=1,2"], 2, "2 numbers do not fill this shape"),
        (["run", "SMALL", "--output", "z=z.npy"], 2, "the model has no output z"),
        (["run", "SMALL", "--dim", "length=3"], 2, '"length"'),
        (["run", "SMALL", "--dim", "batch=many"], 2, "'many' is not a number of elements"),
        (["run", "SMALL", "--dim", "batch"], 2, "not of the form NAME=VALUE"),
        (["run", "SMALL", "--shape", "x=1,4"], 2, "a shape is written as 1x3x224x224"),
        (["run", "SMALL", "--pipeline", "magic"], 2, "no pass is called 'magic'"),
        (["run", "SMALL", "--target", "z80"], 4, "unknown target 'z80'"),
        (["run", "SMALL", "--target", "FOREIGN"], 4, "cannot run on this machine"),
        (["run", "missing.onnx"], 2, "does not exist"),
        (["run", "BROKEN"], 3, "broken.onnx"),
        (["run", "UNKNOWN"], 4, "NoSuchOperator"),
        (["plan", "BROKEN", "--json"], 3, "broken.onnx"),
        (["dump", "SMALL", "--after", "magic"], 2, "it runs 0 import, 1 "),
        (["dump", "SMALL", "--stage", "asm", "--kernel", "magic"], 2, "no kernel is called 'magic'"),
        (["dump", "SMALL", "--stage", "llvm", "--after", "fold"], 2, "--after is for --stage graph"),
        (["dump", "SMALL", "--all"], 2, "name a folder"),
        (["ops", "magic"], 2, "no operator has 'magic' in its name"),
        (["compile", "SMALL", "-o", "small.exe"], 2, "told by the suffix"),
        (["magic"], 2, "No such command"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_a_code(
    onnxc_command: Command, small: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "broken.onnx").write_bytes(small.read_bytes()[:-40])
    unknown = onnx.load(small)
    unknown.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(unknown, tmp_path / "unknown.onnx")
    foreign = "x86-64" if onnxc.Target.host().architecture == "aarch64" else "neoverse-n1"
    named = {
        "SMALL": small,
        "BROKEN": tmp_path / "broken.onnx",
        "UNKNOWN": tmp_path / "unknown.onnx",
        "FOREIGN": foreign,
    }
    outcome = onnxc_command(*(named.get(argument, argument) for argument in arguments))
    assert outcome.code == code
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    errors = [line for line in outcome.err.splitlines() if line.lower().startswith("error:")]
    assert len(errors) == 1


def test_a_bug_is_told_from_a_mistake(onnxc_command: Command, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr("onnxc.compiler.driver.import_model", broken)
    outcome = onnxc_command("dump", small)
    assert outcome.code == cli.BUG
    assert outcome.err.startswith("error: internal error, ZeroDivisionError: deep inside")
    monkeypatch.setenv("ONNXC_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run(["dump", str(small)])


def test_a_model_that_needs_values_says_what_to_do(onnxc_command: Command, tmp_path: Path) -> None:
    """An axis that is an input decides what code there is: `run` knows it, `plan` cannot."""
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)],
        "summed",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]),
            helper.make_tensor_value_info("axes", TensorProto.INT64, [1]),
        ],
        [helper.make_empty_tensor_value_info("y")],
    )
    path = tmp_path / "summed.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    outcome = onnxc_command("plan", path)
    assert (outcome.code, "`onnxc run` compiles when it has seen the values" in outcome.err) == (4, True)
    outcome = onnxc_command("run", path, "--input", "axes=1", "--input", "x=1,2,3,4,5,6", "--json")
    assert json.loads(outcome.out)["outputs"]["y"]["first"] == [6, 15]


def test_main_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["ops", "magic"])
    assert exit.value.code == 2


# --- dump, and graphs as text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--stage", "import"], ["graph @small(%x: f32[batch, 4])", "= Relu(%product)", '// from "times weight"']),
        (["--stage", "graph"], ["Fused(", '// from "times weight", "positive"']),
        (["--after", "import"], []),
        (["--after", "1"], ["// after: canonicalize", "= Relu("]),
        (["--stage", "program"], ["program @small(", "constant "]),
        (["--stage", "kernels"], ["kernel ", "for ", "exp("]),
        (["--stage", "kernels", "--kernel", "share"], ["softmax", "// from share"]),
        (["--stage", "vectors", "--kernel", "share"], ["fma("]),
        (["--stage", "llvm", "--kernel", "entry"], ["define void @onnxc_run_0"]),
        (["--stage", "llvm", "--target", "x86-64-v3", "--kernel", "share"], ["<8 x float>"]),
        (["--stage", "asm", "--target", "x86-64-v3", "--kernel", "share"], ["ymm", "ret"]),
        (["--stage", "asm", "--target", "neoverse-n1", "--kernel", "share"], [".4s"]),
    ],
)
def test_dump(onnxc_command: Command, small: Path, options: list[str], expected: list[str]) -> None:
    outcome = onnxc_command("dump", small, *options)
    if not expected:
        assert outcome.code == 2
        return
    assert outcome.code == 0, outcome.err
    for text in expected:
        assert text in outcome.out


def test_one_kernel_is_a_part_of_all(onnxc_command: Command, small: Path) -> None:
    one = onnxc_command("dump", small, "--stage", "kernels", "--kernel", "share").out
    every = onnxc_command("dump", small, "--stage", "kernels").out
    assert one.strip() in every
    assert one.count("kernel ") == 1 < every.count("kernel ")


def test_dump_of_a_quantized_model(onnxc_command: Command, tmp_path: Path) -> None:
    """What is computed in integers, all of it in reals where that is asked for, and what stays in reals, with why."""
    weights = np.arange(-16, 16).reshape(4, 8).astype(np.int8)
    parameters = {"scale": np.float32(0.1), "zero": np.uint8(7), "zero16": np.uint16(7), "whole": weights}
    nodes = [helper.make_node("DequantizeLinear", ["whole", "scale"], ["weight"])]
    for result, zero in (("y", "zero"), ("z", "zero16")):
        names = ["scale", zero]
        nodes += [
            helper.make_node("QuantizeLinear", ["x", *names], [f"{result}.q"]),
            helper.make_node("DequantizeLinear", [f"{result}.q", *names], [f"{result}.x"]),
            helper.make_node("MatMul", [f"{result}.x", "weight"], [result], name=f"product {result}"),
        ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, n]) for name, n in zip("xyz", (4, 8, 8), strict=True)
    ]
    arrays = [numpy_helper.from_array(np.asarray(array), name) for name, array in parameters.items()]
    graph = helper.make_graph(nodes, "quantized", values[:1], values[1:], arrays)
    path = tmp_path / "quantized.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    shown = onnxc_command("dump", path).out
    assert shown.count("MatMulInteger(") == 1
    assert "left in f32: its first operand is quantized to u16, not to 8 bits" in shown
    exact = onnxc_command("dump", path, "--exact").out
    assert "MatMulInteger" not in exact
    assert "quantization{exact=True}" in exact


def test_dump_of_everything(onnxc_command: Command, small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stages"
    outcome = onnxc_command("dump", small, "--all", "-o", folder, "--pipeline", "canonicalize,cleanup,fuse")
    assert outcome.code == 0, outcome.err
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names[:4] == ["00-import.txt", "01-canonicalize.txt", "02-cleanup.txt", "03-fuse.txt"]
    kernels = {Path(name).stem for name in names if name.startswith("kernels/")}
    assert len(kernels) == 2
    assert {Path(name).stem for name in names if name.startswith("asm/")} == kernels | {"entry"}
    assert f"{len(names)} files" in outcome.out


@pytest.mark.parametrize("options", [["--stage", "import"], ["--stage", "graph"], ["--after", "fold"]])
def test_an_edited_graph_is_compiled(onnxc_command: Command, small: Path, tmp_path: Path, options: list[str]) -> None:
    text = tmp_path / "edited.txt"
    assert onnxc_command("dump", small, "-o", text, *options).code == 0
    assert "Relu(" in text.read_text()
    text.write_text(text.read_text().replace("Relu(", "Tanh("))
    x = np.random.default_rng(6).normal(size=(2, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    outcome = onnxc_command("run", text, "--weights", small, "--input", tmp_path / "x.npy", "--save", tmp_path)
    assert outcome.code == 0, outcome.err
    assert np.allclose(np.load(tmp_path / "y.npy"), small_result(x, np.tanh), atol=1e-6)
    assert onnxc_command("run", text, "--weights", small, "--dim", "batch=2", "--input", tmp_path / "x.npy").code == 0
    assert onnxc_command("plan", text, "--weights", small, "--shape", "x=2x4").code == 0


def test_a_text_says_what_is_wrong_with_it(onnxc_command: Command, small: Path, tmp_path: Path) -> None:
    text = tmp_path / "edited.txt"
    onnxc_command("dump", small, "--stage", "import", "-o", text)
    good = text.read_text()
    outcome = onnxc_command("run", text)
    assert (outcome.code, "--weights MODEL.onnx" in outcome.err) == (3, True)
    for old, new, message in (
        ("= Relu(", "= Relu[", "line "),
        ("%positive = Relu(%product) : f32[batch, 8]", "%positive = Relu(%product) : f32[batch, 9]", "positive"),
        ("Relu(%product)", "Relu(%nothing)", "a value that is defined above"),
    ):
        text.write_text(good.replace(old, new))
        assert text.read_text() != good
        outcome = onnxc_command("run", text, "--weights", small)
        assert outcome.code == 3
        assert message in outcome.err
        assert str(text) in outcome.err


# --- compile --------------------------------------------------------------------------------------------------------


def test_an_artifact_runs_like_its_model(
    onnxc_command: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = onnxc_command("compile", small)
    assert (outcome.code, outcome.out.startswith("small.onnxc: ")) == (0, True)
    records = [json.loads(onnxc_command("run", p, "--seed", 7, "--json").out) for p in (small, "small.onnxc")]
    assert records[0]["outputs"] == records[1]["outputs"]
    assert onnxc_command("plan", "small.onnxc").out.startswith("arena ")
    assert "graph @small(" in onnxc_command("dump", "small.onnxc", "--stage", "import").out
    outcome = onnxc_command("run", "small.onnxc", "--dim", "batch=2")
    assert (outcome.code, "is compiled: give the model" in outcome.err) == (2, True)
    assert onnxc_command("dump", "small.onnxc", "--stage", "asm").code == 4


@pytest.mark.parametrize("options", [[], ["--threads", "1"], ["--target", "neoverse-n1"], ["--target", "x86-64-v2"]])
def test_object_files_come_with_a_header(
    onnxc_command: Command, small: Path, tmp_path: Path, options: list[str]
) -> None:
    outcome = onnxc_command("compile", small, "-o", tmp_path / "out.o", *options)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out.o").read_bytes()[:4] == b"\x7fELF"
    assert "small" in (tmp_path / "out.h").read_text()
    assert [line.split(":")[0] for line in outcome.out.splitlines()] == [f"{tmp_path}/out.o", f"{tmp_path}/out.h"]


# --- plan, ops, completion ------------------------------------------------------------------------------------------


def test_plan_shows_the_arena(onnxc_command: Command) -> None:
    outcome = onnxc_command("plan", DIGITS, "--dim", "batch=1")
    assert outcome.code == 0
    assert outcome.out.startswith("arena ")
    assert "lower bound " in outcome.out
    assert "AAA" in outcome.out
    assert "stem.relu" in outcome.out


def test_plan_without_fusion_has_more_steps(onnxc_command: Command) -> None:
    records = [json.loads(onnxc_command("plan", DIGITS, "--json", *flag).out) for flag in ((), ("--no-fusion",))]
    fused, apart = records
    assert fused["steps"] < apart["steps"]
    for record in records:
        assert record["arena_bytes"] >= record["lower_bound_bytes"] > 0
        assert record["ratio"] == pytest.approx(record["arena_bytes"] / record["lower_bound_bytes"])


def test_ops(onnxc_command: Command) -> None:
    rows = {row["name"]: row for row in json.loads(onnxc_command("ops", "--json").out)}
    assert rows["Softmax"]["defined"] == "ir/ops/reduction.py"
    assert "cpu/gemm.py" in rows["MatMul"]["compiled"] and "cuda/gemm.py" in rows["MatMul"]["on_gpu"]
    missing = onnxc_command("ops", "--missing").out.split()
    assert rows["StringConcat"]["compiled"] == rows["StringConcat"]["on_gpu"] == "host step"
    assert not set(missing) & set(rows)
    found = onnxc_command("ops", "softmax").out
    assert "LogSoftmax" in found
    assert "MatMul" not in found
    assert onnxc_command("ops", "Softmax", "--markdown").out.startswith("| operators |")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(onnxc_command: Command, shell: str) -> None:
    outcome = onnxc_command("completion", shell)
    assert outcome.code == 0
    assert "_ONNXC_COMPLETE" in outcome.out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("onnxc du", "dump"),
        (f"onnxc run {DIGITS} --dim ba", "batch="),
        (f"onnxc dump {DIGITS} --target x86-64-v", "x86-64-v3"),
        (f"onnxc dump {DIGITS} --stage ker", "kernels"),
        ("onnxc ops Log", "LogSoftmax"),
    ],
)
def test_completion_knows_commands_and_models(
    line: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_ONNXC_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    with pytest.raises(SystemExit):
        cli.run([])
    assert expected in [found.partition(",")[2] for found in capsys.readouterr().out.split()]


def test_every_command_explains_itself(onnxc_command: Command) -> None:
    for name in cli.COMMANDS:
        outcome = onnxc_command(name, "--help")
        assert outcome.code == 0
        assert f"Usage: onnxc {name}" in outcome.out
        assert name == "demo" or f"onnxc {name} " in outcome.out.partition("\n")[2], f"{name} has no example"


# --- as a process ---------------------------------------------------------------------------------------------------


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "onnxc", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["onnxc,", "version", onnxc.__version__]


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "onnxc", "dump", DIGITS, "--stage", "llvm"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (0, b"")


def test_cache_shows_and_clears(
    onnxc_command: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    onnxc.compile(small)
    outcome = onnxc_command("cache")
    assert outcome.code == 0 and "models" in outcome.out and "kernels" in outcome.out
    assert str(tmp_path / "cache" / "models") in outcome.out.replace("\n", "")
    kernels = len(list((tmp_path / "cache" / "objects").iterdir()))
    assert kernels
    assert onnxc_command("cache", "--limit", "0").out.endswith("B freed\n")
    assert not list((tmp_path / "cache" / "models").iterdir())
    assert len(list((tmp_path / "cache" / "objects").iterdir())) == kernels
    assert onnxc_command("cache", "--clear").code == 0
    assert not list((tmp_path / "cache" / "objects").iterdir())
    assert onnxc_command("cache", "--limit", "much").code == 2
