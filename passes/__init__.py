"""Passes over graphs, and lowering. Importing this package makes every pass known by its name."""

from . import algebra, canonicalize, cleanup, fold, fuse, layout, pads, scale, transposes

DEFAULT_PIPELINE = "canonicalize,fold,canonicalize,fold,cleanup,fuse"

__all__ = [
    "DEFAULT_PIPELINE",
    "algebra",
    "canonicalize",
    "cleanup",
    "fold",
    "fuse",
    "layout",
    "pads",
    "scale",
    "transposes",
]
