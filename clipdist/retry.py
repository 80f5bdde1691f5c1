"""Trying rejected rows once more: a plan of just these, on top of the table without their rejects."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

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
    names, counts = _without_retried(ledger, state)
    if not counts:
        return None
    planned = {table: rows - sum(counts.get(table, Counter()).values()) for table, rows in state.planned.items()}
    rejected = {
        table: {reason: count - counts.get(table, Counter())[reason] for reason, count in reasons.items()}
        for table, reasons in state.rejected.items()
    }
    base = replace(state, reject_files=tuple(names), planned=planned, rejected=rejected)
    return ledger.extend(ledger.stamp, _units(ledger, state), base, purpose="retry")


def planned_row(planned: pa.Table, index: int) -> bytes:
    """What a reject keeps of its planned row, so that it can be tried again: a table of one row."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, planned.schema) as writer:
        writer.write_table(planned.slice(index, 1))
    return bytes(sink.getvalue())


def _without_retried(ledger: Ledger, state: Manifest) -> tuple[list[str], dict[str, Counter[str]]]:
    """Reject files without the rows that are tried again, and how many these are per table and reason."""
    names: list[str] = []
    counts: dict[str, Counter[str]] = {}
    for name in state.reject_files:
        rejects = ledger.read_rejects([name])
        again = rejects.filter(pc.is_valid(rejects.column("row")))
        if not len(again):
            names.append(name)
            continue
        for table, reason in zip(again.column("table").to_pylist(), again.column("reason").to_pylist(), strict=True):
            counts.setdefault(table, Counter())[reason] += 1
        stay = rejects.filter(pc.is_null(rejects.column("row")))
        if len(stay):
            names.append(f"rejects/{ledger.next_number():06d}-{uuid.uuid4().hex[:12]}.parquet")
            storage.write_atomic(storage.join(ledger.uri, names[-1]), parquet(stay))
    return names, counts


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
