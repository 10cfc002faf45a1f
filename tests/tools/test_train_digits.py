"""The demo's model: the gradients it was trained with, the training, and what the files say of themselves."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnxc.tools import train_digits
from onnxc.tools.train_digits import Variable

FILES = Path(train_digits.__file__).parent


def random_variables(*shapes: tuple[int, ...]) -> list[Variable]:
    random = np.random.default_rng(5)
    return [Variable(random.normal(0, 1, shape)) for shape in shapes]


def small_network(
    x: Variable, w: Variable, scale: Variable, shift: Variable, matrix: Variable, bias: Variable
) -> Variable:
    """A loss through every operation of the trainer, with a residual branch."""
    straight = train_digits.convolution(x, w)
    normal, _, _ = train_digits.batch_normalisation(straight, scale, shift)
    joined = train_digits.max_pool(train_digits.add(train_digits.relu(normal), straight))
    scores = train_digits.linear(train_digits.average_pool(joined), matrix, bias)
    return train_digits.cross_entropy(scores, np.array([1, 3, 0]))


@pytest.mark.parametrize("which", range(6), ids=["image", "weight", "scale", "shift", "matrix", "bias"])
def test_gradients_agree_with_differences(which: int) -> None:
    variables = random_variables((3, 2, 4, 4), (4, 2, 3, 3), (4,), (4,), (10, 4), (10,))
    small_network(*variables).backward()
    gradient = variables[which].gradient
    assert gradient is not None
    value = variables[which].value
    direction = np.random.default_rng(6).normal(0, 1, value.shape)

    def loss(step: float) -> float:
        variables[which].value = value + step * direction
        return float(small_network(*variables).value)

    assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def test_a_short_training_learns() -> None:
    """Two epochs on a third of the training part, judged on the rest of it: far better than guessing (one tenth)."""
    images, labels, _, _ = train_digits.split_digits()
    part = len(images) // 3
    said: list[str] = []
    scaled: NDArray[np.float32] = (images[:part, None] / train_digits.INK).astype(np.float32)
    network = train_digits.train(scaled, labels[:part], 2, np.random.default_rng(1), said.append)
    right = train_digits.correct_answers(train_digits.onnx_model(network), images[part:], labels[part:])
    assert len(said) == 2
    assert right > 0.4 * len(images[part:])


def test_held_out_images_are_not_trained_on() -> None:
    images, _, held_out, labels = train_digits.split_digits()
    kept = np.load(FILES / "digits.npz")
    assert np.array_equal(kept["images"], held_out)
    assert np.array_equal(kept["labels"], labels)
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in held_out}


def test_the_model_is_as_good_as_it_says() -> None:
    model = onnx.load(FILES / "digits.onnx")
    said = {entry.key: entry.value for entry in model.metadata_props}
    kept = np.load(FILES / "digits.npz")
    right = train_digits.correct_answers(model, kept["images"], kept["labels"])
    assert (right, len(kept["labels"])) == (int(said["held_out_correct"]), int(said["held_out_images"]))
    assert right / len(kept["labels"]) == pytest.approx(float(said["held_out_accuracy"]))
    assert right >= 0.985 * len(kept["labels"])


def test_the_model_is_small_and_leaves_work_to_the_compiler() -> None:
    model = onnx.load(FILES / "digits.onnx")
    assert sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= 300_000
    assert {"Mul", "BatchNormalization", "Add", "Relu", "MaxPool"} <= {node.op_type for node in model.graph.node}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
