"""One run at a time: a live holder is respected, a dead one is not, and nobody takes away what is another's."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clipdist import lease, patience, storage
from clipdist.config import UserError
from tests.faulty_store import FaultyStore

ROOT = Path(__file__).parents[2]

HOLD = """
import sys
from clipdist import lease
with lease.held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def no_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.0)


def start_holder(uri: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, uri], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def record(uri: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(storage.read_bytes(storage.join(uri, "running.json")))
    return found


def write_record(uri: str, *, host: str, pid: int, age_seconds: float) -> None:
    value = {"nonce": "theirs", "host": host, "pid": pid, "time": time.time() - age_seconds}
    storage.write_atomic(storage.join(uri, "running.json"), json.dumps(value).encode())


def dead_pid() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)


def test_a_lease_ends_with_its_block(place: str) -> None:
    for _ in range(2):
        with lease.held(place):
            assert record(place)["pid"] == os.getpid()
        assert storage.names(place) == []
    with pytest.raises(ZeroDivisionError), lease.held(place):
        raise ZeroDivisionError
    assert storage.names(place) == []


def test_a_second_run_is_refused_while_the_first_lives_and_may_start_when_it_is_killed(tmp_path: Path) -> None:
    uri = str(tmp_path)
    with start_holder(uri) as holder:
        message = f"another run is at work on this output .*process {holder.pid}"
        with pytest.raises(UserError, match=message), lease.held(uri):
            pass
        assert record(uri)["pid"] == holder.pid, "the refused run must leave the lease alone"
        holder.kill()
    with lease.held(uri):
        assert record(uri)["pid"] == os.getpid()
    assert storage.names(uri) == []


def test_a_run_that_ends_by_itself_leaves_no_lease(tmp_path: Path) -> None:
    with start_holder(str(tmp_path)) as holder:
        holder.communicate("\n", timeout=20)
    assert holder.returncode == 0
    assert storage.names(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("host", "pid", "age_seconds", "refused"),
    [
        ("another-host", 1, 5, True),
        ("another-host", 1, 100, False),
        ("this", 0, 5, False),  # 0: a process that has ended
        ("this", os.getpid(), 5, True),
        ("this", os.getpid(), 100, False),  # the number was given to another process: a living run renews its lease
    ],
)
def test_who_counts_as_alive(place: str, host: str, pid: int, age_seconds: float, refused: bool) -> None:
    host = socket.gethostname() if host == "this" else host
    write_record(place, host=host, pid=pid or dead_pid(), age_seconds=age_seconds)
    if refused:
        with pytest.raises(UserError, match="its lease ends in 5[0-9] s"), lease.held(place):
            pass
        assert record(place)["nonce"] == "theirs"
    else:
        with lease.held(place):
            assert record(place)["nonce"] != "theirs"


def test_a_lease_is_renewed(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    with lease.held(place):
        first, deadline = record(place), time.monotonic() + 10
        while record(place)["time"] == first["time"] and time.monotonic() < deadline:
            time.sleep(0.01)
        later = record(place)
    assert later["time"] > first["time"]
    assert later["nonce"] == first["nonce"]


def test_a_store_that_fails_for_a_while_does_not_end_the_renewals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.01)
    real, calls = storage.write_atomic, []

    def fails_twice(path: str, data: bytes) -> None:
        calls.append(path)
        if len(calls) <= 2:
            raise RuntimeError("no route to the store")
        real(path, data)

    with lease.held(str(tmp_path)):
        first = record(str(tmp_path))
        monkeypatch.setattr(storage, "write_atomic", fails_twice)
        deadline = time.monotonic() + 10
        while record(str(tmp_path))["time"] == first["time"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert record(str(tmp_path))["time"] > first["time"]


def test_what_another_run_took_over_is_neither_renewed_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that slept too long wakes up."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.3)  # not while the record is written here
    with lease.held(str(tmp_path)):
        write_record(str(tmp_path), host="another-host", pid=1, age_seconds=0)
        time.sleep(0.7)
        assert record(str(tmp_path))["nonce"] == "theirs"
    assert record(str(tmp_path))["nonce"] == "theirs"


@pytest.mark.parametrize("age_seconds", [-3600, 3600])
def test_a_run_whose_clock_is_another_is_alive_while_it_renews(
    place: str, monkeypatch: pytest.MonkeyPatch, age_seconds: int
) -> None:
    write_record(place, host="another-host", pid=1, age_seconds=age_seconds)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 1.0)
    renewal = threading.Timer(0.3, lambda: write_record(place, host="another-host", pid=1, age_seconds=age_seconds))
    renewal.start()
    with pytest.raises(UserError, match="another run is at work"), lease.held(place):
        pass
    renewal.join()
    with lease.held(place):  # it renews no more
        assert record(place)["nonce"] != "theirs"


@pytest.mark.parametrize(("settle_seconds", "holders"), [(0.4, 1), (0.0, 2)])
def test_of_two_that_find_the_same_dead_lease_one_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settle_seconds: float, holders: int
) -> None:
    """The slower one removes the lease of the faster one. Without the second look (the control) both would hold."""
    monkeypatch.setattr(lease, "SETTLE_SECONDS", settle_seconds)
    uri, real, both_saw_it = str(tmp_path), storage.remove, threading.Barrier(2)
    write_record(uri, host="another-host", pid=1, age_seconds=100)
    first_is_done, both_ended = threading.Event(), threading.Event()
    held: list[str] = []
    refused: list[str] = []

    def remove(path: str) -> None:
        if threading.current_thread().name == "slow" and not first_is_done.is_set():
            first_is_done.wait(10)
        real(path)

    def judge(uri: str, path: str, real: Any = lease._refuse_if_alive) -> None:
        real(uri, path)
        both_saw_it.wait(10)

    def put(path: str, data: bytes, real: Any = storage.put_if_absent) -> bool:
        won: bool = real(path, data)
        if won:
            threading.Timer(0.1, first_is_done.set).start()
        return won

    def run() -> None:
        try:
            with lease.held(uri):
                held.append(threading.current_thread().name)
                both_ended.wait(2)
        except UserError as error:
            refused.append(str(error))

    monkeypatch.setattr(storage, "remove", remove)
    monkeypatch.setattr(storage, "put_if_absent", put)
    monkeypatch.setattr(lease, "_refuse_if_alive", judge)
    threads = [threading.Thread(target=run, name=name) for name in ("fast", "slow")]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(held) + len(refused) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    both_ended.set()
    for thread in threads:
        thread.join()
    assert len(held) == holders
    assert len(held) + len(refused) == 2


# --- taken over ------------------------------------------------------------------------------------------------------


def test_a_run_that_was_taken_over_does_not_publish(place: str) -> None:
    with lease.held(place) as held:
        held.check()
        write_record(place, host="another-host", pid=1, age_seconds=0)
        with pytest.raises(UserError, match="another run took over this output"):
            held.check()
    assert record(place)["nonce"] == "theirs"


def test_a_lease_that_is_gone_is_lost(place: str) -> None:
    """The run that took over has ended."""
    with lease.held(place) as held:
        storage.remove(storage.join(place, "running.json"))
        with pytest.raises(UserError, match="another run took over this output"):
            held.check()


def test_the_renewal_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    with lease.held(str(tmp_path)):
        write_record(str(tmp_path), host="another-host", pid=1, age_seconds=0)
        time.sleep(0.3)
    assert capsys.readouterr().err.count("another run took over this output") == 1


PAUSED = """
import sys, time
from clipdist import lease
from clipdist.config import UserError
lease.RENEW_SECONDS = 3600.0
try:
    with lease.held(sys.argv[1]) as held:
        print("held", flush=True)
        sys.stdin.readline()
        held.check()
        print("published", flush=True)
except UserError as error:
    print(f"stopped: {error}", flush=True)
"""


@pytest.mark.parametrize("taken_over", [True, False])
def test_a_process_that_slept_through_its_lease_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken_over: bool
) -> None:
    """Its check is earlier than its next renewal. The control: without another run it goes on."""
    command = [sys.executable, "-c", PAUSED, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        if taken_over:
            monkeypatch.setattr(lease, "STALE_SECONDS", 0.0)
            with lease.held(str(tmp_path)) as ours:
                holder.send_signal(signal.SIGCONT)
                said, _ = holder.communicate("\n", timeout=20)
                ours.check()
        else:
            holder.send_signal(signal.SIGCONT)
            said, _ = holder.communicate("\n", timeout=20)
    assert said.startswith("stopped: " if taken_over else "published")


# --- stores with faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [(501, "NotImplemented"), None])
def test_a_store_that_cannot_refuse_a_second_writer(
    bucket: str, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch, capsys: Any, answer: tuple[int, str] | None
) -> None:
    """Ours is written over while we settle: the other one holds it."""
    faulty.lacks_conditions, faulty.ignores_conditions = answer, answer is None
    slept: list[float] = []
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.25)

    def settle(seconds: float) -> None:
        slept.append(seconds)
        write_record(bucket, host="another-host", pid=1, age_seconds=0)

    with monkeypatch.context() as patch:
        patch.setattr(lease.time, "sleep", settle)
        with pytest.raises(UserError, match="another run is at work"), lease.held(bucket):
            pass
    assert slept == [0.25]
    assert capsys.readouterr().err.count("run only one job at a time on an output") == 1
    storage.remove(storage.join(bucket, "running.json"))
    with lease.held(bucket) as held:
        held.check()
    assert storage.names(bucket) == []


def test_a_store_that_can_is_not_mentioned(place: str, capsys: Any) -> None:
    with lease.held(place):
        assert storage.names(place) == ["running.json"]
    assert capsys.readouterr().err == ""


def test_a_lease_outlives_faults_that_pass(bucket: str, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(patience, "FIRST_WAIT_SECONDS", 0.01)
    with lease.held(bucket) as held:
        first = record(bucket)["time"]
        faulty.slow_down_every = faulty.lose_put_reply_every = 3
        deadline = time.monotonic() + 20
        while record(bucket)["time"] == first and time.monotonic() < deadline:
            time.sleep(0.05)
        held.check()
        faulty.slow_down_every = faulty.lose_put_reply_every = 0
        assert record(bucket)["time"] > first
    assert storage.names(bucket) == []


def test_the_end_of_a_run_does_not_hide_its_error(
    bucket: str, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)

    def run() -> None:
        with lease.held(bucket):
            faulty.down_for(600)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
