"""An independent check of memory plans: shares no code with the planner."""

from collections.abc import Iterable


def check_plan(intervals: Iterable[tuple[int, int, int, int]], arena_size: int) -> None:
    """Prove that buffers (first step, last step, offset, size), steps included, sizes in bytes, never share a byte.

    Raises AssertionError naming, by their positions, two buffers that are live at one step and overlap, or one that is
    not inside the arena of `arena_size` bytes.
    """
    placed: list[tuple[int, int, int, int, int]] = []
    for number, (first, last, offset, size) in enumerate(intervals):
        if first > last or size < 0:
            raise AssertionError(f"buffer {number} is no buffer: steps {first} to {last}, {size} bytes")
        if offset < 0 or offset + size > arena_size:
            raise AssertionError(f"buffer {number} at {offset} + {size} is outside the arena of {arena_size} bytes")
        for other, other_first, other_last, other_offset, other_size in placed:
            share_a_step = max(first, other_first) <= min(last, other_last)
            shared_bytes = min(offset + size, other_offset + other_size) - max(offset, other_offset)
            if share_a_step and shared_bytes > 0:
                raise AssertionError(
                    f"buffers {other} and {number} share {shared_bytes} bytes at step {max(first, other_first)}: "
                    f"{other_offset} + {other_size} and {offset} + {size}"
                )
        placed.append((number, first, last, offset, size))
