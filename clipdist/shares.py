"""A table's files shared out among several readers, and row numbers of the whole table in a share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipdist.manifest import File, Manifest
from clipdist.search import Index, Ranking, Where
from clipdist.shards import Shards, row_of_id

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """Some files of a table, to be searched. The row numbers that it gives and takes are those of the whole table.

    `manifest`: the part; `first_rows`: where each file starts in the whole table."""

    manifest: Manifest
    table: str
    first_rows: Mapping[str, int]

    @cached_property
    def index(self) -> Index:
        return Index(Shards(self.manifest, self.table))

    def search(self, queries: NDArray[Any], k: int, where: Where | None) -> Ranking:
        found = self.index.search(queries, k, where)
        return Ranking(found.ids, found.scores, [renumbered(rows, *self._starts) for rows in found.rows])

    def take(self, rows: Rows, names: Sequence[str] | None) -> pa.Table:
        """Columns (None: all but the vector) of rows."""
        columns = self.index.shards.column_names() if names is None else names
        return self.index.shards.take(self._here(rows), columns)

    def vectors(self, rows: Rows) -> NDArray[Any]:
        return self.index.shards.vectors(self._here(rows))

    def row_of_id(self, row_id: str) -> int | None:
        found = row_of_id(self.index.shards, row_id)
        return None if found is None else int(renumbered(np.array([found]), *self._starts)[0])

    @cached_property
    def _starts(self) -> tuple[Rows, Rows]:
        """The files' first rows, here and in the whole table."""
        here = places(self.index.shards)[0]
        whole = [self.first_rows[path] for path in here]
        return np.array(list(here.values()), np.int64), np.array(whole, np.int64)

    def _here(self, rows: Rows) -> Rows:
        here, whole = self._starts
        return renumbered(rows, whole, here)


def spread(files: Sequence[File], rows: Mapping[str, int], readers: int) -> list[list[File]]:
    """Whole files for at most so many readers, about as many rows for each; none is left without a file.
    One empty share when there is no file."""
    shares: list[list[int]] = [[] for _ in range(min(readers, len(files)) or 1)]
    load = [(0, 0)] * len(shares)  # rows, files
    for number in sorted(range(len(files)), key=lambda number: -rows[files[number].path]):
        least = load.index(min(load))
        shares[least].append(number)
        load[least] = (load[least][0] + rows[files[number].path], load[least][1] + 1)
    return [[files[number] for number in sorted(share)] for share in shares]


def places(shards: Shards) -> tuple[dict[str, int], dict[str, int]]:
    """The number of each file's first row, and how many rows of it live, by `File.path` and in order."""
    first = {file.path: 0 for file in shards.manifest.select(shards.table)}
    rows = dict.fromkeys(first, 0)
    for group in shards.row_groups:
        rows[group.file.path] += group.live
    start = 0
    for path in first:
        first[path], start = start, start + rows[path]
    return first, rows


def renumbered(rows: Rows, starts: Rows, to: Rows) -> Rows:
    """Row numbers of files that start at `starts`, where the files start at `to`. Of files that start at the same row
    all but the last are empty."""
    if not len(rows):
        return rows
    which = np.searchsorted(starts, rows, side="right") - 1
    return np.asarray(rows - starts[which] + to[which], np.int64)
