"""The command `onnxc`: finds the command asked for, and turns errors into one line and an exit code.

Exit codes: 0 fine, 1 the compiled result differs, 2 bad usage, 3 bad model, 4 unsupported, 70 a bug of onnxc's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from .. import __version__
from ..ir.errors import (
    DeviceError,
    LimitError,
    ModelError,
    OnnxcError,
    TargetError,
    UnsupportedError,
    ValueNeeded,
    VerifierError,
)

BAD_USAGE, BAD_MODEL, UNSUPPORTED, BUG, INTERRUPTED = 2, 3, 4, 70, 130
COMMANDS = ("run", "compile", "quantize", "check", "dump", "plan", "bench", "ops", "demo", "cache", "completion")


class Commands(click.Group):
    """Loads a command's module when it is needed, in the order in which a new user needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f".commands.{cmd_name}", __package__).command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnxc")
def cli() -> None:
    """Compiles neural networks: ONNX in, machine code out.

    \b
    onnxc demo                               a small trained model on real data
    onnxc run model.onnx                     compile a model and run it on random inputs
    onnxc run model.onnx --input x=x.npy     ... on yours
    onnxc compile model.onnx -o model.so     native code for other programs
    onnxc quantize model.onnx --data d.npz   a smaller, faster model in 8-bit integers
    onnxc check model.onnx                   does it compute what ONNX says
    onnxc dump model.onnx --stage kernels    what the compiler made of it
    onnxc COMMAND --help                     options and examples of a command

    Exit codes: 0 fine, 1 the compiled result differs (check), 2 bad usage, 3 bad model, 4 unsupported. Errors are one
    line; ONNXC_DEBUG=1 shows where.
    """


def exit_code(error: BaseException) -> int:
    """What a script can tell of an error."""
    if isinstance(error, ModelError | VerifierError):
        return BAD_MODEL
    if isinstance(error, UnsupportedError | TargetError | DeviceError | LimitError):
        return UNSUPPORTED
    return BAD_USAGE if isinstance(error, OnnxcError) else BUG


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command line (by default this process's) and exits."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; its exit code. With ONNXC_DEBUG=1 errors are raised."""
    try:
        result = cli.main(arguments, prog_name="onnxc", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`onnxc dump ... | head`): nothing is wrong, and nobody is there to be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("ONNXC_DEBUG", "0") not in ("", "0"):
            raise
        text = " ".join(str(error).split())
        code = exit_code(error)
        if isinstance(error, ValueNeeded):
            text += "; --dim or --shape may settle it, and `onnxc run` compiles when it has seen the values"
        if code == BUG:
            text = f"internal error, {type(error).__name__}: {text} (ONNXC_DEBUG=1 shows where; please report it)"
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(text, err=True)
        return code


__all__ = ["cli", "main", "run"]
