"""Compiled models on disk, so that the second compile of a model is a load.

A model file is recognised by its place, size, time of change and inode, and so are the files of its external data; a
model given as bytes by its content. (One given as a ModelProto is compiled anew; its kernels still come from the cache
of object files.) What lies in the cache is an artifact, mapped when it is found; one that is damaged or of another
compiler is absent. Files are complete when they get their names, so processes may share the folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import llvmlite
import platformdirs

from ..backends.cpu import violations
from ..ir.errors import OnnxcError
from . import artifact
from .compiled import Compiled
from .options import Model, Options

ENTRY, SOURCES = ".onnxc", ".files"
"""Suffixes of an entry, and of what tells which other files a model reads."""
ABANDONED = 24 * 3600
"""Seconds after which a file that was begun is not being written any more."""


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
        """What was made of the model before, with equal options."""
        key = self._key(model, options)
        if key is None:
            return None
        with contextlib.suppress(OnnxcError, OSError, ValueError, TypeError):
            sources = self.folder / f"{_digest(*key[:1])}{SOURCES}"
            entry = self._entry(key, model, json.loads(sources.read_bytes()))
            found = artifact.read(entry)
            for path in (sources, entry):
                os.utime(path)
            return found
        return None

    def compiled(self, model: Model, options: Options, make: Callable[[], Compiled]) -> Compiled:
        """What `make` makes of the model, kept for the next time; or what it made before."""
        found = self.find(model, options)
        if found is not None:
            return found
        key, entry, names = self._key(model, options), None, []
        if key is not None:
            # Before the files are read: what changes meanwhile must not be taken for what was compiled.
            with contextlib.suppress(OnnxcError, OSError):
                names = _other_files(model)
                entry = self._entry(key, model, names)
        result = make()
        if entry is not None and key is not None and sum(map(len, result.weights.values())) <= self.limit:
            with contextlib.suppress(OnnxcError, OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                artifact.save(result, entry)
                _write(self.folder / f"{_digest(*key[:1])}{SOURCES}", json.dumps(names).encode())
                self.prune()
        return result

    def files(self) -> list[tuple[int, int, Path]]:
        """(time of the last use in ns, bytes, path) of the files in the cache, those used longest ago first."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):
                    if entry.is_file(follow_symlinks=False) and _is_ours(entry.name):
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        return sorted(found)

    def prune(self, limit: int | None = None) -> int:
        """Deletes files, those used longest ago first, until `limit` bytes are left (None: the cache's own limit), and
        those that a process left unfinished. Returns the bytes that were freed."""
        files = self.files()
        total, freed = sum(size for _, size, _ in files), 0
        for used, size, path in files:
            unfinished = path.name.startswith(".") and used < time.time_ns() - ABANDONED * 10**9
            if unfinished or total - freed > (self.limit if limit is None else limit):
                with contextlib.suppress(OSError):  # another process was first
                    path.unlink()
                    freed += size
        return freed

    def _key(self, model: Model, options: Options) -> tuple[str, str] | None:
        """Texts that tell a model, and what is wanted of it; None where it is not kept."""
        if not self.limit or options.after is not None or options.folder is not None:
            return None
        if isinstance(model, bytes):
            source = _digest(hashlib.blake2b(model, digest_size=16).hexdigest())
        elif isinstance(model, str | os.PathLike):
            try:
                source = repr(_stamp(os.path.realpath(model)))
            except OSError:
                return None
        else:
            return None
        return source, repr((_compiler(), violations.wanted(), *options.decisive))

    def _entry(self, key: tuple[str, str], model: Model, names: Iterable[str]) -> Path:
        """The place of what was made of a model that reads these other files too, as they are now."""
        stamps = [_stamp(os.path.join(os.path.dirname(os.path.realpath(str(model))), name)) for name in names]
        return self.folder / f"{_digest(*key, repr(stamps))}{ENTRY}"


def _is_ours(name: str) -> bool:
    """Whether a file is one that the cache wrote, or (with a dot in front) began to write."""
    return name.endswith((ENTRY, SOURCES)) or (name.startswith(".") and (f"{ENTRY}." in name or f"{SOURCES}." in name))


def _stamp(path: str) -> tuple[str, int, int, int]:
    """What tells a file and its content without reading it."""
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns, status.st_ino


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


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


def _other_files(model: Model) -> list[str]:
    """Names of the files beside a model that hold its external data."""
    from .weights import external_files  # it needs onnx, which takes long to import

    return [] if isinstance(model, bytes) else external_files(str(model))
