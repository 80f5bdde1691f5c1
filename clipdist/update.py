"""Embeddings brought up to another input: a plan of its new and changed rows, on top of what stays of the table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from clipdist.compare import Comparison, Mode, checksum_of
from clipdist.config import UserError
from clipdist.ledger import Ledger, begin, open_ledger
from clipdist.manifest import Manifest, refuse_other_stamp
from clipdist.progress import Progress
from clipdist.schema import Stamp
from clipdist.upkeep import finish_with, under_way

Plan: TypeAlias = Callable[[], Iterable[pa.Table]]


def begin_or_update(
    uri: str, stamp: Stamp, plan: Plan, mode: Mode | None, *, shard_units: int, given_up: bool = False
) -> Ledger:
    """Opens the output at `uri`, or makes its first plan, or one that brings it up to our input. What an unpublished
    plan gave counts, if it is done and not `given_up`."""
    there = open_ledger(uri)
    if there is None or not is_outdated(there, stamp, mode):
        return begin(uri, stamp, plan, shard_units=shard_units)
    state = there.finished()
    if state is None:
        state = there.published() if given_up or there.left() else there.state()
    if state is None:
        return there.extend(stamp, plan(), Manifest(uri, stamp), purpose="make")
    return _update_plan(there, state, stamp, plan, mode or "add")


def is_outdated(there: Ledger, stamp: Stamp, mode: Mode | None) -> bool:
    """Whether another input is to be brought in, also when one before it has not been published. UserError when the
    output was made with other settings, with another input and no update is asked for, or when a compaction is under
    way."""
    finished = there.finished() is not None
    if there.purpose == "compact" and not finished:
        raise UserError(f"{there.uri}: {under_way(there)}; finish that first: {finish_with(there)}")
    advice = ""
    if stamp.identity != there.stamp.identity and _but_input(stamp) == _but_input(there.stamp):
        if mode is not None:
            return True
        advice = ", or bring this one up to the new input with update=add or update=mirror"
        if not finished:
            advice += f";\n  {under_way(there)}, and with update=... its rows are not done again"
    refuse_other_stamp(there.uri, stamp, there.stamp, advice)
    # A table to which an input was only added also holds rows of others.
    return mode == "mirror" and there.stamp.recorded.get("update") == "add"


def _but_input(stamp: Stamp) -> tuple[Any, ...]:
    identity = {name: value for name, value in stamp.identity.items() if name != "input"}
    return stamp.kind, stamp.schema_version, "input" in stamp.identity, identity


def _update_plan(ledger: Ledger, state: Manifest, stamp: Stamp, plan: Plan, mode: Mode) -> Ledger:
    """What differs is found in one pass over the plan; a second one writes the units without the unchanged rows."""
    with tempfile.TemporaryDirectory(prefix="clipdist-update-") as folder:
        found = Comparison(ledger, state, Path(folder))
        with Progress("compare", sum(map(state.written, state.planned)), "rows") as progress:
            found.add_table(progress)
            found.add_plan(plan(), progress)
            base, rows = found.base(mode), int(found.unchanged.sum())
            found.count["unchanged"] = rows
            line = ", ".join(f"{count:,} {name}" for name, count in found.count.items())
            progress.note(f"rows of the input and of the table: {line}", **found.count)
    units = _without(plan(), found, int(stamp.identity["unit_rows"]))
    bad = {table: state.lost(table) - base.lost(table) for table in state.planned}
    stamp = replace(stamp, recorded={**stamp.recorded, "update": mode, "tried_again": bad})
    return ledger.extend(stamp, units, base, purpose="update")


def _without(plan: Iterable[pa.Table], found: Comparison, unit_rows: int) -> Iterator[pa.Table]:
    """The plan without its unchanged rows, in full units. UserError when it is not the plan that was compared."""
    held: list[pa.Table] = []
    checksum, start = 0, 0
    for unit in plan:
        checksum = checksum_of(unit, checksum)
        stays = ~found.unchanged[start : start + len(unit)]
        held.append(unit.filter(pa.array(stays)) if len(stays) == len(unit) else unit)
        start += len(unit)
        if sum(map(len, held)) >= unit_rows:
            rows = pa.concat_tables(held)
            whole = len(rows) // unit_rows * unit_rows
            yield from (rows.slice(at, unit_rows).combine_chunks() for at in range(0, whole, unit_rows))
            held = [rows.slice(whole)]
    if checksum != found.checksum:
        raise UserError("the input changed while it was read; run the same command again when it no longer does")
    if sum(map(len, held)):
        yield pa.concat_tables(held).combine_chunks()
