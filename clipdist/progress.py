"""Progress of long work: a bar for a person at a terminal, one JSON line per interval in a job's log."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts `total` things of one `unit`. On a terminal a bar; elsewhere a JSON line every `interval_seconds`."""

    def __init__(
        self, name: str, total: int | None, unit: str, *, done: int = 0, interval_seconds: float = 15.0
    ) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.facts: dict[str, object] = {}
        self._already, self._started = done, time.monotonic()
        self._interval, self._next_line = interval_seconds, self._started + interval_seconds
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=name, unit=f" {unit}", unit_scale=False, dynamic_ncols=True
            )

    def advance(self, count: int, **facts: object) -> None:
        """`count` more are done; `facts` are shown beside the bar or stand in the JSON line."""
        self.done += count
        self.facts.update(facts)
        if self._bar is not None:
            self._bar.set_postfix({name: _short(value) for name, value in self.facts.items()}, refresh=False)
            self._bar.update(count)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self._interval
            self._line()

    def note(self, line: str, **facts: object) -> None:
        """Something that stays: a line above the bar, or its facts as JSON."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(json.dumps({"job": self.name, **facts}, default=str), file=sys.stderr, flush=True)

    def rate(self) -> float:
        """Things per second since this run started."""
        return (self.done - self._already) / max(time.monotonic() - self._started, 1e-9)

    def _line(self) -> None:
        fields = {"job": self.name, "done": self.done, "total": self.total, "unit": self.unit}
        fields |= {"per_second": round(self.rate(), 1), "seconds": round(time.monotonic() - self._started, 1)}
        if self.total and self.rate() > 0:
            fields["eta_seconds"] = round((self.total - self.done) / self.rate())
        print(json.dumps(fields | self.facts, default=str), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._line()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
