"""Many small shards -> one of full row groups: units stay small to lose little, what readers open stays large."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipdist import storage
from clipdist.config import UserError
from clipdist.manifest import File
from clipdist.schema import Stamp
from clipdist.shard_reader import damaged
from clipdist.shard_writer import STAMP_KEY, ShardWriter, row_group_rows

READERS = 8
"""Pieces read at a time: on an object store it is the latency that counts."""


Rows: TypeAlias = NDArray[np.int64]


def join_shards(
    paths: Sequence[str],
    name: str,
    stamp: Stamp,
    rows_of: Mapping[str, Rows] = MappingProxyType({}),
    readers: int = READERS,
) -> tuple[bytes, File]:
    """The rows of all pieces, in order, as one shard of the table `name`; vectors keep their bits.

    A piece is what `encode_shard` made, read whole; of those in `rows_of` only these rows (numbers in the file) are
    taken. Pieces may be of another input; everything else of their stamps is the same. Every row group but the last has
    `row_group_rows` rows. UserError, with its path, for a piece that is damaged or was made by another model or
    settings. Memory: the shard, 2 * `readers` pieces, and up to 8 times the vectors of a row group, because Arrow keeps
    4 bytes beside each value of a page until the page is written (128 MiB of float16 [131072, 512]: 660 MiB at the
    peak; float32: 1.2 GiB).
    """
    if not paths:
        raise ValueError("there are no pieces to join")
    size, pieces = row_group_rows(stamp), _pieces(paths, stamp, rows_of, readers)
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


def _pieces(paths: Sequence[str], stamp: Stamp, rows_of: Mapping[str, Rows], readers: int) -> Iterator[pa.Table]:
    """The pieces in order, a few read ahead."""
    identity = _but_input(json.loads(json.dumps(stamp.identity)))  # as a footer gives it back
    ahead: deque[Future[pa.Table]] = deque()
    with ThreadPoolExecutor(readers) as pool:
        for path in paths:
            ahead.append(pool.submit(_piece, path, identity, rows_of.get(path)))
            if len(ahead) > readers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _piece(path: str, identity: object, rows: Rows | None) -> pa.Table:
    try:
        file = pq.ParquetFile(pa.BufferReader(storage.read_bytes(path)))
        footer = json.loads((file.metadata.metadata or {}).get(STAMP_KEY.encode(), b"null"))
        if not isinstance(footer, dict) or _but_input(footer.get("identity")) != identity:
            raise UserError(f"{path}: not a piece of this table: its footer has another stamp, or none")
        found = file.read(use_threads=False).replace_schema_metadata(None)
        return found if rows is None else found.take(pa.array(rows))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged(path, error) from None


def _but_input(identity: object) -> object:
    """Updates bring rows of other inputs into a table; all else is the same for every row."""
    return {k: v for k, v in identity.items() if k != "input"} if isinstance(identity, dict) else identity
