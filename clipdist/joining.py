"""Many small shards -> one of full row groups: units stay small to lose little, what readers open stays large."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq

from clipdist import storage
from clipdist.config import UserError
from clipdist.manifest import File
from clipdist.schema import Stamp
from clipdist.shards import STAMP_KEY, ShardWriter, damaged, row_group_rows

READERS = 8
"""Pieces read at a time: on an object store it is the latency that counts."""


def join_shards(paths: Sequence[str], name: str, stamp: Stamp) -> tuple[bytes, File]:
    """The rows of all pieces, in order, as one shard of the table `name`; vectors keep their bits.

    A piece is what `encode_shard` made, read whole. Every row group but the last has `row_group_rows` rows. UserError,
    with its path, for a piece that is damaged or was made by another model or settings. Memory: the shard, 2 * READERS
    pieces, and up to 8 times the vectors of a row group, because Arrow keeps 4 bytes beside each value of a page until
    the page is written (128 MiB of float16 [131072, 512]: 660 MiB at the peak; float32: 1.2 GiB).
    """
    if not paths:
        raise ValueError("there are no pieces to join")
    size, pieces = row_group_rows(stamp), _pieces(paths, stamp)
    first = next(pieces)
    writer = ShardWriter(first.schema, stamp)
    held: list[pa.Table] = []
    for path, piece in zip(paths, chain([first], pieces), strict=True):
        if not piece.schema.equals(first.schema):
            raise UserError(f"{path}: its columns differ from those of {paths[0]}; both cannot be in one table")
        held.append(piece)
        while sum(map(len, held)) >= size:
            rows = pa.concat_tables(held)
            held = [rows.slice(size)]
            writer.write(rows.slice(0, size))
    rows = pa.concat_tables(held)
    if len(rows):
        writer.write(rows)
    return writer.close(name)


def _pieces(paths: Sequence[str], stamp: Stamp) -> Iterator[pa.Table]:
    """The pieces in order, a few read ahead."""
    identity = json.loads(json.dumps(stamp.identity))  # as a footer gives it back
    ahead: deque[Future[pa.Table]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for path in paths:
            ahead.append(pool.submit(_piece, path, identity))
            if len(ahead) > READERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _piece(path: str, identity: object) -> pa.Table:
    try:
        file = pq.ParquetFile(pa.BufferReader(storage.read_bytes(path)))
        footer = json.loads((file.metadata.metadata or {}).get(STAMP_KEY.encode(), b"null"))
        if not isinstance(footer, dict) or footer.get("identity") != identity:
            raise UserError(f"{path}: not a piece of this table: its footer has another stamp, or none")
        return file.read(use_threads=False).replace_schema_metadata(None)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from None
