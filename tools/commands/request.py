"""What all commands that compile have in common: the model, how to compile it, and what is told meanwhile."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...ir.errors import ModelError, OnnxcError, ShapeError
from ...ir.target import PRECISIONS

if TYPE_CHECKING:
    from ...compiler.compiled import Compiled, MemoryPlan
    from ...compiler.deferred import Deferred
    from ...compiler.interface import Interface
    from ...compiler.options import Model, Options
    from ...ir.graph import Graph
    from ...ir.program import Program
    from ...passes.pipeline import Pass

TEXT_SUFFIXES = (".txt", ".onnxir")
"""Files that hold a graph as text."""


class Pair(click.ParamType[tuple[str, str]]):
    """NAME=VALUE."""

    name = "pair"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, sign, text = value.partition("=")
        if not sign or not name:
            self.fail(f"{value!r} is not of the form NAME=VALUE", param, ctx)
        return name, text


class Size(Pair):
    """SYMBOL=N."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name, text = super().convert(value, param, ctx)
        if not text.isdecimal():
            self.fail(f"{value!r}: {text!r} is not a number of elements", param, ctx)
        return name, int(text)


class Shape(Pair):
    """INPUT=1x3x224x224; INPUT= alone for a scalar."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name, text = super().convert(value, param, ctx)
        sizes = text.split("x") if text else []
        if not all(size.isdecimal() for size in sizes):
            self.fail(f"{value!r}: a shape is written as 1x3x224x224", param, ctx)
        return name, tuple(map(int, sizes))


class Bytes(click.ParamType[int]):
    """An amount of memory: 2G."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from ...compiler.limits import parse_bytes

        try:
            return parse_bytes(value)
        except OnnxcError as error:
            self.fail(str(error), param, ctx)


@dataclass(frozen=True)
class Request:
    """What the options common to `run`, `compile`, `dump` and `plan` ask for."""

    path: str
    weights: str | None
    dims: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    target: str
    threads: int | None
    precision: str
    winograd: str
    strassen: str
    exact: bool
    pipeline: str | None
    time_passes: bool
    max_memory: int | None = None
    times: list[tuple[str, float, int]] = field(default_factory=list)

    def model(self) -> Model:
        """The model's path, or the graph that a text file holds."""
        if not self.path.endswith(TEXT_SUFFIXES):
            return self.path
        from ...compiler.graph_text import read_graph

        return read_graph(self.path, self.weights)

    def options(self) -> Options:
        from ...compiler.options import Options

        return Options(
            self.target, self.dims, self.shapes, self.threads, self.precision, self.pipeline or "",
            winograd=self.winograd, strassen=self.strassen, exact=self.exact, max_memory=self.max_memory,
        )  # fmt: skip

    def executable(self) -> Interface | Deferred:
        """The model compiled for this process, with progress shown; an artifact is loaded."""
        if self.artifact:
            from ...compiler.api import load

            return load(self.path, threads=self.threads, max_memory=self.max_memory)
        from ...compiler.driver import compile_model

        with self.watched() as options:
            return compile_model(self.model(), options)

    def compiled(self) -> Compiled:
        """The code for any target."""
        if self.artifact:
            from ...compiler.artifact import read

            return read(self.path)
        from ...compiler.driver import compiled_model

        with self.watched() as options:
            return compiled_model(self.model(), options)

    def program(self) -> Program:
        """The model lowered, without machine code."""
        from ...compiler.driver import graph_of, program_of
        from ...compiler.limits import check_program
        from ...compiler.options import target_of
        from ...ir.errors import HostNeeded

        with self.watched() as options:
            try:
                program = program_of(graph_of(self.model(), options), target_of(options))
                if self.max_memory is not None:
                    check_program(program, self.max_memory)
                return program
            except HostNeeded as error:
                how = "Python runs a part of this model: `onnxc dump --stage program` lists its steps"
                raise HostNeeded(f"{error}; {how}") from error

    def plan(self) -> tuple[MemoryPlan, Program | None]:
        """The memory plan, with the program that it is for where the model is no artifact."""
        from ...compiler.compiled import MemoryPlan
        from ...compiler.options import resolve_target
        from ...ir.program import ALIGNMENTS

        if self.artifact:
            return self.compiled().plan, None
        program = self.program()
        return MemoryPlan.of(program.plan, alignment=ALIGNMENTS[resolve_target(self.target).kind]), program

    @property
    def artifact(self) -> bool:
        """Whether the model is compiled already. click.UsageError where an option asks to compile it in another way."""
        if not self.path.endswith(".onnxc"):
            return False
        plain = self.target == "host" and self.precision == "f32" and (self.winograd, self.strassen) == ("auto", "auto")
        if self.dims or self.shapes or self.pipeline is not None or not plain or self.weights or self.exact:
            raise click.UsageError(f"{self.path} is compiled: give the model to compile it in another way")
        return True

    @contextmanager
    def watched(self) -> Iterator[Options]:
        """Options with which passes and kernels are shown on a terminal as they are done, and timed if wanted."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        options = self.options()
        columns = (TextColumn("{task.description:>14}"), BarColumn(), TimeElapsedColumn())
        start = time.perf_counter()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            passes = bar.add_task("importing", total=None)
            kernels = bar.add_task("lowering", total=None, visible=False)

            def after(item: Pass, graph: Graph, seconds: float) -> None:
                self.times.append((str(item), seconds, len(graph.nodes)))

            def progress(what: str, done: int, total: int) -> None:
                is_pass = what != "kernels"
                bar.update(passes if is_pass else kernels, completed=done, total=total, description=what)
                bar.update(kernels, visible=not is_pass or done == total)

            # Whoever wants the times of passes wants them to run: no compiled model is taken from the cache then.
            try:
                yield replace(options, progress=progress, after=after if self.time_passes else None)
            except ShapeError as error:
                if self.dims or self.shapes:
                    raise
                # Nobody has given a size: the model contradicts itself.
                raise ModelError(str(error)) from error
        if self.time_passes:
            self._print_times(time.perf_counter() - start)

    def _print_times(self, total: float) -> None:
        rest = total - sum(seconds for _, seconds, _ in self.times)
        rows = [*self.times, ("import, lowering, code", rest, 0)]
        for name, seconds, nodes in rows:
            click.echo(f"{seconds * 1e3:10.1f} ms  {name}{f'  ({nodes} nodes)' if nodes else ''}", err=True)
        click.echo(f"{total * 1e3:10.1f} ms  in all", err=True)


def _complete_dim(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The symbols of the model on the command line, for shell completion."""
    # The option that lacks its value still keeps click from telling which argument is the model.
    paths = [path for path in (ctx.params.get("path"), *ctx.args) if path and Path(path).suffix == ".onnx"]
    if not paths or not Path(paths[0]).is_file():
        return []
    import onnx

    values = onnx.load(paths[0], load_external_data=False).graph.input
    names = {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    return [f"{name}=" for name in sorted(names) if name.startswith(incomplete)]


def _complete_target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from ...ir.cuda_devices import DEVICES
    from ...ir.target import ARM_CPUS, X86_CPUS

    gpus = ("cuda", *(f"cuda:{name}" for name in DEVICES))
    return [name for name in ("host", *gpus, *X86_CPUS, *ARM_CPUS) if name.startswith(incomplete)]


_OPTIONS = (
    click.argument("path", metavar="MODEL", type=click.Path(exists=True, dir_okay=False)),
    click.option("--dim", "dims", type=Size(), multiple=True, metavar="SYMBOL=N", shell_complete=_complete_dim,
                 help="Compile for this size of a symbolic dimension: --dim batch=1. Repeatable."),
    click.option("--shape", "shapes", type=Shape(), multiple=True, metavar="INPUT=SHAPE",
                 help="Compile for this shape of an input: --shape x=1x3x224x224. Repeatable."),
    click.option("--target", default="host", show_default=True, shell_complete=_complete_target, metavar="TARGET",
                 help="What to compile for: host, x86-64-v3, znver4, neoverse-n1, ... each with +feature; cuda, "
                 "cuda:sm_90, cuda:sm_80,sm_90,compute_90, ..."),
    click.option("--threads", type=click.IntRange(min=1), metavar="N", help="At most N threads [default: all CPUs]."),
    click.option("--precision", type=click.Choice(PRECISIONS), default="f32", show_default=True,
                 help="Weights and what lies between kernels in 16 bits, or products of tf32 (GPUs); sums are f32."),
    click.option("--winograd", type=click.Choice(("off", "auto")), default="auto", show_default=True,
                 help="Convolutions by minimal filtering where it is faster; errors are one to six times larger."),
    click.option("--strassen", type=click.Choice(("off", "auto", "two")), default="auto", show_default=True,
                 help="Products by constant matrices of seven half as large instead of eight, where it is faster; "
                 "packed weights are 1.75 times larger (two: 3.1 times, done twice)."),
    click.option("--exact", is_flag=True, help="Keep to the definition: no --winograd, no --strassen, and products of "
                 "dequantized tensors of reals (integers give a result that differs by one step now and then)."),
    click.option("--pipeline", metavar="PASSES", help='Passes to run, such as "canonicalize,fold,fuse{max_inputs=8}".'),
    click.option("--weights", type=click.Path(exists=True, dir_okay=False), metavar="MODEL.onnx",
                 help="Where MODEL is a graph as text (.txt): the ONNX model that holds its constants."),
    click.option("--max-memory", type=Bytes(), metavar="BYTES",
                 help="Refuse a model whose constants, or intermediate values and outputs, take more: 500M, 2G "
                 "[default: this machine's memory]."),
    click.option("--time-passes", is_flag=True, help="Print how long each pass took."),
)  # fmt: skip


def compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the argument MODEL and the options above, as its first argument `request`."""

    @functools.wraps(function)
    def command(
        path: str,
        dims: tuple[tuple[str, int], ...],
        shapes: tuple[tuple[str, tuple[int, ...]], ...],
        target: str,
        threads: int | None,
        precision: str,
        winograd: str,
        strassen: str,
        exact: bool,
        pipeline: str | None,
        weights: str | None,
        time_passes: bool,
        max_memory: int | None,
        **others: Any,
    ) -> Any:
        request = Request(
            path,
            weights,
            dict(dims),
            dict(shapes),
            target,
            threads,
            precision,
            winograd,
            strassen,
            exact,
            pipeline,
            time_passes,
            max_memory,
        )
        return function(request, **others)

    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def note(text: str) -> None:
    """Says on stderr what a person may want to know and a script does not."""
    click.secho(text, err=True, dim=sys.stderr.isatty())
