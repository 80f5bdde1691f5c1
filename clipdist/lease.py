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

RENEW_SECONDS, STALE_SECONDS = 10.0, 60.0


@contextlib.contextmanager
def held(uri: str) -> Iterator[None]:
    """Holds the lease of `uri` while the block runs. UserError when another run holds it."""
    path, nonce = storage.join(uri, "running.json"), uuid.uuid4().hex
    for _ in range(3):
        if storage.put_if_absent(path, _record(nonce)):
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
        storage.remove(path)


def _renew(path: str, nonce: str, stop: threading.Event) -> None:
    while not stop.wait(RENEW_SECONDS):
        with contextlib.suppress(OSError):
            storage.write_atomic(path, _record(nonce))


def _record(nonce: str) -> bytes:
    return json.dumps({"nonce": nonce, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}).encode()


def _refuse_if_alive(uri: str, path: str) -> None:
    try:
        holder = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return
    age = time.time() - holder["time"]
    here = holder["host"] == socket.gethostname()
    alive = _is_running(holder["pid"]) if here else age < STALE_SECONDS
    if alive:
        wait = "" if here else f"; if it is dead, its lease ends in {STALE_SECONDS - age:.0f} s"
        raise UserError(
            f"{uri}: another run is at work on this output (host {holder['host']}, process {holder['pid']}){wait}"
        )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
