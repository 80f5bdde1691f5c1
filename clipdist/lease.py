"""One run at a time on an output: a lease that its holder renews, and that ends by itself when the holder is gone."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from clipdist import storage
from clipdist.config import UserError

RENEW_SECONDS, STALE_SECONDS, SETTLE_SECONDS = 10.0, 60.0, 1.0


@contextlib.contextmanager
def held(uri: str) -> Iterator[None]:
    """Holds the lease of `uri` while the block runs. UserError when another run holds it."""
    path, nonce = storage.join(uri, "running.json"), uuid.uuid4().hex
    for attempt in range(3):
        if storage.put_if_absent(path, _record(nonce)):
            if attempt:  # another run may have seen the same dead lease, and have removed ours for it
                time.sleep(SETTLE_SECONDS)
            if _is_ours(path, nonce):
                break
        _refuse_if_alive(uri, path)
        storage.remove(path)
    else:
        raise UserError(f"{uri}: other runs keep taking this output; start one at a time")
    stop = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, nonce, stop), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        stop.set()
        renewing.join()
        if _is_ours(path, nonce):
            storage.remove(path)


def _renew(path: str, nonce: str, stop: threading.Event) -> None:
    while not stop.wait(RENEW_SECONDS):
        with contextlib.suppress(Exception):  # whatever a store's client raises: the next time may do
            if _is_ours(path, nonce):
                storage.write_atomic(path, _record(nonce))


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
    # A dead run on this host is known at once. The age counts here too: a restarted container reuses the numbers.
    if age < STALE_SECONDS and not (here and not _is_running(holder["pid"])):
        raise UserError(
            f"{uri}: another run is at work on this output (host {holder['host']}, process {holder['pid']}); "
            f"if it is dead, its lease ends in {STALE_SECONDS - age:.0f} s"
        )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
