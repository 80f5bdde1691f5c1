"""read_picture: the bytes from every kind of place, or a BadImage with the reason, whatever the row says."""

import io
import os
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdist import fetch, pictures, storage
from clipdist.images import BadImage
from clipdist.pictures import read_picture
from clipdist.sources import SourceConfig, open_source

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
    assert bad(str(tmp_path / "a.jpg")).reason == "unreadable"
