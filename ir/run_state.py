"""Words that a program shares with who runs it: what checks found (`passes/checks.py`), and what random operators go by
(`passes/draws.py`). Imports little: a model that is loaded needs no compiler."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from .errors import IndexRangeError

RECORD = 3
"""Words of a check's record: whether it was written, the number found, and the limit."""
STATE = "$random"
"""The memory of the words that random operators go by."""
WORDS = 8
"""Of these, for the program and the loops around an operator; those deeper share the last."""


def message(text: str, value: int, limit: int) -> str:
    """The text of a check with what its record tells."""
    return text.replace("{value}", str(value)).replace("{limit}", str(limit))


def words_of(checks: int) -> int:
    """Words of the memory that so many checks write to: one that tells whether any did, and their records."""
    return 1 + RECORD * checks if checks else 0


def raise_faults(texts: Sequence[str], words: Sequence[int]) -> None:
    """Raises IndexRangeError with the message of the first check that has written its record."""
    for position, text in enumerate(texts):
        written, value, limit = words[1 + RECORD * position : 1 + RECORD * (position + 1)]
        if written:
            raise IndexRangeError(message(text, int(value), int(limit)))


def started() -> np.ndarray:
    """The words for a program that begins now: the first is random, so two programs draw different numbers."""
    words = np.zeros(WORDS, np.uint64)
    words[0] = int.from_bytes(os.urandom(8), "little")
    return words


def with_state(constants: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The constants of a program, with words of its own where it has random operators."""
    return {**constants, STATE: started()} if STATE in constants else constants
