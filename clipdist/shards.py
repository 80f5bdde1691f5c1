"""The shards of a table as matrices and columns of the rows that live."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipdist.cache import DiskCache
from clipdist.deletes import deleted_rows
from clipdist.manifest import File, Manifest
from clipdist.progress import Progress
from clipdist.shard_reader import READ_AHEAD, RowGroup, ShardReader

_NOTHING_DELETED: NDArray[np.int64] = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Shards:
    """All shards of one table, in manifest order. Row numbers run through their rows, without the deleted ones."""

    manifest: Manifest
    table: str
    cache: DiskCache | None = None

    @cached_property
    def reader(self) -> ShardReader:
        return ShardReader(self.manifest, self.cache)

    @property
    def dim(self) -> int:
        return self.reader.dim

    @property
    def dtype(self) -> np.dtype[Any]:
        """float16 or float32."""
        return self.reader.dtype

    def __len__(self) -> int:
        return sum(self._live(file) for file in self._files)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row number, [rows, dim]) per row group; local shards are memory-mapped.

        A row group with deleted rows is a copy, made anew each time: all copies kept could fill the memory.
        """
        groups = [group for group in self.row_groups if group.live]
        for group, block in zip(groups, self.reader.ahead(groups), strict=True):
            yield group.first, np.delete(np.asarray(block), group.deleted, axis=0) if len(group.deleted) else block

    @cached_property
    def row_groups(self) -> list[RowGroup]:
        """Every row group, in order."""
        found, first = [], 0
        for file in self._files:
            deleted, start = self._deleted_in(file), 0
            for index, (rows, offset) in enumerate(zip(file.row_groups, file.offsets, strict=True)):
                inside = deleted[np.searchsorted(deleted, start) : np.searchsorted(deleted, start + rows)] - start
                found.append(RowGroup(file, index, rows, offset, first, inside))
                start, first = start + rows, first + rows - len(inside)
        return found

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of the given row numbers (int64 [n]), in that order: [n, dim]."""
        found = np.empty((len(rows), self.dim), self.dtype)
        groups = [group for group in self.row_groups if group.live]
        which = np.searchsorted([group.first for group in groups], rows, side="right") - 1
        for index in np.unique(which):
            group, wanted = groups[index], np.flatnonzero(which == index)
            inside = rows[wanted] - group.first
            places = np.delete(np.arange(group.rows), group.deleted)[inside] if len(group.deleted) else inside
            found[wanted] = self.reader.rows_of(group, places)
        return found

    def warm(self) -> None:
        """Brings everything of a store's table into the cache, several row groups at a time; what is there already is
        not asked for again."""
        with Progress(f"cache {self.table}", len(self), "rows") as progress:
            groups = [group for group in self.row_groups if group.live]
            for group, _ in zip(groups, self.reader.ahead(groups), strict=True):
                progress.advance(group.live)
        self.columns(self.column_names())

    def matrix(self) -> np.ndarray:
        """All vectors, [rows, dim], in memory."""
        blocks = [block for _, block in self.blocks()]
        return np.concatenate(blocks) if blocks else np.zeros((0, self.dim), self.dtype)

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Whole columns of all rows, without the vectors."""
        tables = [self._read(file, names) for file in self._files if self._live(file)]
        if not tables:
            return pa.table({name: pa.array([], pa.string()) for name in names})
        return pa.concat_tables(tables)

    def take(self, rows: np.ndarray, names: Sequence[str]) -> pa.Table:
        """Columns of the given row numbers (int64 [n]), in that order; reads only the files that hold them."""
        live = [self._live(file) for file in self._files]
        ends = np.cumsum(live)
        which = np.searchsorted(ends, rows, side="right")
        parts, order = [], []
        for index in np.unique(which):
            inside = np.flatnonzero(which == index)
            start = int(ends[index]) - live[index]
            parts.append(self._read(self._files[index], names).take(pa.array(rows[inside] - start)))
            order.append(inside)
        if not parts:
            return self.columns(names).slice(0, 0)
        back = np.argsort(np.concatenate(order), kind="stable")
        return pa.concat_tables(parts).take(pa.array(back))

    def by_file(self, names: Sequence[str]) -> Iterator[tuple[File, NDArray[np.int64], pa.Table]]:
        """File by file the rows that live: their numbers in the file, and columns of them. A few are read ahead."""
        waiting: deque[tuple[File, Future[pa.Table]]] = deque()
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            for file in [*(file for file in self._files if self._live(file)), *[None] * READ_AHEAD]:
                if file is not None:
                    waiting.append((file, pool.submit(self._read, file, names)))
                if waiting and (file is None or len(waiting) > READ_AHEAD):
                    first, found = waiting.popleft()
                    yield first, self.live_rows(first), found.result()

    def live_rows(self, file: File) -> NDArray[np.int64]:
        """Numbers of a file's rows that are not deleted."""
        return np.delete(np.arange(file.rows), self._deleted_in(file))

    def column_names(self) -> list[str]:
        return list(self.schema().names)

    def schema(self) -> pa.Schema:
        """Columns and their types, without the vectors; none of a table without files."""
        if not self._files:
            return pa.schema([])
        return pa.schema([field for field in self.reader.schema(self._files[0]) if field.name != "embedding"])

    @cached_property
    def _files(self) -> list[File]:
        return self.manifest.select(self.table)

    @cached_property
    def _deleted(self) -> dict[str, NDArray[np.int64]]:
        return deleted_rows(self.manifest)

    def _deleted_in(self, file: File) -> NDArray[np.int64]:
        return self._deleted.get(file.path, _NOTHING_DELETED)

    def _live(self, file: File) -> int:
        return file.rows - len(self._deleted_in(file))

    def _read(self, file: File, names: Sequence[str]) -> pa.Table:
        """Columns of a file's rows, without the deleted ones."""
        found = pa.table([self.reader.column(file, name) for name in names], names=list(names))
        return found.take(pa.array(self.live_rows(file))) if len(self._deleted_in(file)) else found


def row_of_id(shards: Shards, row_id: str) -> int | None:
    """The row number of an id, None when the table does not hold it."""
    found = pc.index(shards.columns(["id"]).column("id"), pa.scalar(row_id)).as_py()
    return None if found < 0 else int(found)
