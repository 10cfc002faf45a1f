"""Everything about a GPU in one command: is it right, how fast is it.

    python -m onnxc.tools.gpu_check --output report.json

In this order: ONNX's own cases by family of operators; real models and architectures against ONNX Runtime on the CPU,
in all precisions; how fast single operators are, beside what the GPU copies and PyTorch reaches; whole networks beside
PyTorch's. What is not installed (PyTorch, torchvision, transformers, ONNX Runtime) is left out, and so is what does not
fit in the time; the report says so.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click

from .gpu.check import Plan, run
from .gpu.processes import TaskError
from .gpu.summary import print_summary
from .terminal import console

MINUTES = 8.5


@click.command()
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("gpu_report.json"),
    show_default=True,
    help="The report, written anew after each part.",
)
@click.option(
    "--models",
    "folders",
    type=click.Path(exists=True, file_okay=False),
    multiple=True,
    help="A folder of .onnx files to check; model.npz or model.CASE.npz beside model.onnx are its inputs. Repeatable.",
)
@click.option(
    "--minutes", type=click.FloatRange(min=0), default=MINUTES, show_default=True, help="Wall-clock time for all of it."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes that compile (default: all processors but two).")
@click.option("--setup", default="", hidden=True, help="module:function to call first in every process.")
def main(output: Path, folders: tuple[str, ...], minutes: float, jobs: int | None, setup: str) -> None:
    """Checks this machine's GPU: correctness first, then speed. Exit codes: 0 all agrees, 1 something differs, 2 there
    is no GPU that can be used."""
    plan = replace(Plan(), folders=folders, jobs=jobs or 0, setup=setup)
    try:
        report = run(plan, output, minutes, lambda line: click.echo(line, err=True))
    except TaskError as error:
        click.echo(f"gpu_check: {error.message}", err=True)
        sys.exit(2)
    print_summary(report.content, console())
    click.echo(f"the report is {output}")
    sys.exit(1 if report.content["differs"] else 0)


if __name__ == "__main__":
    main()
