"""ONNX's own test suite: its cases with their inputs and expected outputs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnxc.compiler.onnx_backend import OnnxcBackend

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
    """Pairs of inputs and expected outputs: arrays, lists of them for sequences, None for what is absent."""
    if case.model_dir is None:
        yield from (([*map(_value, inputs)], [*map(_value, outputs)]) for inputs, outputs in case.data_sets)
        return
    graph = model_of(case).graph
    for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
        yield _read(folder, "input", graph.input), _read(folder, "output", graph.output)


def _value(data: Any) -> Any:
    """A value of the suite in plain Python: some cases hold their tensors as protobuf messages."""
    for message, convert in _MESSAGES.items():
        if isinstance(data, message):
            return convert(data)
    return data


_MESSAGES: Mapping[type, Callable[[Any], Any]] = {
    onnx.TensorProto: numpy_helper.to_array,
    onnx.SequenceProto: numpy_helper.to_list,
    onnx.OptionalProto: numpy_helper.to_optional,
}


def _read(folder: Path, what: str, ports: Sequence[onnx.ValueInfoProto]) -> list[Any]:
    """The files' values, each of the message that the type of its port asks for."""
    kinds = {"sequence_type": onnx.SequenceProto, "optional_type": onnx.OptionalProto}
    found = []
    for position in range(len(list(folder.glob(f"{what}_*.pb")))):
        message = kinds.get(ports[position].type.WhichOneof("value") or "", onnx.TensorProto)()
        message.ParseFromString((folder / f"{what}_{position}.pb").read_bytes())
        found.append(_value(message))
    return found


def check_case(name: str, device: str = "CPU") -> None:
    """A case compiled for a device gives what the suite expects."""
    case = cases()[name]
    prepared = OnnxcBackend.prepare(model_of(case), device)
    for inputs, outputs in data_sets(case):
        results = prepared.run(inputs)
        assert len(results) == len(outputs)
        for actual, expected in zip(results, outputs, strict=True):
            assert_agrees(actual, expected, case)


def assert_agrees(actual: Any, expected: Any, case: Any) -> None:
    """The same element type and shape; values within the suite's own tolerance, integers and text exactly.

    Sequences are lists that agree element by element, what is absent is None, and text is an array of str objects.
    """
    if expected is None or isinstance(expected, list):
        assert type(actual) is type(expected), f"{type(actual)} for {type(expected)}"
        for one, other in zip(actual or (), expected or (), strict=True):
            assert_agrees(one, other, case)
        return
    assert isinstance(actual, np.ndarray), f"{type(actual)} for {type(expected)}"
    if expected.dtype.kind in "OSU":
        assert actual.dtype == object and all(type(text) is str for text in actual.flat), f"{actual!r} is no text"
        expected = expected.astype(object)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if expected.dtype.kind in "biuOSU" and expected.dtype.itemsize:
        np.testing.assert_array_equal(actual, expected)
    else:
        wide = np.complex128 if expected.dtype.kind == "c" else np.float64
        np.testing.assert_allclose(actual.astype(wide), expected.astype(wide), rtol=case.rtol, atol=case.atol)
