"""Where a pipeline's time goes: seconds of work per stage, what each could do alone, and which one holds it up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from clipdist.report import number, percent, table

STAGES = ("fetch", "decode", "encode", "write")


class Throughput:
    """Sums what units tell: {"rows", "bytes", "seconds": {stage: seconds}, "wait": seconds an encoder waited, "slots":
    {stage: how many work at once}}."""

    def __init__(self) -> None:
        self.rows = 0
        self.bytes = 0
        self.wait = 0.0
        self.busy = 0.0
        self.seconds: Counter[str] = Counter()
        self.slots: dict[str, float] = {}
        self.first: float | None = None
        self.last = 0.0
        self.first_rows = 0

    def add(self, facts: Mapping[str, Any]) -> None:
        rows = int(facts.get("rows", 0))
        self.last = time.monotonic()
        if self.first is None and rows:
            self.first, self.first_rows = self.last, rows
        self.rows += rows
        self.bytes += int(facts.get("bytes", 0))
        self.wait += float(facts.get("wait", 0.0))
        self.busy += float(facts.get("busy", 0.0))
        self.seconds.update(facts.get("seconds", {}))
        self.slots.update(facts.get("slots", {}))

    def shown(self) -> dict[str, object]:
        """Facts for beside a progress bar."""
        if not self.seconds:
            return {}
        return {"encoder_wait": percent(self.waiting()), "read_mb": self.bytes // 10**6}

    def waiting(self) -> float:
        """The share of time that an encoder had nothing to encode."""
        return self.wait / (self.wait + self.busy) if self.wait + self.busy else 0.0

    def steady_rate(self) -> float | None:
        """Rows per second between the first and the last finished unit."""
        if self.first is None or self.last <= self.first:
            return None
        return (self.rows - self.first_rows) / (self.last - self.first)

    def ceilings(self) -> dict[str, float]:
        """Rows per second that each stage could do if it had all its slots to itself."""
        return {
            stage: self.slots.get(stage, 1.0) * self.rows / self.seconds[stage]
            for stage in STAGES
            if self.seconds[stage] > 0
        }

    def bottleneck(self) -> str | None:
        """The stage that could do the least; None when no stage was measured."""
        ceilings = self.ceilings()
        return min(ceilings, key=lambda stage: ceilings[stage]) if ceilings else None

    def summary(self) -> dict[str, object]:
        """Plain data, for a job's log."""
        ceilings = {stage: round(rate, 1) for stage, rate in self.ceilings().items()}
        rate = self.steady_rate()
        return {
            "rows": self.rows,
            "read_bytes": self.bytes,
            "steady_rows_per_second": round(rate, 1) if rate is not None else None,
            "encoder_wait": round(self.waiting(), 4),
            "stage_seconds": {stage: round(self.seconds[stage], 2) for stage in STAGES if self.seconds[stage]},
            "stage_ceilings": ceilings,
            "bottleneck": self.bottleneck(),
        }

    def table(self) -> str:
        """The same for a person."""
        slowest = self.bottleneck()
        rows = [
            [stage, number(self.seconds[stage]), number(ceiling), "<- holds it up" if stage == slowest else ""]
            for stage, ceiling in self.ceilings().items()
        ]
        shown = table(["stage", "seconds", "rows/s alone", ""], rows)
        rate = self.steady_rate()
        reached = f", {number(rate)} rows/s after the first unit" if rate is not None else ""
        return f"{shown}\nencoders waited {percent(self.waiting())} of their time{reached}"
