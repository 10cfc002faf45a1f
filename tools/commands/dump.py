"""`onnxc dump`: the model as text at every stage on its way to machine code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .request import Request, compiling

if TYPE_CHECKING:
    from ...ir.graph import Graph
    from ...passes.pipeline import Pass

STAGES = (
    "import", "graph", "program", "kernels", "vectors", "llvm", "asm", "cuda", "ptx", "sass", "resources",
)  # fmt: skip


@click.command(short_help="Print a model at any stage of its compilation.")
@click.option("--stage", type=click.Choice(STAGES), default="graph", show_default=True, help="What to print.")
@click.option("--after", metavar="PASS", help="With --stage graph: after this pass (its last run, or its number).")
@click.option("--kernel", metavar="NAME", help="Only this kernel: its name, a part of it, or an ONNX node's name.")
@click.option("--all", "everything", is_flag=True, help="Every stage, and the graph after every pass, into a folder.")
@click.option("-o", "--output", type=click.Path(), help="Write to this file; with --all, into this folder.")
@compiling
def command(
    request: Request, stage: str, after: str | None, kernel: str | None, everything: bool, output: str | None
) -> None:
    """Prints MODEL as the compiler sees it.

    \b
    import    the graph as it was read, one meaning per operator
    graph     the graph after the passes: what was folded and fused
    program   what runs: kernels in order, buffers in the arena
    kernels   the loop nests
    vectors   the loop nests with explicit lanes, functions as arithmetic
    llvm      LLVM IR
    asm       the assembly of the target

    \b
    For a GPU (--target cuda:sm_90), instead of the last three:
    cuda      CUDA C
    ptx       PTX
    sass      machine code, by the CUDA toolkit's disassembler
    resources registers, shared memory, spills and occupancy of each kernel

    \b
    onnxc dump model.onnx                               the final graph
    onnxc dump model.onnx --after fold                  after the last run of that pass
    onnxc dump model.onnx --stage kernels --kernel Softmax_12
    onnxc dump model.onnx --stage asm --target neoverse-n1 --kernel gemm
    onnxc dump model.onnx --all -o stages               all of it, as files

    A graph that was written with -o graph.txt may be edited and compiled: onnxc run graph.txt --weights model.onnx.
    """
    if everything:
        if output is None or request.artifact:
            raise click.UsageError("--all writes many files: name a folder for them with -o FOLDER, and a model")
        folder = Path(output)
        count = 0
        for name, text in all_stages(request):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            count += 1
        click.echo(f"{count} files in {folder}")
        return
    if after is not None and stage != "graph":
        raise click.UsageError("--after is for --stage graph")
    if kernel is not None and stage in ("import", "graph", "program"):
        raise click.UsageError(f"--kernel is for the stages {', '.join(STAGES[3:])}")
    text = one_stage(request, stage, after, kernel)
    if output is None:
        click.echo(text, nl=False)
    else:
        Path(output).write_text(text, encoding="utf-8")


def graphs(request: Request) -> list[tuple[str, str]]:
    """("import", text) and then (pass, text) for the graph after each pass."""
    from ...compiler.driver import imported, passed
    from ...compiler.graph_text import after_line

    with request.watched() as options:
        graph = imported(request.model(), options)
        found = [("import", after_line([]) + str(graph))]
        done: list[Pass] = []

        def after(item: Pass, result: Graph, seconds: float) -> None:
            done.append(item)
            found.append((item.name, after_line(done) + str(result)))
            if options.after is not None:
                options.after(item, result, seconds)

        passed(graph, replace(options, after=after))
    return found


def one_stage(request: Request, stage: str, after: str | None, kernel: str | None) -> str:
    """The text that is asked for; of a model that Python runs in part, the list of its steps as the stage "program".

    OnnxcError for an unknown pass or kernel.
    """
    from ...ir.errors import HostNeeded, UnsupportedError

    if request.artifact:
        return request.compiled().dump(stage)
    try:
        return _text_of_stage(request, stage, after, kernel)
    except HostNeeded as error:
        if stage == "program":
            return request.executable().dump(stage)
        raise UnsupportedError(f"{error}; Python runs a part of this model: --stage program lists its steps") from error


def _text_of_stage(request: Request, stage: str, after: str | None, kernel: str | None) -> str:
    from ...compiler.dump import stage_text
    from ...compiler.options import resolve_target
    from ...ir.errors import OnnxcError

    if stage == "import":
        return graphs(replace(request, pipeline=""))[0][1]
    if stage != "graph":
        return stage_text(stage, request.program(), resolve_target(request.target), kernel)
    found = graphs(request)
    if after is None:
        return found[-1][1]
    if after.isdecimal() and int(after) < len(found):
        return found[int(after)][1]
    texts = [text for name, text in found[1:] if name == after]
    if not texts:
        passes = ", ".join(f"{number} {name}" for number, (name, _) in enumerate(found))
        raise OnnxcError(f"the pipeline has no pass {after!r}; it runs {passes}")
    return texts[-1]


def all_stages(request: Request) -> Iterator[tuple[str, str]]:
    """(file, text) of everything."""
    from ...backends.cuda.report import has_disassembler
    from ...compiler.dump import KERNEL_STAGES, kernel_texts
    from ...compiler.options import resolve_target

    for number, (name, text) in enumerate(graphs(request)):
        yield f"{number:02}-{name}.txt", text
    program, target = request.program(), resolve_target(request.target)
    yield "program.txt", str(program)
    for stage, suffix in KERNEL_STAGES[target.kind].items():
        if stage == "sass" and not has_disassembler():
            continue
        for name, text in kernel_texts(stage, program, target):
            yield f"{stage}/{name}.{suffix}", text
