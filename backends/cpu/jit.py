"""Object files as code of this process."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

from llvmlite import binding

from ...ir.target import Target
from .objects import target_machine
from .runtime import ENTRY_POINT, load_pool


class CodeImage:
    """Object files linked with each other and with this process's thread pool, until `close` or until it is collected.

    `names` are the functions whose addresses will be asked for, `imports` addresses that the objects may refer to.
    Symbols of one image are unknown to every other.
    Raises RuntimeError where a symbol is undefined or defined twice.
    """

    def __init__(
        self, objects: Sequence[bytes], names: Sequence[str], target: Target, imports: Mapping[str, int] | None = None
    ):
        builder = binding.JITLibraryBuilder()
        for content in objects:
            builder.add_object_img(content)
        for name in names:
            builder.export_symbol(name)
        for name, address in (imports or {}).items():
            builder.import_symbol(name, address)
        if any(ENTRY_POINT.encode() in content for content in objects):
            builder.import_symbol(ENTRY_POINT, load_pool(target_machine(target)))
        engine = binding.create_lljit_compiler(target_machine(target), use_jit_link=True)
        try:
            library = builder.link(engine, "image")
        except RuntimeError:
            engine.close()
            raise
        self._addresses: dict[str, int] = {name: library[name] for name in names}
        self.close = weakref.finalize(self, _unload, library, engine)

    def keep(self) -> None:
        """Leaves the code loaded until the process ends, also while the interpreter exits."""
        found = self.close.detach()
        if found is not None:
            for part in found[2]:
                part.detach()

    def address(self, name: str) -> int:
        """The address of one of the functions. KeyError for a name that was not given."""
        return self._addresses[name]


def _unload(library: binding.orcjit.ResourceTracker, engine: binding.LLJIT) -> None:
    library.close()
    engine.close()
