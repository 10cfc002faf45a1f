"""A real model quantised: speech is still found where it was, on ONNX Runtime and compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxc
import onnxruntime
from onnxc.tools.quantize.driver import quantised_draft
from onnxc.tools.quantize.settings import Settings

from .fetch import fetch
from .silero import SPEECH_THRESHOLD, Arrays, Model, frames, recording, sequence_probabilities

SPEECH = Path(__file__).parent / "data" / "speech.wav"


def by_onnxruntime(model: onnx.ModelProto | Path) -> Model:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]

    def run(inputs: Arrays) -> Arrays:
        return dict(zip(names, session.run(None, inputs), strict=True))

    return run


def test_speech_is_found_where_it_was() -> None:
    path = fetch("silero", "silero_vad/data/silero_vad_16k_sequence.onnx")
    signal, rate = recording(SPEECH)
    state = np.zeros((1, 1, 128), np.float32)
    chunks = frames(signal, rate)
    model = onnxc.quantize(path, [{"input": chunks[: len(chunks) // 2], "h": state, "c": state}])
    # The waveform has more range than 8 bits, the spectrum behind it is rounded channel by channel.
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) >= 5
    expected = np.array(sequence_probabilities(by_onnxruntime(path), signal, rate))
    theirs = np.array(sequence_probabilities(by_onnxruntime(model), signal, rate))
    ours = np.array(sequence_probabilities(onnxc.compile(model).run, signal, rate))
    speech = expected > SPEECH_THRESHOLD
    assert 0.2 < speech.mean() < 0.98
    for found in (theirs, ours):
        assert np.mean((found > SPEECH_THRESHOLD) != speech) <= 0.005
        assert np.abs(found - expected).mean() <= 0.01
    assert np.array_equal(theirs > SPEECH_THRESHOLD, ours > SPEECH_THRESHOLD)


def test_what_is_inside_branches_becomes_integers() -> None:
    """The whole network is in the branches of an If for the two sampling rates, and branches are in these."""
    path = fetch("silero", "silero_vad/data/silero_vad.onnx")
    signal, rate = recording(SPEECH)
    chunks, state = frames(signal, rate), np.zeros((2, 1, 128), np.float32)
    data = [{"input": chunk[None], "state": state, "sr": np.array(rate)} for chunk in chunks[::4]]
    draft, summary = quantised_draft(path, data, Settings())
    assert summary.quantised == {"Conv": 5}
    reasons = sorted(reason for _, operator, reason in summary.left if operator == "Conv")
    assert reasons[0].startswith("8 bits hold too little") and set(reasons[1:]) == {"no sample gets here"}
    model = draft.embedded()
    for feed in data[::8]:
        expected, theirs, ours = (
            run(feed) for run in (by_onnxruntime(path), by_onnxruntime(model), onnxc.compile(model).run)
        )
        assert abs(float(expected["output"].item()) - float(theirs["output"].item())) < 0.1
        for name, array in theirs.items():
            np.testing.assert_allclose(ours[name], array, atol=1e-4)
