"""`onnxc plan`: where every buffer lies in the arena, and how far that is from the best possible."""

from __future__ import annotations

import json
from dataclasses import replace

import click

from .request import Request, compiling

HEIGHT, LISTED = 20, 12


@click.command(short_help="Show the memory plan: arena, lower bound, a map.")
@click.option("--no-fusion", is_flag=True, help="Plan with every operator as a kernel of its own.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all buffers.")
@compiling
def command(request: Request, no_fusion: bool, as_json: bool) -> None:
    """Prints the memory plan of MODEL: the size of the arena that holds all intermediate results, the lower bound (the
    largest sum of bytes that are alive at once), and a map: steps from left to right, addresses from bottom to top.

    \b
    onnxc plan model.onnx
    onnxc plan model.onnx --dim batch=8
    onnxc plan model.onnx --no-fusion --json

    A symbolic dimension that is not given counts as 32 here; the plan itself holds for any size.
    """
    from ...passes import DEFAULT_PIPELINE
    from ..plan_view import PlanView, arena_map, bytes_text
    from ..terminal import console, table_of

    if no_fusion:
        request = replace(request, pipeline=without_fusion(request.options().pipeline or DEFAULT_PIPELINE))
    plan, program = request.plan()
    view = PlanView.of(plan, program)
    if as_json:
        click.echo(json.dumps(view.record(), indent=2))
        return
    screen = console()
    sizes = f" at {', '.join(f'{name} = {size}' for name, size in plan.sizes.items())}" if plan.sizes else ""
    screen.print(
        f"arena {bytes_text(plan.arena_bytes)} ({plan.arena_bytes} bytes){sizes}\n"
        f"lower bound {bytes_text(plan.lower_bound)}, ratio {view.ratio:.4f}; "
        f"all {len(view.buffers)} buffers apart would be {bytes_text(sum(b.bytes for b in view.buffers))}"
        + (f"; {view.in_place} more results are written in place" if view.in_place else "")
    )
    if not view.buffers:
        return
    nodes = f" ({', '.join(view.peak_origin)})" if view.peak_origin else ""
    screen.print(f"fullest at step {view.peak} of {view.steps}{nodes}\n")
    for line in arena_map(view, min(screen.width, 120), HEIGHT):
        screen.print(line)
    table = table_of("", "buffer", ">bytes", ">offset", "steps")
    letters = view.letters()
    for buffer in view.buffers[:LISTED]:
        span = f"{buffer.first}-{buffer.last}"
        table.add_row(letters[buffer.name], buffer.name, f"{buffer.bytes:,}", f"{buffer.offset:,}", span)
    screen.print()
    screen.print(table)
    if len(view.buffers) > LISTED:
        screen.print(f"... and {len(view.buffers) - LISTED} smaller ones (--json lists all)")


def without_fusion(pipeline: str) -> str:
    """The pipeline with its fusion held to one operator a kernel."""
    from ...passes.attention import Attention
    from ...passes.fuse import Fuse
    from ...passes.pipeline import parse_pipeline

    passes = [item for item in parse_pipeline(pipeline) if not isinstance(item, Attention)]
    return ",".join(str(replace(p, max_members=1) if isinstance(p, Fuse) else p) for p in passes)
