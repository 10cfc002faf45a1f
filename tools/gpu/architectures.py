"""Networks that torchvision and transformers build from a configuration, with random weights, and their export to ONNX.

Nothing here is imported from them before it is asked for; where one is not installed its networks are left out.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
OPSET = 20
SEED = 0
TOKENS, PAST = 128, 127
"""Of a text; of a text before the token of a step."""


@dataclass(frozen=True)
class Architecture:
    """`build(batch)` gives a module of PyTorch and its inputs by name, always of the same weights and values."""

    name: str
    library: str
    build: Callable[[int], tuple[Any, Mapping[str, Any]]]

    @property
    def missing(self) -> str:
        """What is not installed that it takes; nothing where all is."""
        lacking = [name for name in dict.fromkeys(("torch", self.library)) if importlib.util.find_spec(name) is None]
        return f"{', '.join(lacking)} not installed" if lacking else ""


def _picture(name: str, batch: int, size: int = 224) -> tuple[Any, Mapping[str, Any]]:
    """A function of torchvision.models."""
    torch, models = importlib.import_module("torch"), importlib.import_module("torchvision.models")
    torch.manual_seed(SEED)
    module = _as_trained(torch, getattr(models, name)(weights=None))
    return module, {"image": torch.randn(batch, 3, size, size)}


def _as_trained(torch: Any, module: Any) -> Any:
    """Draws anew what begins as one number everywhere (biases, scales, statistics), so that all of it counts."""
    statistics = [b for name, b in module.named_buffers() if name.endswith(("running_mean", "running_var"))]
    with torch.no_grad():
        for values in (*module.parameters(), *statistics):
            first = values.flatten()[0]
            if values.numel() > 1 and bool((values == first).all()):
                values.copy_(first * (0.8 + 0.4 * torch.rand(values.shape)) + 0.05 * torch.randn(values.shape))
    return module.eval()


def _network(
    model: str, inputs: Callable[[Any, int, Any], Mapping[str, Any]], batch: int, **settings: Any
) -> tuple[Any, Mapping[str, Any]]:
    """A class of transformers with its configuration changed by `settings`."""
    torch, library = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.manual_seed(SEED)
    kind = getattr(library, model)
    config = kind.config_class(**settings)
    # Attention in PyTorch's own function: what people run, and one pattern for all exports.
    module = _as_trained(torch, kind._from_config(config, attn_implementation="sdpa"))
    given = inputs(torch, batch, config)
    return _first_output(torch, module, list(given)), given


def _first_output(torch: Any, module: Any, names: list[str]) -> Any:
    class FirstOutput(torch.nn.Module):  # type: ignore[misc]
        """Tensors in, one tensor out."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *arguments: Any) -> Any:
            return self.module(**dict(zip(names, arguments, strict=True)))[0]

    return FirstOutput().eval()


def _tokens(torch: Any, batch: int, config: Any) -> Mapping[str, Any]:
    return {"input_ids": torch.randint(0, config.vocab_size, (batch, TOKENS))}


def _masked_tokens(torch: Any, batch: int, config: Any) -> Mapping[str, Any]:
    mask = torch.ones(batch, TOKENS, dtype=torch.int64)
    mask[:, -TOKENS // 4 :] = 0
    return {**_tokens(torch, batch, config), "attention_mask": mask}


def _pixels(torch: Any, batch: int, config: Any) -> Mapping[str, Any]:
    return {"pixel_values": torch.randn(batch, 3, config.image_size, config.image_size)}


def _gpt2_step(batch: int) -> tuple[Any, Mapping[str, Any]]:
    """GPT-2 (124 M) that makes the next token's logits from one token and the keys and values of those before it,
    [layers, batch, heads, tokens, channels]."""
    torch, library = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.manual_seed(SEED)
    config = library.GPT2Config()
    module = _as_trained(torch, library.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa"))

    class Step(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, input_ids: Any, keys: Any, values: Any) -> Any:
            past = library.DynamicCache()
            for layer in range(config.n_layer):
                past.update(keys[layer], values[layer], layer)
            return self.module(input_ids=input_ids, past_key_values=past, use_cache=True).logits

    width = config.n_embd // config.n_head
    shape = (config.n_layer, batch, config.n_head, PAST, width)
    given = {"input_ids": torch.randint(0, config.vocab_size, (batch, 1))}
    return Step().eval(), {**given, "keys": torch.randn(shape), "values": torch.randn(shape)}


_SMALL = {"num_hidden_layers": 3, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 768}
_VISION = [
    "resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "densenet121", "squeezenet1_1",
    "shufflenet_v2_x1_0", "regnet_y_400mf", "convnext_tiny", "swin_t", "vit_b_16",
]  # fmt: skip
_TEXTS: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("bert", "BertModel", _masked_tokens, _SMALL),
    ("gpt2", "GPT2LMHeadModel", _tokens, {"n_layer": 3, "n_embd": 256, "n_head": 4}),
    ("llama", "LlamaForCausalLM", _tokens, {**_SMALL, "num_key_value_heads": 2, "vocab_size": 8000}),
    ("t5-encoder", "T5EncoderModel", _masked_tokens, {"num_layers": 3}),
    ("vit", "ViTModel", _pixels, _SMALL),
]
ARCHITECTURES = [
    *(Architecture(name, "torchvision", partial(_picture, name)) for name in _VISION),
    *(Architecture(n, "transformers", partial(_network, kind, inputs, **s)) for n, kind, inputs, s in _TEXTS),
]
"""Those that are compared with the reference."""
LARGE = {
    "resnet50": Architecture("resnet50", "torchvision", partial(_picture, "resnet50")),
    "bert-base": Architecture("bert-base", "transformers", partial(_network, "BertModel", _tokens)),
    "gpt2-step": Architecture("gpt2-step", "transformers", _gpt2_step),
}
"""Those whose speed is measured."""


def export(architecture: Architecture, batch: int, path: str, half: bool = False) -> dict[str, Array]:
    """Writes the network as an ONNX model of fixed sizes; its inputs. `half` makes all of it f16."""
    torch = importlib.import_module("torch")
    module, inputs = architecture.build(batch)
    if half:
        module, inputs = module.half(), halved(torch, inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with torch.inference_mode(), warnings.catch_warnings(), silent[0], silent[1]:
        warnings.simplefilter("ignore")
        arguments = (module, tuple(inputs.values()), path)
        torch.onnx.export(*arguments, input_names=list(inputs), opset_version=OPSET, dynamo=True)
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def halved(torch: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with those in f32 as f16."""
    return {name: x.half() if x.dtype == torch.float32 else x for name, x in inputs.items()}
