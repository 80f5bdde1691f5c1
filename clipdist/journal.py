"""metrics.jsonl: one JSON line per interval of steps, epoch, validation and start of the workers.

Contract: whatever dies, the lines are those of one undisturbed run: they are written before each checkpoint by the
process that writes it, and a run that goes on drops the lines of the steps that it takes again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from clipdist import storage

Report = Callable[[dict[str, Any]], None]

KEPT = ("workers", "outputs", "step", "epoch", "validated", "interpolated")


def is_line(event: dict[str, Any], every: int) -> bool:
    """Whether an event is a line: of steps only the first and every `every`-th."""
    return event["event"] in KEPT and (event["event"] != "step" or event["step"] == 1 or event["step"] % every == 0)


def read(output: str) -> list[dict[str, Any]]:
    """The lines of a run; none when it has not started."""
    path = storage.join(output, "metrics.jsonl")
    if not storage.exists(path):
        return []
    whole = storage.read_bytes(path).rpartition(b"\n")[0]  # a line that a dying process tore has no end
    return [json.loads(line) for line in whole.splitlines()]


class Journal:
    """The lines of a run that has `step` steps, the last of them `measured` or not, and goes on. On a disk each is
    written as it comes, on a store all with the next `write`."""

    def __init__(self, output: str, every: int, step: int, *, measured: bool) -> None:
        self._path, self._every = storage.join(output, "metrics.jsonl"), every
        last = {"validated": step if measured else step - 1, "interpolated": -1}
        self._lines = [line for line in read(output) if line.get("step", 0) <= last.get(line["event"], step)]
        self.write()

    def before(self, report: Report) -> Report:
        """`report` with the time in its events, after they were written here."""

        def written(event: dict[str, Any]) -> None:
            event = event | {"time": time.time()}
            if is_line(event, self._every):
                self._lines.append(event)
                if storage.is_local(self._path):
                    with open(self._path, "ab") as file:
                        file.write(_encoded([event]))
            report(event)

        return written

    def write(self) -> None:
        storage.write_atomic(self._path, _encoded(self._lines))


def _encoded(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
