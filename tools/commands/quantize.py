"""`onnxc quantize`: a model with integers in place of floats, as standard ONNX."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..quantize.settings import Progress, Settings, Summary

SHOWN = 10
"""Nodes left in float that are named."""


@click.command(short_help="Quantise a model after training: integers in place of floats.")
@click.argument("path", metavar="MODEL", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--data",
    metavar="WHAT",
    help="What to calibrate on: .npz with arrays by the inputs' names, .npy or a picture for the only input, a folder "
    "of such files, or module:function, which yields dicts of arrays. A first axis that an input lacks is of samples.",
)
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), metavar="FILE", help="[default: MODEL's name.int8.onnx]"
)
@click.option(
    "--method",
    type=click.Choice(("mse", "minmax", "percentile", "entropy")),
    default="mse",
    show_default=True,
    help="How ranges of activations are chosen: with the least mean square error, all values, all but the outermost, "
    "or with the least loss of information.",
)
@click.option(
    "--percentile", type=float, default=99.99, show_default=True, help="What --method percentile keeps on either side."
)
@click.option(
    "--activations", type=click.Choice(("u8", "i8")), default="u8", show_default=True, help="The type of activations."
)
@click.option("--symmetric", is_flag=True, help="Activations around zero (4-bit weights too) instead of a zero point.")
@click.option("--per-tensor", is_flag=True, help="One scale for all weights of a layer instead of one per channel.")
@click.option(
    "--bias-correction/--no-bias-correction",
    "correction",
    default=True,
    show_default=True,
    help="Biases make up for the mean error of rounded weights.",
)
@click.option(
    "--smooth/--no-smooth",
    default=True,
    show_default=True,
    help="Make channels of very different size alike before they share a scale (SmoothQuant).",
)
@click.option(
    "--integer-outputs",
    is_flag=True,
    help="Every convolution writes integers, also before SiLU and the like: ONNX Runtime computes no others with "
    "integers. It costs accuracy.",
)
@click.option(
    "--weights-only",
    type=click.Choice(("int4", "int8")),
    help="Only weights: those of matrix products in blocks of 4 bits, or all in 8 per channel.",
)
@click.option("--block", type=int, default=32, show_default=True, help="Weights that share a 4-bit scale.")
@click.option(
    "--dynamic",
    is_flag=True,
    help="Ranges found at run time: MatMulInteger, ConvInteger (images), DynamicQuantizeLSTM. ONNX Runtime is slow at "
    "ConvInteger: --keep Conv for it. With --data too, all is calibrated but LSTM.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="NODE",
    help="Leave in float: an operator, or a pattern of nodes' names. Repeatable.",
)
@click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use N samples of the data.")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Samples that run at once [default: what fits].")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the samples where there are more.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="At most N threads [default: all CPUs].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    path: str,
    data: str | None,
    output: str | None,
    method: str,
    percentile: float,
    activations: str,
    symmetric: bool,
    per_tensor: bool,
    correction: bool,
    smooth: bool,
    integer_outputs: bool,
    weights_only: str | None,
    block: int,
    dynamic: bool,
    keep: tuple[str, ...],
    samples: int | None,
    batch: int | None,
    seed: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Quantises MODEL and writes standard ONNX, which other engines run too: QuantizeLinear and DequantizeLinear around
    convolutions and matrix products (with --data), or one of the forms that need no data.

    Convolutions are merged with the batch normalisation behind them. The same model, data and options give the same
    bytes.

    \b
    onnxc quantize model.onnx --data calibration.npz -o small.onnx
    onnxc quantize model.onnx --data images/ --samples 200 --method entropy
    onnxc quantize model.onnx --data mydata:batches --keep Gemm --keep "/head/*"
    onnxc quantize bert.onnx --dynamic                  no data; matrix products, convolutions and LSTM
    onnxc quantize speech.onnx --data s.npz --dynamic   calibrated, but LSTM, whose ranges are found at run time
    onnxc quantize llm.onnx --weights-only int4         blocks of 32 weights along the sums
    onnxc check small.onnx --baseline model.onnx --data calibration.npz      what it costs, value by value
    """
    from ..quantize.driver import quantised_draft
    from ..quantize.settings import Settings

    target = Path(output or f"{Path(path).stem}.{weights_only or 'int8'}.onnx")
    if target.exists() and target.samefile(path):
        raise click.UsageError(f"{target}: the model itself would be overwritten")
    with shown(as_json) as tell:
        settings = Settings(
            method, percentile, activations, symmetric, per_tensor, correction, smooth, integer_outputs, weights_only,
            block, dynamic, keep, samples, batch, seed, threads, progress=tell,
        )  # fmt: skip
        draft, summary = quantised_draft(path, data, settings)
        files = draft.save(target)
    if as_json:
        click.echo(json.dumps({"model": path, "files": [*map(str, files)], **summary.record()}, indent=2))
    else:
        report(summary, settings, files)


def report(summary: Summary, settings: Settings, files: list[Path]) -> None:
    """Prints what became of the model."""
    from ...compiler.limits import format_bytes

    what = ", ".join(f"{count} {operator}" for operator, count in summary.quantised.items())
    if summary.kind == "static":
        how = f"{settings.activations} activations by {settings.method} on {summary.samples} samples"
        click.echo(f"{what} in integers, {summary.tensors} values stored in 8 bits ({how})")
    else:
        click.echo(f"{what}: {'ranges at run time' if settings.dynamic else f'weights of {settings.weights_only}'}")
    if summary.widened:
        click.echo("what was in 16-bit floats is computed in f32 (the types of inputs and outputs are as they were)")
    for name, operator, reason in summary.left[:SHOWN]:
        click.echo(f"left in float: {name} ({operator}): {reason}")
    if len(summary.left) > SHOWN:
        others = Counter(operator for _, operator, _ in summary.left[SHOWN:])
        click.echo(f"left in float: {', '.join(f'{count} more {name}' for name, count in others.items())}")
    sizes = f"weights {format_bytes(summary.bytes_before)} -> {format_bytes(summary.bytes_after)}"
    click.echo(f"{', '.join(map(str, files))}: {sizes}")


@contextmanager
def shown(quiet: bool) -> Iterator[Progress]:
    """Shows on a terminal what is being done, and how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    screen = Console(stderr=True)
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True, disable=quiet or not screen.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def tell(what: str, done: int, total: int | None) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield tell
