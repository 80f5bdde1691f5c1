"""Which rows repeat an id, in memory that does not grow with the ids: hashes and row numbers go to files on disk."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])
PARTITIONS = 512
"""Of a billion ids a partition holds two million, 47 MB."""
SPILL_BYTES = 16 << 20
"""A smaller input, of up to 700,000 rows, needs no disk."""


def duplicate_rows(ids: Iterable[pa.Array]) -> np.ndarray:
    """Sorted numbers of the rows whose id came earlier; a row whose id is "" has none. `ids`: string arrays without
    nulls. Equal hashes of 128 bit count as equal ids."""
    waiting: list[np.ndarray] = []
    start = 0
    with tempfile.TemporaryDirectory() as folder:
        for batch in ids:
            waiting.append(_records(batch, start))
            start += len(batch)
            if sum(records.nbytes for records in waiting) >= SPILL_BYTES:
                _spill(folder, np.concatenate(waiting))
                waiting = []
        rest = np.concatenate([np.zeros(0, RECORD), *waiting])
        if not any(Path(folder).iterdir()):
            return np.sort(_repeated(rest))
        _spill(folder, rest)
        found = [_repeated(np.fromfile(path, RECORD)) for path in Path(folder).iterdir()]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *found]))


def _records(ids: pa.Array, start: int) -> np.ndarray:
    values = ids.cast(pa.binary()).to_pylist()
    rows = np.array([row for row, value in enumerate(values, start) if value], np.int64)
    digests = b"".join([hashlib.blake2b(value, digest_size=16).digest() for value in values if value])
    halves = np.frombuffer(digests, "<u8").reshape(-1, 2)
    records = np.empty(len(rows), RECORD)
    records["high"], records["low"], records["row"] = halves[:, 0], halves[:, 1], rows
    return records


def _spill(folder: str, records: np.ndarray) -> None:
    """Appends each record to the file of its partition, in the order of the rows."""
    partition = (records["high"] % PARTITIONS).astype(np.int64)
    records = records[np.argsort(partition, kind="stable")]
    ends = np.cumsum(np.bincount(partition, minlength=PARTITIONS))
    for number, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > begin:
            with (Path(folder) / str(number)).open("ab") as file:
                file.write(records[begin:end].tobytes())


def _repeated(records: np.ndarray) -> np.ndarray:
    """The rows of a partition whose hash has an earlier row."""
    records = records[np.lexsort((records["row"], records["low"], records["high"]))]
    same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    return np.ascontiguousarray(records["row"][1:][same])
