"""`onnxc demo`: a small trained model that ships with the package, on real data."""

import click


@click.command(short_help="Compile a small trained model and run it on handwritten digits.")
@click.option(
    "--digit",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Which held-out image to show.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(digit: int, as_json: bool) -> None:
    """Compiles a convolutional network that was trained on handwritten digits; runs it on images that were held out."""
    from ..demo import show

    show(digit, as_json)
