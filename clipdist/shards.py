"""Committed embedding shards as matrices: written as one raw page per row group, read by memory map or range reads.

A row group's vectors are one UNCOMPRESSED PLAIN page, so its bytes are the row-major matrix; the byte offset is
committed with the file. To every other reader a shard is ordinary Parquet.
"""

from __future__ import annotations

import io
import json
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipdist import storage
from clipdist.cache import DiskCache
from clipdist.config import UserError
from clipdist.deletes import deleted_rows
from clipdist.manifest import File, Manifest
from clipdist.schema import Stamp, stored_dtype, vector_type

VECTOR = "embedding.list.element"
ROW_GROUP = 65_536
STAMP_KEY = "clipdist"

READ_AHEAD = 3

_MATRIX_BYTES = 1 << 30  # of one row group at most: a page has to stay below 2 GiB with all that comes with it
_NOTHING_DELETED: NDArray[np.int64] = np.zeros(0, np.int64)


def row_group_rows(stamp: Stamp) -> int:
    """Rows of a full row group."""
    row_bytes = int(stamp.identity["dim"]) * np.dtype(stored_dtype(stamp)).itemsize
    return max(1, min(ROW_GROUP, _MATRIX_BYTES // row_bytes))


def encode_shard(table: pa.Table, name: str, stamp: Stamp) -> tuple[bytes, File]:
    """A table of `embeddings_schema` as the bytes of one shard, and what the ledger has to know of it."""
    writer, size = ShardWriter(table.schema, stamp), row_group_rows(stamp)
    for start in range(0, len(table), size):
        writer.write(table.slice(start, size))
    return writer.close(name)


class ShardWriter:
    """One shard in memory, row group by row group. The footer tells its stamp to whoever finds the file alone."""

    def __init__(self, schema: pa.Schema, stamp: Stamp) -> None:
        self.dtype, self.dim = np.dtype(stored_dtype(stamp)), int(stamp.identity["dim"])
        expected = vector_type(self.dim, stored_dtype(stamp))
        if schema.field("embedding").type != expected:
            raise RuntimeError(f"the stamp says {expected}, the rows hold {schema.field('embedding').type}")
        columns = [leaf for leaf in schema.names if leaf != "embedding"]
        self._checksums: list[int] = []
        self._buffer = io.BytesIO()
        self._writer = pq.ParquetWriter(
            self._buffer,
            schema.remove_metadata(),
            compression={VECTOR: "none"} | dict.fromkeys(columns, "zstd"),
            use_dictionary=[leaf for leaf in columns if leaf not in ("id", "caption", "image_uri", "pair_id")],
            data_page_size=2_000_000_000,
            max_rows_per_page=1 << 20,
            write_page_checksum=False,
        )
        self._writer.add_key_value_metadata({STAMP_KEY: json.dumps(stamp.to_json()), "layout": "single_page"})

    def write(self, rows: pa.Table) -> None:
        """Adds one row group; every one but the last has `row_group_rows` rows."""
        checksum = 0
        for chunk in rows.column("embedding").chunks:
            checksum = zlib.crc32(chunk.flatten().to_numpy().data, checksum)
        self._checksums.append(checksum)
        self._writer.write_table(rows, row_group_size=len(rows))

    def close(self, name: str) -> tuple[bytes, File]:
        """The shard. RuntimeError unless every row group's vectors lie in it raw, bit for bit."""
        self._writer.close()
        data = self._buffer.getvalue()
        metadata = pq.read_metadata(io.BytesIO(data))
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        rows = tuple(group.num_rows for group in groups)
        lengths = [number * self.dim * self.dtype.itemsize for number in rows]
        offsets = tuple(_matrix_offset(group, length) for group, length in zip(groups, lengths, strict=True))
        whole = memoryview(data)
        for offset, length, checksum in zip(offsets, lengths, self._checksums, strict=True):
            if zlib.crc32(whole[offset : offset + length]) != checksum:
                raise RuntimeError("the embedding column must be one raw page")
        return data, File("", name, metadata.num_rows, rows, len(data), offsets=offsets)


def _matrix_offset(group: pq.RowGroupMetaData, length: int) -> int:
    chunks = [group.column(index) for index in range(group.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == VECTOR)
    return int(chunk.data_page_offset + chunk.total_compressed_size - length)


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


@dataclass(frozen=True)
class Shards:
    """All shards of one table, in manifest order. Row numbers run through their rows, without the deleted ones."""

    manifest: Manifest
    table: str
    cache: DiskCache | None = None

    @property
    def dim(self) -> int:
        return int(self.manifest.stamp.identity["dim"])

    @property
    def dtype(self) -> np.dtype[Any]:
        """float16 or float32."""
        return np.dtype(stored_dtype(self.manifest.stamp)).newbyteorder("<")

    def __len__(self) -> int:
        return sum(self._live(file) for file in self._files)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row number, [rows, dim]) per row group; local shards are memory-mapped.

        A row group with deleted rows is a copy, made anew each time: all copies kept could fill the memory.
        """
        for group in self.row_groups:
            if group.live:
                block = self.matrix_of(group)
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

    def matrix_of(self, group: RowGroup) -> np.ndarray:
        """All rows of a row group, the deleted ones too: [rows, dim]. Memory-mapped where the shard is local."""
        path, shape = self.manifest.path(group.file), (group.rows, self.dim)
        length = group.rows * self.dim * self.dtype.itemsize
        try:
            if storage.is_local(path):
                return np.memmap(path, dtype=self.dtype, mode="r", offset=group.offset, shape=shape)
            data = storage.read_bytes(path, group.offset, group.offset + length)
            return np.frombuffer(data, dtype=self.dtype).reshape(shape)
        except (OSError, ValueError) as error:
            raise damaged(path, error) from None

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of the given row numbers (int64 [n]), in that order: [n, dim]."""
        found = np.empty((len(rows), self.dim), self.dtype)
        groups = [group for group in self.row_groups if group.live]
        which = np.searchsorted([group.first for group in groups], rows, side="right") - 1
        for index in np.unique(which):
            group, wanted = groups[index], np.flatnonzero(which == index)
            live = np.delete(np.arange(group.rows), group.deleted)
            found[wanted] = self.matrix_of(group)[live[rows[wanted] - group.first]]
        return found

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
        path = self.manifest.path(self._files[0])
        try:
            with storage.open_read(path) as file:
                return pa.schema([field for field in pq.read_schema(file) if field.name != "embedding"])
        except (OSError, pa.ArrowException) as error:
            raise damaged(path, error) from None

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
        path = self.manifest.path(file)
        try:
            with storage.open_read(path) as opened:
                found = pq.read_table(opened, columns=list(names)).replace_schema_metadata(None)
            if len(found) != file.rows or found.num_columns != len(names):
                raise ValueError(f"{len(found)} rows of {', '.join(found.column_names)} there")
        except (OSError, ValueError, pa.ArrowException) as error:
            raise damaged(path, error) from None
        return found.take(pa.array(self.live_rows(file))) if len(self._deleted_in(file)) else found


def damaged(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path}: this shard is missing, unreadable or shorter than its commit says "
        f"({error.__class__.__name__}: {error}); copy it again, or embed into a new output"
    )


def row_of_id(shards: Shards, row_id: str) -> int | None:
    """The row number of an id, None when the table does not hold it."""
    found = pc.index(shards.columns(["id"]).column("id"), pa.scalar(row_id)).as_py()
    return None if found < 0 else int(found)
