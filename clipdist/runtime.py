"""Ray as the jobs use it: connecting quietly, and running a ledger's missing units through a Ray Data pipeline."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray
import ray.data
from ray._private.utils import read_ray_address

from clipdist import lease, storage
from clipdist.config import UserError
from clipdist.ledger import Ledger, Manifest
from clipdist.progress import Progress

HOPELESS_ROWS, HOPELESS_FRACTION = 200, 0.9
"""After this many rows a job stops when this share of them was rejected: a wrong folder, missing credentials."""


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS (set by `ray job submit`) or a running one, or starts Ray on this machine.
    UserError when nothing answers at RAY_ADDRESS."""
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of a change to come
        for name in ("ray", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        ray.init(address(), log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)


def address() -> str | None:
    """Where Ray runs; None: where Ray itself looks. Ray would wait for minutes where nothing answers: at a mistyped
    address, or at the one that a cluster of this machine left behind when it was killed."""
    named = os.environ.get("RAY_ADDRESS") or None
    known = named or read_ray_address()
    if known is None or known in ("auto", "local") or _answers(known):
        return named
    if named is None:
        return "local"
    raise UserError(
        f"RAY_ADDRESS: nothing answers at {named}; start the cluster, or unset RAY_ADDRESS to work on this machine"
    )


def _answers(place: str) -> bool:
    """Whether something listens at host:port; a scheme before it does not matter."""
    found = urlsplit(place if "://" in place else f"ray://{place}")
    try:
        socket.create_connection((found.hostname or "", found.port or 10001), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


@dataclass(frozen=True)
class Scale:
    """Training workers and what each of them gets."""

    workers: int
    use_gpu: bool
    cores: int

    @property
    def resources(self) -> dict[str, int]:
        return {"CPU": self.cores} | ({"GPU": 1} if self.use_gpu else {})

    @property
    def decoders(self) -> int:
        """Decoding processes per worker: beside a GPU all cores but one; on CPUs one, as decoding shares the cores."""
        return max(1, self.cores - 1) if self.use_gpu else 1


def scale(workers: int, use_gpu: bool) -> Scale:
    """As many cores per worker as fit, each worker on one node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def places(cores: int) -> int:
        return sum(
            int(min(node.get("CPU", 0) // cores, node.get("GPU", 0) if use_gpu else float("inf"))) for node in nodes
        )

    most = max(int(node.get("CPU", 0)) for node in nodes)
    return Scale(workers, use_gpu, next((cores for cores in range(most, 1, -1) if places(cores) >= workers), 1))


def run_units(
    ledger: Ledger,
    name: str,
    pipeline: Callable[[ray.data.Dataset], ray.data.Dataset],
    max_rejected_fraction: float,
    **facts: Any,
) -> Manifest:
    """Runs `pipeline` over the units that have no commit yet, judges the rejects, publishes the manifest.

    The pipeline gets rows {"unit": number} and gives `unit_report` rows after each commit. Raises UserError, and
    publishes nothing, when more than `max_rejected_fraction` of a table's rows are rejected.
    """
    with lease.held(ledger.uri):
        ledger.forget_rejecting_units()  # of an earlier run that was not published: what it rejected may be mended
        return _run_units(ledger, name, pipeline, max_rejected_fraction, **facts)


def _run_units(
    ledger: Ledger,
    name: str,
    pipeline: Callable[[ray.data.Dataset], ray.data.Dataset],
    max_rejected_fraction: float,
    **facts: Any,
) -> Manifest:
    commits = ledger.commits()
    done = {commit["unit"] for commit in commits}
    todo = [unit for unit in range(len(ledger.units)) if unit not in done]
    tally = Tally(ledger, max_rejected_fraction)
    for commit in commits:
        tally.add(commit["planned"], commit["rejected"])
    total = sum(ledger.units)
    with Progress(name, total, "rows", done=sum(ledger.units[unit] for unit in done)) as progress:
        if todo:
            connect()
            units = ray.data.from_items([{"unit": unit} for unit in todo], override_num_blocks=len(todo))
            for report in pipeline(units).iter_rows():
                tally.add(json.loads(report["planned"]), json.loads(report["rejected"]))
                progress.advance(ledger.units[report["unit"]], rejected=tally.rejected())
                tally.stop_if_hopeless()
    tally.stop_if_hopeless(at_end=True)
    return ledger.publish(**facts)


def unit_report(unit: int, planned: dict[str, int], rejects: list[dict[str, Any]]) -> dict[str, Any]:
    """What a pipeline's last step tells the driver of one unit."""
    reasons: dict[str, Counter[str]] = {table: Counter() for table in planned}
    for reject in rejects:
        reasons[reject["table"]][reject["reason"]] += 1
    return {"unit": unit, "planned": json.dumps(planned), "rejected": json.dumps(reasons)}


class Tally:
    """Rows planned and rejected so far, per table and reason."""

    def __init__(self, ledger: Ledger, max_rejected_fraction: float) -> None:
        self.ledger, self.limit = ledger, max_rejected_fraction
        self.planned: Counter[str] = Counter()
        self.reasons: dict[str, Counter[str]] = {}

    def add(self, planned: dict[str, int], rejected: dict[str, dict[str, int]]) -> None:
        self.planned.update(planned)
        for table, reasons in rejected.items():
            self.reasons.setdefault(table, Counter()).update(reasons)

    def rejected(self) -> int:
        return sum(sum(reasons.values()) for reasons in self.reasons.values())

    def stop_if_hopeless(self, *, at_end: bool = False) -> None:
        """UserError when the limit is certain to be passed, or nearly everything fails."""
        for table, rows in self.planned.items():
            lost = sum(self.reasons.get(table, Counter()).values())
            whole = rows if at_end else max(rows, sum(self.ledger.units))
            hopeless = rows >= HOPELESS_ROWS and lost >= HOPELESS_FRACTION * rows and self.limit < HOPELESS_FRACTION
            if lost > self.limit * whole or hopeless:
                raise UserError(self._failure(table, rows, lost))

    def _failure(self, table: str, rows: int, lost: int) -> str:
        lines = [
            f"{lost:,} of {rows:,} {table} were rejected ({100 * lost / rows:.1f} %); "
            f"max_rejected_fraction allows {100 * self.limit:.1f} %. Nothing was published."
        ]
        lines += [f"  {count:>8,}  {reason}" for reason, count in self.reasons[table].most_common()]
        lines += ["  for example:"] + [f"    {example}" for example in self.ledger.reject_examples(3)]
        lines.append("  Mend the pictures and run the same command again (units with rejects are tried anew),")
        lines.append("  or choose a new output for a changed table, or raise max_rejected_fraction.")
        return "\n".join(lines)


def save_config(uri: str, text: str) -> None:
    """The resolved config beside what it made; it reruns the job."""
    storage.write_atomic(storage.join(uri, "config.yaml"), text.encode())
