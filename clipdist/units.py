"""A ledger's missing units through Ray Data: the job that runs at 3 am, may die at any step, and is run again.

    missing units -> pipeline (read, work, commit: Ray tasks and actors) -> join full shards

Ray runs a task again for ever when its process dies. So processes say what they begin (`attempts`); a unit that was
begun too often passes through the pipeline untouched, and is rescued alone at the end.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data

from clipdist import lease, runtime
from clipdist.attempts import ATTEMPTS, Watch, all_died, model_dies
from clipdist.config import UserError
from clipdist.ledger import Join, Ledger
from clipdist.progress import Progress
from clipdist.tally import Tally
from clipdist.throughput import Throughput

HOPELESS_SUSPECTS = 3
"""When this many units have killed their processes and none was finished, it is not the rows."""
WAVE_UNITS = 16_384
"""Units per run of Ray Data: its driver keeps some kilobytes of each."""
JOINS_AT_ONCE = 2
STALL_SECONDS = 300.0

Pipeline = Callable[[ray.data.Dataset, Ledger, Any], ray.data.Dataset]
Rescue = Callable[[Ledger, int], dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """What a job does with units. `pipeline`: rows {"unit": number} -> `report` rows after each commit, or `suspect`
    rows for those that `Watch.begin` refuses. `join`: pieces -> shard. `rescue`: commits one unit that killed its
    process, row by row if need be."""

    name: str
    pipeline: Pipeline
    join: Join | None = None
    rescue: Rescue | None = None


def run_units(
    ledger: Ledger, work: Work, max_rejected_fraction: float, held: lease.Lease, *, retry_follows: bool = False
) -> None:
    """Commits the missing units of the ledger, and joins its full shards. UserError as soon as it is hopeless."""
    todo = ledger.missing()
    tally = Tally(ledger, max_rejected_fraction, retry_follows=retry_follows)
    joiner = Joiner(ledger, work.join, set(todo))
    total, left = int(ledger.unit_rows.sum()), sum(ledger.rows_of(unit) for unit in todo)
    with Progress(work.name, total, "rows", done=total - left) as progress, Stall(progress) as stall:
        if todo or joiner.ready:
            runtime.connect()
        watch = Watch.remote() if todo else None  # type: ignore[attr-defined]
        speed = Throughput()
        metrics = Metrics(work.name) if todo else None
        suspects: list[int] = []
        if 0 < left < total:
            goes_on = f"{total - left:,} of {total:,} rows are done; what else was under way is done again"
            progress.note(goes_on, done=total - left, left=left)

        def take(report: dict[str, Any]) -> None:
            if held.lost:
                held.check()
            unit, facts = int(report["unit"]), json.loads(report["facts"])
            speed.add(facts)
            tally.add(json.loads(report["planned"]), json.loads(report["rejected"]))
            progress.advance(ledger.rows_of(unit), rejected=tally.rejected(), **speed.shown())
            if metrics is not None:
                metrics.add(ledger.rows_of(unit), json.loads(report["rejected"]), facts, progress.rate())
            tally.stop_if_hopeless()
            joiner.committed(unit)

        for start in range(0, len(todo), WAVE_UNITS):
            wave = todo[start : start + WAVE_UNITS]
            units = ray.data.from_items([{"unit": unit} for unit in wave], override_num_blocks=len(wave))
            for report in _reports(work.pipeline(units, ledger, watch), ledger):
                stall.over()
                watch.forget.remote(int(report["unit"]))  # type: ignore[union-attr]
                if report["planned"]:
                    take(report)
                else:
                    suspects.append(int(report["unit"]))
                    _stop_if_nothing_lives(ledger, suspects, speed)
        for unit in suspects:
            assert work.rescue is not None
            what = f"unit {unit} killed its process {ATTEMPTS} times; trying its rows apart"
            progress.note(what, note=what)
            take(work.rescue(ledger, unit))
            stall.over()
        joiner.finish()
        if speed.rows and work.name == "embed":
            progress.note(speed.table(), **speed.summary())


def _reports(pipeline: ray.data.Dataset, ledger: Ledger) -> Iterator[dict[str, Any]]:
    try:
        yield from pipeline.iter_rows()
    except ray.exceptions.RayActorError as error:  # Ray starts an actor again that dies later, and over single rows
        raise model_dies() from error
    except ray.exceptions.RayTaskError as error:
        fault = _fault_behind(error)
        if fault is None:
            raise
        if isinstance(fault, OSError) and fault.errno is not None:
            # Ray Data puts words of its own in the place of the path
            raise type(fault)(fault.errno, fault.strerror, ledger.uri) from None
        raise fault from None


def _fault_behind(error: BaseException | None) -> OSError | UserError | None:
    """What a worker met, such as a disk that is full or a store that is down, inside what Ray wraps around it."""
    for _ in range(10):
        told = isinstance(error, OSError | UserError) and not isinstance(error, ray.exceptions.RayTaskError)
        if error is None or told:
            return error  # type: ignore[return-value]
        error = getattr(error, "cause", None) or error.__cause__
    return None


class Stall:
    """Says from time to time that nothing is finished: Ray waits without a word for what a cluster has not, or has no
    more."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.since, self.ended = progress, time.monotonic(), threading.Event()

    def __enter__(self) -> Stall:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()

    def over(self) -> None:
        self.since = time.monotonic()

    def _look(self) -> None:
        while not self.ended.wait(STALL_SECONDS):
            minutes = (time.monotonic() - self.since) / 60
            if minutes * 60 >= STALL_SECONDS:
                what = f"no unit was finished for {minutes:.0f} minutes; `ray status` shows what the cluster lacks"
                self.progress.note(what, note=what)


def report(unit: int, planned: dict[str, int], rejects: Sequence[dict[str, Any]], facts: dict[str, Any]) -> Any:
    """What a pipeline's last step tells the driver of one unit."""
    reasons: dict[str, Counter[str]] = {table: Counter() for table in planned}
    for reject in rejects:
        reasons[reject["table"]][reject["reason"]] += 1
    texts = {"planned": planned, "rejected": reasons, "facts": facts}
    return {"unit": unit} | {name: json.dumps(value) for name, value in texts.items()}


class Joiner:
    """Joins each shard as soon as all its units are committed, in Ray tasks beside the pipeline."""

    def __init__(self, ledger: Ledger, join: Join | None, todo: set[int]) -> None:
        self.ledger, self.join = ledger, join if ledger.shard_units else None
        self.left: Counter[int] = Counter()
        self.ready: list[int] = []
        self.running: list[Any] = []
        if self.join is not None:
            closed = ledger.closed()
            for shard in (shard for shard in ledger.shards if shard not in closed):
                self.left[shard] = sum(unit in todo for unit in ledger.units_of(shard))
                if not self.left[shard]:
                    self.ready.append(shard)

    def committed(self, unit: int) -> None:
        if self.join is None:
            return
        shard = self.ledger.shard_of(unit)
        self.left[shard] -= 1
        if not self.left[shard]:
            self.ready.append(shard)
        self._start()

    def finish(self) -> None:
        while self.ready or self.running:
            self._start()
            self._wait()

    def _start(self) -> None:
        while self.ready:
            if len(self.running) >= JOINS_AT_ONCE:
                self._wait()
            shard = self.ready.pop(0)
            self.running.append(_join.remote(self.ledger, shard, self.join))  # type: ignore[arg-type]

    def _wait(self) -> None:
        done, self.running = ray.wait(self.running, num_returns=1)
        ray.get(done)


@ray.remote(num_cpus=0)  # beside the pipeline, which takes all cores
def _join(ledger: Ledger, shard: int, join: Join) -> None:
    ledger.join(shard, join)


class Metrics:
    """What Ray exports to Prometheus while a job runs."""

    def __init__(self, job: str) -> None:
        from ray.util.metrics import Counter as Total
        from ray.util.metrics import Gauge

        self.job = {"job": job}
        self.rows = Total("clipdist_rows", "rows committed", ("job",))
        self.rejected = Total("clipdist_rejected_rows", "rows rejected", ("job", "table", "reason"))
        self.bytes = Total("clipdist_read_bytes", "bytes of pictures read", ("job",))
        self.seconds = Total("clipdist_stage_seconds", "seconds of work per stage", ("job", "stage"))
        self.rate = Gauge("clipdist_rows_per_second", "rows per second since the start", ("job",))

    def add(self, rows: int, rejected: dict[str, dict[str, int]], facts: dict[str, Any], rate: float) -> None:
        self.rows.inc(rows, self.job)
        self.rate.set(rate, self.job)
        if facts.get("bytes"):
            self.bytes.inc(facts["bytes"], self.job)
        for stage, seconds in facts.get("seconds", {}).items():
            if seconds > 0:
                self.seconds.inc(seconds, self.job | {"stage": stage})
        for table, reasons in rejected.items():
            for reason, count in reasons.items():
                self.rejected.inc(count, self.job | {"table": table, "reason": reason})


def _stop_if_nothing_lives(ledger: Ledger, suspects: Sequence[int], speed: Throughput) -> None:
    if len(suspects) >= HOPELESS_SUSPECTS and not speed.rows:
        raise all_died(
            ledger,
            f"that worked on the first {len(suspects)} units all died, {ATTEMPTS} times each, and none was finished",
        )
