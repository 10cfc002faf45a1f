"""Compiled code on disk, by the hash of what it was made from: the cache that all backends share."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import platformdirs

PRUNING_PAUSE = 60
"""Seconds in which the files of a cache are not counted again."""


def cache_folder() -> Path:
    """The user's cache folder, or $ONNXC_CACHE_DIR."""
    return Path(os.environ.get("ONNXC_CACHE_DIR") or platformdirs.user_cache_dir("onnxc"))


def usable_processors() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def key_of(*parts: str) -> str:
    """The key of what is made from exactly these texts."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode()
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


@dataclass(frozen=True)
class ObjectCache:
    """Object files on disk by the hash of what they were made from. A file that is damaged or unreadable is absent.

    When the files exceed `limit` bytes, those that were not used for longest go.
    """

    folder: Path
    limit: int = 256 << 20

    @staticmethod
    def default() -> ObjectCache:
        """In the user's cache folder, or in $ONNXC_CACHE_DIR."""
        return ObjectCache(cache_folder() / "objects")

    def load(self, key: str) -> bytes | None:
        path = self.folder / key
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        digest, content = stored[:16], stored[16:]
        if not content or _digest(content) != digest:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def store(self, key: str, content: bytes) -> None:
        """Keeps a file; does nothing where the folder cannot be written."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".")
            try:
                with open(handle, "wb") as file:
                    file.write(_digest(content) + content)
                os.replace(name, self.folder / key)
            except OSError:
                os.unlink(name)
                raise

    def sizes(self) -> list[int]:
        """The bytes of all files."""
        return [size for _, size, _ in self._files()]

    def prune(self, limit: int | None = None) -> int:
        """Deletes the files used longest ago until three quarters of the limit are left, if it is exceeded, or of
        another limit. Returns the bytes that were freed."""
        limit, files = self.limit if limit is None else limit, self._files()
        total, freed = sum(size for _, size, _ in files), 0
        for _, size, path in files if total > limit else ():
            with contextlib.suppress(OSError):
                os.unlink(path)
            freed += size
            if total - freed <= limit * 3 // 4:
                break
        return freed

    def keep_within_limit(self) -> None:
        """Prunes where no process has done so within the last minute: to look at thousands of files takes longer than
        to compile a small model."""
        mark = self.folder.with_name(f"{self.folder.name}.pruned")
        with contextlib.suppress(OSError):
            if abs(time.time() - mark.stat().st_mtime) < PRUNING_PAUSE:
                return
        with contextlib.suppress(OSError):
            mark.touch()
        self.prune()

    def _files(self) -> list[tuple[int, int, str]]:
        """(time of the last use, bytes, path), those used longest ago first."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):
                    status = entry.stat()
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
        return sorted(found)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
