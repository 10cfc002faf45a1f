"""How products by packed weights are cut: a task for each panel of columns, for many rows and each block of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, dim_min, symbol
from ....ir.dtypes import I64
from ....ir.loops import For, If, Let, Statement
from ....ir.scalars import Buffer
from .packing import Columns, by_columns
from .register_tile import pieces, remainders
from .weight_only_definition import Definition
from .weight_only_panels import WeightPanels


def panel_tasks(
    panels: WeightPanels,
    rows: Dim,
    most: Callable[[Columns], int],
    tile: Callable[[int, Columns, Dim, Dim], Iterable[Statement]],
    definition: Definition,
    tops: Buffer,
) -> Iterator[Statement]:
    """A task for each panel: `tile(rows of it, columns, first column, first row)` for tiles of at most so many rows;
    the definition where not all `tops` of the rows are finite."""
    cut = panels.panels

    def panel(columns: Columns) -> Iterator[Statement]:
        number: Dim = k.index_symbol("task", cut.count) if columns.count != 1 else columns.first
        column, usual = number * cut.tile.width, []
        for index, trips, size, row in row_tiles(rows, most(columns)):
            usual.append(For(index, trips, tuple(tile(size, columns, column, row))))
        yield from panels.aliases(column)
        yield from definition.unless_finite(tops, 0, rows, columns, column, usual)

    task = k.index_symbol("task", cut.count)
    yield For("task", cut.count, by_columns(cut, task, panel), "parallel")


def row_tiles(rows: Dim, most: int) -> Iterator[tuple[str, Dim, int, Dim]]:
    """Loops over tiles of at most so many rows that cover all: (index, trips, rows of a tile, its first row)."""
    done: Dim = 0
    left: Dim = rows
    loops: list[tuple[int, Dim]] = []
    if isinstance(rows, int):
        loops += pieces(rows, -(-rows // -(-rows // most)))
    else:
        for size in (most, *remainders(most)):
            loops.append((size, left // size))
            left = left - left // size * size
    for position, (size, trips) in enumerate(loops):
        index = f"rows{position}"
        yield index, trips, size, done + k.index_symbol(index, trips) * size
        done = done + trips * size


def row_tasks(
    panels: WeightPanels,
    rows: Dim,
    most: int,
    before: Sequence[Statement],
    panel: Callable[[Columns, Dim, Dim, Dim], Iterable[Statement]],
) -> Statement:
    """A task for each panel and block of at most so many rows, blocks of one panel following one another:
    `panel(columns, first row, rows, first column)`."""
    cut = panels.panels
    blocks = -(-rows // most) if isinstance(rows, int) else (rows + (most - 1)) // most
    tasks = cut.count * blocks
    task, first = k.index_symbol("task", tasks), symbol("block_of_rows", 0, blocks - 1) * most
    here = [Let("block_of_rows", task % blocks), Let("panel", task // blocks)]
    here.append(Let("task_rows", dim_min(most, rows - first)))
    count: Dim = symbol("task_rows", 0, most)

    def inner(columns: Columns) -> Iterable[Statement]:
        number: Dim = symbol("panel", 0, cut.count - 1) if columns.count != 1 else columns.first
        return panel(columns, first, count, number * cut.tile.width)

    return For("task", tasks, (*here, *before, *by_columns(cut, symbol("panel"), inner)), "parallel")


def each_tile(
    all_rows: Dim, rows: Dim, size: int, tile: Callable[[int, Dim], Iterable[Statement]]
) -> Iterator[Statement]:
    """All tiles of `size` rows of a task's `rows`, and of what remains of `all_rows`: `tile(rows of it, first row)`."""
    full = rows // size
    yield For("tile", full, tuple(tile(size, k.index_symbol("tile", full) * size)))
    done, left = full * size, rows - full * size
    if isinstance(all_rows, int) and all_rows % size:
        yield If(s.const(0, I64) < s.index(left), tuple(tile(all_rows % size, done)))
    elif not isinstance(all_rows, int):
        for small in remainders(size):
            count = left // small
            yield For("tile", count, tuple(tile(small, done + k.index_symbol("tile", count) * small)))
            done, left = done + count * small, left - count * small
