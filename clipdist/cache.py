"""A bounded cache of immutable files on this machine's disk, shared by its processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_LEFT_FREE = 1 << 30  # bytes of the disk that are not the cache's
_ABANDONED_SECONDS = 24 * 3600.0  # after which a file that was never finished was some killed process's


class DiskCache:
    """Files of `folder`, at most `limit_bytes` of them; those go first that were not used for longest.

    Whoever has opened or mapped a file keeps it, also when it goes. A disk that is full or cannot be written makes a
    cache that holds nothing, and no error: everything in it can be had elsewhere.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}
        self._bytes: int | None = None  # as far as this process knows

    def __getstate__(self) -> tuple[Path, int]:
        return self.folder, self.limit_bytes

    def __setstate__(self, state: tuple[Path, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def find(self, key: str, size: int | None = None) -> NDArray[np.uint8] | None:
        """The file `key`, memory-mapped, if it is there, and of `size` bytes where that is known."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            if self._is_ours() and (there := path.stat().st_size) and size in (None, there):
                os.utime(path)
                # Copy on write: nothing writes, but torch warns of memory that is read-only.
                return np.memmap(path, np.uint8, "c")
        return None

    def entry(self, key: str, size: int | None, make: Callable[[], bytes]) -> NDArray[np.uint8]:
        """The bytes of the file `key`, memory-mapped, of what `make` gives where it is not there yet; in memory when
        there is no room for a file. Threads of this process wait for the one that makes it; processes may make it
        twice."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            found = self.find(key, size)
            if found is None:
                data = make()
                with contextlib.suppress(OSError):
                    self._put(key, data)
                found = self.find(key, len(data))
            return np.frombuffer(data, np.uint8) if found is None else found

    def size_bytes(self) -> int:
        return sum(size for _, size, _ in self._files())

    def clear(self) -> None:
        for path, _, _ in self._files():
            path.unlink(missing_ok=True)
        self._bytes = 0

    def _put(self, key: str, data: bytes) -> None:
        """OSError when there is no room."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self._is_ours():
            raise PermissionError("another user's folder")
        if len(data) > min(self.limit_bytes, shutil.disk_usage(self.folder).free - _LEFT_FREE):
            raise OSError("no room")
        path = self._path(key)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        with self._lock:
            if self._bytes is None or self._bytes + len(data) > self.limit_bytes:
                self._bytes = self._evict(path)
            else:
                self._bytes += len(data)

    def _path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()

    def _is_ours(self) -> bool:
        """What another user put there, such as in a folder for temporary files, is not to be trusted."""
        return self.folder.stat().st_uid == os.getuid()

    def _evict(self, newest: Path) -> int:
        """Removes what is too much, but not the newest file; how many bytes are left."""
        files = sorted(self._files(), key=lambda file: file[2])
        total = sum(size for _, size, _ in files)
        for path, size, used in files:
            abandoned = path.suffix == ".tmp" and used < time.time() - _ABANDONED_SECONDS
            if abandoned or (total > self.limit_bytes and path != newest and path.suffix != ".tmp"):
                path.unlink(missing_ok=True)
                total -= size
        return total

    def _files(self) -> list[tuple[Path, int, float]]:
        """Path, size and last use of every file."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    found.append((Path(entry.path), entry.stat().st_size, entry.stat().st_mtime))
        return found


def default_cache(limit_gib: float = 50) -> DiskCache:
    """Where desktops keep such files: `$XDG_CACHE_HOME/clipdist`, or `~/.cache/clipdist`; without a home that can be
    written, a folder of this user's among the temporary ones."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    existing = next(folder for folder in (base, *base.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        base = Path(tempfile.gettempdir()) / f"clipdist-{os.getuid()}"
    return DiskCache(base / "clipdist", int(limit_gib * (1 << 30)))
