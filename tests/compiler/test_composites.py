"""The table of composite operators holds every family there is."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import onnxc.compiler.composites
from onnxc.compiler.composites import COMPOSITES
from onnxc.compiler.expand import Expansions


def test_every_family_is_joined() -> None:
    families = 0
    for module in pkgutil.iter_modules(onnxc.compiler.composites.__path__):
        declare = getattr(import_module(f"onnxc.compiler.composites.{module.name}"), "declare", None)
        if isinstance(declare, Expansions):
            families += 1
            assert set(declare.functions) <= set(COMPOSITES), f"compiler/composites/__init__.py lacks {module.name}"
    assert families >= 5
