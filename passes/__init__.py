"""Passes over graphs, and lowering. Importing this package makes every pass known by its name."""

from . import canonicalize, cleanup, fold, fuse, layout, transposes

DEFAULT_PIPELINE = "canonicalize,fold,canonicalize,fold,cleanup,fuse"

__all__ = ["DEFAULT_PIPELINE", "canonicalize", "cleanup", "fold", "fuse", "layout", "transposes"]
