"""`onnxc completion`: the script that makes a shell complete this command line."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(short_help="Print the script for completion in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Prints the script that makes SHELL complete commands, options, targets and a model's dimensions.

    \b
    onnxc completion bash >> ~/.bashrc
    onnxc completion zsh >> ~/.zshrc
    onnxc completion fish > ~/.config/fish/completions/onnxc.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "onnxc", "_ONNXC_COMPLETE").source())
