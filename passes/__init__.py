"""Passes over graphs, and lowering. Importing this package makes every pass known by its name."""

from . import (
    algebra,
    attention,
    canonicalize,
    cleanup,
    fold,
    fuse,
    layout,
    loops,
    merge,
    pads,
    precision,
    reorder,
    scale,
    transposes,
    unflatten,
)

DEFAULT_PIPELINE = (
    "canonicalize,fold,loops,canonicalize,fold,cleanup,"  # shapes become known, and what they decide constant
    "rules,fold,scale,pads,unflatten,cleanup,"  # algebra; convolutions take in what stands around them
    "layout,canonicalize,fold,cleanup,"
    "merge-products,attention,fuse,reorder"
)
"""What `compile` runs: a text that `parse_pipeline` reads. Running it once more changes nothing."""

PIPELINES = {"cpu": DEFAULT_PIPELINE.replace("attention", "attention{narrow=0}"), "cuda": DEFAULT_PIPELINE}
"""The same by the kind of target."""

__all__ = [
    "DEFAULT_PIPELINE",
    "PIPELINES",
    "algebra",
    "attention",
    "canonicalize",
    "cleanup",
    "fold",
    "fuse",
    "layout",
    "loops",
    "merge",
    "pads",
    "precision",
    "reorder",
    "scale",
    "transposes",
    "unflatten",
]
