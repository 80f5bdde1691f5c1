"""A table made, gone on with, found finished, tried again or brought up to another input: what a rerun does.

plan -> units (`units`: read, work, commit) -> judge rejects -> publish
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable

import pyarrow as pa

from clipdist import lease, runtime, storage
from clipdist.compare import Mode
from clipdist.config import UserError
from clipdist.ledger import Ledger, open_ledger
from clipdist.manifest import Manifest
from clipdist.retry import retry_plan
from clipdist.schema import Stamp
from clipdist.tally import Tally
from clipdist.units import Work, run_units
from clipdist.update import begin_or_update, is_outdated


def make_table(
    uri: str,
    stamp: Stamp,
    plan: Callable[[], Iterable[pa.Table]],
    work: Work,
    *,
    max_rejected_fraction: float,
    retry_rejected: bool,
    config: str,
    shard_units: int = 0,
    update: Mode | None = None,
) -> Manifest:
    """Makes the table at `uri`, or goes on with it, or finds it finished; with `retry_rejected`, then tries its rejects
    once more; with `update`, brings it up to another input. `config` reruns the job and is kept beside the table.

    Raises UserError, and publishes nothing, when more than `max_rejected_fraction` of a table's rows are rejected."""
    there = open_ledger(uri)
    outdated = there is not None and is_outdated(there, stamp, update)
    if there is not None and not outdated and not retry_rejected and (manifest := there.finished()) is not None:
        _clean_up(uri)
        return manifest
    with lease.held(uri) as held:
        there, given_up = open_ledger(uri), False
        if there is not None and there.finished() is None and is_outdated(there, stamp, update):
            given_up = _is_given_up(there, work, held)
        ledger = begin_or_update(uri, stamp, plan, update, shard_units=shard_units, given_up=given_up)
        runtime.save_config(uri, config)
        manifest = ledger.finished()
        # A retry that is under way is the one that is asked for, unless it holds what an earlier run rejected.
        under_way = ledger.purpose == "retry" and bool(ledger.missing())
        follows = retry_rejected and not (under_way and not ledger.has_rejects())
        if manifest is None:
            run_units(ledger, work, max_rejected_fraction, held, retry_follows=follows)
        if follows:
            again = retry_plan(ledger)
            if again is not None:
                ledger, manifest = again, None
                run_units(ledger, work, max_rejected_fraction, held)
        if manifest is not None:
            held.check()
            ledger.sweep(manifest)
            return manifest
        return _publish(ledger, max_rejected_fraction, held)


def _is_given_up(ledger: Ledger, work: Work, held: lease.Lease) -> bool:
    """Does what an unpublished plan of an earlier input has left, so that its rows need not be done again; publishes
    nothing. A plan of which nearly every row fails is given up."""
    given_up = Tally(ledger, 1.0).mostly_lost()
    if not given_up:
        run_units(ledger, work, 1.0, held)  # rows that fail now are tried again, or are no longer in the input
        given_up = Tally(ledger, 1.0).mostly_lost()
    if given_up:
        why = "the plan of the earlier input is given up, because nearly all its rows fail"
        print(f"note: {ledger.uri}: {why}", file=sys.stderr)
    return given_up


def _publish(ledger: Ledger, max_rejected_fraction: float, held: lease.Lease) -> Manifest:
    Tally(ledger, max_rejected_fraction).judge()
    held.check()
    return ledger.publish()


def _clean_up(uri: str) -> None:
    """Deletes what a run left that was killed after it had published: its lease is still there."""
    if storage.exists(storage.join(uri, "running.json")):
        with contextlib.suppress(UserError), lease.held(uri):  # suppressed: that another run is at work
            ledger = open_ledger(uri)
            if ledger is not None and (manifest := ledger.finished()) is not None:
                ledger.sweep(manifest)
