"""What attributes may say: the words and flags that ONNX's texts list, which its schemas do not.

A word that no definition knows must not pass for another one: `reduction="summ"` is no sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnx import AttributeProto

from ..ir.errors import ModelError

_ANY = ""
_REDUCTIONS, _LOSSES = ("none", "add", "mul", "max", "min"), ("none", "mean", "sum")
_DIRECTIONS = ("forward", "foward", "reverse", "bidirectional")  # the default of GRU-1 is misspelt
_POST = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")

WORDS: Mapping[tuple[str, str], tuple[str, ...]] = {
    (_ANY, "auto_pad"): ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID", ""),
    (_ANY, "post_transform"): _POST,
    ("BitShift", "direction"): ("LEFT", "RIGHT"),
    ("RNN", "direction"): _DIRECTIONS,
    ("GRU", "direction"): _DIRECTIONS,
    ("LSTM", "direction"): _DIRECTIONS,
    ("Cast", "round_mode"): ("up", "down", "nearest"),
    ("CastLike", "round_mode"): ("up", "down", "nearest"),
    ("DepthToSpace", "mode"): ("DCR", "CRD"),
    ("SpaceToDepth", "mode"): ("DCR", "CRD"),
    ("Gelu", "approximate"): ("none", "tanh"),
    ("GridSample", "mode"): ("linear", "bilinear", "nearest", "cubic", "bicubic"),
    ("GridSample", "padding_mode"): ("zeros", "border", "reflection"),
    ("Pad", "mode"): ("constant", "reflect", "edge", "wrap"),
    ("NegativeLogLikelihoodLoss", "reduction"): _LOSSES,
    ("SoftmaxCrossEntropyLoss", "reduction"): _LOSSES,
    ("ScatterElements", "reduction"): _REDUCTIONS,
    ("ScatterND", "reduction"): _REDUCTIONS,
    ("Resize", "coordinate_transformation_mode"): (
        "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric",
        "tf_half_pixel_for_nn", "tf_crop_and_resize",
    ),
    ("Resize", "keep_aspect_ratio_policy"): ("stretch", "not_larger", "not_smaller"),
    ("Resize", "mode"): ("nearest", "linear", "cubic"),
    ("Resize", "nearest_mode"): ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
    ("Upsample", "mode"): ("nearest", "linear", "bilinear", "trilinear"),
    ("RoiAlign", "coordinate_transformation_mode"): ("half_pixel", "output_half_pixel"),
    ("RoiAlign", "mode"): ("avg", "max"),
    ("TensorScatter", "mode"): ("linear", "circular"),
    ("TfIdfVectorizer", "mode"): ("TF", "IDF", "TFIDF"),
    ("StringNormalizer", "case_change_action"): ("LOWER", "UPPER", "NONE"),
    ("LinearAttention", "update_rule"): ("linear", "gated", "delta", "gated_delta"),
    ("Normalizer", "norm"): ("MAX", "L1", "L2"),
    ("TreeEnsembleRegressor", "aggregate_function"): ("SUM", "AVERAGE", "MIN", "MAX"),
    ("SVMClassifier", "kernel_type"): ("LINEAR", "POLY", "RBF", "SIGMOID"),
    ("SVMRegressor", "kernel_type"): ("LINEAR", "POLY", "RBF", "SIGMOID"),
}  # fmt: skip
"""The words by operator ("": all of them) and attribute."""

FLAGS = (
    "align_corners", "allowzero", "antialias", "ceil_mode", "center_point_box", "count_include_pad",
    "exclude_outside", "exclusive", "inverse", "is_causal", "keepdims", "largest", "linear_before_reset",
    "noop_with_empty_axes", "onesided", "periodic", "reverse", "saturate", "select_last_index", "sorted",
    "storage_order", "training_mode",
)  # fmt: skip
"""Attributes that are 0 or 1 wherever ONNX's own operators have them."""


def check_choices(operator: str, attributes: Iterable[AttributeProto]) -> None:
    """Raises ModelError where an attribute of one of ONNX's operators says what its text does not list."""
    for attribute in attributes:
        if attribute.name in FLAGS and attribute.type == AttributeProto.INT and attribute.i not in (0, 1):
            raise ModelError(f'its attribute "{attribute.name}" is {attribute.i}, which must be 0 or 1')
        words = WORDS.get((operator, attribute.name)) or WORDS.get((_ANY, attribute.name))
        if words is None or attribute.type != AttributeProto.STRING:
            continue
        found = attribute.s.decode(errors="replace")
        if found not in words:
            raise ModelError(f'its attribute "{attribute.name}" is {found[:80]!r}, not one of {", ".join(words)}')
