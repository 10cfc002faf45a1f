"""`onnxc run`: compile a model, run it, show or save what it gives."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .request import Pair, Request, compiling, note

SHOWN = 4
"""First elements of an output that are printed."""


@click.command(short_help="Compile a model and run it.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=WHAT",
    help="A file (.npy, .npz, .pb, an image), numbers (1,2,3), random, zeros or ones. Repeatable.",
)
@click.option(
    "--output",
    "outputs",
    type=Pair(),
    multiple=True,
    metavar="NAME=FILE",
    help="Save an output as .npy or .pb. Repeatable.",
)
@click.option(
    "--save", type=click.Path(file_okay=False), metavar="FOLDER", help="Save every output as FOLDER/NAME.npy."
)
@click.option("--repeat", type=click.IntRange(min=1), default=None, metavar="N", help="Run N times and print the time.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the inputs that are made up.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@compiling
def command(
    request: Request,
    inputs: tuple[str, ...],
    outputs: tuple[tuple[str, str], ...],
    save: str | None,
    repeat: int | None,
    seed: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Compiles MODEL (or takes its code from the cache), runs it, and prints or saves the outputs.

    Inputs that are not given are made up, and a note says how.

    \b
    onnxc run model.onnx                                all inputs random
    onnxc run model.onnx --input x=image.npy            from a file
    onnxc run model.onnx --input photo.jpg              a picture for the only input, 0..1, resized if it must be
    onnxc run model.onnx --input ids=101,2023,102 --input mask=ones
    onnxc run model.onnx --dim batch=8 --repeat 100     the time of a batch of 8
    onnxc run model.onnx --input x=x.npy --output y=y.npy
    onnxc run edited.txt --weights model.onnx           a dumped and edited graph
    """
    import numpy as np

    from ...ir.errors import OnnxcError
    from .. import arrays

    start = time.perf_counter()
    executable = request.executable()
    compile_seconds = time.perf_counter() - start
    ports = executable.inputs
    known = {port.name for port in executable.outputs}
    for name, _ in outputs:
        if name not in known:
            raise OnnxcError(f"the model has no output {name}; it gives {', '.join(map(str, executable.outputs))}")

    given, fills = arrays.read_arrays(inputs, ports)
    sizes = arrays.sizes_for(ports, given)
    random = np.random.default_rng(seed)
    for port in ports:
        if port.name not in given and not port.dtype.startswith("optional("):
            fill = fills.get(port.name, "random")
            given[port.name] = arrays.made_up(port, sizes, fill, random)
            if port.name not in fills and not as_json:
                shape = ", ".join(map(str, given[port.name].shape))
                note(f"{port}: not given, {fill} {port.dtype}[{shape}]")

    results = executable.run(given)
    seconds = [_timed(executable, given) for _ in range(repeat or 0)]
    found = arrays.leaves(results)
    for name, path in outputs:
        if name not in found:
            raise OnnxcError(f"the output {name} is no array; --save FOLDER writes the arrays in it")
        arrays.write_array(Path(path), found[name])
    if save is not None:
        Path(save).mkdir(parents=True, exist_ok=True)
        for name, array in found.items():
            arrays.write_array(Path(save) / f"{arrays.file_name(name)}.npy", array)

    facts = {name: summary(array) for name, array in found.items()}
    if as_json:
        record: dict[str, Any] = {
            "model": request.path,
            "inputs": {n: {"dtype": str(a.dtype), "shape": list(a.shape)} for n, a in arrays.leaves(given).items()},
            "outputs": facts,
            "compile_seconds": compile_seconds,
        }
        if seconds:
            record["run_seconds"] = {"median": statistics.median(seconds), "min": min(seconds), "runs": len(seconds)}
        click.echo(json.dumps(record, indent=2))
        return
    _print_table(facts)
    if seconds:
        median, least = (1e3 * x for x in (statistics.median(seconds), min(seconds)))
        click.echo(f"{len(seconds)} runs: median {median:.3f} ms, least {least:.3f} ms")


def _timed(executable: Any, inputs: Mapping[str, Any]) -> float:
    start = time.perf_counter()
    executable.run(inputs)
    return time.perf_counter() - start


def summary(array: Any) -> dict[str, Any]:
    """What is told of an output: type, shape, range and mean of its finite elements, how many are not, the first."""
    import numpy as np

    facts: dict[str, Any] = {"dtype": str(array.dtype), "shape": list(array.shape)}
    flat = array.reshape(-1)
    if array.dtype.kind not in "OSUc":
        wide = flat.astype(np.float64)
        finite = wide[np.isfinite(wide)]
        facts |= {"min": None, "mean": None, "max": None, "not_finite": int(wide.size - finite.size)}
        if finite.size:
            facts |= {"min": float(finite.min()), "mean": float(finite.mean()), "max": float(finite.max())}
    exact = array.dtype.kind in "iub"
    facts["first"] = [
        (bool(x) if array.dtype.kind == "b" else int(x)) if exact else _number(x) for x in flat[:SHOWN].tolist()
    ]  # fmt: skip
    return facts


def _number(element: Any) -> float | str:
    """A number that JSON has, else its text."""
    try:
        number = float(element)
    except (TypeError, ValueError):
        return str(element)
    return number if math.isfinite(number) else str(number)


def _print_table(facts: Mapping[str, Mapping[str, Any]]) -> None:
    from ..terminal import console, table_of

    def short(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    odd = any(fact.get("not_finite") for fact in facts.values())
    table = table_of(
        "output", "type", "shape", ">min", ">mean", ">max", *([">not finite"] if odd else []), "first values"
    )
    for name, fact in facts.items():
        shape = ", ".join(map(str, fact["shape"]))
        numbers = [fact.get(key) for key in ("min", "mean", "max", *(["not_finite"] if odd else []))]
        more = " ..." if math.prod(fact["shape"]) > SHOWN else ""
        first = " ".join(map(short, fact["first"])) + more
        table.add_row(name, fact["dtype"], f"[{shape}]", *map(short, numbers), first)
    console().print(table)
