"""`onnxc ops`: the operators, their types, and where each is compiled."""

from __future__ import annotations

import json
from dataclasses import asdict

import click


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from ..operator_table import rows

    return [row.name for row in rows() if row.name.lower().startswith(incomplete.lower())]


@click.command(short_help="List the operators and where each is compiled.")
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=_complete)
@click.option("--markdown", is_flag=True, help="The table of README.md.")
@click.option("--missing", is_flag=True, help="ONNX's operators that are refused.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def command(names: tuple[str, ...], markdown: bool, missing: bool, as_json: bool) -> None:
    """Lists the operators: what defines each (a file of ir/ops, or ONNX's own schema), the element types that it takes,
    and what makes its code on CPUs and on GPUs: a schedule of backends/ (cpu/gemm.py stands in backends/cpu/kernels,
    scan.py in backends/kernels), or the loop nest that follows from its definition.

    \b
    onnxc ops                     all
    onnxc ops Softmax conv        those with these words in their names
    onnxc ops --missing           what ONNX has and onnxc refuses
    """
    from ...ir.errors import OnnxcError
    from .. import operator_table
    from ..terminal import console, table_of

    if missing:
        click.echo("\n".join(operator_table.missing()))
        return
    found = [row for row in operator_table.rows() if not names or any(n.lower() in row.name.lower() for n in names)]
    if not found:
        raise OnnxcError(f"no operator has {' or '.join(map(repr, names))} in its name")
    if as_json:
        click.echo(json.dumps([asdict(row) for row in found], indent=2))
    elif markdown:
        click.echo(operator_table.markdown(found), nl=False)
    else:
        table = table_of("operator", "defined in", "types", "on CPUs", "on GPUs")
        for row in found:
            table.add_row(row.name, row.defined, " ".join(row.types), row.compiled, row.on_gpu)
        console().print(table)
        if len(found) == 1 and found[0].meaning:
            click.echo(f"\n{found[0].meaning}")
