"""Processes that die: how often one may over a unit, which rows kill, and what a person is told when all do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from clipdist.config import Fault
from clipdist.ledger import Ledger

ATTEMPTS = 2
"""How often a process may die over a unit before it is taken out of the pipeline."""

T = TypeVar("T")


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)  # its node may go
class Watch:
    """Hears from every process which unit it begins, before it does."""

    def __init__(self) -> None:
        self.begun: Counter[tuple[int, str]] = Counter()
        self.loads = 0

    def begin(self, unit: int, stage: str) -> bool:
        """Whether to do it: False when as many processes died over it as may."""
        self.begun[unit, stage] += 1
        return self.begun[unit, stage] <= ATTEMPTS

    def may_load(self, most: int) -> bool:
        """Whether to load a model: False when so many processes in a row began to, and none came to the end."""
        self.loads += 1
        return self.loads <= most

    def loaded(self) -> None:
        self.loads = 0

    def forget(self, unit: int) -> None:
        for key in [key for key in self.begun if key[0] == unit]:
            del self.begun[key]


def may_begin(watch: Any, unit: int, stage: str) -> bool:
    return bool(ray.get(watch.begin.remote(unit, stage)))


def suspect(unit: int) -> dict[str, Any]:
    """The report of a unit that was not done, because it killed its process too often."""
    return {"unit": unit, "planned": "", "rejected": "", "facts": ""}


def halved(
    rows: Sequence[int], attempt: Callable[[Sequence[int]], T | None]
) -> Iterator[tuple[Sequence[int], T | None]]:
    """(rows, result) of parts of `rows`, in order; the result is None for a single row that does not survive.

    `attempt` gives None when its process died. A part that dies is halved; a single row gets a second attempt."""
    found = attempt(rows)
    if found is None and len(rows) == 1:
        found = attempt(rows)
    if found is not None or len(rows) == 1:
        yield rows, found
        return
    middle = len(rows) // 2
    yield from halved(rows[:middle], attempt)
    yield from halved(rows[middle:], attempt)


def model_dies() -> Fault:
    return Fault(
        "the processes that load the model die before it is loaded: most likely there is too little memory. Try fewer "
        "encoders or larger machines"
    )


def all_died(ledger: Ledger, which: str) -> Fault:
    """What a person is told when it is not single rows that kill."""
    return Fault(
        f"{ledger.uri}: the processes {which}: most likely there is too little memory. "
        "Try a smaller batch_rows, fewer encoders, or larger machines"
    )
