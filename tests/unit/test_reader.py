"""Rows of a split: streamed as the files hold them, tables side by side, in bounded memory and a bounded cache."""

import errno
import gc
import io
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdist import reader, storage
from clipdist.lanes import EpochOrder
from clipdist.reader import LocalCache, RowGroups, Rows

SIZES = (5, 1, 7, 3, 9, 2, 4)


def write(folder: str, column: str, sizes: tuple[int, ...] = SIZES, per_file: int = 3, payload: int = 1) -> RowGroups:
    """A table of row groups of `sizes`, a few per file; the values tell group and row."""
    files, indices = [], []
    for start in range(0, len(sizes), per_file):
        buffer, path = io.BytesIO(), storage.join(folder, f"{column}-{start:03d}.parquet")
        with pq.ParquetWriter(buffer, pa.schema([(column, pa.string()), ("unread", pa.int64())])) as writer:
            for index, size in enumerate(sizes[start : start + per_file]):
                values = [f"{column}-{start + index}-{row}-" + "x" * payload for row in range(size)]
                writer.write_table(pa.table({column: values, "unread": list(range(size))}), row_group_size=size)
                files.append(path)
                indices.append(index)
        storage.write_atomic(path, buffer.getvalue())
    return RowGroups(tuple(files), tuple(indices), sizes, (column,))


def everything(rows: Rows, order: EpochOrder, start: int = 0, by: int = 4) -> list[list[dict[str, Any]]]:
    """The rows of every lane from row `start` on, taken `by` rows at a time."""
    found = []
    for lane, length in enumerate(order.lengths):
        open_lane, taken = rows.lane(order, lane, min(start, int(length))), []
        for stop in range(min(start, int(length)), int(length) + by, by):
            taken += [row for part in open_lane.take(min(stop, int(length))) for row in part.to_pylist()]
        found.append(taken)
    return found


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_epoch_gives_what_the_files_hold_every_row_once(tmp_path: Path, in_memory: bool) -> None:
    groups = write(str(tmp_path), "name")
    rows = Rows([groups], in_memory=in_memory)
    assert len(rows) == sum(SIZES)
    found = [row for lane in everything(rows, EpochOrder(rows.sizes, 3, 0, 0, 0)) for row in lane]
    expected = [row for path in sorted(set(groups.files)) for row in pq.read_table(path, columns=["name"]).to_pylist()]
    assert found != expected, "another order"
    assert sorted(row["name"] for row in found) == sorted(row["name"] for row in expected)
    rows.close()


def test_a_streamed_lane_is_its_groups_one_after_the_other_each_shuffled(tmp_path: Path) -> None:
    rows = Rows([write(str(tmp_path), "name")], in_memory=False)
    order = EpochOrder(rows.sizes, 3, 0, 0, 0)
    for lane, found in enumerate(everything(rows, order)):
        expected = [f"name-{group}-{row}-x" for group in order.groups[lane] for row in order.shuffled(int(group))]
        assert [row["name"] for row in found] == expected
    rows.close()


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("lanes", [2, 3, 20])
def test_a_lane_can_start_anywhere(tmp_path: Path, in_memory: bool, lanes: int) -> None:
    rows = Rows([write(str(tmp_path), "name")], in_memory=in_memory)
    order = EpochOrder(rows.sizes, lanes, 0, 0, 0)
    whole = everything(rows, order)
    for start in range(int(order.lengths.max()) + 1):
        for by in (1, 5, 100):
            assert everything(rows, order, start, by) == [lane[start:] for lane in whole]
    rows.close()


@pytest.mark.parametrize("in_memory", [False, True])
def test_tables_stand_side_by_side_row_by_row(tmp_path: Path, in_memory: bool) -> None:
    tables = [write(str(tmp_path), "name"), write(str(tmp_path), "output", per_file=2)]
    rows = Rows(tables, in_memory=in_memory)
    for lane in everything(rows, EpochOrder(rows.sizes, 3, 0, 0, 0)):
        for row in lane:
            assert list(row) == ["name", "output"]
            assert row["name"].replace("name", "output") == row["output"]
    rows.close()


def test_read_ahead_keeps_the_order(tmp_path: Path) -> None:
    groups = write(str(tmp_path), "name")
    chosen = [4, 0, 6, 1, 5]
    found = list(groups.read_ahead(chosen, ahead=2))
    assert [group for group, _ in found] == chosen
    assert [table.column("name")[0].as_py() for _, table in found] == [f"name-{group}-0-x" for group in chosen]
    assert list(groups.read_ahead([])) == []


def _count_alive(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many tables that were read are alive, and the most at any time."""
    real, lock, count = RowGroups.read, threading.Lock(), {"now": 0, "most": 0, "read": 0}

    def ended() -> None:
        with lock:
            count["now"] -= 1

    def read(self: RowGroups, group: int) -> pa.Table:
        table = real(self, group)
        with lock:
            count["now"] += 1
            count["read"] += 1
            count["most"] = max(count["most"], count["now"])
        weakref.finalize(table, ended)
        return table

    monkeypatch.setattr(RowGroups, "read", read)
    return count


def test_memory_is_two_row_groups_per_lane_however_long_the_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, lanes = _count_alive(monkeypatch), 12
    rows = Rows([write(str(tmp_path), "name", sizes=(8,) * 120, per_file=20)], in_memory=False)
    order = EpochOrder(rows.sizes, lanes, 0, 0, 0)
    opened, held = [rows.lane(order, lane, 0) for lane in range(lanes)], 0
    for stop in range(1, int(order.lengths.max()) + 1):
        parts = [part for lane in opened for part in lane.take(stop)]
        held = max(held, sum(lane.table is not None for lane in opened))  # type: ignore[attr-defined]
        del parts
        gc.collect(0)
    assert count["read"] == 120
    assert held == lanes, "of each lane the group that it is in, shuffled"
    slack = 1 + reader.READ_THREADS  # one is being shuffled; a thread may be slow to let go of what it has read
    assert count["most"] <= lanes + slack < 2 * lanes, "and the next one as it was read"
    rows.close()


def test_few_rows_are_read_once_and_dealt_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = _count_alive(monkeypatch)
    rows = Rows([write(str(tmp_path), "name")], in_memory=True)
    assert (rows.sizes == 1).all()
    for epoch in range(3):
        everything(rows, EpochOrder(rows.sizes, 3, 0, 0, epoch))
    assert count["read"] == len(SIZES)
    rows.close()


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_a_cache_serves_what_it_keeps_up_to_its_size(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = write(str(tmp_path), "name", sizes=(10,) * 12, payload=2000)
    size = groups.read(0).nbytes
    count, cache = _count_alive(monkeypatch), LocalCache("pairs", 5 * size + size // 2)
    for _ in range(2):
        for group in range(12):
            assert cache.read(groups, group).column("name")[3].as_py() == f"name-{group}-3-" + "x" * 2000
    kept = list(cache.folder.iterdir())
    assert len(kept) == 5
    assert sum(path.stat().st_size for path in kept) < 6 * size
    assert count["read"] == 12 + 7, "what came first stays"
    another = RowGroups(groups.files, groups.indices, groups.rows, ("unread",))
    assert cache.read(another, 0).column_names == ["unread"], "other columns are another thing"
    cache.close()
    assert list(cache_folder.iterdir()) == []


def test_processes_of_a_machine_share_a_cache(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = write(str(tmp_path), "name")
    first, second = LocalCache("pairs", 2**20), LocalCache("pairs", 2**20)
    expected = [first.read(groups, group) for group in range(len(groups))]
    count = _count_alive(monkeypatch)
    assert [second.read(groups, group) for group in range(len(groups))] == expected
    assert count["read"] == 0
    first.close()
    for _ in range(2):
        assert [second.read(groups, group) for group in range(len(groups))] == expected, "another one may have ended"
    assert count["read"] == len(groups), "kept again"
    assert LocalCache("others", 2**20).folder != first.folder


def test_a_full_disk_ends_the_cache_and_nothing_else(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, cache = write(str(tmp_path), "name"), LocalCache("pairs", 2**20)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa.ipc, "new_file", full)
    for group in range(len(groups)):
        assert cache.read(groups, group) == groups.read(group)
    assert cache.free_bytes == 0
    assert list(cache.folder.iterdir()) == [], "no half file stays"


def test_a_folder_of_somebody_else_is_not_written_to(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LocalCache("pairs", 100).free_bytes == 100
    user = reader.os.getuid()
    calls = iter([user, user + 1])  # the name of the folder, then the comparison with its owner
    monkeypatch.setattr(reader.os, "getuid", lambda: next(calls))
    assert LocalCache("pairs", 100).free_bytes == 0


def test_from_s3_every_group_is_fetched_once_when_the_cache_holds_them_all(
    bucket: str, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = [write(bucket, "name"), write(bucket, "output")]
    count, rows = _count_alive(monkeypatch), Rows(tables, in_memory=False, cache_bytes=2**20)
    for epoch in range(3):
        found = everything(rows, EpochOrder(rows.sizes, 2, 0, 0, epoch))
        assert len({row["name"] for lane in found for row in lane}) == sum(SIZES)
    assert count["read"] == 2 * len(SIZES)
    rows.close()
    assert list(cache_folder.iterdir()) == []


@pytest.mark.parametrize(("where", "options"), [("disk", {"cache_bytes": 2**20}), ("s3", {})])
def test_no_cache_on_a_disk_or_without_room(
    where: str, options: dict[str, int], tmp_path: Path, cache_folder: Path, request: pytest.FixtureRequest
) -> None:
    folder = str(tmp_path / "data") if where == "disk" else request.getfixturevalue("bucket")
    rows = Rows([write(folder, "name")], in_memory=False, **options)
    assert len(rows.read(4)) == 9
    assert list(cache_folder.iterdir()) == []
    rows.close()


def test_sizes_are_those_of_the_groups(tmp_path: Path) -> None:
    rows = Rows([write(str(tmp_path), "name")], in_memory=False)
    assert rows.sizes.tolist() == list(SIZES)
    assert rows.sizes.dtype == np.int64
    rows.close()
