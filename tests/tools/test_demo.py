"""The demo: what it says is what the model, its files and another engine say."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxc.tools import cli, demo


@pytest.fixture(scope="module")
def measured() -> demo.Facts:
    return demo.measure(3)[0]


def test_it_is_right_as_often_as_onnx_runtime(measured: demo.Facts) -> None:
    held_out = np.load(demo.FILES / "digits.npz")
    session = onnxruntime.InferenceSession(demo.FILES / "digits.onnx", providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(None, {"image": held_out["images"][:, None].astype(np.float32)})
    right = int((np.asarray(probabilities).argmax(1) == held_out["labels"]).sum())
    assert (measured.correct, measured.images) == (right, len(held_out["labels"]))
    assert measured.label == held_out["labels"][3]
    assert measured.confidence == pytest.approx(float(np.asarray(probabilities)[3].max()), abs=1e-4)


def test_every_node_is_in_one_kernel(measured: demo.Facts) -> None:
    nodes = {node.name for node in onnx.load(demo.FILES / "digits.onnx").graph.node if node.op_type != "Flatten"}
    computed = [name for _, origin in measured.kernels for name in origin]
    assert nodes <= set(computed)
    assert len(measured.kernels) < len(nodes)  # something was fused


def test_numbers_are_plausible(measured: demo.Facts) -> None:
    assert measured.arena_bytes >= measured.lower_bound_bytes > 0
    assert measured.batch_seconds > 0
    assert measured.single_seconds > 0
    assert measured.shown == 3


def test_the_picture_has_two_characters_a_pixel() -> None:
    lines = demo.picture(np.array([[0, 16], [8, 1]], np.uint8))
    assert lines[0] == "  @@"
    assert len(lines[1]) == 4
    assert lines[1][0] not in " @"


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["demo", "--digit", "5"]) == 0
    text = capsys.readouterr().out
    assert "held-out images" in text
    assert "stem/conv + stem/norm + stem/relu" in text
    assert "lower bound" in text
    assert cli.run(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shown"] == 0
