"""`onnxc compile`: native code for other programs, or an artifact that `onnxc.load` runs."""

from __future__ import annotations

from pathlib import Path

import click

from .request import Request, compiling

SUFFIXES = (".onnxc", ".so", ".o")


@click.command(short_help="Write native code, or an artifact for onnxc.load.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), help="What to write [default: MODEL's name with .onnxc]."
)
@compiling
def command(request: Request, output: str | None) -> None:
    """Compiles MODEL ahead of time.

    \b
    onnxc compile model.onnx                            model.onnxc: code and weights for onnxc.load, without compiling
    onnxc compile model.onnx -o model.so                a shared library and a C header (links by the system's cc)
    onnxc compile model.onnx -o model.o                 an object file and a C header
    onnxc compile model.onnx -o model.o --threads 1     one that needs no library, not even for threads
    onnxc compile model.onnx --target x86-64-v3         for any machine of that kind
    onnxc compile model.onnx --target cuda:sm_80,sm_90  for GPUs; cuda alone for all that are common, and PTX
    """
    path = Path(output or f"{Path(request.path).stem}.onnxc")
    if path.suffix not in SUFFIXES:
        raise click.UsageError(f"{path}: what is written is told by the suffix, one of {', '.join(SUFFIXES)}")
    if request.target.startswith("cuda") and path.suffix != ".onnxc":
        raise click.UsageError(f"{path}: code for GPUs is written as an artifact, .onnxc")
    from ...compiler import artifact

    written = artifact.write(request.compiled(), path, threaded=request.threads != 1)
    for file in written:
        click.echo(f"{file}: {file.stat().st_size / 1024:.0f} KB")
