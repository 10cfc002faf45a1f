"""Passes over graphs, and lowering. Importing this package makes every pass known by its name."""

from . import fuse

DEFAULT_PIPELINE = "fuse"

__all__ = ["DEFAULT_PIPELINE", "fuse"]
