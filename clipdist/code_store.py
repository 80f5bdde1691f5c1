"""The codes of a table's row groups: made once, on all cores, and kept in the cache on this machine's disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdist import storage
from clipdist.cache import DiskCache
from clipdist.codes import LAYOUT, Codes, encode
from clipdist.kernels import Kernel, find_kernel
from clipdist.progress import Progress
from clipdist.scan import Part
from clipdist.scores import Ints
from clipdist.shard_reader import RowGroup, cache_key
from clipdist.shards import Shards

FEWEST_ROWS = 16_384
"""Below it the float32 pass is done before codes would be asked for."""
_WORTH_TORCH = 1 << 22  # rows x queries: what the float32 pass does while torch is imported
_HELD_BYTES = 4 << 30  # of codes that no cache takes, in memory
_SHOWN_FROM = 1_000_000  # rows whose codes take seconds


class CodeStore:
    """Codes for searches of one table. `device`: "cpu", or a GPU that then holds them all."""

    def __init__(self, shards: Shards, cache: DiskCache | None, device: str = "cpu") -> None:
        self.shards, self.cache, self.device = shards, cache, device
        self._work = 0
        self._parts: list[Part] | None = None

    def kernel(self, queries: int) -> Kernel | None:
        """What multiplies codes, where that is worth it: torch is used when it was imported already, or once importing
        it would not have taken longer than what was asked for."""
        rows = len(self.shards)
        self._work += rows * queries
        if rows < FEWEST_ROWS or not ("torch" in sys.modules or self._work > _WORTH_TORCH):
            return None
        if self.cache is None and rows * self.shards.dim > _HELD_BYTES:
            return None
        return find_kernel(self.device)

    def parts(self, kernel: Kernel) -> list[Part]:
        """Every row group with its codes, where the kernel wants them."""
        if self._parts is None:
            self._parts = self._make(kernel)
        return self._parts

    def _make(self, kernel: Kernel) -> list[Part]:
        groups = [group for group in self.shards.row_groups if group.live]
        show = Progress("codes", len(self.shards), "rows") if len(self.shards) >= _SHOWN_FROM else None
        made = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for group, codes in zip(groups, pool.map(self._codes, groups), strict=True):
                part = Part(group, codes, kernel.place(codes.code), self._vectors(group))
                made.append(part)
                if show is not None:
                    show.advance(group.rows)
        return made

    def _codes(self, group: RowGroup) -> Codes:
        dim = self.shards.dim
        if self.cache is None:
            return encode(self.shards.reader.matrix_of(group))
        key = cache_key(group.file, f"codes {LAYOUT} {group.index}")
        size = Codes.size(group.rows, dim)
        data = self.cache.entry(key, size, lambda: encode(self.shards.reader.matrix_of(group)).to_bytes())
        return Codes.of_bytes(data, group.rows, dim)

    def _vectors(self, group: RowGroup) -> Callable[[Ints], NDArray[Any]]:
        """The vectors at places."""
        if storage.is_local(self.shards.manifest.uri):
            matrix = self.shards.reader.matrix_of(group)  # once: to map a file takes longer than to read a row
            return lambda places: np.asarray(matrix[places])
        return lambda places: self.shards.reader.rows_of(group, places)
