"""Ids and contents of millions of rows compared on disk, where not even the ids fit in memory.

Of every row a record (hash of the id, where it is, and for a comparison the hash of its content) goes to files on disk
by the hash of its id; then these are looked at, file by file.
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

PLACES = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<i8")])
CONTENTS = np.dtype([*PLACES.descr, ("content", "<u8")])
PARTITIONS = 256
"""Of 100 million rows with three captions each a partition holds 50 MB."""
SPILL_BYTES = 16 << 20
"""A smaller set of records, of up to 500,000, needs no disk."""


class Spill:
    """Records by the hash of their id: in memory while they are few, then on disk."""

    def __init__(self, folder: Path, record: np.dtype[Any]) -> None:
        """`record`: PLACES, or CONTENTS."""
        self.folder, self.record = folder, record
        self._waiting: list[NDArray[Any]] = []
        self._on_disk = False
        folder.mkdir()

    def add(self, keys: pa.Array, **columns: Any) -> None:
        """`keys`: texts without nulls; `columns`: the other fields of the records."""
        digests = [hashlib.blake2b(key, digest_size=16).digest() for key in keys.cast(pa.binary()).to_pylist()]
        records = np.empty(len(digests), self.record)
        halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        records["high"], records["low"] = halves[:, 0], halves[:, 1]
        for name, values in columns.items():
            records[name] = values
        self._waiting.append(records)
        if sum(some.nbytes for some in self._waiting) >= SPILL_BYTES:
            self._flush()

    def partition(self, number: int) -> NDArray[Any]:
        """The records of one of PARTITIONS, in the order in which they came."""
        if self._on_disk:
            self._flush()
            path = self.folder / str(number)
            return np.fromfile(path, self.record) if path.exists() else np.zeros(0, self.record)
        records = self._in_memory()
        found: NDArray[Any] = records[records["high"] % PARTITIONS == number]
        return found

    def partitions(self) -> Iterator[NDArray[Any]]:
        return map(self.partition, range(PARTITIONS))

    def _in_memory(self) -> NDArray[Any]:
        self._waiting = [np.concatenate([np.zeros(0, self.record), *self._waiting])]
        return self._waiting[0]

    def _flush(self) -> None:
        """Appends what waits in memory to the files."""
        records, self._waiting, self._on_disk = self._in_memory(), [], True
        partition = (records["high"] % PARTITIONS).astype(np.int64)
        records = records[np.argsort(partition, kind="stable")]
        ends = np.cumsum(np.bincount(partition, minlength=PARTITIONS))
        for number in np.unique(partition).tolist():
            with (self.folder / str(number)).open("ab") as file:
                file.write(records[ends[number - 1] if number else 0 : ends[number]].tobytes())


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
