"""Trains the small networks that tests of quantization measure accuracy on; writes them beside this file.

    python tests/tools/data/make_subjects.py REPOSITORY

depthwise.onnx   MobileNet-like (inverted residuals, batch normalisation, Clip at 6), on scikit-learn's digits
text.onnx        a transformer of one layer that tells kinds of text by 64 bytes; text.npz has fragments to try it on
audio.onnx       strided convolutions over a waveform that tell sounds as `sounds.py` makes them

Needs torch (for training alone) and scikit-learn. Half a minute each on two cores.
"""

import io
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxc.tools.train_digits import INK, shifted, split_digits
from torch import nn
from torch.nn import functional

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from sounds import CLASSES, LENGTH, sounds  # noqa: E402

FRAGMENT = 64
KINDS = ("tools/*.py", ".venv/**/METADATA", "**/*.ll", "**/*.cuh", ".venv/**/numpy/*.h")


class Inverted(nn.Module):
    """An inverted residual (Sandler et al. 2018)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = 4 * channels_in
        self.residual = stride == 1 and channels_in == channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
        Inverted(12, 12, 1), Inverted(12, 16, 2), Inverted(16, 16, 1), Inverted(16, 24, 2), Inverted(24, 24, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


class Text(nn.Module):
    """Bytes [batch, 64] -> scores: embedding, one layer of attention and one of GELU, mean, linear."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.bytes, self.place = nn.Embedding(128, width), nn.Parameter(torch.zeros(FRAGMENT, width))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.classify = nn.Linear(width, len(KINDS))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.bytes(tokens) + self.place
        h = self.first(x)
        q, k, v = (
            layer(h).reshape(-1, FRAGMENT, self.heads, 8).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(-1, FRAGMENT, 32))
        x = x + self.down(functional.gelu(self.up(self.second(x))))
        return self.classify(self.last(x).mean(1))


def audio() -> nn.Module:
    def block(channels_in: int, channels: int, size: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv1d(channels_in, channels, size, stride, size // 2, bias=False)
        return [conv, nn.BatchNorm1d(channels), nn.ReLU()]

    layers = block(1, 16, 33, 4) + block(16, 24, 9, 4) + block(24, 32, 5, 2) + block(32, 32, 5, 2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, len(CLASSES)))


def train(network: nn.Module, batches, steps: int, rate: float = 4e-3) -> None:
    optimiser = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps)
    network.train()
    for _, (x, y) in zip(range(steps), batches, strict=False):
        loss = functional.cross_entropy(network(torch.as_tensor(x)), torch.as_tensor(y))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def save(network: nn.Module, example: torch.Tensor, name: str, names: list[str]) -> None:
    buffer = io.BytesIO()
    network.eval()
    torch.onnx.export(
        network, (example,), buffer, input_names=names[:1], output_names=names[1:], opset_version=17, dynamo=False,
        dynamic_axes={each: {0: "batch"} for each in names}, training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
    )  # fmt: skip
    model = onnx.load_model_from_string(buffer.getvalue())
    for node in model.graph.node:
        node.ClearField("doc_string")
    onnx.save(model, HERE / name)
    print(name, len(buffer.getvalue()) // 1024, "KB", flush=True)


def digits(random: np.random.Generator):
    images, labels, *_ = split_digits()
    scaled = (images[:, None] / INK).astype(np.float32)
    while True:
        chosen = random.choice(len(scaled), 64)
        yield shifted(scaled[chosen], random).copy(), labels[chosen].astype(np.int64)


def fragments(folder: Path, random: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fragments [n, 64] and their kinds: of the files' first parts for training, and of the rest."""
    parts = ([], [])
    for label, pattern in enumerate(KINDS):
        texts = [bytes(b for b in path.read_bytes() if b < 128) for path in sorted(folder.glob(pattern))[:40]]
        texts = [text for text in texts if len(text) > 8 * FRAGMENT]
        for part, (start, stop), count in ((0, (0, 0.75), 4000), (1, (0.75, 1), 200)):
            for _ in range(count):
                text = texts[random.integers(len(texts))]
                place = random.integers(int(start * len(text)), int(stop * len(text)) - FRAGMENT)
                parts[part].append((np.frombuffer(text[place : place + FRAGMENT], np.uint8), label))
    return [(np.stack([x for x, _ in part]), np.array([y for _, y in part])) for part in parts]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    (x, y), (held_x, held_y) = fragments(Path(sys.argv[1]), random)
    network = depthwise()
    train(network, digits(random), 700)
    save(network, torch.zeros(2, 1, 8, 8), "depthwise.onnx", ["image", "scores"])

    def texts():
        while True:
            chosen = random.choice(len(x), 128)
            yield x[chosen].astype(np.int64), y[chosen]

    network = Text()
    train(network, texts(), 900)
    save(network, torch.zeros(2, FRAGMENT, dtype=torch.int64), "text.onnx", ["tokens", "scores"])
    np.savez_compressed(HERE / "text.npz", tokens=held_x, kinds=held_y.astype(np.uint8))

    def waves():
        while True:
            yield sounds(64, random)

    network = audio()
    train(network, waves(), 500)
    save(network, torch.zeros(2, 1, LENGTH), "audio.onnx", ["wave", "scores"])


if __name__ == "__main__":
    main()
