"""Naming the type of a file with magika: the bytes that its network sees, and the label of what it answers.

Follows the package `magika` (mode "high confidence"). A model is any callable {name: array} -> {name: array}.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Model = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Config:
    """The part of magika's config.min.json that inference needs."""

    begin_size: int  # bytes from the start of the file
    end_size: int  # bytes from its end
    block_size: int  # bytes read at either end, before white space is stripped
    padding_token: int
    labels: tuple[str, ...]
    thresholds: dict[str, float]
    default_threshold: float

    @staticmethod
    def read(path: Path) -> "Config":
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries["mid_size"] or entries["use_inputs_at_offsets"]:
            raise ValueError(f"{path}: features from the middle of a file are not supported")
        return Config(
            entries["beg_size"],
            entries["end_size"],
            entries["block_size"],
            entries["padding_token"],
            tuple(entries["target_labels_space"]),
            entries["thresholds"],
            entries["medium_confidence_threshold"],
        )


def features(content: bytes, config: Config) -> NDArray[np.int32]:
    """[begin + end] tokens: the first bytes without leading white space, padded after; the last ones, padded before."""
    begin = content[: config.block_size].lstrip()[: config.begin_size]
    end = content[-config.block_size :].rstrip()[-config.end_size :]
    tokens = np.full(config.begin_size + config.end_size, config.padding_token, np.int32)
    tokens[: len(begin)] = np.frombuffer(begin, np.uint8)
    tokens[len(tokens) - len(end) :] = np.frombuffer(end, np.uint8)
    return tokens


def file_types(model: Model, contents: list[bytes], config: Config) -> list[tuple[str | None, float]]:
    """Label and score of each file, all in one batch; None for a label whose score is below its threshold."""
    (scores,) = model({"bytes": np.stack([features(content, config) for content in contents])}).values()
    named: list[tuple[str | None, float]] = []
    for row in scores:
        label, score = config.labels[int(row.argmax())], float(row.max())
        sure = score >= config.thresholds.get(label, config.default_threshold)
        named.append((label if sure else None, score))
    return named
