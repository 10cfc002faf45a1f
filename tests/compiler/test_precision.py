"""Models compiled in every precision against the same in f32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxc
import pytest
from onnxc.compiler.driver import graph_of
from onnxc.compiler.options import Options
from small_models import image, model_of_text, small_cnn

NARROW = ("f16", "bf16")
TOLERANCE = 2e-2
"""Of the largest value."""
LEAST = float(np.finfo(np.float32).min)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Weights that keep the size of what they are multiplied with: [depth, columns] or [filters, *summed]."""
    depth = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
    return np.random.default_rng(seed).standard_normal(shape, np.float32) / np.float32(np.sqrt(depth))


def transformer_block(masked: float = -1e9) -> onnx.ModelProto:
    """Masked attention of four heads, layer normalization, GELU; the mask is made of integers as exporters do."""
    width, inner = 64, 256
    arrays = {
        "wq": normal(width, width, seed=1), "wk": normal(width, width, seed=2), "wv": normal(width, width, seed=3),
        "wo": normal(width, width, seed=4), "up": normal(width, inner, seed=5), "down": normal(inner, width, seed=6),
        "bias": 0.1 * normal(inner, 1)[:, 0], "gain": 1 + 0.1 * normal(width, 1)[:, 0],
        "shift": 0.1 * normal(width, 1, seed=8)[:, 0], "masked": np.float32(masked).reshape(()),
        "table": normal(500, width, seed=9) * np.float32(np.sqrt(500)), "scale": np.float32(0.25).reshape(()),
        "one": np.float32(1).reshape(()), "heads": np.array([0, 0, 4, 16]), "flat": np.array([0, 0, -1]),
        "axes": np.array([1, 2]),
    }  # fmt: skip
    return model_of_text(
        """block (int64[batch, length] tokens, int64[batch, length] mask) => (float[batch, length, 64] y) {
            x = Gather (table, tokens)
            n = LayerNormalization <epsilon = 1e-12, axis = -1> (x, gain, shift)
            q0 = MatMul (n, wq)
            k0 = MatMul (n, wk)
            v0 = MatMul (n, wv)
            q1 = Reshape (q0, heads)
            k1 = Reshape (k0, heads)
            v1 = Reshape (v0, heads)
            q = Transpose <perm = [0, 2, 1, 3]> (q1)
            k = Transpose <perm = [0, 2, 3, 1]> (k1)
            v = Transpose <perm = [0, 2, 1, 3]> (v1)
            s0 = MatMul (q, k)
            s1 = Mul (s0, scale)
            m0 = Unsqueeze (mask, axes)
            m1 = Cast <to = 1> (m0)
            m2 = Sub (one, m1)
            m3 = Mul (m2, masked)
            s = Add (s1, m3)
            p = Softmax <axis = -1> (s)
            c0 = MatMul (p, v)
            c1 = Transpose <perm = [0, 2, 1, 3]> (c0)
            c = Reshape (c1, flat)
            o = MatMul (c, wo)
            r = Add (o, x)
            n2 = LayerNormalization <epsilon = 1e-12, axis = -1> (r, gain, shift)
            u0 = MatMul (n2, up)
            u1 = Add (u0, bias)
            u = Gelu (u1)
            d = MatMul (u, down)
            y = Add (d, r)
        }""",
        **arrays,
    )


def mobile_block() -> onnx.ModelProto:
    """Expansion, depthwise convolution, projection and a residual, as MobileNetV2 has them; squeeze and excitation."""
    arrays = {
        "stem": normal(16, 3, 3, 3), "expand": normal(64, 16, 1, 1), "depth": normal(64, 1, 3, 3),
        "squeeze": normal(8, 64, 1, 1), "excite": normal(64, 8, 1, 1), "project": normal(16, 64, 1, 1),
        "gamma": 1 + 0.2 * normal(64, 1)[:, 0], "beta": 0.2 * normal(64, 1, seed=1)[:, 0],
        "mean": 0.2 * normal(64, 1, seed=2)[:, 0], "variance": np.full(64, 1.3, np.float32),
        "zero": np.float32(0).reshape(()), "six": np.float32(6).reshape(()), "classes": normal(16, 10),
    }  # fmt: skip
    return model_of_text(
        """mobile (float[batch, 3, height, width] image) => (float[batch, 10] logits) {
            x0 = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (image, stem)
            x = Relu (x0)
            e0 = Conv (x, expand)
            e1 = BatchNormalization (e0, gamma, beta, mean, variance)
            e = Clip (e1, zero, six)
            d0 = Conv <pads = [1, 1, 1, 1], group = 64> (e, depth)
            d1 = BatchNormalization (d0, gamma, beta, mean, variance)
            d = HardSwish (d1)
            g = GlobalAveragePool (d)
            g0 = Conv (g, squeeze)
            g1 = Relu (g0)
            g2 = Conv (g1, excite)
            g3 = HardSigmoid (g2)
            s = Mul (d, g3)
            p = Conv (s, project)
            r = Add (p, x)
            pooled = GlobalAveragePool (r)
            flat = Flatten (pooled)
            logits = MatMul (flat, classes)
        }""",
        **arrays,
    )


def recurrent() -> onnx.ModelProto:
    """Two LSTM layers, the second in both directions, and a linear layer."""
    arrays = {
        "w1": normal(1, 128, 20), "r1": normal(1, 128, 32), "b1": 0.1 * normal(1, 256), "w2": normal(2, 64, 32),
        "r2": normal(2, 64, 16), "b2": 0.1 * normal(2, 128), "out": normal(32, 8), "axes": np.array([1]),
        "flat": np.array([0, 0, -1]),
    }  # fmt: skip
    return model_of_text(
        """tagger (float[steps, batch, 20] x)
        => (float[steps, batch, 8] y, float[1, batch, 32] h, float[1, batch, 32] c) {
            y1, h, c = LSTM <hidden_size = 32> (x, w1, r1, b1)
            s1 = Squeeze (y1, axes)
            y2 = LSTM <hidden_size = 16, direction = "bidirectional"> (s1, w2, r2, b2)
            t2 = Transpose <perm = [0, 2, 1, 3]> (y2)
            s2 = Reshape (t2, flat)
            y = MatMul (s2, out)
        }""",
        **arrays,
    )


def tokens(*lengths: int) -> dict[str, np.ndarray]:
    """Sentences padded to the longest; one of no tokens at all is masked as a whole."""
    longest = max(lengths)
    mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
    return {"tokens": np.random.default_rng(len(lengths)).integers(0, 500, mask.shape), "mask": mask}


MODELS: dict[str, tuple[Callable[[], onnx.ModelProto | Path], dict[str, np.ndarray]]] = {
    "small cnn": (small_cnn, {"image": image(2, 3, 17, 13)}),
    "digits": (lambda: Path(onnxc.__file__).parent / "tools" / "digits.onnx", {"image": 8 + 4 * image(3, 1, 8, 8)}),
    "transformer": (transformer_block, tokens(7, 12, 1)),
    "transformer, least mask": (lambda: transformer_block(LEAST), tokens(7, 12, 0)),
    "transformer, small mask": (lambda: transformer_block(-1e4), tokens(7, 12, 0)),
    "mobile": (mobile_block, {"image": image(2, 3, 24, 30)}),
    "recurrent": (recurrent, {"x": image(9, 3, 20)}),
}


@pytest.mark.parametrize("to", NARROW)
@pytest.mark.parametrize("name", MODELS)
def test_models_agree_with_f32(name: str, to: str) -> None:
    make, inputs = MODELS[name]
    wide, found = (onnxc.compile(make(), precision=precision) for precision in ("f32", to))
    for output, expected in wide.run(inputs).items():
        actual = found.run(inputs)[output]
        assert actual.dtype == expected.dtype == np.float32
        assert np.isfinite(actual).all()
        assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()
        assert not np.array_equal(actual, expected), "nothing is rounded"


def test_weights_take_half_the_memory() -> None:
    def constants(precision: str) -> int:
        graph = graph_of(transformer_block(), Options(precision=precision))
        return sum(handle.array.nbytes for handle in graph.constants.values())

    assert constants("f16") < 0.6 * constants("f32")


@pytest.mark.parametrize("to", ["tf32", *NARROW])
@pytest.mark.parametrize("name", ["small cnn", "transformer, least mask", "recurrent"])
def test_models_agree_on_a_gpu(name: str, to: str, gpu: None) -> None:
    make, inputs = MODELS[name]
    wide, found = onnxc.compile(make()).run(inputs), onnxc.compile(make(), target="cuda", precision=to).run(inputs)
    for output, expected in wide.items():
        assert np.abs(found[output] - expected).max() <= (2e-3 if to == "tf32" else TOLERANCE) * np.abs(expected).max()
