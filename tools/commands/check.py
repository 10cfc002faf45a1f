"""`onnxc check`: compare a compiled model with what ONNX says it computes; find what is at fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from .request import Request, compiling

DIFFERS = 1


@click.command(short_help="Compare a compiled model with ONNX's reference.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=WHAT",
    help="A file (.npy, .npz, .pb, an image), numbers (1,2,3), random, zeros or ones. Repeatable.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Sets of made-up inputs to try."
)
@click.option(
    "--oracle",
    type=click.Choice(("auto", "reference", "onnxruntime", "f64")),
    default="auto",
    show_default=True,
    help="Who says what is right: ONNX's reference and ONNX Runtime with onnxc's unoptimised code as arbiter, the "
    "reference alone, ONNX Runtime, or the reference with all floats widened to f64.",
)
@click.option("--per-node", is_flag=True, help="Compare the intermediate values too.")
@click.option("--bisect", is_flag=True, help="Find the pass or kernel at fault, and the smallest part that shows it.")
@click.option(
    "--save",
    type=click.Path(dir_okay=False),
    metavar="FILE.onnx",
    help="Where --bisect saves the smallest part, its inputs beside it as .npz [default: MODEL.part.onnx].",
)
@click.option(
    "--baseline",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FLOAT.onnx",
    help="The float model that MODEL was quantised from: tells where accuracy is lost.",
)
@click.option(
    "--data",
    metavar="FILE|FOLDER|MODULE:FUNCTION",
    help="Samples for --baseline, as `onnxc quantize --data` reads them.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=16, show_default=True, help="The most of them that are used."
)
@click.option("--least", type=float, metavar="DB", help="With --baseline: the least that every output must have.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@compiling
def command(
    request: Request,
    inputs: tuple[str, ...],
    seeds: int,
    oracle: str,
    per_node: bool,
    bisect: bool,
    save: str | None,
    baseline: str | None,
    data: str | None,
    samples: int,
    least: float | None,
    as_json: bool,
) -> int:
    """Runs MODEL compiled, and node by node as ONNX defines it without any optimisation, and compares the outputs,
    worst first. Exit code 0: the same within what rounding explains; 1: they differ.

    Inputs that are not given are made up of what the model does with them: indices in range, masks of 0 and 1, lengths
    within the sequence. How much may differ follows from element types, lengths of sums and depth; where that does not
    do, rounding is measured on these inputs, and on a difference ONNX Runtime and an evaluation in f64 are asked too.

    \b
    onnxc check model.onnx                              all inputs made up
    onnxc check model.onnx --input x=x.npy --dim batch=4
    onnxc check model.onnx --seeds 5 --target x86-64-v2
    onnxc check model.onnx --per-node                   every value that is still there after optimising
    onnxc check model.onnx --bisect --save small.onnx   which pass or kernel is at fault
    onnxc check model.onnx --json
    onnxc check int8.onnx --baseline model.onnx --data images/ --least 20

    With --baseline no reference is asked: the signal-to-noise ratio of every tensor of the quantised model is measured
    against the float model, alone (only the tensor, and the weights that it is computed with, are quantised; what they
    read is in floats) and accumulated (all before it is quantised), by onnxc's compiled code for both. "By channel" is
    what the ratio is if every channel counts alike, however faint; tensors are listed worst first by the lower of the
    two. Names are those of the float model. Exit code 1: an output has less than --least.

    \b
    JSON: model, target, precision, same; oracle {asked, nodes: {engine: count}, disputes: [{node, operator, right,
    alone}]}; cases: [{seed, inputs, outputs}]; per_node: {total, values}; fault: {kind: import, pass, kernel, plan or
    code, culprit, pass: {name, number}, kernels, value, nodes, unseen, part: {nodes, trials, files, difference}}.
    An output or value is {name, dtype, shape, same, max_abs, max_rel, max_ulp, snr_db, limit, excess, different,
    worst: {index, actual, expected}, reason}, an output also {status, agreement}. Infinities and NaN are texts.
    With --baseline: model, baseline, samples, same, outputs, unmatched (nodes); tensors: [{name, in_model, nodes,
    operator, weights, shape, alone, of_values, of_weights, accumulated, clipped, remark}], each ratio {snr_db,
    by_channel_db, worst_channel: {index, snr_db}}.
    """
    from ..check.bisect import find_fault
    from ..check.engine import Checker
    from ..check.report import Report, lines

    if request.artifact or request.path.endswith((".txt", ".onnxir")):
        raise click.UsageError(f"{request.path}: only an ONNX model says what it should compute")
    if save is not None and not bisect:
        raise click.UsageError("--save is for --bisect")
    if baseline is not None:
        if inputs and data is not None:
            raise click.UsageError("--input and --data both say what the inputs are")
        return compare(request, baseline, data, inputs, seeds, samples, least, as_json)
    if data is not None or least is not None:
        raise click.UsageError("--data and --least are for --baseline")
    with progress(as_json) as tell:
        checker = Checker(request.path, request.options(), oracle, inputs, tell)
        cases = tuple(checker.case(seed) for seed in range(seeds))
        worst = min(cases, key=lambda case: case.verdicts[0].difference.severity if case.verdicts else (0.0, 0.0))
        found = checker.per_node(worst) if per_node and worst.actual else None
        fault = find_fault(checker, worst) if bisect and not worst.good else None
        saved: tuple[str, ...] = ()
        if fault is not None and fault.part is not None:
            saved = write_part(fault.part, Path(save or f"{Path(request.path).stem}.part.onnx"))
    report = Report(
        request.path, request.target, request.precision, oracle, cases, found, fault, bisect, saved
    )  # fmt: skip
    return shown(report.good, report.record, lines(report), as_json)


def compare(
    request: Request, baseline: str, data: str | None, inputs: tuple[str, ...], seeds: int, samples: int,
    least: float | None, as_json: bool,
) -> int:  # fmt: skip
    """`check --baseline`: the quantised model beside the float model."""
    from ..check.sensitivity import Comparison
    from ..check.sensitivity_report import SensitivityReport, lines

    options = request.options()
    with progress(as_json) as tell:
        tell("pairing")
        comparison = Comparison(request.path, baseline, options)
        found = comparison.run(samples_of(baseline, data, inputs, options, min(seeds, samples), samples), tell)
    report = SensitivityReport(request.path, baseline, found, least, made_up=data is None and not inputs)
    return shown(report.good, report.record, lines(report), as_json)


def shown(good: bool, record: Callable[[], Any], lines: Iterable[Any], as_json: bool) -> int:
    """Prints a report, as JSON or line by line; the exit code."""
    from ..terminal import console

    if as_json:
        click.echo(json.dumps(record(), indent=2))
    else:
        screen = console()
        for line in lines:
            screen.print(line)
    return 0 if good else DIFFERS


def samples_of(
    path: str, data: str | None, inputs: tuple[str, ...], options: Any, seeds: int, limit: int
) -> Iterator[Mapping[str, Any]]:
    """The samples that `data` holds, or as many made-up ones as there are seeds."""
    import onnx

    from ..bench.subjects import inputs_of
    from ..check.inputs import ports_of
    from ..quantize.data import Samples

    if data is not None:
        graph = onnx.load(path, load_external_data=False).graph
        yield from Samples(data, ports_of(graph, {tensor.name: tensor for tensor in graph.initializer}), limit)
    else:
        for seed in range(seeds):
            yield inputs_of(path, options.dims or {}, options.shapes or {}, inputs, seed)[1]


def progress(quiet: bool) -> Any:
    """Shows on a terminal what is being done."""
    from contextlib import contextmanager

    from rich.console import Console

    @contextmanager
    def shown() -> Any:
        screen = Console(stderr=True)
        if quiet or not screen.is_terminal:
            yield lambda what: None
            return
        with screen.status("reading") as status:
            yield lambda what: status.update(what)

    return shown()


def write_part(part: Any, path: Path) -> tuple[str, ...]:
    """Writes a part of a model, and its inputs beside it; the files' names."""
    import numpy as np

    path.write_bytes(part.model.SerializeToString())
    arrays = {name: array for name, array in part.inputs.items() if isinstance(array, np.ndarray)}
    if not arrays:
        return (str(path),)
    beside = path.with_suffix(".npz")
    plain = {name: a if a.dtype.isbuiltin == 1 else a.astype(np.float32) for name, a in arrays.items()}
    np.savez(beside, **plain)  # type: ignore[arg-type]
    return str(path), str(beside)
