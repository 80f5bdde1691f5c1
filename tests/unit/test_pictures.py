"""read_picture: the bytes from every kind of place, or a BadImage with the reason, whatever the row says."""

import io
import os
import pickle
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdist import fetch, patience, pictures, storage
from clipdist.images import BadImage
from clipdist.pictures import read_picture
from clipdist.sources import SourceConfig, open_source
from tests.faulty_store import FaultyStore

NAMES = [
    "plain.jpg", "with space.jpg", "a#b.jpg", "a#bytes=1.jpg", "100%.jpg", "a%20b.jpg", "q?x=1&y.jpg", "한글 사진.jpg",
    "é.jpg", "[1].jpg", "a*b.jpg", "a::b.jpg", "a'b\".jpg", "~.jpg", "back\\slash.jpg", "no_extension", "a+b.jpg",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    pictures._row_group.cache_clear()


def bad(uri: str | None, **settings: Any) -> BadImage:
    with pytest.raises(BadImage) as caught:
        read_picture(uri, **settings)
    return caught.value


@pytest.mark.parametrize("name", NAMES)
def test_files_of_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(name.encode())
    assert read_picture(f"{tmp_path}/{name}") == name.encode()


def test_objects_of_any_name(bucket: str) -> None:
    for name in NAMES:
        storage.write_atomic(f"{bucket}/{name}", name.encode())
        assert read_picture(f"{bucket}/{name}") == name.encode()
    assert bad(f"{bucket}/none.jpg").reason == "missing"
    storage.write_atomic(f"{bucket}/empty.jpg", b"")
    assert read_picture(f"{bucket}/empty.jpg") == b""
    assert bad(f"{bucket}/plain.jpg", max_image_bytes=3).reason == "too_many_bytes"


@pytest.mark.parametrize("folder", ["plain", "한 글 #1"])
def test_members_of_a_tar(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "t.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in (("1.jpg", b"first"), ("2.jpg", b""), ("3.jpg", b"third" * 1000)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    uris = [row["image_uri"] for row in open_source(SourceConfig(path=str(path))).rows()]
    assert [read_picture(uri) for uri in uris] == [b"first", b"", b"third" * 1000]
    assert bad(uris[2], max_image_bytes=4999).reason == "too_many_bytes"
    path.unlink()
    assert bad(uris[0]).reason == "missing"


@pytest.mark.parametrize(
    "form",
    [
        lambda data: pa.array(data, pa.binary()),
        lambda data: pa.array(data, pa.large_binary()),
        lambda data: pa.array([{"bytes": one, "path": "p"} for one in data]),
        lambda data: pa.array([None if one is None else {"path": "p", "bytes": one} for one in data]),
    ],
)
@pytest.mark.parametrize("column", ["image", "main.picture"])
def test_rows_of_a_parquet_file(tmp_path: Path, form: Callable[[Any], pa.Array], column: str) -> None:
    data = [b"one", b"two", None, b"", b"five" * 100]
    path = tmp_path / "t 1#.parquet"
    pq.write_table(pa.table({column: form(data), "id": list("abcde")}), path, row_group_size=2)
    uris = [row["image_uri"] for row in open_source(SourceConfig(path=str(path), image_column=column)).rows()]
    found = [read_picture(uri) for uri, one in zip(uris, data, strict=True) if one is not None]
    assert found == [one for one in data if one is not None]
    assert bad(uris[2]).reason == "missing"
    assert bad(uris[4], max_image_bytes=399).reason == "too_many_bytes"
    assert bad(uris[4].replace("#row=2:0", "#row=2:9")).reason == "unreadable"
    assert bad(uris[4].replace("#row=2:", "#row=9:")).reason == "unreadable"


def test_threads_read_a_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [b"%d" % n for n in range(64)]}), path)
    real, reads, start = storage.open_read, [], threading.Barrier(8)

    def counted(opened: str) -> Any:
        reads.append(opened)
        return real(opened)

    def read(n: int) -> bytes:
        if n < 8:
            start.wait()
        return read_picture(f"{path}#row=0:{n}:image")

    monkeypatch.setattr(storage, "open_read", counted)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(64))) == [b"%d" % n for n in range(64)]
    assert len(reads) == 1


def test_urls_go_through_the_safe_client(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(url: str, **settings: Any) -> bytes:
        asked.append((url, settings))
        if "gone" in url:
            raise fetch.FetchError("not_found", "404")
        return b"body"

    monkeypatch.setattr(pictures, "fetch", fake)
    assert read_picture("https://host/a b.jpg#x", max_image_bytes=7) == b"body"
    assert read_picture("HTTP://host/a.jpg", allow_private_hosts=True) == b"body"
    assert asked[0] == ("https://host/a b.jpg#x", {"max_bytes": 7, "allow_private_hosts": False})
    assert asked[1][1]["allow_private_hosts"] is True
    assert bad("https://host/gone.jpg").reason == "fetch_not_found"


def test_private_hosts_are_refused() -> None:
    assert bad("http://127.0.0.1:9/a.jpg").reason.startswith("fetch_")


@pytest.mark.parametrize(
    "uri",
    [
        "simplecache::http://127.0.0.1:9/a.jpg", "filecache::https://127.0.0.1:9/a.jpg", "ftp://127.0.0.1:9/a.jpg",
        "github://a:b@main/x.jpg", "zip://a.jpg::http://127.0.0.1:9/x.zip", "memory://a.jpg", "file:///etc/hostname",
        "simplecache::http://127.0.0.1:9/x.tar#bytes=0+5", "ftp://127.0.0.1:9/x.parquet#row=0:0:image",
        "nonsense://x", "://", "webhdfs://127.0.0.1:9/x",
    ],
)  # fmt: skip
def test_a_row_cannot_reach_around_the_safe_client(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    opened = []

    def note(path: str) -> Any:
        opened.append(path)
        raise OSError("opened")

    monkeypatch.setattr(storage, "filesystem", note)
    assert bad(uri).reason == "unreadable"
    assert opened == []


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        (None, "missing"),
        ("", "missing"),
        ("{folder}/none.jpg", "missing"),
        ("{folder}", "missing"),
        ("{folder}/file/inside.jpg", "missing"),
        ("{folder}/\0.jpg", "unreadable"),
        ("{folder}/" + "x" * 300 + ".jpg", "unreadable"),
        ("{folder}/none.parquet#row=0:0:image", "missing"),
        ("{folder}/file#row=0:0:image", "unreadable"),
        ("{folder}/none.tar#bytes=0+5", "missing"),
        ("{folder}/loop", "unreadable"),
        ("gs://bucket/a.jpg", "unreadable"),
    ],
)
def test_what_cannot_be_read_is_one_rows_reject(tmp_path: Path, uri: str | None, reason: str) -> None:
    (tmp_path / "file").write_bytes(b"no parquet")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    error = bad(uri and uri.replace("{folder}", str(tmp_path)))
    assert error.reason == reason
    assert str(error)


def test_no_more_than_was_checked_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    assert read_picture(str(tmp_path / "a.jpg"), max_image_bytes=5) == b"12345"
    assert bad(str(tmp_path / "a.jpg"), max_image_bytes=4).reason == "too_many_bytes"
    assert read_picture("/dev/zero") == b""


def test_a_store_that_fails_is_a_reject_and_no_memory_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentials(Exception):
        """botocore's errors are not OSErrors."""

    def fails(error: Exception) -> Callable[..., Any]:
        def read(*args: Any) -> bytes:
            raise error

        return read

    (tmp_path / "a.jpg").write_bytes(b"x")
    monkeypatch.setattr(storage, "read_bytes", fails(NoCredentials("no keys")))
    assert "NoCredentials: no keys" in str(bad(str(tmp_path / "a.jpg")))
    monkeypatch.setattr(storage, "read_bytes", fails(MemoryError()))
    with pytest.raises(MemoryError):
        read_picture(str(tmp_path / "a.jpg"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "a.jpg").chmod(0)
    error = bad(str(tmp_path / "a.jpg"))
    assert (error.reason, error.transient) == ("denied", False)


def test_what_the_disk_denies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where root runs the tests."""

    def denied(*args: Any, **kwargs: Any) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.jpg").write_bytes(b"x")
    monkeypatch.setattr(storage, "read_bytes", denied)
    error = bad(str(tmp_path / "a.jpg"))
    assert (error.reason, error.transient) == ("denied", False)


# --- a store with faults ---------------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits, and no tries of the client's own."""
    monkeypatch.setattr(patience, "FIRST_WAIT_SECONDS", 0.005)
    monkeypatch.setattr(patience, "LONGEST_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(patience, "CLIENT_RETRIES", {"total_max_attempts": 1, "mode": "standard"})
    monkeypatch.setattr(pictures, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(pictures._denied, "in_vain", 0)
    monkeypatch.setattr(pictures, "_down_since", {})


def test_a_picture_is_one_request(bucket: str, faulty: FaultyStore) -> None:
    for name, data in (("a", b"12345"), ("empty", b"")):
        storage.write_atomic(f"{bucket}/{name}", data)
    faulty.forget()
    assert read_picture(f"{bucket}/a", max_image_bytes=5) == b"12345"
    assert faulty.requests == {"GET": 1}
    assert read_picture(f"{bucket}/empty") == b""
    assert bad(f"{bucket}/a", max_image_bytes=4).reason == "too_many_bytes"
    assert bad(f"{bucket}/none").reason == "missing"
    assert faulty.requests == {"GET": 4}


def test_no_more_of_an_object_is_read_than_may_be(bucket: str, faulty: FaultyStore) -> None:
    storage.write_atomic(f"{bucket}/large", bytes(5_000_000))
    faulty.forget()
    assert bad(f"{bucket}/large", max_image_bytes=1000).reason == "too_many_bytes"
    assert faulty.bytes_out == 1001


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("fault", ["slow_down_every", "cut_every", "deny_every"])
@pytest.mark.parametrize("patient", [True, False])
def test_no_picture_is_lost_to_faults_that_pass(
    bucket: str, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch, fault: str, patient: bool
) -> None:
    """Without patience (the control) some are."""
    for number in range(40):
        storage.write_atomic(f"{bucket}/{number}", b"%d" % number * 100)
    monkeypatch.setattr(pictures, "PATIENCE_SECONDS", 20.0 if patient else 0.0)
    monkeypatch.setattr(pictures, "DENIALS", 10)
    setattr(faulty, fault, 3)

    def read(number: int) -> bool | BadImage:
        try:
            return read_picture(f"{bucket}/{number}") == b"%d" % number * 100
        except BadImage as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(read, range(40)))
    lost = [one for one in found if isinstance(one, BadImage)]
    assert all(one is True for one in found) if patient else lost
    assert all(one.transient for one in lost)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("status", "code", "reason", "transient"),
    [
        (503, "SlowDown", "unreadable", True),
        (500, "InternalError", "unreadable", True),
        (403, "AccessDenied", "denied", True),
        (403, "InvalidAccessKeyId", "denied", False),
        (400, "InvalidArgument", "unreadable", False),
        (404, "NoSuchKey", "missing", False),
        (404, "NoSuchBucket", "missing", False),
    ],
)
def test_reasons_of_a_store(
    bucket: str, faulty: FaultyStore, status: int, code: str, reason: str, transient: bool
) -> None:
    faulty.refuse = (status, code)
    for uri in (f"{bucket}/a", f"{bucket}/a.tar#bytes=3+5"):
        error = pickle.loads(pickle.dumps(bad(uri)))
        assert (error.reason, error.transient) == (reason, transient)
    if not transient:
        assert faulty.requests == {"GET": 2}


@pytest.mark.usefixtures("hasty")
def test_a_bucket_that_is_closed_is_soon_believed(
    bucket: str, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "BELIEVED_AFTER", 2)
    monkeypatch.setattr(pictures, "PATIENCE_SECONDS", 20.0)
    faulty.refuse = (403, "AccessDenied")
    for expected in (3, 6, 7, 8):
        assert bad(f"{bucket}/a").reason == "denied"
        assert faulty.requests["GET"] == expected


@pytest.mark.usefixtures("hasty")
def test_a_store_that_is_down_for_good_is_not_waited_for_by_every_picture(
    bucket: str, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_atomic(f"{bucket}/a", b"a")
    monkeypatch.setattr(pictures, "OUTAGE_SECONDS", 2.5)
    faulty.refuse = (503, "SlowDown")

    def seconds() -> float:
        started = time.monotonic()
        assert bad(f"{bucket}/a").transient
        return time.monotonic() - started

    assert min(seconds(), seconds()) >= 1, "an outage that may pass is waited out"
    bad(f"{bucket}/a")
    faulty.forget()
    for asked in range(1, 9):
        bad(f"{bucket}/a")
        assert faulty.requests["GET"] == asked
    faulty.refuse = None
    assert read_picture(f"{bucket}/a") == b"a"
    faulty.refuse = (503, "SlowDown")
    assert seconds() >= 1, "it answered since"


@pytest.mark.usefixtures("hasty")
def test_rows_of_one_row_group_wait_together_for_a_store_that_is_down(
    bucket: str, faulty: FaultyStore, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"image": [b"%d" % n for n in range(16)]}), tmp_path / "t.parquet")
    storage.write_atomic(f"{bucket}/t.parquet", (tmp_path / "t.parquet").read_bytes())
    faulty.down_for(600)
    started = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        errors = list(pool.map(lambda n: bad(f"{bucket}/t.parquet#row=0:{n}:image"), range(16)))
    assert time.monotonic() - started < 10, "not sixteen times a second"
    assert {(error.reason, error.transient) for error in errors} == {("unreadable", True)}
    faulty.down_for(0)
    assert read_picture(f"{bucket}/t.parquet#row=0:7:image") == b"7"


@pytest.mark.parametrize("transient", [True, False])
def test_what_the_safe_client_calls_transient(monkeypatch: pytest.MonkeyPatch, transient: bool) -> None:
    def fake(url: str, **settings: Any) -> bytes:
        raise fetch.FetchError("http_status", "503", transient)

    monkeypatch.setattr(pictures, "fetch", fake)
    assert bad("https://host/a.jpg").transient is transient
