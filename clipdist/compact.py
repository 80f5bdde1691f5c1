"""Small files of finished embeddings joined into full ones, without their deleted rows.

A compaction is a plan like any other: each unit names slices of old files that become one new file. The old ones stay
what readers see until the manifest of all new ones is there.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from clipdist import lease, storage
from clipdist.deletes import deleted_rows, write_deletes
from clipdist.joining import join_shards
from clipdist.ledger import Ledger
from clipdist.manifest import File, Manifest, read_manifest
from clipdist.progress import Progress
from clipdist.report import file_size
from clipdist.shards import Shards
from clipdist.upkeep import open_finished

FULL, FEW_DELETED = 0.9, 0.05
"""A file stays when it has at least this share of `shard_rows`, and less than this share of its rows is deleted."""
READERS = 1

PLANNED = pa.schema(
    [(name, pa.string() if name in ("table", "path") else pa.int64()) for name in ("table", "path", "first", "rows")]
)
"""Rows of a file that live, from the `first`-th on, in the order in which they go into the new file."""


@dataclass(frozen=True)
class Compacted:
    """The tables before and after; both are the same when there was nothing to do."""

    before: Manifest
    after: Manifest

    def show(self) -> str:
        if self.before is self.after:
            few = (
                f", fewer than {FEW_DELETED:.0%} of each file; --every drops them"
                if sum(self.after.deleted.values())
                else ""
            )
            return f"nothing to do: {_size(self.after)}{few}"
        return f"before  {_size(self.before)}\nafter   {_size(self.after)}"


def compact(uri: str, *, every: bool = False) -> Compacted:
    """Compacts the embeddings at `uri`, or goes on with that where it was stopped. `every`: a file of which only one
    row is deleted is written anew too."""
    open_finished(uri, "compact")
    with lease.held(uri) as held:
        ledger = open_finished(uri, "compact")
        before = read_manifest(uri)
        if ledger.finished() is not None:
            planned = _plan(ledger, before, 0 if every else FEW_DELETED)
            if planned is None:
                return Compacted(before, before)
            ledger = planned
        _join_all(ledger, before)
        held.check()
        return Compacted(before, ledger.publish())


def _plan(ledger: Ledger, state: Manifest, few: float) -> Ledger | None:
    """The plan of the next compaction; None when every file may stay. `few`: the share of deleted rows that may."""
    size = int(ledger.stamp.identity["shard_rows"])
    units: list[pa.Table] = []
    stay: list[File] = []
    for table in state.planned:
        shards = Shards(state, table)
        live = {file.path: len(shards.live_rows(file)) for file in state.select(table)}
        deleted = {file.path: file.rows - live[file.path] for file in state.select(table)}
        clean = {file.path for file in state.select(table) if deleted[file.path] < max(1, few * file.rows)}
        goes = {path for path in live if live[path] < FULL * size or path not in clean}
        for shard in _cut([(path, live[path]) for path in live if path in goes], size):
            path, _, rows = shard[0]
            if len(shard) == 1 and path in clean and rows == live[path]:
                goes.remove(path)  # small and alone
            else:
                values = [(table, *part) for part in shard]
                units.append(
                    pa.Table.from_pylist([dict(zip(PLANNED.names, row, strict=True)) for row in values], PLANNED)
                )
        stay += [file for file in state.select(table) if file.path not in goes]
    return (
        None
        if len(stay) == len(state.files)
        else ledger.extend(ledger.stamp, units, _only(ledger, state, stay), purpose="compact")
    )


def _cut(files: Sequence[tuple[str, int]], size: int) -> Iterator[list[tuple[str, int, int]]]:
    """(path, first, rows) of the slices of each new file, of `size` rows all but the last."""
    shard: list[tuple[str, int, int]] = []
    space = size
    for path, rows in files:
        first = 0
        while first < rows:
            taken = min(space, rows - first)
            shard.append((path, first, taken))
            first, space = first + taken, space - taken
            if not space:
                yield shard
                shard, space = [], size
    if shard:
        yield shard


def _only(ledger: Ledger, state: Manifest, files: Sequence[File]) -> Manifest:
    """The state with these files and their deletes alone; what the others hold is in the units."""
    tables = {file.path: file.table for file in files}
    rows = {path: numbers for path, numbers in deleted_rows(state).items() if path in tables}
    counts = Counter(dict.fromkeys(state.deleted, 0))
    for path, numbers in rows.items():
        counts[tables[path]] += len(numbers)
    names: tuple[str, ...] = ()
    if rows:
        names = (f"deletes/{ledger.number + 1:06d}-{uuid.uuid4().hex[:12]}.parquet",)
        storage.write_atomic(storage.join(ledger.uri, names[0]), write_deletes(rows))
    return replace(state, files=tuple(files), delete_files=names, deleted=dict(counts))


def _join_all(ledger: Ledger, before: Manifest) -> None:
    """Makes the new files that are missing, one at a time. `before`: the table that is compacted."""
    files = {file.path: file for file in before.files}
    shards = {table: Shards(before, table) for table in before.planned}
    todo = ledger.missing()
    with Progress("compact", len(ledger.units), "files", done=len(ledger.units) - len(todo)) as progress:
        for unit in todo:
            slices = ledger.rows(unit).to_pylist()
            table = slices[0]["table"]
            rows_of = {
                before.path(files[one["path"]]): shards[table].live_rows(files[one["path"]])[
                    one["first"] : one["first"] + one["rows"]
                ]
                for one in slices
            }
            data, file = join_shards(list(rows_of), table, ledger.stamp, rows_of, READERS)
            ledger.commit_shard(unit, data, file)
            progress.advance(1)


def _size(manifest: Manifest) -> str:
    deleted, size = sum(manifest.deleted.values()), sum(file.file_bytes for file in manifest.files)
    return f"{len(manifest.files):,} files, {file_size(size)}, {deleted:,} deleted rows"
