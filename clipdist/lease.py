"""One run at a time on an output: a lease that its holder renews, and that ends by itself when the holder is gone."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from clipdist import patience, storage
from clipdist.config import Fault, UserError

RENEW_SECONDS, STALE_SECONDS, SETTLE_SECONDS = 10.0, 60.0, 1.0
WATCH_SECONDS = 2.5 * RENEW_SECONDS


class Lease:
    """A lease that this run holds. The run calls `check` before it publishes or deletes: if it was paused for longer
    than STALE_SECONDS, another one may be at work here by now."""

    def __init__(self, uri: str) -> None:
        self.uri, self.path, self.nonce = uri, storage.join(uri, "running.json"), uuid.uuid4().hex
        self.lost = False
        """Whether a renewal found that it is another's."""

    def check(self) -> None:
        """Fault when the lease is another's, or gone. It looks itself: a run that wakes up is here before its
        renewals are."""
        if self.lost or not _is_ours(self.path, self.nonce):
            raise Fault(
                f"{self.uri}: another run took over this output, because this one was not heard of for "
                f"{STALE_SECONDS:.0f} s (paused, or cut off from the store); this one stops and leaves it alone"
            )


@contextlib.contextmanager
def held(uri: str) -> Iterator[Lease]:
    """Holds the lease of `uri` while the block runs. UserError when another run holds it.

    The block calls `check` of what it gets before it publishes or deletes."""
    lease = Lease(uri)
    _take(lease)
    stop = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, stop), daemon=True)
    renewing.start()
    try:
        yield lease
    finally:
        stop.set()
        renewing.join()
        # At the end of a lease nobody waits long for a store: it ends by itself, too.
        with contextlib.suppress(Exception), patience.at_most(RENEW_SECONDS):
            if _is_ours(lease.path, lease.nonce):
                storage.remove(lease.path)


def _take(lease: Lease) -> None:
    one_wins = storage.has_conditional_put(lease.uri)
    if not one_wins:
        what = "this store cannot refuse a second writer (no conditional PUT)"
        print(f"note: {lease.uri}: {what}: run only one job at a time on an output", file=sys.stderr)
    for attempt in range(3):
        if storage.put_if_absent(lease.path, _record(lease.nonce)):
            # Another run may have seen the same dead lease, and have removed ours for it; or have written over ours.
            if attempt or not one_wins:
                time.sleep(SETTLE_SECONDS)
            if _is_ours(lease.path, lease.nonce):
                return
        _refuse_if_alive(lease.uri, lease.path)
        storage.remove(lease.path)
    raise UserError(f"{lease.uri}: other runs keep taking this output; start one at a time")


def _renew(lease: Lease, stop: threading.Event) -> None:
    while not stop.wait(RENEW_SECONDS):
        # Whatever a store's client raises: the next time may do. A renewal that is tried for long could come when the
        # lease is another's already.
        with contextlib.suppress(Exception), patience.at_most(RENEW_SECONDS):
            if _is_ours(lease.path, lease.nonce):
                storage.write_atomic(lease.path, _record(lease.nonce))
                continue
            lease.lost = True
            print(f"{lease.uri}: another run took over this output; this one will stop", file=sys.stderr)
            return


def _is_ours(path: str, nonce: str) -> bool:
    try:
        return bool(json.loads(storage.read_bytes(path))["nonce"] == nonce)
    except FileNotFoundError:
        return False


def _record(nonce: str) -> bytes:
    return json.dumps({"nonce": nonce, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}).encode()


def _refuse_if_alive(uri: str, path: str) -> None:
    try:
        holder = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return
    age = time.time() - holder["time"]
    here = holder["host"] == socket.gethostname()
    if here and not _is_running(holder["pid"]):
        return  # known at once
    # The age counts here too: a restarted container reuses the numbers of processes.
    alive, left = age < STALE_SECONDS, STALE_SECONDS - age
    if not here and not 0 <= age < STALE_SECONDS:  # dead, or its clock is another: then it is renewed meanwhile
        time.sleep(WATCH_SECONDS)
        alive, left = _is_renewed(path, holder), STALE_SECONDS
    if alive:
        raise UserError(
            f"{uri}: another run is at work on this output (host {holder['host']}, process {holder['pid']}); "
            f"if it is dead, its lease ends in {left:.0f} s"
        )


def _is_renewed(path: str, holder: dict[str, Any]) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return bool(json.loads(storage.read_bytes(path)) != holder)
    return False


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
