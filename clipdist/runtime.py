"""Ray as the jobs use it: connecting quietly, what the cluster has, what a worker gets."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray
import ray.data
from ray._private.utils import read_ray_address

from clipdist import storage
from clipdist.config import UserError


def connect() -> None:
    """Joins the cluster of RAY_ADDRESS (set by `ray job submit`) or a running one, or starts Ray on this machine.
    UserError when nothing answers at RAY_ADDRESS."""
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of a change to come
        for name in ("ray", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        place = address()
        try:
            with _own_signals():
                ray.init(place, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
        except ConnectionError as error:
            hint = "is it a cluster that runs, and does it ask for a token (RAY_AUTH_MODE=token)?"
            raise UserError(f"RAY_ADDRESS: {place}: cannot be joined ({error}); {hint}") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # or of what a worker raised only the text arrives
    for name in ("ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as an error it also raises
    _quiet_actors()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts, and aborts on it with its own stack."""
    ours = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)


NOISE = b"has constructor arguments in the object store and max_restarts > 0"
"""Ray's core says so of every actor of Ray Data, on stderr, as an error. It is none: their arguments are kept."""


def _quiet_actors() -> None:
    """Ray Data starts its actors without the noise."""
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator as Pool

    start = getattr(Pool, "_start_actor", None)
    if start is None or hasattr(start, "loud"):
        return

    def quietly(*args: Any, **kwargs: Any) -> Any:
        with without_noise():
            return start(*args, **kwargs)

    setattr(quietly, "loud", start)  # noqa: B010
    setattr(Pool, "_start_actor", quietly)  # noqa: B010


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """What is written to stderr meanwhile is passed on at the end, without lines of NOISE."""
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError):  # a process without stderr
        yield
        return
    with tempfile.TemporaryFile() as scratch:
        os.dup2(scratch.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            scratch.seek(0)
            for line in scratch:
                if NOISE not in line:
                    os.write(2, line)


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


def node_cpus() -> int:
    """Of the smallest node that has any: what a process can count on."""
    there = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return min((cores for cores in there if cores), default=1)


def gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def gpus_for(use_gpu: bool | None, processes: int | None) -> int:
    """GPUs to work on: none when they are not wanted; when they are, also those that a growing cluster has not yet."""
    if use_gpu is None:
        return gpus()
    return max(gpus(), processes or 1) if use_gpu else 0


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


def save_config(uri: str, text: str) -> None:
    """The resolved config beside what it made; it reruns the job."""
    storage.write_atomic(storage.join(uri, "config.yaml"), text.encode())
