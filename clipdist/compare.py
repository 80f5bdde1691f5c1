"""What differs between finished embeddings and a new plan, of both tables at once."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipdist.config import UserError
from clipdist.ledger import Ledger
from clipdist.manifest import Manifest
from clipdist.progress import Progress
from clipdist.retry import without_rejects
from clipdist.schema import RESERVED
from clipdist.shards import Shards
from clipdist.spill import CONTENTS, Difference, Places, Spill, content_hashes, differences
from clipdist.upkeep import without_rows

Mode = Literal["add", "mirror"]

DELETES_AT_ONCE = 16_000_000
"""Rows per file of deletes, all of which are held in memory while it is made."""
NOTHING = np.uint64(0)
"""The content of a row of which none is stored."""
_FILE_BITS = 32  # a place is the number of a file and, in the lower bits, a row of it


class Comparison:
    """A table and a plan on their way through files."""

    def __init__(self, ledger: Ledger, state: Manifest, folder: Path) -> None:
        self.ledger, self.state = ledger, state
        names = ("stored", "planned", "bad", "rejects")
        self.stored, self.planned, self.bad, self.rejects = (Spill(folder / name, CONTENTS) for name in names)
        self.tables = list(state.stamp.identity["towers"])
        schemas = [Shards(state, table).schema() for table in self.tables]
        self.kept = {field.name: field.type for schema in schemas for field in schema if field.name not in RESERVED}
        self.any_stored = any(schemas)
        self.checksum, self.plan_rows = 0, 0
        self.unchanged: NDArray[np.bool_] = np.zeros(0, bool)
        self.count: Counter[str] = Counter()

    def add_table(self, progress: Progress) -> None:
        numbers = {file.path: number for number, file in enumerate(self.state.files)}
        for table in self.tables:
            pair = ["pair_id"] if table == "texts" else []
            columns = ["id", "caption", "image_uri", "group", *sorted(self.kept)]
            for file, rows, found in Shards(self.state, table).by_file([*columns, *pair]):
                contents = content_hashes([found.column(name) for name in columns])
                keys = found.column("pair_id" if pair else "id").combine_chunks()
                self.stored.add(keys, content=contents, place=(numbers[file.path] << _FILE_BITS) + rows)
                progress.advance(len(rows))
        for number, name in enumerate(self.state.reject_files):
            keys = _reject_keys(self.ledger.read_rejects([name]))
            self.rejects.add(keys, content=NOTHING, place=(number << _FILE_BITS) + np.arange(len(keys)))

    def add_plan(self, plan: Iterable[pa.Table], progress: Progress) -> None:
        for unit in plan:
            if not self.plan_rows:
                self._check_columns(unit.schema)
            rows = np.arange(self.plan_rows, self.plan_rows + len(unit))
            good = pc.is_null(unit.column("reason"))
            # Of several rows with one id the first is the row of that id.
            bad = pc.and_(pc.invert(good), pc.not_equal(pc.fill_null(unit.column("reason"), ""), "duplicate_id"))
            numbers, planned = rows[good.to_numpy()], unit.filter(good)
            ids = planned.column("id").combine_chunks()
            self.planned.add(ids, content=self._contents(planned), place=numbers)
            keys = _reject_keys(unit.filter(bad).rename_columns({"image_uri": "uri"}))
            self.bad.add(keys, content=NOTHING, place=rows[bad.to_numpy()])
            self.checksum = checksum_of(unit, self.checksum)
            self.plan_rows += len(unit)
            progress.advance(0, planned=self.plan_rows)

    def base(self, mode: Mode) -> Manifest:
        """What stays of the table; writes the deletes, and the rejects that stay."""
        self.unchanged = np.zeros(self.plan_rows, bool)
        base, waiting, rejects = self.state, [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for one in differences(self.stored, self.planned, self.bad, self.rejects):
            self.unchanged[one.unchanged] = True
            self._tell(one, mode)
            rejects.append(one.rejects)
            waiting += [one.outdated] if mode == "add" else [one.outdated, one.unplanned]
            if sum(map(len, waiting)) >= DELETES_AT_ONCE:
                base, waiting = self._without_places(base, np.concatenate(waiting)), [np.zeros(0, np.int64)]
        base = self._without_places(base, np.concatenate(waiting))
        places = np.sort(np.concatenate(rejects))

        def goes(number: int, table: pa.Table) -> Any:
            ours = places[slice(*np.searchsorted(places, [number << _FILE_BITS, (number + 1) << _FILE_BITS]))]
            mask = np.full(len(table), mode == "mirror")
            mask[ours & ((1 << _FILE_BITS) - 1)] = True
            return pa.array(mask)

        return without_rejects(self.ledger, base, goes)

    def _without_places(self, base: Manifest, places: Places) -> Manifest:
        files, rows = places >> _FILE_BITS, places & ((1 << _FILE_BITS) - 1)
        order = np.argsort(files, kind="stable")
        which, starts = np.unique(files[order], return_index=True)
        parts = np.split(rows[order], starts[1:]) if len(which) else []
        paths = (self.state.files[number].path for number in which)
        return without_rows(self.ledger, base, dict(zip(paths, parts, strict=True)))

    def _tell(self, one: Difference, mode: Mode) -> None:
        gone = {"deleted" if mode == "mirror" else "only in the table": one.gone}
        self.count.update({"new": one.new, "changed": one.changed, **gone})

    def _contents(self, planned: pa.Table) -> NDArray[np.uint64]:
        """What would be stored of each row, as `add_table` finds it: of its picture and of its captions."""
        captions = planned.column("captions").combine_chunks()
        common = [planned.column(name).combine_chunks() for name in ("image_uri", "group", *sorted(self.kept))]
        found = np.zeros(len(planned), np.uint64)
        texts, parents = pc.list_flatten(captions), pc.list_parent_indices(captions).to_numpy()
        numbers = np.arange(len(parents)) - np.searchsorted(parents, parents)
        if "images" in self.tables:
            first = pa.array(np.flatnonzero(numbers == 0))
            caption = (
                pa.nulls(len(planned), pa.string())
                if not len(first)
                else _scattered(texts.take(first), parents[first.to_numpy()], len(planned))
            )
            found += content_hashes([planned.column("id").combine_chunks(), caption, *common])
        if "texts" in self.tables and len(parents):
            rows = pa.array(parents)
            ids = planned.column("id").combine_chunks().take(rows)
            own = pc.binary_join_element_wise(ids, pa.array(numbers).cast(pa.string()), "#")
            np.add.at(found, parents, content_hashes([own, texts, *(column.take(rows) for column in common)]))
        return found

    def _check_columns(self, planned: pa.Schema) -> None:
        """Files of one table have the same columns."""
        kept = {field.name: field.type for field in planned if field.name not in RESERVED}
        if self.any_stored and kept != self.kept:
            shown = [", ".join(f"{name} ({kind})" for name, kind in sorted(one.items())) for one in (self.kept, kept)]
            raise UserError(
                f"{self.ledger.uri}: kept columns: {shown[0] or 'none'} there, {shown[1] or 'none'} now; an update "
                "cannot change them: choose another output, or keep the same columns"
            )
        self.kept = kept


def _scattered(values: Any, rows: NDArray[np.int64], length: int) -> Any:
    """`values` at their rows, and null at all others."""
    index = np.full(length, -1, np.int64)
    index[rows] = np.arange(len(rows))
    return values.take(pa.array(index, mask=index < 0))


def _reject_keys(rejects: pa.Table) -> pa.Array:
    """Ids; a row without one is known by where it is and what is wrong with it."""
    texts = [pc.fill_null(rejects.column(name), "") for name in ("uri", "message")]
    keys = pc.coalesce(rejects.column("id"), pc.binary_join_element_wise("\0", *texts, "\0"))
    return keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys


def checksum_of(unit: pa.Table, so_far: int) -> int:
    for batch in unit.combine_chunks().to_batches():
        so_far = zlib.crc32(batch.serialize(), so_far)
    return so_far
