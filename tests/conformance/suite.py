"""ONNX's own test suite: its cases with their inputs and expected outputs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
FAILING = Path(__file__).with_name("failing.txt")
FAILING_CUDA = Path(__file__).with_name("failing_cuda.txt")


@functools.cache
def cases() -> dict[str, Any]:
    """All cases by "kind/name"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {f"{kind}/{case.name}": case for kind in KINDS for case in load_model_tests(kind=kind)}


def failing(file: Path = FAILING) -> dict[str, str]:
    """Cases known to fail, each with its reason; these lists may only shrink."""
    lines = (line.split("#", 1) for line in file.read_text().splitlines() if line.strip() and line[0] != "#")
    return {name.strip(): reason.strip() for name, reason in lines}


def model_of(case: Any) -> onnx.ModelProto:
    return case.model if case.model_dir is None else onnx.load(Path(case.model_dir) / "model.onnx")


def data_sets(case: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Pairs of inputs and expected outputs."""
    if case.model_dir is None:
        yield from case.data_sets
        return
    for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
        yield _arrays(folder, "input"), _arrays(folder, "output")


def _arrays(folder: Path, what: str) -> list[np.ndarray]:
    count = len(list(folder.glob(f"{what}_*.pb")))
    return [numpy_helper.to_array(onnx.load_tensor(folder / f"{what}_{position}.pb")) for position in range(count)]


def assert_agrees(actual: Any, expected: Any, case: Any) -> None:
    """The same element type and shape; values within the suite's own tolerance, integers and text exactly."""
    assert isinstance(actual, np.ndarray), f"{type(actual)} for {type(expected)}"
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if expected.dtype.kind in "biuOSU" and expected.dtype.itemsize:
        np.testing.assert_array_equal(actual, expected)
    else:
        wide = np.complex128 if expected.dtype.kind == "c" else np.float64
        np.testing.assert_allclose(actual.astype(wide), expected.astype(wide), rtol=case.rtol, atol=case.atol)
