"""Committed embedding shards as matrices: written as one raw page per row group, read by memory map or range reads.

A row group's vectors are one UNCOMPRESSED PLAIN page, so its bytes are the row-major matrix; the byte offset is
committed with the file. To every other reader a shard is ordinary Parquet.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipdist import storage
from clipdist.config import UserError
from clipdist.manifest import File, Manifest

VECTOR = "embedding.list.element"


def encode_shard(table: pa.Table, name: str) -> tuple[bytes, File]:
    """A table of `embeddings_schema` as the bytes of one shard, and what the ledger has to know of it."""
    buffer = io.BytesIO()
    columns = [leaf for leaf in table.schema.names if leaf != "embedding"]
    pq.write_table(
        table,
        buffer,
        compression={VECTOR: "none"} | dict.fromkeys(columns, "zstd"),
        use_dictionary=[leaf for leaf in columns if leaf not in ("id", "caption", "image_uri", "pair_id")],
        row_group_size=65_536,
        data_page_size=2_000_000_000,
        max_rows_per_page=1 << 20,
        write_page_checksum=False,
    )
    data = buffer.getvalue()
    metadata = pq.read_metadata(io.BytesIO(data))
    groups = range(metadata.num_row_groups)
    dim = table.schema.field("embedding").type.list_size
    offsets = tuple(_matrix_offset(metadata.row_group(group), dim) for group in groups)
    rows = tuple(metadata.row_group(group).num_rows for group in groups)
    return data, File("", name, len(table), rows, len(data), offsets=offsets)


def _matrix_offset(group: pq.RowGroupMetaData, dim: int) -> int:
    chunks = [group.column(index) for index in range(group.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema == VECTOR)
    if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page:
        raise RuntimeError("the embedding column must be one raw page")
    return int(chunk.data_page_offset + chunk.total_compressed_size - group.num_rows * dim * 2)


@dataclass(frozen=True)
class Shards:
    """All shards of one table, in manifest order; row numbers run through them."""

    manifest: Manifest
    table: str

    @property
    def dim(self) -> int:
        return int(self.manifest.stamp.identity["dim"])

    def __len__(self) -> int:
        return self.manifest.written(self.table)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row number, float16 [rows, dim]) per row group; local shards are memory-mapped."""
        first = 0
        for file in self.manifest.select(self.table):
            for rows, offset in zip(file.row_groups, file.offsets, strict=True):
                yield first, self._matrix(file, rows, offset)
                first += rows

    def matrix(self) -> np.ndarray:
        """All vectors, float16 [rows, dim], in memory."""
        blocks = [block for _, block in self.blocks()]
        return np.concatenate(blocks) if blocks else np.zeros((0, self.dim), np.float16)

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Whole columns of all rows, without the vectors."""
        tables = [self._read(file, names) for file in self.manifest.select(self.table)]
        if not tables:
            return pa.table({name: pa.array([], pa.string()) for name in names})
        return pa.concat_tables(tables)

    def take(self, rows: np.ndarray, names: Sequence[str]) -> pa.Table:
        """Columns of the given row numbers (int64 [n]), in that order; reads only the files that hold them."""
        files = self.manifest.select(self.table)
        ends = np.cumsum([file.rows for file in files])
        which = np.searchsorted(ends, rows, side="right")
        parts, order = [], []
        for index in np.unique(which):
            inside = np.flatnonzero(which == index)
            start = int(ends[index]) - files[index].rows
            parts.append(self._read(files[index], names).take(pa.array(rows[inside] - start)))
            order.append(inside)
        if not parts:
            return self.columns(names).slice(0, 0)
        back = np.argsort(np.concatenate(order), kind="stable")
        return pa.concat_tables(parts).take(pa.array(back))

    def column_names(self) -> list[str]:
        files = self.manifest.select(self.table)
        if not files:
            return []
        with storage.open_read(self.manifest.path(files[0])) as file:
            return [name for name in pq.read_schema(file).names if name != "embedding"]

    def _read(self, file: File, names: Sequence[str]) -> pa.Table:
        path = self.manifest.path(file)
        try:
            with storage.open_read(path) as opened:
                return pq.read_table(opened, columns=list(names))
        except (OSError, pa.ArrowException) as error:
            raise _damaged(path, error) from None

    def _matrix(self, file: File, rows: int, offset: int) -> np.ndarray:
        path, shape = self.manifest.path(file), (rows, self.dim)
        length = rows * self.dim * 2
        try:
            if storage.is_local(path):
                return np.memmap(path, dtype="<f2", mode="r", offset=offset, shape=shape)
            data = storage.read_bytes(path, offset, offset + length)
            return np.frombuffer(data, dtype="<f2").reshape(shape)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from None


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path}: this shard is missing, unreadable or shorter than its commit says "
        f"({error.__class__.__name__}: {error}); copy it again, or embed into a new output"
    )


def row_of_id(shards: Shards, row_id: str) -> int | None:
    """The row number of an id, None when the table does not hold it."""
    found = pc.index(shards.columns(["id"]).column("id"), pa.scalar(row_id)).as_py()
    return None if found < 0 else int(found)
