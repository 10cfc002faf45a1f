"""Every operator of ONNX with every element type that its schema admits, compiled, against ONNX's reference.

All narrow and complex types are tried at each run, of the others a fixed fifth; all of them with ONNXC_TYPES=all.
"""

from __future__ import annotations

import os
import zlib

import numpy as np
import onnxc
import pytest
from admitted_types import Typed, admitted, examples, schemas, typed
from gpu import emulated_gpu
from onnx.reference import ReferenceEvaluator
from onnxc.ir.dtypes import BF16, DType

SHARE = 5
OTHERS = ("Sequence", "String", "Optional", "Regex", "SplitToSequence", "ConcatFromSequence", "ImageDecoder")
"""What the names of operators on text, sequences, optionals and images begin with: other tests have those."""
ONLY_RUNS = {
    **dict.fromkeys(("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"), "random numbers"),
    **dict.fromkeys(("Bernoulli", "Multinomial"), "random numbers"),
    "AffineGrid": "the reference gives f32 whatever the type",
    "Det": "the reference gives f64 whatever the type",
    "GridSample": "the reference truncates integers after each axis",
    "LayerNormalization": "the reference gives mean and deviation the type of the input, not that of stash_type",
    "RMSNormalization": "the reference gives the type of the input, not that of the scale",
    "ReduceSumSquare": "the reference widens integers",
}
"""Operators whose results may differ from the reference's in type or value, with the reason."""
ONLY_RUN_AS = {
    ("DequantizeLinear", "f8e8m0"): "what has no sign is made of negative numbers: ONNX leaves open of which",
    ("BitCast", "bool"): "bits that are no truth value",
    ("Resize", "c64"): "the reference drops imaginary parts",
    ("Resize", "c128"): "the reference drops imaginary parts",
}


def test_every_operator_has_an_example() -> None:
    assert all(op.startswith(OTHERS) for op in schemas() if op not in examples())


def chosen(case: Typed) -> bool:
    narrow = case.dtype.is_narrow or case.dtype.kind == "complex"
    return narrow or os.environ.get("ONNXC_TYPES") == "all" or zlib.crc32(case.name.encode()) % SHARE == 0


def tolerance(dtype: DType) -> float:
    return 2e-2 if dtype == BF16 else 5e-3 if dtype.bits <= 16 else 1e-4


def assert_close(found: np.ndarray, wanted: np.ndarray, dtype: DType, what: str) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), what
    wide = np.complex128 if wanted.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore"):
        a, b = found.astype(wide), wanted.astype(wide)
    np.testing.assert_allclose(a, b, rtol=tolerance(dtype), atol=tolerance(dtype) / 10, err_msg=what)


@pytest.mark.parametrize("op", [op for op in examples() if not op.startswith(OTHERS)])
def test_all_admitted_types(op: str) -> None:
    made = (typed(op, variable, dtype) for variable, dtype in admitted(op))
    for case in filter(None, made):
        if not chosen(case):
            continue
        try:
            found = onnxc.compile(case.model).run(case.inputs)
        except onnxc.OnnxcError as error:
            raise AssertionError(f"{case.name}: {error}") from error
        if op in ONLY_RUNS or (op, case.dtype.name) in ONLY_RUN_AS:
            continue
        try:
            with np.errstate(all="ignore"):
                wanted = ReferenceEvaluator(case.model).run(None, case.inputs)
        except Exception:
            continue  # it does not run with this type
        for name, array in zip(found, wanted, strict=True):
            assert_close(found[name], np.asarray(array), case.dtype, f"{case.name}, {name}")


def _has_one_on_a_gpu(op: str) -> bool:
    return any(dtype.name == "c64" or dtype.is_narrow for _, dtype in admitted(op))


GPU = [op for op in examples() if not op.startswith((*OTHERS, "Random")) and _has_one_on_a_gpu(op)]


@pytest.mark.parametrize("op", GPU)
def test_narrow_and_complex_types_on_a_gpu(op: str) -> None:
    """The same as on a CPU; one type of each kind."""
    with emulated_gpu():
        for variable, dtype in admitted(op):
            case = typed(op, variable, dtype) if dtype.name in ("c64", "f8e5m2", "i4") else None
            if case is not None:
                wanted = onnxc.compile(case.model, target="host").run(case.inputs)
                found = onnxc.compile(case.model, target="cuda").run(case.inputs)
                for name, array in wanted.items():
                    assert_close(found[name], array, case.dtype, f"{case.name}, {name}")
