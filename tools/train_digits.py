"""Trains the demo's network on scikit-learn's handwritten digits; writes digits.onnx and digits.npz beside this file.

    python -m onnxc.tools.train_digits [--output FOLDER] [--epochs N]

A residual CNN for 8 x 8 images, trained by plain numpy (a minute on one idle core) with the reverse-mode
differentiation of the first half of this file. The ONNX graph keeps what a compiler should remove: the scale of the
input, batch normalisations beside their convolutions, separate activations. One fifth of the images is held out before
training and looked at once, at the end; digits.npz holds it. Needs scikit-learn and onnxruntime (`onnxc[test]`).
The same seed gives the same weights up to rounding, whose order depends on numpy's BLAS and its number of threads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]

SEED = 8
HELD_OUT = 0.2
EPOCHS = 40
# Width and shifts were compared by cross-validation within the training part (four folds; these: 1425 of 1438 right).
BATCH = 64
PEAK_RATE = 4e-3  # of Adam; rises over the first tenth of the steps, then falls to zero as a cosine
WEIGHT_DECAY = 1e-3
NARROW, WIDE = 24, 48  # channels before and after the pooling
EPSILON = 1e-5
STATISTICS_DECAY = 0.95  # of batch normalisation's running mean and variance, per step
INK = 16.0  # a pixel of the data set is 0..16


# --- reverse-mode differentiation -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Variable:
    """A value, and for each parent the function that takes the gradient here to the parent's share of it."""

    value: Array
    parents: tuple[tuple["Variable", Callable[[Array], Array]], ...] = ()
    gradient: Array | None = field(default=None, repr=False)

    def backward(self) -> None:
        """Sets `gradient` of every ancestor to d(self)/d(ancestor); self is a scalar."""
        order: list[Variable] = []
        seen: set[Variable] = set()

        def visit(variable: Variable) -> None:
            if variable not in seen:
                seen.add(variable)
                for parent, _ in variable.parents:
                    visit(parent)
                order.append(variable)

        visit(self)
        for variable in order:
            variable.gradient = np.zeros_like(variable.value)
        self.gradient = np.ones_like(self.value)
        for variable in reversed(order):
            for parent, share in variable.parents:
                parent.gradient += share(variable.gradient)  # type: ignore[arg-type, operator]  # set above


def _correlate(x: Array, weight: Array) -> tuple[Array, Array]:
    """3 x 3 correlation with zero padding 1: [n, o, h, w], and the windows [n, c, h, w, 3, 3] of x."""
    windows = sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), axis=(2, 3))
    return np.ascontiguousarray(np.tensordot(windows, weight, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)), windows


def convolution(x: Variable, weight: Variable) -> Variable:
    """ONNX Conv of [n, c, h, w] by [o, c, 3, 3], pads 1, without bias."""
    y, windows = _correlate(x.value, weight.value)
    turned = weight.value[:, :, ::-1, ::-1].swapaxes(0, 1)
    to_weight = (weight, lambda g: np.tensordot(g, windows, ((0, 2, 3), (0, 2, 3))))
    return Variable(y, ((x, lambda g: _correlate(g, turned)[0]), to_weight))


def batch_normalisation(x: Variable, scale: Variable, shift: Variable) -> tuple[Variable, Array, Array]:
    """Normalised by the batch's own statistics (Ioffe & Szegedy 2015); also the mean and variance of each channel."""
    axes = (0, 2, 3)
    mean, variance = x.value.mean(axes), x.value.var(axes)
    deviation = np.sqrt(variance + EPSILON)[:, None, None]
    normal = (x.value - mean[:, None, None]) / deviation

    def to_x(g: Array) -> Array:
        g = g * scale.value[:, None, None]
        return np.asarray(
            (g - g.mean(axes, keepdims=True) - normal * (g * normal).mean(axes, keepdims=True)) / deviation
        )

    y = normal * scale.value[:, None, None] + shift.value[:, None, None]
    to_scale, to_shift = (scale, lambda g: (g * normal).sum(axes)), (shift, lambda g: g.sum(axes))
    return Variable(y, ((x, to_x), to_scale, to_shift)), mean, variance


def relu(x: Variable) -> Variable:
    positive = x.value > 0
    return Variable(x.value * positive, ((x, lambda g: g * positive),))


def add(x: Variable, y: Variable) -> Variable:
    return Variable(x.value + y.value, ((x, lambda g: g), (y, lambda g: g)))


def max_pool(x: Variable) -> Variable:
    """ONNX MaxPool 2 x 2, stride 2."""
    n, c, h, w = x.value.shape
    tiles = x.value.reshape(n, c, h // 2, 2, w // 2, 2)
    top = tiles.max((3, 5), keepdims=True)
    is_top = tiles == top
    share = is_top / is_top.sum((3, 5), keepdims=True, dtype=x.value.dtype)
    return Variable(top[:, :, :, 0, :, 0], ((x, lambda g: (share * g[:, :, :, None, :, None]).reshape(x.value.shape)),))


def average_pool(x: Variable) -> Variable:
    """ONNX GlobalAveragePool and Flatten: [n, c]."""
    area = x.value.shape[2] * x.value.shape[3]
    return Variable(x.value.mean((2, 3)), ((x, lambda g: np.broadcast_to(g[:, :, None, None] / area, x.value.shape)),))


def linear(x: Variable, weight: Variable, bias: Variable) -> Variable:
    """ONNX Gemm with transB: [n, c] by [o, c]."""
    to_weight, to_bias = (weight, lambda g: g.T @ x.value), (bias, lambda g: g.sum(0))
    return Variable(x.value @ weight.value.T + bias.value, ((x, lambda g: g @ weight.value), to_weight, to_bias))


def cross_entropy(scores: Variable, labels: Array) -> Variable:
    """Mean over the batch of -log softmax(scores)[label]."""
    shifted = scores.value - scores.value.max(1, keepdims=True)
    logarithms = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    target = np.eye(scores.value.shape[1], dtype=scores.value.dtype)[labels]
    loss = -(target * logarithms).sum(1).mean()
    return Variable(np.asarray(loss), ((scores, lambda g: g * (np.exp(logarithms) - target) / len(labels)),))


# --- the network ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A convolution with its batch normalisation; `residual`: the layer whose output is added before the activation."""

    name: str
    channels_in: int
    channels: int
    residual: str | None = None
    pooled: bool = False  # MaxPool after the activation


LAYERS = (
    Layer("stem", 1, NARROW),
    Layer("narrow_1", NARROW, NARROW),
    Layer("narrow_2", NARROW, NARROW, residual="stem", pooled=True),
    Layer("widen", NARROW, WIDE),
    Layer("wide_1", WIDE, WIDE),
    Layer("wide_2", WIDE, WIDE, residual="widen"),
)


@dataclass
class Network:
    """Trained values by name, and batch normalisation's running statistics by layer: (mean, variance)."""

    weights: dict[str, Variable]
    statistics: dict[str, tuple[Array, Array]]

    def scores(self, images: Array) -> Variable:
        """Scores [n, 10] of images [n, 1, 8, 8] in 0..1, in training mode: moves the running statistics."""
        x = Variable(images)
        outputs: dict[str, Variable] = {}
        for layer in LAYERS:
            x = convolution(x, self.weights[f"{layer.name}.weight"])
            scale, shift = self.weights[f"{layer.name}.scale"], self.weights[f"{layer.name}.shift"]
            x, *seen = batch_normalisation(x, scale, shift)
            old, new = STATISTICS_DECAY, 1 - STATISTICS_DECAY
            mean, variance = (old * a + new * b for a, b in zip(self.statistics[layer.name], seen, strict=True))
            self.statistics[layer.name] = (mean, variance)
            x = relu(x if layer.residual is None else add(x, outputs[layer.residual]))
            outputs[layer.name] = x
            x = max_pool(x) if layer.pooled else x
        return linear(average_pool(x), self.weights["classify.weight"], self.weights["classify.bias"])


def new_network(random: np.random.Generator) -> Network:
    """Weights after He et al. 2015; the last batch normalisation of a residual branch starts small."""
    weights, statistics = {}, {}
    for layer in LAYERS:
        spread = np.sqrt(2 / (9 * layer.channels_in))
        weights[f"{layer.name}.weight"] = random.normal(0, spread, (layer.channels, layer.channels_in, 3, 3))
        weights[f"{layer.name}.scale"] = np.full(layer.channels, 0.2 if layer.residual else 1.0)
        weights[f"{layer.name}.shift"] = np.zeros(layer.channels)
        statistics[layer.name] = (np.zeros(layer.channels, np.float32), np.ones(layer.channels, np.float32))
    weights["classify.weight"] = random.normal(0, np.sqrt(1 / WIDE), (10, WIDE))
    weights["classify.bias"] = np.zeros(10)
    return Network({name: Variable(value.astype(np.float32)) for name, value in weights.items()}, statistics)


def shifted(images: Array, random: np.random.Generator) -> Array:
    """Each image moved by -1, 0 or 1 pixel along both axes, empty paper coming in."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    places = sliding_window_view(padded, (8, 8), axis=(2, 3))  # [n, 1, 3, 3, 8, 8]
    rows, columns = random.choice(3, (2, len(images)), p=(0.1, 0.8, 0.1))
    return np.asarray(places[np.arange(len(images)), :, rows, columns])


def train(
    images: Array, labels: Array, epochs: int, random: np.random.Generator, report: Callable[[str], None]
) -> Network:
    """Network for images [n, 1, 8, 8] in 0..1, by Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    network = new_network(random)
    moments = {name: np.zeros((2, *variable.value.shape), np.float32) for name, variable in network.weights.items()}
    steps = epochs * (len(images) // BATCH)
    step = 0
    for epoch in range(1, epochs + 1):
        losses = []
        for chosen in np.array_split(random.permutation(len(images)), len(images) // BATCH):
            loss = cross_entropy(network.scores(shifted(images[chosen], random)), labels[chosen])
            loss.backward()
            step += 1
            rate = PEAK_RATE * min(1.0, step / (0.1 * steps)) * 0.5 * (1 + np.cos(np.pi * step / steps))
            for name, variable in network.weights.items():
                gradient, (first, second) = variable.gradient, moments[name]
                assert gradient is not None
                first += 0.1 * (gradient - first)
                second += 0.001 * (gradient**2 - second)
                change = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
                decay = WEIGHT_DECAY * variable.value if name.endswith("weight") else 0.0
                variable.value -= (rate * (change + decay)).astype(np.float32)
            losses.append(float(loss.value))
        report(f"epoch {epoch:3} of {epochs}: loss {np.mean(losses):.4f}")
    return network


# --- the model file -------------------------------------------------------------------------------------------------


def onnx_model(network: Network) -> onnx.ModelProto:
    """The network in inference mode: image f32 [batch, 1, 8, 8] in 0..16 -> probability f32 [batch, 10]."""
    nodes = [helper.make_node("Mul", ["image", "ink"], ["scaled"], "scale")]
    arrays = {"ink": np.array(1 / INK, np.float32)}
    value = "scaled"
    for layer in LAYERS:
        name = layer.name
        arrays |= {f"{name}.{part}": network.weights[f"{name}.{part}"].value for part in ("weight", "scale", "shift")}
        arrays |= dict(zip((f"{name}.mean", f"{name}.variance"), network.statistics[name], strict=True))
        normalise = [f"{name}.conv", *(f"{name}.{part}" for part in ("scale", "shift", "mean", "variance"))]
        nodes += [
            helper.make_node("Conv", [value, f"{name}.weight"], [f"{name}.conv"], f"{name}/conv", pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", normalise, [f"{name}.norm"], f"{name}/norm", epsilon=EPSILON),
        ]
        value = f"{name}.norm"
        if layer.residual:
            nodes.append(helper.make_node("Add", [value, f"{layer.residual}.relu"], [f"{name}.sum"], f"{name}/add"))
            value = f"{name}.sum"
        nodes.append(helper.make_node("Relu", [value], [f"{name}.relu"], f"{name}/relu"))
        value = f"{name}.relu"
        if layer.pooled:
            pool = helper.make_node(
                "MaxPool", [value], [f"{name}.pool"], f"{name}/pool", kernel_shape=[2, 2], strides=[2, 2]
            )
            nodes.append(pool)
            value = f"{name}.pool"
    classify = {f"classify.{part}": network.weights[f"classify.{part}"].value for part in ("weight", "bias")}
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["average"], "average"),
        helper.make_node("Flatten", ["average"], ["features"], "flatten"),
        helper.make_node("Gemm", ["features", *classify], ["score"], "classify", transB=1),
        helper.make_node("Softmax", ["score"], ["probability"], "softmax", axis=1),
    ]
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8])
    probability = helper.make_tensor_value_info("probability", onnx.TensorProto.FLOAT, ["batch", 10])
    constants = [
        numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in (arrays | classify).items()
    ]
    graph = helper.make_graph(nodes, "digits", [image], [probability], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10, producer_name="onnxc")
    onnx.checker.check_model(model, full_check=True)
    return model


def correct_answers(model: onnx.ModelProto, images: Array, labels: Array) -> int:
    """How many images [n, 8, 8] in 0..16 ONNX Runtime names rightly by the model."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (probability,) = session.run(None, {"image": images[:, None].astype(np.float32)})
    return int((probability.argmax(1) == labels).sum())


def split_digits() -> tuple[Array, Array, Array, Array]:
    """Training images uint8 [n, 8, 8] and labels, held-out images and labels; the same for everyone."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(SEED).permutation(len(data.images))
    images, labels = data.images[order].astype(np.uint8), data.target[order].astype(np.uint8)
    held_out = round(HELD_OUT * len(images))
    return images[held_out:], labels[held_out:], images[:held_out], labels[:held_out]


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent,
    help="folder to write to",
)
@click.option("--epochs", type=click.IntRange(min=1), default=EPOCHS, show_default=True)
def main(output: Path, epochs: int) -> None:
    """Train the demo's digit classifier; write digits.onnx and digits.npz."""
    images, labels, held_out_images, held_out_labels = split_digits()
    scaled = (images[:, None] / INK).astype(np.float32)
    model = onnx_model(train(scaled, labels, epochs, np.random.default_rng(SEED), click.echo))
    correct, total = correct_answers(model, held_out_images, held_out_labels), len(held_out_labels)
    model.doc_string = (
        f"Names handwritten digits (8 x 8, ink 0..16), trained on {len(images)} images of scikit-learn's digits by "
        f"tools/train_digits.py; right on {correct} of {total} held-out images ({correct / total:.2%})."
    )
    entries = {
        "held_out_images": total,
        "held_out_correct": correct,
        "held_out_accuracy": correct / total,
        "seed": SEED,
    }
    helper.set_model_props(model, {name: str(value) for name, value in entries.items()})
    output.mkdir(parents=True, exist_ok=True)
    onnx.save(model, output / "digits.onnx")
    np.savez_compressed(output / "digits.npz", images=held_out_images, labels=held_out_labels)
    click.echo(model.doc_string)


if __name__ == "__main__":
    main()
