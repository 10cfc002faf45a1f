"""Tables on the terminal."""

import sys
from typing import Literal

from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 200
"""Columns where nobody looks: in a file or a pipe nothing is cut off."""


def console() -> Console:
    """Prints as it is told: no markup, no colours of its own."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def table_of(*titles: str) -> Table:
    """A table without lines; titles that begin with ">" are over columns of numbers.

    Where the terminal is narrow the last column goes over several lines.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        side: Literal["left", "right"] = "right" if title.startswith(">") else "left"
        table.add_column(title.lstrip(">"), justify=side, overflow="ellipsis", no_wrap=title != titles[-1])
    return table
