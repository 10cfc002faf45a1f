"""Well-known architectures with random weights, exported by PyTorch: what `onnxc bench resnet50` times.

Needs torch and, for most, transformers (`pip install 'onnxc[bench]'`). Weights are drawn by a fixed seed; statistics of
batch normalisations too, as untrained ones are the identity.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from ...ir.errors import OnnxcError

Export: TypeAlias = "Callable[[Path], None]"
"""Writes the model to a path."""

IMAGES = (2, 3, 224, 224)
BATCHES = 64  # the most images or texts that an export with an open batch says it takes


def _libraries() -> tuple[Any, Any]:
    """(torch, transformers), its random numbers begun anew. Raises OnnxcError where one is not installed."""
    try:
        torch, transformers = import_module("torch"), import_module("transformers")
    except ImportError as error:
        raise OnnxcError(f"{error.name} makes this model: pip install 'onnxc[bench]'") from None
    torch.manual_seed(0)
    return torch, transformers


def _write(
    path: Path, module: Any, arguments: tuple[Any, ...], inputs: list[str], outputs: list[str], batched: bool
) -> None:
    """Exports by torch.export, the first axis of all inputs open where `batched`."""
    torch = import_module("torch")
    batch = torch.export.Dim("batch", min=1, max=BATCHES)
    # All of a module's inputs are one variable parameter.
    sizes = (tuple({0: batch} for _ in arguments),) if batched else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), arguments, str(path), input_names=inputs, output_names=outputs, dynamo=True,
            dynamic_shapes=sizes, external_data=False, verbose=False,
        )  # fmt: skip


def _module(part: Any, forward: Callable[..., Any]) -> Any:
    """A module around `part`, as `part` of which `forward(module, *inputs)` reads it."""
    kind = type("Exported", (import_module("torch").nn.Module,), {"forward": forward})
    made = kind()
    made.part = part
    return made


def _reading(model: Any, output: str, names: tuple[str, ...]) -> Any:
    """A module of positional inputs that gives one of the outputs."""
    options = {"use_cache": False} if getattr(model.config, "use_cache", False) and names == ("input_ids",) else {}

    def forward(self: Any, *values: Any) -> Any:
        return getattr(self.part(**dict(zip(names, values, strict=True)), **options), output)

    return _module(model, forward)


def image_model(path: Path, model: str, **settings: Any) -> None:
    """A classifier of 1000 kinds of pictures from transformers: `model` is what its classes' names begin with."""
    torch, transformers = _libraries()
    config = getattr(transformers, f"{model}Config")(num_labels=1000, **settings)
    network = getattr(transformers, f"{model}ForImageClassification")(config)
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.normal_(0, 0.1)
    reading = _reading(network, "logits", ("pixel_values",))
    _write(path, reading, (torch.randn(IMAGES),), ["image"], ["logits"], True)


def text_encoder(path: Path, tokens: int = 128, **settings: Any) -> None:
    """A BERT that reads `tokens` tokens: its last hidden state."""
    torch, transformers = _libraries()
    network = transformers.BertModel(transformers.BertConfig(**settings), add_pooling_layer=False)
    names = ("input_ids", "attention_mask", "token_type_ids")
    texts = torch.randint(0, 1000, (2, tokens))
    arguments = (texts, torch.ones_like(texts), torch.zeros_like(texts))
    _write(path, _reading(network, "last_hidden_state", names), arguments, list(names), ["hidden"], True)


def decoder_prefill(path: Path, model: str, tokens: int, **settings: Any) -> None:
    """The logits of a decoder for a prompt of `tokens` tokens."""
    torch, transformers = _libraries()
    network = getattr(transformers, f"{model}ForCausalLM" if model != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, f"{model}Config")(**settings)
    )
    reading = _reading(network, "logits", ("input_ids",))
    _write(path, reading, (torch.randint(0, 1000, (1, tokens)),), ["input_ids"], ["logits"], False)


def decoder_step(path: Path, model: str, past: int, **settings: Any) -> None:
    """One token of a decoder after `past` others, whose keys and values go in and come out one longer."""
    torch, transformers = _libraries()
    cache_type = import_module("transformers.cache_utils").DynamicCache
    config = getattr(transformers, f"{model}Config")(**settings)
    network = getattr(transformers, f"{model}ForCausalLM" if model != "GPT2" else "GPT2LMHeadModel")(config)
    layers = config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = config.hidden_size // config.num_attention_heads

    def forward(self: Any, input_ids: Any, *states: Any) -> Any:
        cache = cache_type()
        for layer in range(layers):
            cache.update(states[2 * layer], states[2 * layer + 1], layer)
        result = self.part(input_ids=input_ids, past_key_values=cache, use_cache=True)
        pairs = [state for layer in result.past_key_values.layers for state in (layer.keys, layer.values)]
        return (result.logits, *pairs)

    states = [torch.randn(1, heads, past, width) for _ in range(2 * layers)]
    names = [f"{number // 2}.{'key' if number % 2 == 0 else 'value'}" for number in range(2 * layers)]
    ends = ["input_ids", *(f"past.{name}" for name in names)], ["logits", *(f"present.{name}" for name in names)]
    _write(path, _module(network, forward), (torch.randint(0, 1000, (1, 1)), *states), *ends, False)


def recurrent_layer(path: Path, batch: int, steps: int = 50, inputs: int = 128, hidden: int = 256) -> None:
    """An LSTM over [steps, batch, inputs]."""
    torch, _ = _libraries()

    layer = _module(torch.nn.LSTM(inputs, hidden), lambda self, x: self.part(x)[0])
    _write(path, layer, (torch.randn(steps, batch, inputs),), ["x"], ["y"], False)


def perceptron(path: Path) -> None:
    """16 -> 32 -> 32 -> 8 with ReLU between."""
    torch, _ = _libraries()
    nn = torch.nn
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    _write(path, network, (torch.randn(1, 16),), ["x"], ["y"], False)


def rectifier(path: Path) -> None:
    """ReLU of 4 numbers: what a call costs."""
    torch, _ = _libraries()
    _write(path, torch.nn.ReLU(), (torch.randn(4),), ["x"], ["y"], False)


SMALL_LLAMA: Mapping[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 32000,
}  # fmt: skip

EXPORTS: Mapping[str, Export] = {
    "resnet50": partial(image_model, model="ResNet"),
    "mobilenetv2": partial(image_model, model="MobileNetV2"),
    "efficientnet_b0": partial(
        image_model, model="EfficientNet", width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, image_size=224
    ),
    "vit_b16": partial(image_model, model="ViT"),
    "bert_base": text_encoder,
    "minilm": partial(
        text_encoder, hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536
    ),
    "gpt2_prefill": partial(decoder_prefill, model="GPT2", tokens=64),
    "gpt2_step": partial(decoder_step, model="GPT2", past=128),
    "llama_prefill": partial(decoder_prefill, model="Llama", tokens=64, **SMALL_LLAMA),
    "llama_step": partial(decoder_step, model="Llama", past=128, **SMALL_LLAMA),
    "lstm": partial(recurrent_layer, batch=1),
    "lstm_batch8": partial(recurrent_layer, batch=8),
    "mlp": perceptron,
    "relu4": rectifier,
}
"""What PyTorch exports, by the name in the catalogue."""
