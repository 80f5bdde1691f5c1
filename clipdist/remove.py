"""Rows taken out of finished embeddings by their ids: nothing is rewritten, readers leave the rows out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipdist import lease, storage
from clipdist.config import UserError
from clipdist.ledger import Ledger
from clipdist.manifest import Manifest, read_manifest
from clipdist.retry import without_rejects
from clipdist.shards import Shards
from clipdist.upkeep import open_finished, without_rows

EXAMPLES = 5


@dataclass(frozen=True)
class Removed:
    """What was found of the ids: rows per table, and rejects; and which ids were nowhere."""

    rows: dict[str, int]
    unknown: list[str]

    def show(self) -> str:
        found = ", ".join(f"{count:,} {name}" for name, count in self.rows.items())
        return f"removed: {found}" + (f"\n{self.not_there()}" if self.unknown else "")

    def not_there(self) -> str:
        some = ", ".join(self.unknown[:EXAMPLES]) + (", ..." if len(self.unknown) > EXAMPLES else "")
        return f"not there: {len(self.unknown):,} {'id' if len(self.unknown) == 1 else 'ids'} ({some})"


def read_ids(path: str) -> list[str]:
    """One id per line."""
    try:
        lines = storage.read_bytes(storage.absolute(path)).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected a text file (UTF-8) with one id per line") from None
    return [line.strip() for line in lines if line.strip()]


def remove(uri: str, ids: Iterable[str]) -> Removed:
    """Takes the ids out of both tables, and their rejects. UserError, and nothing changed, when none is there."""
    wanted = pa.array(sorted(set(ids)), pa.string())
    open_finished(uri, "remove")
    with lease.held(uri) as held:
        ledger = open_finished(uri, "remove")
        before = read_manifest(uri)
        state = ledger.finished()
        if state is None:  # an earlier run was killed after it had planned this
            held.check()
            state = ledger.publish()
        found = _Found(ledger, before, wanted)
        if len(found.unknown) == len(wanted):
            raise UserError(f"{uri}: none of the {len(wanted):,} ids is there ({', '.join(found.unknown[:EXAMPLES])})")
        left = found if before.number == state.number else _Found(ledger, state, wanted)
        base = without_rows(ledger, state, left.rows)
        base = without_rejects(ledger, base, lambda _, rejects: pc.is_in(rejects.column("id"), wanted))
        if base is not state:
            again = ledger.extend(ledger.stamp, [], base, purpose="remove")
            held.check()
            again.publish()
        return Removed(found.counts, found.unknown)


class _Found:
    """Where ids are: row numbers per file, rows per table and rejects, and the ids that are nowhere."""

    def __init__(self, ledger: Ledger, state: Manifest, wanted: pa.Array) -> None:
        self.rows: dict[str, NDArray[np.int64]] = {}
        self.counts: dict[str, int] = {}
        there = np.zeros(len(wanted), bool)

        def positions(ids: pa.ChunkedArray) -> NDArray[np.bool_]:
            at = pc.index_in(ids, wanted)
            there[at.drop_null().to_numpy()] = True
            mask: NDArray[np.bool_] = at.is_valid().to_numpy()
            return mask

        for table in state.planned:
            self.counts[table] = 0
            for file, numbers, ids in Shards(state, table).by_file(["pair_id" if table == "texts" else "id"]):
                found = numbers[positions(ids.column(0))]
                self.counts[table] += len(found)
                if len(found):
                    self.rows[file.path] = found
        rejects = [positions(ledger.read_rejects([name]).column("id")) for name in state.reject_files]
        self.counts["rejects"] = sum(int(mask.sum()) for mask in rejects)
        self.unknown: list[str] = wanted.filter(pa.array(~there)).to_pylist()
