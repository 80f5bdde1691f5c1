"""The actors of a search over a cluster: each answers for some files of a table; and how they are asked."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import ray

from clipdist.config import Fault
from clipdist.manifest import Manifest
from clipdist.shares import Share

RETRIES = 3
"""How often a question is asked again of an actor whose process died over it."""
SIGN_SECONDS = 10.0
PATIENCE_SECONDS = 600.0
"""How long an actor may give no sign of life. Ray waits for ever for a node that does not come back."""


@ray.remote(max_restarts=-1, max_task_retries=RETRIES, concurrency_groups={"signs": 1})  # type: ignore[call-overload]
class ShareSearcher:
    """A process that answers for a share. Nothing is opened before the first question: an actor that dies while it is
    made would be made again for ever."""

    def __init__(self, manifest: Manifest, table: str, first_rows: dict[str, int]) -> None:
        self.share = Share(manifest, table, first_rows)

    def answer(self, method: str, *arguments: Any) -> Any:
        return getattr(self.share, method)(*arguments)

    @ray.method(concurrency_group="signs")
    def sign(self) -> int:
        """Its process."""
        return os.getpid()


def ask(calls: Sequence[tuple[Any, Any]], patience_seconds: float) -> list[Any]:
    """The answers of (actor, pending answer). What an actor raised is raised here; Fault when its process died too
    often, or nothing is heard of it."""
    answers = [answer for _, answer in calls]
    heard = time.monotonic()
    try:
        while True:
            _, waiting = ray.wait(answers, num_returns=len(answers), timeout=SIGN_SECONDS)
            if not waiting:
                return list(ray.get(answers))
            signs = [actor.sign.remote() for actor, answer in calls if answer in waiting]
            _, silent = ray.wait(signs, num_returns=len(signs), timeout=SIGN_SECONDS)
            if not silent:
                heard = time.monotonic()
            elif time.monotonic() - heard > patience_seconds:
                raise _silent(len(silent), len(calls), patience_seconds)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    except ray.exceptions.RayError as error:
        raise _lost(error) from error


def _silent(silent: int, actors: int, seconds: float) -> Fault:
    return Fault(
        f"{silent} of {actors} search processes gave no sign of life for {seconds:.0f} s: the cluster lost the node "
        "of one, or has no cores left for it. Look at `ray status`, then run the same again"
    )


def _lost(error: Exception) -> Fault:
    if isinstance(error, ray.exceptions.RayActorError | ray.exceptions.OutOfMemoryError):
        return Fault(
            f"a search process died {RETRIES + 1} times over the same question: most likely there is too little "
            "memory. Try fewer queries at once, more actors, or larger machines"
        )
    first = (str(error).strip().splitlines() or [""])[0]
    return Fault(
        f"the cluster is gone ({type(error).__name__}: {first}). Look at `ray status`, then run the same again"
    )
