"""A bounded cache of immutable files on this machine's disk, shared by its processes."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path


class DiskCache:
    """Files of `folder`, at most `limit_bytes` of them; those go first that were used least recently."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes

    def entry(self, key: str, size: int, make: Callable[[Path], None]) -> Path | None:
        """The path of the file `key` of `size` bytes, written by `make` if it is not there. None: no room for it."""
        if size > self.limit_bytes:
            return None
        path = self.folder / hashlib.sha256(key.encode()).hexdigest()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not path.exists() or path.stat().st_size != size:
                temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
                make(temporary)
                temporary.rename(path)
                self._evict(path)
            os.utime(path)
        except OSError:
            return None
        return path

    def _evict(self, kept: Path) -> None:
        there = sorted(
            (entry for entry in self.folder.iterdir() if entry != kept), key=lambda entry: entry.stat().st_mtime
        )
        total = sum(entry.stat().st_size for entry in [*there, kept])
        for entry in there:
            if total <= self.limit_bytes:
                return
            total -= entry.stat().st_size
            entry.unlink(missing_ok=True)


def default_cache(limit_gib: float = 50) -> DiskCache:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return DiskCache(base / "clipdist", int(limit_gib * (1 << 30)))
