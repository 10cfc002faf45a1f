"""Passes over graphs, and lowering. Importing this package makes every pass known by its name."""

from . import algebra, canonicalize, cleanup, fold, fuse, layout, loops, pads, reorder, scale, transposes

DEFAULT_PIPELINE = (
    "canonicalize,fold,loops,canonicalize,fold,cleanup,"  # shapes become known, and what they decide constant
    "rules,fold,scale,pads,cleanup,"  # algebra; convolutions take in what stands around them
    "layout,canonicalize,fold,cleanup,"
    "fuse,reorder"
)
"""What `compile` runs: a text that `parse_pipeline` reads. Running it once more changes nothing."""

__all__ = [
    "DEFAULT_PIPELINE",
    "algebra",
    "canonicalize",
    "cleanup",
    "fold",
    "fuse",
    "layout",
    "loops",
    "pads",
    "reorder",
    "scale",
    "transposes",
]
