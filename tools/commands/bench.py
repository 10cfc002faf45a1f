"""`onnxc bench`: models timed beside other engines on the same cores."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .request import Shape, Size, note

if TYPE_CHECKING:
    from ..bench.catalogue import Subject
    from ..bench.rounds import Result, Setting


class Numbers(click.ParamType[tuple[int, ...]]):
    """1,2,4"""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = value.split(",")
        if not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} is no list of numbers such as 1,2", param, ctx)
        return tuple(map(int, parts))


def _complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    from ..bench.catalogue import CATALOGUE

    names = [CompletionItem(name) for name in CATALOGUE if name.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


def _list(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Prints the models that have names."""
    if not value:
        return
    from ..bench.catalogue import CATALOGUE
    from ..terminal import console, table_of

    table = table_of("name", "model", "from")
    for name, subject in CATALOGUE.items():
        origin = {
            "torch": "PyTorch's export, random weights",
            "light": "ONNX's topologies, random weights",
            "quantized": "the same in 8 or 4 bits",
        }
        table.add_row(name, subject.title, origin.get(subject.source, f"package {subject.source}"))
    console().print(table)
    ctx.exit()


@click.command(short_help="Time models beside other engines.")
@click.argument("models", nargs=-1, required=True, shell_complete=_complete_model)
@click.option(
    "--against",
    default="onnxruntime",
    show_default=True,
    metavar="ENGINES",
    help="Names, by commas: onnxruntime, openvino; NAME:bf16 for a precision; none for onnxc alone.",
)
@click.option("--precision", default="", metavar="TYPE", help="Of onnxc: f32, bf16, f16.")
@click.option("--winograd", type=click.Choice(("off", "auto")), default="auto", show_default=True, help="Of onnxc.")
@click.option(
    "--strassen", type=click.Choice(("off", "auto", "two")), default="auto", show_default=True, help="Of onnxc."
)
@click.option("--target", default="host", show_default=True, metavar="TARGET", help="Of onnxc: such as haswell.")
@click.option("--threads", type=Numbers(), default=(1,), metavar="N,N", help="Threads; one table row for each number.")
@click.option("--batch", type=Numbers(), default=(), metavar="N,N", help="Sizes of the open first axis of the inputs.")
@click.option("--dim", "dims", type=Size(), multiple=True, metavar="SYMBOL=N", help="Fix a symbolic size. Repeatable.")
@click.option("--shape", "shapes", type=Shape(), multiple=True, metavar="INPUT=1x3x8", help="Fix an input's shape.")
@click.option(
    "--input", "given", multiple=True, metavar="NAME=WHAT",
    help="As of `onnxc run`; others are made up to suit what the model does with them.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True)
@click.option("--seconds", type=float, default=0.3, show_default=True, help="Of each engine in each round.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the inputs that are made up.")
@click.option("--no-cold", is_flag=True, help="Do not time compiling without caches.")
@click.option("--profile", is_flag=True, help="Show the time of each kernel instead, in ONNX's names.")
@click.option("--top", type=click.IntRange(min=1), default=25, show_default=True, help="Lines of a profile.")
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="Show the models that have names."
)
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Write all that was measured to a file.")
def command(
    models: tuple[str, ...], against: str, precision: str, winograd: str, strassen: str, target: str,
    threads: tuple[int, ...], batch: tuple[int, ...], dims: tuple[tuple[str, int], ...],
    shapes: tuple[tuple[str, tuple[int, ...]], ...], given: tuple[str, ...], rounds: int, seconds: float, seed: int,
    no_cold: bool, profile: bool, top: int, file: str | None,
) -> None:  # fmt: skip
    """Times MODELS (files, or names of `--list`) beside other engines: each in a process of its own, on the same
    processors, in turns of fractions of a second, the others stopped meanwhile. Outputs are compared first.

    \b
    onnxc bench model.onnx                              beside ONNX Runtime, one thread
    onnxc bench model.onnx --against onnxruntime,openvino,openvino:bf16 --threads 1,2
    onnxc bench model.onnx --batch 1,8 --json table.json
    onnxc bench resnet50 bert_base                      models that are made, or fetched, when first asked for
    onnxc bench model.onnx --profile                    where the time goes, and how near the machine's limits

    "ratio" is the engine's time over onnxc's, the median over the rounds: above 1 onnxc is faster. "differs" is how far
    outputs are from those of the first other engine, relative to the largest. Memory is the peak of the process.
    In a profile "of limit" is the least time that the operations and bytes of a kernel can take on this machine (both
    measured, the best being kept) over its time.
    """
    from ..bench.rounds import OWN, measure

    engines = [f"{OWN}:{precision}" if precision else OWN, *_engines(against)]
    records: list[dict[str, Any]] = []
    options = {"winograd": winograd, "strassen": strassen, "target": target}
    for setting in _settings(models, threads, batch, dict(dims), dict(shapes), given, seed, options):
        note(f"{setting.name}: {_sizes(setting)}")
        if profile:
            records.append(_profile(setting, precision, top))
            continue
        results = measure(setting, engines, rounds, seconds, not no_cold)
        records.append(_record(setting, results))
        _print(setting, results)
    if file is not None:
        record = {"machine": _machine(), "versions": _versions(engines), "settings": records}
        Path(file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _engines(text: str) -> list[str]:
    from importlib.metadata import PackageNotFoundError

    from ...ir.errors import OnnxcError
    from ..bench.engines import LOADERS, version_of

    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
    for name in names:
        try:
            version_of(name)
        except KeyError:
            raise OnnxcError(f"no engine is called {name!r}; there are {', '.join(LOADERS)}") from None
        except PackageNotFoundError:
            package = name.partition(":")[0]
            raise OnnxcError(f"{package} is not installed: pip install {package}") from None
    return names


def _settings(
    models: Sequence[str], threads: Sequence[int], batch: Sequence[int], dims: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]], given: Sequence[str], seed: int, options: Mapping[str, str],
) -> list[Setting]:  # fmt: skip
    """Every model at every batch size and number of threads, with inputs that suit it."""
    from ..bench.rounds import Setting
    from ..bench.subjects import inputs_of, leading_symbols

    found = []
    for model in models:
        name, path, usual = _subject(model)
        leading = leading_symbols(path) if batch else []
        if batch and not leading:
            note(f"{name}: the first axes of its inputs are not open, --batch changes nothing")
        for size in batch or (None,):
            chosen = {**dims, **dict.fromkeys(leading, size)} if size is not None else dims
            sizes, inputs = inputs_of(path, chosen, {**usual.shapes, **shapes}, given or usual.inputs, seed)
            found += [Setting(path, sizes, inputs, count, name, options) for count in threads]
    return found


def _subject(model: str) -> tuple[str, str, Subject]:
    """(name, path, what to time it with) of a file or of a model in the catalogue. Raises OnnxcError for neither."""
    from ...ir.errors import OnnxcError
    from ..bench.catalogue import CATALOGUE, Subject, model_path

    if Path(model).is_file():
        return Path(model).stem, model, Subject(Path(model).stem, "file")
    if model not in CATALOGUE:
        raise OnnxcError(f"{model} is neither a file nor the name of a model: `onnxc bench --list` shows the names")
    return model, str(model_path(model)), CATALOGUE[model]


def _profile(setting: Setting, precision: str, top: int) -> dict[str, Any]:
    """Prints the kernels that take most of the time; all of them as a record."""
    from ...compiler.deferred import Deferred
    from ...compiler.driver import compile_model, compiled_model
    from ...compiler.options import Options
    from ...ir.errors import ValueNeeded
    from ...ir.target import Target
    from ...passes.work import NOTHING
    from ..bench.limits import limits_of
    from ..bench.profile import profile
    from ..terminal import console, table_of

    target = Target.parse(setting.options["target"])
    how: dict[str, Any] = {**setting.options, "target": target}
    options = Options(dims=setting.dims, threads=setting.threads, precision=precision or "f32", **how)
    limits = limits_of(target)
    try:
        compiled = compiled_model(setting.path, options)
    except ValueNeeded:
        executable = compile_model(setting.path, options)
        assert isinstance(executable, Deferred)
        compiled = executable.serving(setting.inputs).compiled
    entries, _ = profile(compiled, setting.inputs, setting.threads)
    total = sum(entry.median for entry in entries)
    table = table_of(">us", ">share", ">GOP/s", ">GB/s", ">of limit", "kernel", "nodes")
    rows = []
    for entry in sorted(entries, key=lambda entry: -entry.median):
        seconds = max(entry.median, 1e-9)
        limit = limits.least_seconds(entry.load, setting.threads) / seconds
        rows.append({
            "kernel": entry.kernel, "nodes": list(entry.origin), "seconds": entry.median,
            "operations": entry.load.operations, "bytes": entry.load.bytes, "of_limit": limit,
        })  # fmt: skip
        if len(rows) <= top:
            more = f" +{len(entry.origin) - 2}" if len(entry.origin) > 2 else ""
            operations, moved = entry.load.operations / seconds / 1e9, entry.load.bytes / seconds / 1e9
            table.add_row(
                f"{1e6 * entry.median:.1f}", f"{100 * entry.median / total:.1f}%", f"{operations:.1f}", f"{moved:.1f}",
                f"{limit:.2f}", entry.kernel, ", ".join(entry.origin[:2]) + more,
            )  # fmt: skip
    console().print(table)
    whole = sum((entry.load for entry in entries), NOTHING)
    least = sum(limits.least_seconds(entry.load, setting.threads) for entry in entries)
    best = f"{limits.flops / 1e9:.0f}"
    known = [f"{name}: {limits.dots[name] / 1e9:.0f}" for name in whole.dots if name in limits.dots]
    best += f" ({', '.join(known)})" if known else ""
    click.echo(
        f"{len(entries)} calls, {1e3 * total:.3f} ms: {whole.operations / total / 1e9:.1f} GOP/s of {best} a "
        f"thread, {whole.bytes / total / 1e9:.1f} GB/s; {least / total:.2f} of the limit"
    )
    return {
        "model": setting.name, "threads": setting.threads, "seconds": total, "kernels": rows,
        "limits": asdict(limits),
    }  # fmt: skip


def _sizes(setting: Setting) -> str:
    shapes = (f"{name} {list(array.shape)}" for name, array in setting.inputs.items())
    return f"{', '.join(shapes)}; {setting.threads} thread{'s' * (setting.threads > 1)}"


def _print(setting: Setting, results: Sequence[Result]) -> None:
    from ..terminal import console, table_of

    table = table_of(
        "engine", ">ms", ">+-", ">ratio", ">load s", ">cold s", ">memory MB", ">code KB", ">differs", "remarks"
    )
    own = results[0]
    for result in results:
        if result.error or not result.rounds:
            table.add_row(result.engine, *[""] * 8, result.error)
            continue
        ratio = "" if result is own or not own.rounds or own.error else f"{result.ratio(own):.2f}"
        table.add_row(
            result.engine,
            f"{1e3 * result.median:.4g}",
            f"{100 * result.spread:.0f}%",
            ratio,
            f"{result.load:.2f}",
            "" if result.cold is None else f"{result.cold:.2f}",
            "" if result.memory is None else f"{result.memory / 1e6:.0f}",
            "" if result.code_bytes is None else f"{result.code_bytes / 1e3:.0f}",
            "" if result.difference is None else f"{result.difference:.1e}",
            "",
        )
    console().print(table)


def _record(setting: Setting, results: Sequence[Result]) -> dict[str, Any]:
    own = results[0]
    usable = bool(own.rounds) and not own.error
    return {
        "model": setting.name,
        "sizes": dict(setting.dims),
        "inputs": {name: [str(array.dtype), list(array.shape)] for name, array in setting.inputs.items()},
        "threads": setting.threads,
        "engines": {
            result.engine: {
                **{key: value for key, value in vars(result).items() if key != "engine" and value not in (None, "")},
                **({"median": result.median, "spread": result.spread} if result.rounds else {}),
                **({"ratio": result.ratio(own)} if result.rounds and usable and not result.error else {}),
            }
            for result in results
        },
    }


def _machine() -> dict[str, Any]:
    from ...ir.target import Target

    host = Target.parse("host")
    return {"cpu": host.cpu, "target": str(host), "system": platform.platform(), "python": platform.python_version()}


def _versions(engines: Sequence[str]) -> dict[str, str]:
    from ..bench.engines import version_of

    return {engine: version_of(engine) for engine in engines}
