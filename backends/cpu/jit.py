"""Object files as code of this process."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from llvmlite import binding

from ...ir.target import Target
from .objects import target_machine
from .runtime import ENTRY_POINT, load_pool

_LIBRARY = "image"


class CodeImage:
    """Object files linked with each other and with this process's thread pool, until `close` or until it is collected.

    Symbols of one image are unknown to every other. Raises RuntimeError where a symbol is undefined or defined twice.
    """

    def __init__(self, objects: Sequence[bytes], target: Target):
        builder = binding.JITLibraryBuilder()
        for content in objects:
            builder.add_object_img(content)
        if any(ENTRY_POINT.encode() in content for content in objects):
            builder.import_symbol(ENTRY_POINT, load_pool(target_machine(target)))
        self._engine = binding.create_lljit_compiler(target_machine(target), use_jit_link=True)
        try:
            library = builder.link(self._engine, _LIBRARY)
        except RuntimeError:
            self._engine.close()
            raise
        self.close = weakref.finalize(self, _unload, library, self._engine)

    def address(self, name: str) -> int:
        """The address of a function. Raises RuntimeError where the image has none of that name."""
        found: int = self._engine.lookup(_LIBRARY, name)[name]
        return found


def _unload(library: binding.orcjit.ResourceTracker, engine: binding.LLJIT) -> None:
    library.close()
    engine.close()
