"""Storage on a disk and on S3: all or nothing, one winner, no stale answers, also when processes are killed."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError  # type: ignore[import-untyped]
from s3fs.errors import translate_boto_error

import clipdist
from clipdist import patience, storage
from clipdist.config import UserError
from tests.faulty_store import FaultyStore

ROOT = Path(clipdist.__file__).parents[1]


def other_client(path: str) -> Any:
    """What another process would be: a client without this one's caches."""
    fs, inner = storage.filesystem(path)
    return type(fs)(skip_instance_cache=True), inner


def test_what_is_written_is_read(place: str) -> None:
    path = storage.join(place, "a", "한글 #1 %20?+&.bin")
    assert not storage.exists(path)
    for data in (b"", b"0123456789", b"other"):
        storage.write_atomic(path, data)
        assert storage.read_bytes(path) == data
        assert storage.size(path) == len(data)
        with storage.open_read(path) as file:
            assert file.read() == data
    assert storage.read_bytes(path, 1, 3) == b"th"
    assert storage.read_bytes(path, 2, 2) == b""
    assert storage.exists(path)
    assert storage.names(storage.join(place, "a")) == ["한글 #1 %20?+&.bin"]
    storage.remove(path)
    storage.remove(path)
    assert not storage.exists(path)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(path)
    with pytest.raises(FileNotFoundError):
        storage.size(path)


def test_listings(place: str) -> None:
    assert storage.names(place) == []
    for name in ("b", "a/2", "a/10", "c.txt"):
        storage.write_atomic(storage.join(place, name), name.encode())
    assert storage.names(place) == ["a", "b", "c.txt"]
    assert storage.names(storage.join(place, "nothing")) == []
    assert storage.is_directory(place)
    assert not storage.is_directory(storage.join(place, "b"))
    found = list(storage.walk_files(place))
    assert found == [(storage.join(place, name), len(name)) for name in ("b", "c.txt", "a/10", "a/2")]
    storage.remove_tree(place)
    assert storage.names(place) == []
    storage.remove_tree(place)


def test_nothing_is_remembered_that_another_process_may_change(place: str) -> None:
    storage.write_atomic(storage.join(place, "one"), b"1")
    storage.names(place)
    fs, inner = other_client(storage.join(place, "two"))
    fs.pipe_file(inner, b"22")
    fs.pipe_file(storage.filesystem(storage.join(place, "one"))[1], b"changed")
    assert storage.exists(storage.join(place, "two"))
    assert storage.size(storage.join(place, "one")) == 7
    assert storage.read_bytes(storage.join(place, "one")) == b"changed"
    assert storage.names(place) == ["one", "two"]
    assert [size for _, size in storage.walk_files(place)] == [7, 2]
    fs.rm_file(inner)
    assert not storage.exists(storage.join(place, "two"))


def test_a_folder_made_in_the_s3_console_is_empty(bucket: str) -> None:
    fs, inner = storage.filesystem(f"{bucket}/made/")
    name, _, key = inner.partition("/")
    fs.call_s3("put_object", Bucket=name, Key=f"{key}/", Body=b"")
    assert storage.names(f"{bucket}/made") == []
    assert list(storage.walk_files(f"{bucket}/made")) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("/a/../b", "/b"),
        ("file:///a/b", "/a/b"),
        ("x", os.path.abspath("x")),
        ("~/x", os.path.expanduser("~/x")),
    ],
)
def test_absolute(given: str, expected: str) -> None:
    assert storage.absolute(given) == expected


def test_local_names_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("a::b", "a#b", "a%20b", "a?b", "[a]", "a*b", "~a", " a "):
        path = storage.join(str(tmp_path), name)
        storage.write_atomic(path, b"x")
        assert storage.read_bytes(path) == b"x"
        assert (tmp_path / name).exists()


def test_a_fingerprint_changes_with_the_content(place: str) -> None:
    path, seen = storage.join(place, "file"), set()
    whole, edge = 20, 4
    for data in (
        b"",
        b"a",
        b"b",
        b"a" * 8,
        b"a" * 9,
        b"b" + b"a" * 20,
        b"a" * 20 + b"b",
        b"a" * 21,
        b"a" * 10 + b"b" + b"a" * 10,
    ):
        storage.write_atomic(path, data)
        found = storage.fingerprint(path, whole, edge)
        assert found == storage.fingerprint(path, whole, edge)
        assert found not in seen
        seen.add(found)


def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.check_writable(str(tmp_path / "new" / "deep"))
    (tmp_path / "file").write_text("x")
    for path in ("file", "file/below"):
        with pytest.raises(UserError, match="cannot be written: .*/file is a file"):
            storage.check_writable(str(tmp_path / path))
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root all may be written
    with pytest.raises(UserError, match=f"/new: cannot be written: no permission in {tmp_path}"):
        storage.check_writable(str(tmp_path / "new"))


# --- killed in the middle --------------------------------------------------------------------------------------------

WRITE_FOREVER = """
import sys
from clipdist import storage
data = [bytes([n]) * (8 << 20) for n in (1, 2)]
print("ready", flush=True)
while True:
    for one in data:
        storage.write_atomic(sys.argv[1], one)
"""


def test_a_killed_writer_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path, half_written = tmp_path / "shard", 0
    for delay in (0.004, 0.011, 0.017, 0.023, 0.031):
        with subprocess.Popen(
            [sys.executable, "-c", WRITE_FOREVER, str(path)], cwd=ROOT, stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            deadline = time.monotonic() + 20
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        data = path.read_bytes()
        assert len(data) == 8 << 20
        assert len(set(data[:: 1 << 12])) == 1
        assert storage.names(str(tmp_path)) == ["shard"]
        half_written += len(list(tmp_path.glob(".shard.*")))
        if half_written:
            return
    pytest.fail("no kill hit a write; choose other delays")


def test_an_interrupted_upload_is_not_visible(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large object is sent in parts; here the process ends before the last call."""
    fs, _ = storage.filesystem(bucket)
    real, pipe_file, sent = fs._call_s3, fs.pipe_file, []

    async def stops(method: str, *args: Any, **kwargs: Any) -> Any:
        sent.append(method)
        if method == "complete_multipart_upload":
            raise OSError("the network is gone")
        return await real(method, *args, **kwargs)

    monkeypatch.setattr(fs, "_call_s3", stops)
    monkeypatch.setattr(fs, "pipe_file", lambda path, data: pipe_file(path, data, chunksize=5 << 20))
    with pytest.raises(OSError, match="the network is gone"):
        storage.write_atomic(f"{bucket}/large", bytes(11 << 20))
    assert sent.count("upload_part") == 3
    assert storage.names(bucket) == []


# --- put_if_absent ---------------------------------------------------------------------------------------------------

RACE = """
import os, sys, time
from clipdist import storage
readers, start = [], time.time() + 0.2
for number in range(8):
    read, write = os.pipe()
    if os.fork() == 0:
        while time.time() < start:
            pass
        won = [storage.put_if_absent(f"{sys.argv[1]}{unit}", b"%d" % number) for unit in range(20)]
        os.write(write, b"".join(b"1" if one else b"0" for one in won))
        os._exit(0)
    os.close(write)
    readers.append(read)
for read in readers:
    print(os.read(read, 100).decode())
"""


def test_one_of_eight_processes_wins_on_a_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path / "out" / "unit-")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    won = done.stdout.split()
    assert len(won) == 8
    for unit, marks in enumerate(zip(*won, strict=True)):
        assert marks.count("1") == 1
        assert (tmp_path / "out" / f"unit-{unit}").read_text() == str(marks.index("1"))
    assert len(list((tmp_path / "out").iterdir())) == 20, "temporary files were left"


def in_eight_threads(work: Callable[[int], bool]) -> list[bool]:
    start, won = threading.Barrier(8), [False] * 8

    def one(number: int) -> None:
        start.wait()
        won[number] = work(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def test_one_of_eight_wins_on_a_disk_when_all_are_at_the_last_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks first and writes then has nothing more to look at here."""
    together, path = threading.Barrier(8), str(tmp_path / "unit")

    def after_all(real: Callable[..., None]) -> Callable[..., None]:
        def call(*names: str) -> None:
            together.wait(20)
            real(*names)

        return call

    for name in ("link", "rename", "replace"):
        monkeypatch.setattr(os, name, after_all(getattr(os, name)))
    won = in_eight_threads(lambda number: storage.put_if_absent(path, b"%d" % number))
    assert won.count(True) == 1
    assert storage.read_bytes(path) == b"%d" % won.index(True)


def test_one_of_eight_wins_on_s3(bucket: str) -> None:
    for unit in range(3):
        path = f"{bucket}/out/unit-{unit}"
        won = in_eight_threads(lambda number: storage.put_if_absent(path, b"%d" % number))  # noqa: B023
        assert won.count(True) == 1
        assert storage.read_bytes(path) == b"%d" % won.index(True)


def test_looking_before_writing_is_not_enough(bucket: str) -> None:
    """The control of the test above: it notices a put_if_absent that is not atomic."""
    path, looked = f"{bucket}/out/unit", threading.Barrier(8)

    def look_then_write(number: int) -> bool:
        free = not storage.exists(path)
        looked.wait()
        if free:
            storage.write_atomic(path, b"%d" % number)
        return free

    assert in_eight_threads(look_then_write).count(True) > 1


def test_only_the_first_content_stays(place: str) -> None:
    path = storage.join(place, "commits", "000000.json")
    assert storage.put_if_absent(path, b"first")
    assert not storage.put_if_absent(path, b"second")
    assert storage.read_bytes(path) == b"first"
    assert storage.put_if_absent(path, b"first"), "the reply to an earlier try may have been lost"
    assert storage.names(storage.join(place, "commits")) == ["000000.json"]


def test_a_lost_reply_is_no_loss(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The PUT arrives, its reply does not, and the client tries again: the second answer is "it is there"."""
    fs, _ = storage.filesystem(bucket)
    real = fs._call_s3

    async def twice(method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "put_object":
            await real(method, *args, **kwargs)
        return await real(method, *args, **kwargs)

    monkeypatch.setattr(fs, "_call_s3", twice)
    assert storage.put_if_absent(f"{bucket}/unit", b"mine")
    assert not storage.put_if_absent(f"{bucket}/unit", b"theirs")


@pytest.mark.parametrize(
    ("code", "condition", "tries", "outcome"),
    [
        ("PreconditionFailed", "If-None-Match", 1, "lost"),  # AWS
        ("PreconditionFailed", None, 1, "lost"),  # other stores name no condition
        ("ConditionalRequestConflict", None, 4, "raised"),
        ("ServiceUnavailable", None, 1, "raised"),
    ],
)
def test_what_stores_answer(
    bucket: str, monkeypatch: pytest.MonkeyPatch, code: str, condition: str | None, tries: int, outcome: str
) -> None:
    path, calls = f"{bucket}/unit", []
    fs, _ = storage.filesystem(path)
    real = fs.pipe_file

    def refuse(inner: str, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if outcome == "lost":  # another writer was faster
            real(inner, b"theirs")
        details = {"Code": code, "Message": "no"} | ({"Condition": condition} if condition else {})
        raise translate_boto_error(ClientError({"Error": details}, "PutObject"))

    monkeypatch.setattr(fs, "pipe_file", refuse)
    monkeypatch.setattr(storage, "CONFLICT_WAITS_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(patience, "SECONDS", 0.0)
    if outcome == "raised":
        with pytest.raises((OSError, patience.StoreDown), match="no"):
            storage.put_if_absent(path, b"mine")
    else:
        assert not storage.put_if_absent(path, b"mine")
    assert len(calls) == tries


def test_a_conflict_that_ends_is_tried_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, _ = storage.filesystem(bucket)
    real, calls = fs.pipe_file, []

    def conflicts_once(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            details = {"Code": "ConditionalRequestConflict", "Message": "two at once"}
            raise translate_boto_error(ClientError({"Error": details}, "PutObject"))
        real(*args, **kwargs)

    monkeypatch.setattr(fs, "pipe_file", conflicts_once)
    monkeypatch.setattr(storage, "CONFLICT_WAITS_SECONDS", (0.0,))
    assert storage.put_if_absent(f"{bucket}/unit", b"mine")
    assert len(calls) == 2


def test_what_is_removed_before_it_can_be_read_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "running.json")
    storage.write_atomic(path, b"theirs")
    real = os.link

    def link_then_removed(source: str, target: str) -> None:
        try:
            real(source, target)
        except FileExistsError:
            os.unlink(target)
            raise

    monkeypatch.setattr(os, "link", link_then_removed)
    assert not storage.put_if_absent(path, b"mine")


# --- a store with faults ---------------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits, and no tries of the client's own: each fault meets the code under test."""
    monkeypatch.setattr(patience, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(patience, "LONGEST_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(patience, "CLIENT_RETRIES", {"total_max_attempts": 1, "mode": "standard"})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, hasty: None) -> None:
    """The control: nothing is tried again."""
    monkeypatch.setattr(patience, "SECONDS", 0.0)


def everything(uri: str) -> None:
    """Every operation once or more; fails when one does not do its work."""
    big = os.urandom(300_000)
    for name in ("a", "b", "folder/c"):
        storage.write_atomic(f"{uri}/{name}", big)
    assert storage.put_if_absent(f"{uri}/once", b"mine")
    assert not storage.put_if_absent(f"{uri}/once", b"theirs")
    assert storage.exists(f"{uri}/a")
    assert not storage.exists(f"{uri}/none")
    assert storage.is_file(f"{uri}/a")
    assert not storage.is_file(f"{uri}/folder")
    assert storage.is_directory(f"{uri}/folder")
    assert storage.size(f"{uri}/a") == len(big)
    assert storage.read_bytes(f"{uri}/a") == big
    assert storage.read_bytes(f"{uri}/a", 5, 250_000) == big[5:250_000]
    assert storage.names(uri) == ["a", "b", "folder", "once"]
    assert list(storage.glob(f"{uri}/*")) == [f"{uri}/{name}" for name in ("a", "b", "folder", "once")]
    assert len(list(storage.walk_files(uri))) == 4
    with storage.open_read(f"{uri}/a") as file:
        file.seek(200_000)
        assert file.read() == big[200_000:]
    assert storage.has_conditional_put(uri)
    storage.remove(f"{uri}/a")
    assert not storage.exists(f"{uri}/a")
    storage.remove_tree(uri)
    assert storage.names(uri) == []


# Every fifth: no operation here is more than four requests, so that a second try can always end well.
@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("fault", "every"), [("slow_down_every", 5), ("cut_every", 5), ("lose_put_reply_every", 2)])
def test_faults_that_pass_are_no_faults(bucket: str, faulty: FaultyStore, fault: str, every: int) -> None:
    setattr(faulty, fault, every)
    everything(bucket)
    assert faulty.faults[fault] >= 2


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("fault", "every"), [("slow_down_every", 5), ("cut_every", 5), ("lose_put_reply_every", 1)])
def test_without_patience_they_are(bucket: str, faulty: FaultyStore, fault: str, every: int) -> None:
    """The control of the test above. (aiohttp repeats a PUT once whose connection was closed without a word.)"""
    setattr(faulty, fault, every)
    with pytest.raises(patience.StoreDown):
        everything(bucket)


@pytest.mark.usefixtures("hasty")
def test_a_file_that_is_open_reads_on(bucket: str, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_atomic(f"{bucket}/a", bytes(1000))
    with storage.open_read(f"{bucket}/a") as file:
        file.cache.fetcher(0, 1)
        faulty.down_for(0.3)
        assert file.read() == bytes(1000)
        faulty.down_for(60)
        monkeypatch.setattr(patience, "SECONDS", 0.1)
        with pytest.raises(patience.StoreDown):
            file.cache.fetcher(0, 1)


@pytest.mark.usefixtures("hasty")
def test_folders_are_uploaded_whole(bucket: str, faulty: FaultyStore, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    faulty.slow_down_every = faulty.lose_put_reply_every = 5
    storage.upload(str(tmp_path), f"{bucket}/up")
    assert [path for path, _ in storage.walk_files(f"{bucket}/up")] == [f"{bucket}/up/{name}" for name in "abc"]


def test_sixteen_threads_outlive_a_store_that_is_down_for_five_seconds(bucket: str, faulty: FaultyStore) -> None:
    """With the waits that a job has. None is lost, and none comes twice."""
    storage.write_atomic(f"{bucket}/warm", b"1")
    faulty.down_for(5)
    start, down = time.monotonic(), []

    def one(number: int) -> bool:
        assert storage.put_if_absent(f"{bucket}/{number}", b"%d" % number)
        down.append(time.monotonic() - start)
        return storage.read_bytes(f"{bucket}/{number}") == b"%d" % number

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(16)))
    assert min(down) > 4.9
    assert max(down) < 45
    assert len(storage.names(bucket)) == 17


def test_a_store_that_is_down_for_good_is_named(bucket: str, faulty: FaultyStore, monkeypatch: Any) -> None:
    """With the tries of the client and a shorter time: the last try ends soon after it."""
    monkeypatch.setattr(patience, "SECONDS", 2.0)
    faulty.down_for(600)
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        storage.names(bucket)
    assert 2 <= time.monotonic() - started < 8
    message = str(caught.value)
    assert message.startswith(f"{bucket}: the store at {faulty.url} did not do its work in ")
    assert "test" not in message.replace("latest", ""), "the keys of this store"
    assert "?" not in message, "a query may hold a signature"
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), UserError)


def test_nobody_listens(faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(patience, "SECONDS", 1.0)
    with pytest.raises(UserError, match=f"the store at http://127.0.0.1:{port} .*EndpointConnectionError"):
        storage.exists("s3://clipdist/x")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "InvalidAccessKeyId", PermissionError),
        (403, "SignatureDoesNotMatch", PermissionError),
        (400, "ExpiredToken", PermissionError),
        (403, "AccessDenied", PermissionError),
        (404, "NoSuchBucket", FileNotFoundError),
        (404, "NoSuchKey", FileNotFoundError),
        (501, "NotImplemented", OSError),
    ],
)
def test_what_does_not_pass_fails_at_once(bucket: str, faulty: FaultyStore, status: int, code: str, kind: Any) -> None:
    faulty.refuse = (status, code)
    for operation, expected, tries in (
        (lambda: storage.read_bytes(f"{bucket}/a", 0, 5), kind, 1),
        (lambda: storage.write_atomic(f"{bucket}/a", b"1"), kind, 1),
        (lambda: storage.size(f"{bucket}/a"), OSError, 2),  # the answer to a HEAD names no code; then: is it a folder
    ):
        faulty.forget()
        with pytest.raises(expected):
            operation()
        assert faulty.requests.total() <= tries


def test_without_credentials_nothing_is_tried_again(bucket: str, faulty: FaultyStore, monkeypatch: Any) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match=f"{bucket}/a: no credentials .*set AWS_ACCESS_KEY_ID"):
        storage.read_bytes(f"{bucket}/a")
    assert faulty.requests.total() == 0


@pytest.mark.usefixtures("hasty")
def test_denials_are_tried_again_only_where_it_is_asked_for(bucket: str, faulty: FaultyStore) -> None:
    storage.write_atomic(f"{bucket}/a", b"1")
    faulty.deny_every = 1
    with pytest.raises(PermissionError), patience.at_most(20, denials=2):
        storage.read_bytes(f"{bucket}/a", 0, 5)
    assert faulty.requests["GET"] == 3
    faulty.deny_every = 2
    with patience.at_most(20, denials=1):
        for _ in range(3):
            assert storage.read_bytes(f"{bucket}/a", 0, 5) == b"1"
    assert faulty.faults["deny_every"] == 3 + 3


def test_a_limit_counts_for_all_that_a_block_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise ConnectionRefusedError("no")

    monkeypatch.setattr(patience, "FIRST_WAIT_SECONDS", 0.05)
    started = time.monotonic()
    with patience.at_most(0.5), patience.at_most(60):
        for _ in range(3):
            with pytest.raises(patience.StoreDown):
                patience.patiently(None, "x", refused)
    assert 0.5 <= time.monotonic() - started < 1
    assert patience.limit() is None


def test_what_cannot_be_a_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert storage.is_file(str(tmp_path / "a"))
    for name in ("none", "a/inside", "x" * 300, ""):
        assert not storage.is_file(f"{tmp_path}/{name}")


def test_a_disk_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        raise TimeoutError("a network file system")

    calls: list[Any] = []
    monkeypatch.setattr(type(storage.filesystem(str(tmp_path))[0]), "cat_file", refused)
    with pytest.raises(TimeoutError):
        storage.read_bytes(str(tmp_path / "a"))
    assert len(calls) == 1


# --- stores without a conditional PUT --------------------------------------------------------------------------------

LACKING = [(501, "NotImplemented"), (400, "NotImplemented"), (400, "InvalidArgument"), None]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("answer", LACKING)
def test_put_if_absent_does_without(bucket: str, faulty: FaultyStore, answer: tuple[int, str] | None) -> None:
    faulty.lacks_conditions, faulty.ignores_conditions = answer, answer is None
    assert not storage.has_conditional_put(bucket)
    assert storage.names(bucket) == []
    assert storage.filesystem(bucket)[0].find(bucket) == [], "the probe is gone"
    faulty.lose_put_reply_every = 2
    for unit in range(3):
        assert storage.put_if_absent(f"{bucket}/{unit}", b"first")
        assert not storage.put_if_absent(f"{bucket}/{unit}", b"second")
        assert storage.read_bytes(f"{bucket}/{unit}") == b"first"
    assert faulty.faults["lose_put_reply_every"]


def test_without_a_look_first_a_store_that_ignores_the_condition_writes_over(bucket: str, faulty: FaultyStore) -> None:
    """The control of the test above."""
    faulty.ignores_conditions = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_is_there", lambda *of: False)
        assert storage.put_if_absent(f"{bucket}/unit", b"first")
        assert storage.put_if_absent(f"{bucket}/unit", b"second")


def test_of_two_that_write_at_once_the_one_written_over_sees_it(bucket: str, faulty: FaultyStore) -> None:
    """Without a conditional PUT: the other's write arrives between ours and our look."""
    faulty.lacks_conditions = (501, "NotImplemented")
    fs, _ = storage.filesystem(f"{bucket}/unit")
    real = fs.pipe_file

    def and_another(path: str, data: bytes, **options: Any) -> None:
        real(path, data, **options)
        real(path, b"theirs")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs, "pipe_file", and_another)
        assert not storage.put_if_absent(f"{bucket}/unit", b"mine")


def test_a_conditional_put_is_two_requests(bucket: str, faulty: FaultyStore) -> None:
    storage.put_if_absent(f"{bucket}/warm", b"1")
    faulty.forget()
    assert storage.put_if_absent(f"{bucket}/unit", b"first")
    assert faulty.requests == {"HEAD": 1, "PUT": 1}
    assert storage.has_conditional_put(bucket)


def test_other_stores_have_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a disk nor S3: here fsspec's store in memory."""
    uri = f"memory://{uuid.uuid4().hex}"
    assert not storage.has_conditional_put(uri)
    assert storage.put_if_absent(f"{uri}/unit", b"first")
    assert storage.put_if_absent(f"{uri}/unit", b"first")
    assert not storage.put_if_absent(f"{uri}/unit", b"second")


@pytest.mark.parametrize("move", ["replace", "link"])
def test_a_file_that_a_sweep_takes_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: str) -> None:
    """Another process takes a living writer's temporary file for what a killed one left: before the move, and after."""
    real, moments = getattr(os, move), iter(["before", "before", "after"])

    def swept(source: str, target: str) -> None:
        moment = next(moments)
        if moment == "before":
            storage.remove_temporaries(str(tmp_path))
        real(source, target)
        storage.remove_temporaries(str(tmp_path))

    monkeypatch.setattr(os, move, swept)
    path = str(tmp_path / "folder" / "file")
    if move == "replace":
        storage.write_atomic(path, b"whole")
    else:
        assert storage.put_if_absent(path, b"whole")
    assert storage.read_bytes(path) == b"whole"
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["file"]
