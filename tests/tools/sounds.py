"""Sounds of some kinds, each with its own pitch, loudness and noise: what the audio model of these tests names."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

CLASSES = ("sine", "square", "sawtooth", "rising", "falling", "plucked", "noise", "trembling")
LENGTH, RATE = 1024, 8000


def sounds(count: int, random: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Waves f32 [count, 1, 1024] in -1..1 at 8 kHz, and their kinds [count]."""
    kinds = random.integers(0, len(CLASSES), count)
    return np.stack([_sound(CLASSES[kind], random) for kind in kinds])[:, None].astype(np.float32), kinds


def _sound(kind: str, random: np.random.Generator) -> NDArray[Any]:
    time, pitch = np.arange(LENGTH) / RATE, 150 * 2 ** (2.5 * random.random())
    turn = pitch * time + random.random()
    if kind in ("rising", "falling"):
        turn = pitch * time * (1 + 6 * time if kind == "rising" else 1.8 - 6 * time)
    wave = {
        "square": lambda: np.sign(np.sin(2 * np.pi * turn)),
        "sawtooth": lambda: 2 * (turn % 1) - 1,
        "plucked": lambda: np.sin(2 * np.pi * turn) * np.exp(-30 * time),
        "noise": lambda: np.convolve(random.normal(size=LENGTH), np.ones(3) / 3, "same"),
        "trembling": lambda: np.sin(2 * np.pi * turn) * (0.5 + 0.5 * np.sin(2 * np.pi * 30 * time)),
    }.get(kind, lambda: np.sin(2 * np.pi * turn))()
    return np.asarray(np.clip(0.05 + 0.9 * random.random(), 0, 1) * wave + random.normal(size=LENGTH) * 0.03)
