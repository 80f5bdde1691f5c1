"""What lies in the files of shards: matrices and columns, from the disk, the cache of a store, or the store.

Where there is no cache, or no room in it, a store's row groups are streamed.
"""

from __future__ import annotations

import io
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipdist import storage
from clipdist.cache import DiskCache
from clipdist.config import UserError
from clipdist.manifest import File, Manifest
from clipdist.schema import stored_dtype

READ_AHEAD = 3
"""Row groups, or files, that a store is asked for at a time."""

_REQUESTS = 16  # for single rows, at once
_APART = 256  # a row group is read whole when one in so many of its rows is asked for
_HELD_BYTES = 256 << 20  # of columns in memory
_SHARE_OF_CACHE = 0.6  # for the row groups of one table; codes take half as much as float16 rows


@dataclass(frozen=True)
class RowGroup:
    """One row group of a shard. `first` is the row number of its first live row; `deleted` holds the places of its
    deleted rows, ascending."""

    file: File
    index: int
    rows: int
    offset: int
    first: int
    deleted: NDArray[np.int64]

    @property
    def live(self) -> int:
        return self.rows - len(self.deleted)

    def numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row numbers of places of live rows."""
        return self.first + places - np.searchsorted(self.deleted, places)


class ShardReader:
    """Reads the shards of one table; nothing here knows of deleted rows."""

    def __init__(self, manifest: Manifest, cache: DiskCache | None) -> None:
        self.manifest, self.cache = manifest, cache
        self.dim = int(manifest.stamp.identity["dim"])
        self.dtype: np.dtype[Any] = np.dtype(stored_dtype(manifest.stamp)).newbyteorder("<")
        self._held: OrderedDict[tuple[str, str], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()
        self._starts: dict[tuple[str, str], int] = {}
        ends: Counter[str] = Counter()
        for file in manifest.files:
            for index, rows in enumerate(file.row_groups):
                ends[file.table] += rows * self.dim * self.dtype.itemsize
                self._starts[file.path, f"rows {index}"] = ends[file.table]

    def matrix_of(self, group: RowGroup) -> np.ndarray:
        """All rows of a row group, the deleted ones too: [rows, dim]. Memory-mapped where it lies on this machine."""
        shape, path = (group.rows, self.dim), self.manifest.path(group.file)
        try:
            if storage.is_local(path):
                return np.memmap(path, dtype=self.dtype, mode="r", offset=group.offset, shape=shape)
            found = self._entry(f"rows {group.index}", group.file, self._bytes_of(group), lambda: self._fetch(group))
            return found.view(self.dtype).reshape(shape)
        except (OSError, ValueError) as error:
            raise damaged(path, error) from None

    def rows_of(self, group: RowGroup, places: np.ndarray) -> np.ndarray:
        """The vectors at places (int64 [n]) of a row group: [n, dim]. Of one that only a store has, few rows are read
        one by one."""
        far = not storage.is_local(self.manifest.uri) and not self._is_here(group)
        unique, inverse = np.unique(places, return_inverse=True)
        if not far or len(unique) * _APART > group.rows:
            return np.asarray(self.matrix_of(group)[places])
        path, size = self.manifest.path(group.file), self.dim * self.dtype.itemsize

        def read(place: int) -> bytes:
            start = group.offset + int(place) * size
            data = storage.read_bytes(path, start, start + size)
            if len(data) != size:
                raise damaged(path, ValueError(f"{len(data)} of {size} bytes there"))
            return data

        with ThreadPoolExecutor(_REQUESTS) as pool:
            rows = b"".join(pool.map(read, unique))
        return np.frombuffer(rows, self.dtype).reshape(len(unique), self.dim)[inverse]

    def column(self, file: File, name: str) -> pa.ChunkedArray:
        """A column of all rows of a file; those that were read last are held in memory."""
        with self._lock:
            if (file.path, name) in self._held:
                self._held.move_to_end((file.path, name))
                return self._held[file.path, name]
        column = self._read_column(file, name)
        with self._lock:
            self._held[file.path, name] = column
            while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > _HELD_BYTES:
                self._held.popitem(last=False)
        return column

    def schema(self, file: File) -> pa.Schema:
        """Every column of a file, and its type."""
        path = self.manifest.path(file)

        def read() -> bytes:
            with storage.open_read(path, buffered=False) as opened:
                return bytes(pq.read_schema(opened).remove_metadata().serialize())

        try:
            if storage.is_local(path):
                return pq.read_schema(path).remove_metadata()
            kept = self._entry("schema", file, None, read)
            return pa.ipc.read_schema(pa.py_buffer(kept))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise damaged(path, error) from None

    def _read_column(self, file: File, name: str) -> pa.ChunkedArray:
        path = self.manifest.path(file)

        def read() -> pa.Table:
            with storage.open_read(path, buffered=False) as opened:
                return pq.read_table(opened, columns=[name]).replace_schema_metadata(None)

        try:
            if storage.is_local(path):
                # Not a file of Python's, which Arrow's threads may still ask for when the process ends: it would abort.
                with pa.memory_map(path) as mapped:
                    found = pq.ParquetFile(mapped).read(columns=[name]).replace_schema_metadata(None)
            else:
                kept = self._entry(f"column {name}", file, None, lambda: _ipc(read()))
                found = pa.ipc.open_file(pa.py_buffer(kept)).read_all()
            if len(found) != file.rows or found.column_names != [name]:
                raise ValueError(f"{len(found)} rows of {', '.join(found.column_names)} there")
        except (OSError, ValueError, pa.ArrowException) as error:
            raise damaged(path, error) from None
        return found.column(0)

    def ahead(self, groups: Sequence[RowGroup]) -> Iterator[np.ndarray]:
        """The matrices of row groups, in order; a store is asked for a few at a time."""
        if storage.is_local(self.manifest.uri):
            yield from map(self.matrix_of, groups)
            return
        waiting: deque[Future[np.ndarray]] = deque()
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            for group in groups:
                waiting.append(pool.submit(self.matrix_of, group))
                if len(waiting) > READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _fetch(self, group: RowGroup) -> bytes:
        length = self._bytes_of(group)
        data = storage.read_bytes(self.manifest.path(group.file), group.offset, group.offset + length)
        if len(data) != length:
            raise ValueError(f"{len(data)} of {length} bytes there")
        return data

    def _bytes_of(self, group: RowGroup) -> int:
        return group.rows * self.dim * self.dtype.itemsize

    def _is_here(self, group: RowGroup) -> bool:
        key = cache_key(group.file, f"rows {group.index}")
        return self.cache is not None and self.cache.find(key, self._bytes_of(group)) is not None

    def _entry(self, what: str, file: File, size: int | None, make: Callable[[], bytes]) -> NDArray[np.uint8]:
        if self.cache is None or (size is not None and not self._has_room(what, file)):
            return np.frombuffer(make(), np.uint8)
        return self.cache.entry(cache_key(file, what), size, make)

    def _has_room(self, what: str, file: File) -> bool:
        """Whether these rows are kept: as many row groups as fill a part of the cache, and always the same. Else a
        table that is larger would throw out on every pass what the next pass needs first."""
        return self.cache is not None and self._starts[file.path, what] <= _SHARE_OF_CACHE * self.cache.limit_bytes


def damaged(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path}: this shard is missing, unreadable or shorter than its commit says "
        f"({error.__class__.__name__}: {error}); copy it again, or embed into a new output"
    )


def cache_key(file: File, what: str) -> str:
    """A file's name holds random digits of the attempt that wrote it, so with its size it names its content, wherever
    the table lies: a table that was copied shares what is kept of it."""
    return f"{what} of {file.path}, {file.file_bytes} bytes"


def _ipc(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()
