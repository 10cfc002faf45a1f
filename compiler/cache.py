"""Compiled models on disk, so that the second compile of a model is a load.

A model file is recognised by its place, size and time of change; models given in memory are compiled anew (their
kernels still come from the cache of object files). What lies in the cache is an artifact; one that is damaged or of
another compiler is absent.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import llvmlite
import platformdirs

from ..backends.cpu import violations
from ..ir.errors import OnnxcError
from . import artifact
from .compiled import Compiled
from .options import Model, Options

LARGEST = 2 << 30
"""Bytes of a model above which it is not kept."""


@dataclass(frozen=True)
class ModelCache:
    """Artifacts by key; when they exceed `limit` bytes, those that were not used for longest go.

    $ONNXC_CACHE_DIR moves it, $ONNXC_MODEL_CACHE_BYTES sets the limit; 0 turns it off.
    """

    folder: Path
    limit: int

    @staticmethod
    def default() -> ModelCache:
        root = os.environ.get("ONNXC_CACHE_DIR") or platformdirs.user_cache_dir("onnxc")
        return ModelCache(Path(root) / "models", int(os.environ.get("ONNXC_MODEL_CACHE_BYTES", 4 << 30)))

    def find(self, model: Model, options: Options) -> Compiled | None:
        """What was made of the model file before, with equal options."""
        path = self._place(model, options)
        if path is None or not path.exists():
            return None
        with contextlib.suppress(OnnxcError, OSError):
            found = artifact.read(path)
            os.utime(path)
            return found
        return None

    def compiled(self, model: Model, options: Options, make: Callable[[], Compiled]) -> Compiled:
        """What `make` makes of the model file, kept for the next time; or what it made before."""
        found = self.find(model, options)
        if found is not None:
            return found
        path, result = self._place(model, options), make()
        if path is not None and not _reads_other_files(str(model)):
            with contextlib.suppress(OnnxcError, OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                artifact.save(result, path)
                self._prune()
        return result

    def _place(self, model: Model, options: Options) -> Path | None:
        watched = options.after is not None or options.folder is not None
        key = None if watched or not self.limit else _key(model, options.decisive)
        return None if key is None else self.folder / f"{key}.onnxc"

    def _prune(self) -> None:
        files = [(entry.stat(), entry.path) for entry in os.scandir(self.folder) if entry.name.endswith(".onnxc")]
        found = sorted((status.st_mtime_ns, status.st_size, path) for status, path in files)
        total = sum(size for _, size, _ in found)
        for _, size, path in found:
            if total <= self.limit:
                break
            os.unlink(path)
            total -= size


def _key(model: object, options: Sequence[object]) -> str | None:
    if not isinstance(model, str | os.PathLike):
        return None
    try:
        path = os.path.realpath(model)
        status = os.stat(path)
    except OSError:
        return None
    if status.st_size > LARGEST:
        return None
    what = (path, status.st_size, status.st_mtime_ns, status.st_ino, _compiler(), violations.wanted(), *options)
    return hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()


@functools.cache
def _compiler() -> str:
    """Identifies this compiler by its files: a changed pass must not find what the old one made."""
    root, stamps = Path(__file__).parents[1], []
    for folder in ("ir", "passes", "backends", "compiler"):
        for place, inner, names in os.walk(root / folder):
            inner[:] = sorted(name for name in inner if name != "__pycache__")
            for name in sorted(names):
                if name.endswith((".py", ".ll")):
                    path = os.path.join(place, name)
                    status = os.stat(path)
                    stamps.append((path, status.st_size, status.st_mtime_ns))
    return hashlib.blake2b(repr((llvmlite.__version__, stamps)).encode(), digest_size=16).hexdigest()


def _reads_other_files(model: str) -> bool:
    """Whether the model may have data in other files, whose changes would go unnoticed: the key "location" tells."""
    word, tail = b"location", b""
    with open(model, "rb") as file:
        while block := file.read(1 << 24):
            if word in tail + block:
                return True
            tail = block[-len(word) :]
    return False
