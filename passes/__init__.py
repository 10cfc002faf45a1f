"""Passes over graphs, and lowering. Importing this package makes every pass known by its name."""

from . import (
    algebra,
    attention,
    canonicalize,
    cleanup,
    dynamic_ranges,
    fold,
    fold_depth,
    fuse,
    layout,
    loops,
    merge,
    pads,
    precision,
    quantization,
    reorder,
    scale,
    short_frames,
    transposes,
    unflatten,
    unsigned_bytes,
    weights_only,
    wide_weights,
    zero_points,
)

DEFAULT_PIPELINE = (
    # Shapes become known, and what they decide constant; integers that stand for reals stay what they are.
    "canonicalize,fold{dequantize=False},loops,canonicalize,fold{dequantize=False},cleanup,quantization,weights-only,"
    "wide-weights,dynamic-ranges,"
    "rules,fold,short-frames,scale,pads,unflatten,cleanup,"  # algebra; convolutions take in what stands around them
    "layout,canonicalize,fold,cleanup,"
    "merge-products,attention,fuse,reorder"
)
"""What `compile` runs: a text that `parse_pipeline` reads. Running it once more changes nothing."""

PIPELINES = {
    "cpu": DEFAULT_PIPELINE.replace("attention", "attention{narrow=0, bytes=1}")
    .replace("wide-weights,", "wide-weights,unsigned-bytes,")
    .replace("pads,", "pads,fold-depth,"),
    "cuda": DEFAULT_PIPELINE.replace("pads,", "pads,zero-points,"),
}
"""The same by the kind of target."""

__all__ = [
    "DEFAULT_PIPELINE",
    "PIPELINES",
    "algebra",
    "attention",
    "canonicalize",
    "cleanup",
    "dynamic_ranges",
    "fold",
    "fold_depth",
    "fuse",
    "layout",
    "loops",
    "merge",
    "pads",
    "precision",
    "quantization",
    "reorder",
    "scale",
    "short_frames",
    "transposes",
    "unflatten",
    "unsigned_bytes",
    "weights_only",
    "wide_weights",
    "zero_points",
]
