"""Trying rejected rows once more: a plan of just these, on top of the table without their rejects."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipdist import storage
from clipdist.ledger import Ledger, parquet
from clipdist.manifest import Manifest

RETRY_UNIT_ROWS = 512


def retry_plan(ledger: Ledger) -> Ledger | None:
    """The plan that tries again what the ledger's finished units rejected; None when nothing can be tried again: a
    duplicate id stays one."""
    state = ledger.finished() or ledger.state()
    base = without_rejects(ledger, state, lambda _, rejects: pc.is_valid(rejects.column("row")))
    return None if base is state else ledger.extend(ledger.stamp, _units(ledger, state), base, purpose="retry")


def planned_row(planned: pa.Table, index: int) -> bytes:
    """What a reject keeps of its planned row, so that it can be tried again: a table of one row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, planned.schema) as writer:
        writer.write_table(planned.slice(index, 1))
    return bytes(sink.getvalue())


def without_rejects(ledger: Ledger, state: Manifest, goes: Callable[[int, pa.Table], Any]) -> Manifest:
    """The state without some rejects, which are no longer planned either; the same object when none goes. `goes`:
    (number of the reject file, its rows) -> bool per row. The files of those that stay are written here."""
    names: list[str] = []
    counts: dict[str, Counter[str]] = {}
    for number, name in enumerate(state.reject_files):
        rejects = ledger.read_rejects([name])
        mask = goes(number, rejects)
        gone, stay = rejects.filter(mask), rejects.filter(pc.invert(mask))
        if not len(gone):
            names.append(name)
            continue
        for table, reason in zip(gone.column("table").to_pylist(), gone.column("reason").to_pylist(), strict=True):
            counts.setdefault(table, Counter())[reason] += 1
        if len(stay):
            names.append(f"rejects/{ledger.next_number():06d}-{uuid.uuid4().hex[:12]}.parquet")
            storage.write_atomic(storage.join(ledger.uri, names[-1]), parquet(stay))
    if not counts:
        return state
    planned = {table: rows - sum(counts.get(table, Counter()).values()) for table, rows in state.planned.items()}
    rejected = {
        table: {reason: count - counts.get(table, Counter())[reason] for reason, count in reasons.items()}
        for table, reasons in state.rejected.items()
    }
    return replace(state, reject_files=tuple(names), planned=planned, rejected=rejected)


def _units(ledger: Ledger, state: Manifest) -> Iterator[pa.Table]:
    """The planned rows of the rejects, with the one table in which each is missing; a unit is of one reject file."""
    for name in state.reject_files:
        rejects = ledger.read_rejects([name])
        again = rejects.filter(pc.is_valid(rejects.column("row")))
        rows = [pa.ipc.open_stream(row).read_all() for row in again.column("row").to_pylist()]
        for start in range(0, len(rows), RETRY_UNIT_ROWS):
            part = pa.concat_tables(rows[start : start + RETRY_UNIT_ROWS]).combine_chunks()
            only = again.column("table").slice(start, len(part)).combine_chunks()
            yield (part.drop_columns(["only"]) if "only" in part.schema.names else part).append_column("only", only)
