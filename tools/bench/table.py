"""The recorded times of the models in the catalogue, and the README's table of them.

`make bench` measures all; `python -m onnxc.tools.bench.table README.md [MODEL ...]` some, the other rows staying as
they were recorded. Every row is one run in which the engines took turns (see `rounds`).
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ...ir.errors import OnnxcError
from ...ir.target import Target
from ..document import Part
from .catalogue import CATALOGUE, model_path
from .engines import version_of
from .rounds import OWN, Result, Setting, measure
from .subjects import inputs_of, leading_symbols

RECORD = Path(__file__).with_name("record.json")
PART = Part("times", "make bench")
OTHERS = ("onnxruntime", "openvino")
LOW, BATCH = "bf16", 8
COLUMNS = (
    "ms", "ONNX Runtime", "OpenVINO", "ms, 2 threads", "ONNX Runtime", "OpenVINO", "gain by the 2nd thread",
    "compile s, 2 processors", "from the cache s", "code KB",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One run: a model at a batch size (None for that of the model), a number of threads, and onnxc's precision."""

    model: str
    threads: int = 1
    batch: int | None = None
    precision: str = ""

    @property
    def key(self) -> str:
        parts = [self.model, f"threads={self.threads}"]
        parts += [f"batch={self.batch}"] if self.batch else []
        return " ".join([*parts, self.precision] if self.precision else parts)

    @property
    def engines(self) -> tuple[str, ...]:
        if self.precision:
            return (f"{OWN}:{self.precision}", OTHERS[0], *(f"{name}:{self.precision}" for name in OTHERS[1:]))
        return (OWN, *OTHERS)


def rows(models: Sequence[str], threads: Sequence[int]) -> Iterator[Row]:
    """All runs of the table for these models: each at each number of threads, and some in batches and in bf16."""
    for model in models:
        subject = CATALOGUE[model]
        yield from (Row(model, count) for count in threads)
        if subject.batched and 1 in threads:
            yield Row(model, batch=BATCH)
        if subject.low_precision and 1 in threads:
            yield Row(model, precision=LOW)


def run(row: Row, rounds: int, seconds: float) -> dict[str, Any]:
    """What was measured, as it is recorded."""
    subject, path = CATALOGUE[row.model], str(model_path(row.model))
    dims = dict.fromkeys(leading_symbols(path), row.batch) if row.batch is not None else {}
    sizes, inputs = inputs_of(path, dims, subject.shapes, subject.inputs, seed=0)
    setting = Setting(path, sizes, inputs, row.threads, row.model)
    # Compiling without a cache is timed once for each model, on two processors.
    results = measure(setting, row.engines, rounds, seconds, cold=row == Row(row.model, 2))
    own = results[0]
    if own.error:
        raise OnnxcError(f"{row.key}: {own.error}")
    return {
        "date": datetime.date.today().isoformat(),
        "engines": {result.engine: _recorded(result, own) for result in results},
    }


def _recorded(result: Result, own: Result) -> dict[str, Any]:
    if result.error or not result.rounds:
        return {"error": result.error}
    found = {
        "ms": 1e3 * result.median,
        "ratio": result.ratio(own),
        "spread": result.spread,
        "differs": result.difference,
    }
    load = {"load": result.load, "cold": result.cold, "memory": result.memory, "code": result.code_bytes}
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in {**found, **load}.items()
        if value is not None
    }


def markdown(record: Mapping[str, Any]) -> str:
    """The tables: at one and two threads, of quantised models, in batches, in bf16."""
    machine, found = record["machine"], record["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    dates = " to ".join(
        dict.fromkeys((min(row["date"] for row in found.values()), max(row["date"] for row in found.values())))
    )
    lines = [
        f"{machine['cpu']}, {machine['system']}; {versions}; {dates}. Columns of other engines tell their time over "
        "that of onnxc, whose milliseconds the others show: above 1 they are slower.",
    ]
    for title, quantized in (("model, f32", False), ("model, 8 or 4 bits (all engines run the same file)", True)):
        rows = [
            _line(subject.title, found[Row(name).key], found.get(Row(name, 2).key))
            for name, subject in CATALOGUE.items()
            if subject.is_quantized == quantized and Row(name).key in found
        ]
        if rows:
            lines += ["", *_table(title, *COLUMNS), *rows]
    for title, batch, precision in ((f"batch {BATCH}, f32", BATCH, ""), (f"{LOW}, OpenVINO's too", None, LOW)):
        others = [(name, found.get(Row(name, 1, batch, precision).key)) for name in CATALOGUE]
        if any(row for _, row in others):
            lines += ["", *_table(title, "ms", "ONNX Runtime f32", "OpenVINO", "largest difference")]
        for name, row in others:
            if row is not None:
                own = next(iter(row["engines"].values()))
                lines.append(" | ".join([f"| {CATALOGUE[name].title}", *_cells(row), f"{own['differs']:.0e} |"]))
    floats = [Row(name).key for name, subject in CATALOGUE.items() if not subject.is_quantized]
    single = [found[key]["engines"][OTHERS[0]] for key in floats if key in found]
    ratios = [engine["ratio"] for engine in single if "ratio" in engine]
    if ratios:
        mean = statistics.geometric_mean(ratios)
        lines += ["", f"Geometric mean of ONNX Runtime's {len(ratios)} ratios in f32 with one thread: {mean:.2f}."]
    return "\n".join(lines) + "\n"


def _table(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


def _line(title: str, one: Mapping[str, Any], two: Mapping[str, Any] | None) -> str:
    own = one["engines"][OWN]
    second = [""] * 6
    if two is not None:
        other = two["engines"][OWN]
        # Without a compilation before it, "load" was none from the cache.
        compiling = [f"{other['cold']:.1f}", f"{other['load']:.2f}"] if "cold" in other else [""] * 2
        second = [*_cells(two), f"{own['ms'] / other['ms']:.2f}", *compiling]
    return " | ".join([f"| {title}", *_cells(one), *second, f"{own.get('code', 0) / 1e3:.0f} |"])


def _cells(found: Mapping[str, Any]) -> list[str]:
    own, *others = found["engines"].values()
    return [f"{own['ms']:.3g}", *(f"{other['ratio']:.2f}" if "ratio" in other else "fails" for other in others)]


@click.command()
@click.argument("document", type=click.Path(exists=True, dir_okay=False))
@click.argument("models", nargs=-1)
@click.option("--rounds", default=7, show_default=True)
@click.option("--seconds", default=0.25, show_default=True, help="Of each engine in each round.")
@click.option("--threads", default="1,2", show_default=True)
@click.option("--only-write", is_flag=True, help="Write the table of what is recorded, measure nothing.")
def main(document: str, models: tuple[str, ...], rounds: int, seconds: float, threads: str, only_write: bool) -> None:
    """Measures MODELS (all of the catalogue by default), records it beside this file, and renews DOCUMENT's table."""
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {"rows": {}}
    if not only_write:
        import platform

        target = Target.host()
        record["machine"] = {"cpu": target.cpu, "system": f"{platform.system()} {platform.machine()}"}
        record["versions"] = {name: version_of(name) for name in (OWN, *OTHERS)}
        for row in rows(models or list(CATALOGUE), [int(count) for count in threads.split(",")]):
            try:
                record["rows"][row.key] = run(row, rounds, seconds)
            except OnnxcError as error:
                click.echo(f"{row.key}: {error}", err=True)
                continue
            cells = _cells(record["rows"][row.key])
            click.echo(f"{row.key}: {cells[0]} ms; {', '.join(cells[1:])}")
            RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PART.renew(Path(document), lambda: markdown(record))


if __name__ == "__main__":
    sys.exit(main())
