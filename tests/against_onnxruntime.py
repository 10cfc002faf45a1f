"""One compiled model against ONNX Runtime, at several sizes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxc
import onnxruntime
from small_models import Array


def assert_agree(model: onnx.ModelProto, *cases: Mapping[str, Array], tolerance: float = 1e-5) -> None:
    """One compile of the model gives what ONNX Runtime gives for every case.

    `tolerance` is the largest difference, as a part of the largest value expected.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    executable = onnxc.compile(model)
    for case in cases:
        found = executable.run(case)
        for name, wanted in zip(names, session.run(names, dict(case)), strict=True):
            assert (found[name].shape, found[name].dtype) == (wanted.shape, wanted.dtype), name
            if wanted.dtype.kind == "f":
                largest = np.abs(wanted, dtype=np.float64).max(initial=0.0)
                np.testing.assert_allclose(found[name], wanted, rtol=0, atol=tolerance * largest, err_msg=name)
            else:
                np.testing.assert_array_equal(found[name], wanted, err_msg=name)
