"""A state of Scan that broadcasts with what its body reads: only the run tells that its size stays the same."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnxc


def test_state_of_open_size() -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        scanned (float[a] start, float[t, 4] x) => (float[b] last, float[t, c] all) {
            last, all = Scan <num_scan_inputs = 1, body = step (float[a] state, float[4] row)
                => (float[b] next, float[b] out) {
                next = Add (state, row)
                out = Identity (next)
            }> (start, x)
        }
    """)
    start, x = np.arange(4, dtype=np.float32), np.ones((3, 4), np.float32)
    last, everything = onnxc.compile(model)(start, x)
    np.testing.assert_array_equal(last, start + 3)
    np.testing.assert_array_equal(everything, start + np.arange(1, 4, dtype=np.float32)[:, None])
