"""The rows of a split, from memory or streamed: tables of the same row groups joined side by side, read lane by lane.

A split of at most IN_MEMORY_BYTES is read once and dealt row by row. A larger one is streamed: every lane holds the
row group that it is in and fetches the next one ahead, so memory is two row groups per lane whatever the split's size.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipdist import storage
from clipdist.lanes import EpochOrder, Indices

IN_MEMORY_BYTES = 512 * 2**20
READ_THREADS = 4


@dataclass(frozen=True)
class RowGroups:
    """Row groups of one table, in order: the file, the index in it, and the rows of each."""

    files: tuple[str, ...]
    indices: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, group: int) -> pa.Table:
        with storage.open_read(self.files[group]) as opened:
            return pq.ParquetFile(opened).read_row_group(self.indices[group], columns=list(self.columns))

    def read_ahead(self, chosen: Sequence[int], ahead: int = READ_THREADS) -> Iterator[tuple[int, pa.Table]]:
        """(row group, its table) of the chosen ones in order, while threads read those to come."""
        with ThreadPoolExecutor(ahead) as pool:
            coming: deque[Future[pa.Table]] = deque()
            for position, group in enumerate(chosen):
                coming += [pool.submit(self.read, one) for one in chosen[position + len(coming) : position + ahead]]
                yield group, coming.popleft().result()


class LocalCache:
    """Row groups of a remote store on this machine's disk, up to a number of bytes per process; the processes of a
    machine share what they keep. Every epoch reads every group once, in another order, so what came first stays:
    throwing out the oldest would throw out what comes next."""

    def __init__(self, name: str, max_bytes: int) -> None:
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        self.folder = Path(tempfile.gettempdir()) / f"clipdist-cache-{os.getuid()}-{digest}"
        self.free_bytes = max_bytes if self._is_ours() else 0

    def _is_ours(self) -> bool:
        """Made when it is missing: a process that ended, or is a stage ahead, may have removed it."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        return self.folder.stat().st_uid == os.getuid()

    def read(self, groups: RowGroups, group: int) -> pa.Table:
        key = f"{groups.files[group]}:{groups.indices[group]}:{groups.columns}"
        path = self.folder / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        with contextlib.suppress(OSError), pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
        table = groups.read(group)
        if table.nbytes <= self.free_bytes and self._is_ours():
            self._keep(table, path)
        return table

    def _keep(self, table: pa.Table, path: Path) -> None:
        unfinished = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            unfinished.rename(path)
            self.free_bytes -= table.nbytes
        except OSError:  # a full disk must not end a training
            self.free_bytes = 0
            unfinished.unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Rows:
    """The rows of a split: one or more tables with the same row groups, joined side by side."""

    def __init__(
        self, tables: Sequence[RowGroups], *, in_memory: bool, cache_bytes: int = 0, threads: int = READ_THREADS
    ) -> None:
        assert all(table.rows == tables[0].rows for table in tables)
        self.tables, self._pool = list(tables), ThreadPoolExecutor(threads)
        remote = any(not storage.is_local(file) for table in tables for file in table.files[:1])
        self._cache = LocalCache(tables[0].files[0], cache_bytes) if cache_bytes and remote and not in_memory else None
        self._whole = (
            pa.concat_tables(self._pool.map(self.read, range(len(tables[0])))).combine_chunks() if in_memory else None
        )
        sizes = np.ones(sum(tables[0].rows), np.int64) if in_memory else np.array(tables[0].rows, np.int64)
        self.sizes: Indices = sizes

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def read(self, group: int) -> pa.Table:
        """One row group with all columns."""
        tables = [self._cache.read(table, group) if self._cache else table.read(group) for table in self.tables]
        joined = tables[0]
        for table in tables[1:]:
            for name in table.column_names:
                joined = joined.append_column(name, table.column(name))
        return joined

    def lane(self, order: EpochOrder, lane: int, start: int) -> Lane:
        """A lane of an epoch from its row `start` on."""
        return (
            _DealtLane(self._whole, order, lane, start)
            if self._whole is not None
            else _StreamedLane(self, order, lane, start)
        )

    def fetch(self, group: int) -> Future[pa.Table]:
        return self._pool.submit(self.read, group)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._cache:
            self._cache.close()


class Lane(Protocol):
    """The rows of one lane, front to back."""

    def take(self, stop: int) -> list[pa.Table]:
        """The rows from where it is up to row `stop` of the lane."""


class _DealtLane:
    """A lane of single rows of a table in memory."""

    def __init__(self, table: pa.Table, order: EpochOrder, lane: int, start: int) -> None:
        self.table, self.rows, self.position = table, order.groups[lane], start

    def take(self, stop: int) -> list[pa.Table]:
        chosen, self.position = self.rows[self.position : stop], stop
        return [self.table.take(pa.array(chosen))] if len(chosen) else []


class _StreamedLane:
    """A lane of row groups, of which it holds one and fetches the next."""

    def __init__(self, rows: Rows, order: EpochOrder, lane: int, start: int) -> None:
        self.source, self.order, self.groups = rows, order, order.groups[lane]
        ends = np.cumsum(order.sizes[self.groups])
        self.number = int(np.searchsorted(ends, start, side="right"))
        self.first = int(ends[self.number - 1]) if self.number else 0  # row of the lane at which its group starts
        self.position = start
        self.table: pa.Table | None = None
        self.ahead: Future[pa.Table] | None = self._fetch(self.number)

    def take(self, stop: int) -> list[pa.Table]:
        parts = []
        while self.position < stop:
            table = self._group()
            end = min(stop, self.first + len(table))
            parts.append(table.slice(self.position - self.first, end - self.position))
            self.position = end
            if end == self.first + len(table):
                self.table, self.number, self.first = None, self.number + 1, end
        return parts

    def _group(self) -> pa.Table:
        if self.table is None:
            assert self.ahead is not None
            shuffled = self.order.shuffled(int(self.groups[self.number]))
            self.table = self.ahead.result().take(pa.array(shuffled))
            self.ahead = self._fetch(self.number + 1)
        return self.table

    def _fetch(self, number: int) -> Future[pa.Table] | None:
        return self.source.fetch(int(self.groups[number])) if number < len(self.groups) else None
