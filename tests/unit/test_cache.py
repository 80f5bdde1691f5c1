"""The cache: bounded, shared by threads and processes, and never in the way of an answer."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipdist import cache as caches
from clipdist import shard_reader
from clipdist.cache import DiskCache, default_cache
from clipdist.manifest import read_manifest
from clipdist.search import Index
from clipdist.shards import Shards
from tests.faulty_store import FaultyStore
from tests.unit.some_shards import some_vectors, write_embeddings

PARTS = [some_vectors(rows, 16, seed) for seed, rows in enumerate((50, 1, 80, 300))]
QUERIES = some_vectors(5, 16, 9, "float32")


def fill(size: int, letter: bytes = b"x") -> Callable[[], bytes]:
    return lambda: letter * size


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache, made = DiskCache(tmp_path / "cache", 1000), []

    def get(key: str) -> None:
        cache.entry(key, 300, lambda: made.append(key) or b"x" * 300)  # type: ignore[func-returns-value]
        time.sleep(0.02)

    for key in ("a", "b", "c", "a", "d", "a", "d", "c"):
        get(key)
    assert made == ["a", "b", "c", "d"]
    assert cache.size_bytes() <= 1000
    get("b")
    assert made == ["a", "b", "c", "d", "b"]
    assert cache.find("a") is None, "it was used before d and c"
    assert cache.find("d") is not None


def test_too_large_unwritable_and_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DiskCache(tmp_path / "small", 10).entry("key", 11, fill(11)).tobytes() == b"x" * 11
    (tmp_path / "file").write_text("no folder")
    assert DiskCache(tmp_path / "file", 1000).entry("key", 11, fill(11)).tobytes() == b"x" * 11
    monkeypatch.setattr(caches, "_LEFT_FREE", 1 << 60)
    full = DiskCache(tmp_path / "full", 1000)
    assert full.entry("key", 11, fill(11)).tobytes() == b"x" * 11
    assert full.size_bytes() == 0


def test_a_folder_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path, 1000)
    cache.entry("key", 4, fill(4))
    assert cache.find("key") is not None
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert cache.entry("key", 4, fill(4, b"y")).tobytes() == b"yyyy"


def test_a_fault_of_whoever_makes_it_is_told(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)

    def fails() -> bytes:
        raise OSError("the store is down")

    with pytest.raises(OSError, match="the store is down"):
        cache.entry("key", 4, fails)
    assert cache.entry("key", 4, fill(4)).tobytes() == b"xxxx"
    assert cache.find("key") is not None


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    cache.entry("key", 8, fill(8))
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"x")
    assert cache.entry("key", 8, fill(8)).tobytes() == b"x" * 8
    assert path.read_bytes() == b"x" * 8


def test_threads_make_it_once(tmp_path: Path) -> None:
    cache, made = DiskCache(tmp_path, 1 << 20), []

    def make() -> bytes:
        made.append(1)
        time.sleep(0.05)
        return b"x" * 100

    threads = [threading.Thread(target=lambda: cache.entry("key", 100, make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert pickle.loads(pickle.dumps(cache)).find("key", 100) is not None


def test_processes_do_not_disturb_each_other(tmp_path: Path) -> None:
    """They make, evict and read the same few files; each reads only whole ones."""
    code = f"""
import random
from pathlib import Path
from clipdist.cache import DiskCache
cache = DiskCache(Path({str(tmp_path)!r}), 5000)
for number in range(300):
    key = random.randrange(12)
    data = bytes([key]) * 1000
    assert cache.entry(str(key), 1000, lambda: data).tobytes() == data  # whatever another process removes
"""
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert not list(tmp_path.glob("*.tmp"))


def test_files_that_nobody_finished_go(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 1000)
    for name, age in (("old.tmp", 2e5), ("new.tmp", 5.0)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cache.entry("key", 5, fill(5))
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == ["new.tmp"]


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache().folder == tmp_path / "xdg" / "clipdist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache(2).folder == tmp_path / "home" / ".cache" / "clipdist"
    assert default_cache(2).limit_bytes == 2 << 30


# --- Shards of a store -----------------------------------------------------------------------------------------------


@pytest.fixture
def table(faulty: FaultyStore, s3_bucket: str, request: pytest.FixtureRequest) -> str:
    """An embeddings artefact on a store that counts requests."""
    uri = f"{s3_bucket}/cache/{request.node.name}"
    write_embeddings(uri, PARTS)
    return uri


def everything(shards: Shards) -> list[Any]:
    rows = np.array([5, 400, 0, 130, 5])
    found = [shards.matrix(), shards.vectors(rows), shards.take(rows, ["id", "price"]), shards.columns(["caption"])]
    return [value if isinstance(value, np.ndarray) else value.to_pydict() for value in found]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_equal(ours, theirs)


def test_a_second_reader_asks_the_store_for_nothing(
    table: str, tmp_path: Path, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "_APART", 2)  # so that single rows are read too
    expected = everything(write_embeddings(str(tmp_path / "local"), PARTS))
    manifest = read_manifest(table, "embeddings")
    for cache in (None, DiskCache(tmp_path / "none", 10)):  # streamed
        assert_same(everything(Shards(manifest, "images", cache)), expected)
    cache = DiskCache(tmp_path / "cache", 1 << 20)
    assert_same(everything(Shards(manifest, "images", cache)), expected)
    faulty.forget()
    assert_same(everything(Shards(manifest, "images", cache)), expected)
    assert sum(faulty.requests.values()) == 0
    everything(Shards(manifest, "images"))  # the control: without it the store is asked
    assert faulty.requests["GET"] > 5


def test_few_rows_are_read_one_by_one(table: str, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "_APART", 2)
    shards = Shards(read_manifest(table, "embeddings"), "images")
    faulty.forget()
    rows = np.array([200, 430, 200])
    found = shards.vectors(rows)
    np.testing.assert_array_equal(found, np.concatenate(PARTS)[rows])
    assert faulty.requests["GET"] == 2
    assert faulty.bytes_out < 2000


def test_searches_of_a_store_and_of_a_disk_agree(table: str, tmp_path: Path, faulty: FaultyStore) -> None:
    local = Index(write_embeddings(str(tmp_path / "local"), PARTS))
    cache = DiskCache(tmp_path / "cache", 1 << 20)
    expected = local.search(QUERIES, 7, "price < 60")
    for _ in range(2):
        index = Index.open(table, cache=cache)
        found = index.search(QUERIES, 7, "price < 60")
        assert (found.ids, [scores.tolist() for scores in found.scores]) == (
            [list(ids) for ids in expected.ids],
            [scores.tolist() for scores in expected.scores],
        )
    faulty.forget()
    index.search(QUERIES, 7, "price < 60")
    assert sum(faulty.requests.values()) == 0


def test_a_killed_warm_goes_on_where_it_was(table: str, tmp_path: Path, faulty: FaultyStore) -> None:
    manifest, cache = read_manifest(table, "embeddings"), DiskCache(tmp_path / "cache", 1 << 20)
    code = f"""
from pathlib import Path
from clipdist import shard_reader
from clipdist.cache import DiskCache
from clipdist.search import Index
shard_reader.READ_AHEAD = 1
Index.open({table!r}, cache=DiskCache(Path({str(cache.folder)!r}), 1 << 20)).shards.warm()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while process.poll() is None and cache.size_bytes() == 0:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # until the store has counted what it asked for last
    shards = Shards(manifest, "images", cache)
    there = sum(shards.reader._is_here(group) for group in shards.row_groups)
    assert there >= 1
    faulty.forget()
    read = [group.index for group in shards.row_groups if not shards.reader._is_here(group)]
    for _ in shards.blocks():
        pass
    assert faulty.requests["GET"] == len(read) == len(PARTS) - there
    shards.warm()
    faulty.forget()
    shards.warm()
    assert sum(faulty.requests.values()) == 0


def test_a_store_with_faults(table: str, tmp_path: Path, faulty: FaultyStore) -> None:
    expected = everything(write_embeddings(str(tmp_path / "local"), PARTS))
    faulty.slow_down_every, faulty.cut_every = 3, 4
    assert_same(
        everything(Shards(read_manifest(table, "embeddings"), "images", DiskCache(tmp_path / "c", 1 << 20))), expected
    )
    assert faulty.faults


def test_a_table_that_is_larger_than_the_cache_keeps_the_same_part(
    table: str, tmp_path: Path, faulty: FaultyStore
) -> None:
    shards = Shards(read_manifest(table, "embeddings"), "images", DiskCache(tmp_path / "cache", 8000))
    expected = np.concatenate(PARTS)
    asked = []
    for _ in range(3):
        faulty.forget()
        np.testing.assert_array_equal(shards.matrix(), expected)
        asked.append(faulty.requests["GET"])
    assert asked[0] == len(PARTS)
    assert asked[1] == asked[2] == 1, "the largest row group is streamed, the others are kept"
