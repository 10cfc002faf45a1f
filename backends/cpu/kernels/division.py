"""How the work of a kernel is divided among threads: by rows of what it makes, or by columns.

A thread finds in its core's cache what it wrote in the kernel before; what another core wrote comes at a fraction of
that speed (measured between two core complexes: 7 bytes a cycle, against 30 from the own second-level cache). Rows
(pixels, tokens) are divided alike by all kernels, so those that can be are; then every thread reads all columns of the
right operand. Where that is larger than the rest, as in the last layers of a network for images, columns are divided.
"""

from __future__ import annotations

from ....ir.dims import Dim

TASKS_PER_THREAD = 4
"""Tasks per thread that even out threads which progress at different speeds."""
FOREIGN_BYTES_PER_CYCLE = 6
"""Of data that another core has written."""
SHARED_BYTES_PER_CYCLE = 20
"""Of constants, from the last-level cache."""


def divides_rows(left_bytes: int, right_bytes: int, made_bytes: int, threads: int) -> bool:
    """Whether rows are to be divided rather than columns, by the cycles that each thread waits for what it does not
    have: rows of the left operand and of what the next kernel reads, or columns of a constant right operand."""
    if threads < 2:
        return False
    by_columns = (left_bytes + made_bytes / threads) / FOREIGN_BYTES_PER_CYCLE
    return right_bytes / SHARED_BYTES_PER_CYCLE < by_columns


def row_blocks(rows: int, others: Dim, threads: int) -> int:
    """How many blocks of rows there are where rows are divided: for every thread as many as give it enough tasks, of
    which each block has `others`."""
    each = -(-TASKS_PER_THREAD // others) if isinstance(others, int) and others else TASKS_PER_THREAD
    return max(1, min(rows, threads * each))
