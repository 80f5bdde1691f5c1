"""Rows -> a shard: Parquet whose vectors are one raw page per row group.

A row group's vectors are one UNCOMPRESSED PLAIN page, so its bytes are the row-major matrix; the byte offset is
committed with the file. To every other reader a shard is ordinary Parquet.
"""

from __future__ import annotations

import io
import json
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipdist.manifest import File
from clipdist.schema import Stamp, stored_dtype, vector_type

VECTOR = "embedding.list.element"
ROW_GROUP = 65_536
STAMP_KEY = "clipdist"

_MATRIX_BYTES = 1 << 30  # of one row group at most: a page has to stay below 2 GiB with all that comes with it


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
