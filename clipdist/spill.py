"""Ids and contents of millions of rows compared on disk, where not even the ids fit in memory.

Of every stored row, of every planned row and of every reject a record (hash of the id, hash of the content, where it
is) goes to files on disk by the hash of its id; then these are compared, file by file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Places: TypeAlias = NDArray[np.int64]

RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("content", "<u8"), ("place", "<i8")])
PARTITIONS = 256
"""Of 100 million rows with three captions each a partition holds 50 MB."""
SPILL_BYTES = 16 << 20


class Spill:
    """Records on disk, by the hash of their id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: list[NDArray[Any]] = []
        folder.mkdir()

    def add(self, keys: pa.Array, contents: NDArray[np.uint64], places: Places) -> None:
        """`keys`: texts without nulls."""
        digests = [hashlib.blake2b(key, digest_size=16).digest() for key in keys.cast(pa.binary()).to_pylist()]
        records = np.empty(len(digests), RECORD)
        halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        records["high"], records["low"] = halves[:, 0], halves[:, 1]
        records["content"], records["place"] = contents, places
        self._waiting.append(records)
        if sum(some.nbytes for some in self._waiting) >= SPILL_BYTES:
            self.flush()

    def flush(self) -> None:
        """Appends what waits in memory to the files."""
        records = np.concatenate([np.zeros(0, RECORD), *self._waiting])
        self._waiting = []
        partition = (records["high"] % PARTITIONS).astype(np.int64)
        records = records[np.argsort(partition, kind="stable")]
        ends = np.cumsum(np.bincount(partition, minlength=PARTITIONS))
        for number in np.unique(partition).tolist():
            with (self.folder / str(number)).open("ab") as file:
                file.write(records[ends[number - 1] if number else 0 : ends[number]].tobytes())

    def partition(self, number: int) -> NDArray[Any]:
        path = self.folder / str(number)
        return np.fromfile(path, RECORD) if path.exists() else np.zeros(0, RECORD)


@dataclass(frozen=True)
class Difference:
    """Of the ids of one partition. Places are those that the records came with."""

    unchanged: Places
    """Planned rows that are stored as they are planned."""
    outdated: Places
    """Stored rows whose id is planned with another content."""
    unplanned: Places
    """Stored rows whose id is not planned."""
    rejects: Places
    """Rejects whose id is planned."""
    new: int
    changed: int
    """Ids of each kind."""
    gone: int


def differences(stored: Spill, planned: Spill, bad: Spill, rejects: Spill) -> Iterator[Difference]:
    """What differs, partition by partition. An id may be stored as several rows, whose contents are added up. `bad`:
    planned rows that are rejected unseen: their id is planned, and never stored as planned."""
    for spill in (stored, planned, bad, rejects):
        spill.flush()
    for number in range(PARTITIONS):
        parts = [spill.partition(number) for spill in (stored, planned, bad, rejects)]
        if any(map(len, parts)):
            yield _difference(*parts)


def _difference(stored: Any, planned: Any, bad: Any, rejects: Any) -> Difference:
    ids, count = _groups(np.concatenate([stored, planned, bad, rejects]))
    of_stored, of_planned, of_bad, of_rejects = np.split(ids, np.cumsum([len(stored), len(planned), len(bad)]))
    there, good, wanted = np.zeros(count, bool), np.zeros(count, bool), np.zeros(count, bool)
    there[of_stored], good[of_planned] = True, True
    wanted[of_planned], wanted[of_bad] = True, True
    here, now = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
    np.add.at(here, of_stored, stored["content"])
    np.add.at(now, of_planned, planned["content"])
    same = there & good & (here == now)
    return Difference(
        unchanged=planned["place"][same[of_planned]],
        outdated=stored["place"][(wanted & ~same)[of_stored]],
        unplanned=stored["place"][~wanted[of_stored]],
        rejects=rejects["place"][wanted[of_rejects]],
        new=int((good & ~there).sum()),
        changed=int((wanted & there & ~same).sum()),
        gone=int((there & ~wanted).sum()),
    )


def _groups(records: Any) -> tuple[NDArray[np.int64], int]:
    """A number per record, the same for the same id, and how many ids there are."""
    order = np.lexsort((records["low"], records["high"]))
    high, low = records["high"][order], records["low"][order]
    first = np.ones(len(records), bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    groups = np.empty(len(records), np.int64)
    groups[order] = np.cumsum(first) - 1
    return groups, int(first.sum())


def content_hashes(columns: Iterable[Any]) -> NDArray[np.uint64]:
    """A hash of 64 bits per row over all columns. Null differs from every text, and no two rows run together."""
    parts = []
    for column in columns:
        text = column.cast(pa.string())
        length = pc.binary_length(text).cast(pa.string())
        parts.append(pc.fill_null(pc.binary_join_element_wise(length, text, ":"), "-"))
    rows = pc.binary_join_element_wise(*parts, "")
    rows = rows.combine_chunks() if isinstance(rows, pa.ChunkedArray) else rows
    digests = [hashlib.blake2b(row, digest_size=8).digest() for row in rows.cast(pa.binary()).to_pylist()]
    return np.frombuffer(b"".join(digests), "<u8")
