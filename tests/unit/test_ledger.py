"""The ledger: every planned row once, whoever is killed, runs twice, or comes too late."""

import io
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdist import ledger, storage
from clipdist.config import UserError
from clipdist.ledger import Ledger, begin, open_ledger
from clipdist.manifest import File, Manifest, read_manifest
from clipdist.retry import planned_row, retry_plan
from clipdist.schema import Stamp, recorded

ROOT = Path(__file__).parents[2]
Tables = dict[tuple[str, str | None], tuple[bytes, File]]
STAMP = Stamp("pairs", {"source": {"path": "/in"}, "rows": 4})
UNITS = 2
ROWS_PER_UNIT = 4


def plan() -> Iterable[pa.Table]:
    return (pa.table({"id": [f"{unit}-{row}" for row in range(ROWS_PER_UNIT)]}) for unit in range(UNITS))


def shard(ids: list[str], split: str | None = None) -> tuple[bytes, File]:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": ids}), buffer)
    return buffer.getvalue(), File("", "pairs", len(ids), (len(ids),), buffer.tell(), split)


def reject(row_id: str, table: str = "pairs") -> dict[str, Any]:
    row = planned_row(pa.table({"id": [row_id]}), 0)
    return {"id": row_id, "table": table, "uri": None, "reason": "missing", "message": "no such file", "row": row}


def commit(book: Ledger, unit: int, rejected: int = 1) -> bool:
    """Writes all rows of a unit but the last `rejected`, which become rejects."""
    ids = book.rows(unit).column("id").to_pylist()
    kept, lost = ids[: len(ids) - rejected], ids[len(ids) - rejected :]
    return book.commit(unit, {("pairs", None): shard(kept)}, {"pairs": len(ids)}, [reject(row) for row in lost])


def join(paths: Sequence[str], table: str, stamp: Stamp) -> tuple[bytes, File]:
    """Pieces -> one shard."""
    ids = [pq.read_table(io.BytesIO(storage.read_bytes(path))).column("id").to_pylist() for path in paths]
    return shard(list(itertools.chain(*ids)))


def run_job(uri: str, shard_units: int = 0) -> Manifest:
    """What a job does: open or go on, commit what is missing, join what is full, publish."""
    book = begin(uri, STAMP, plan, shard_units=shard_units)
    for unit in book.missing():
        commit(book, unit)
    for number in set(book.shards) - book.closed():
        book.join(number, join)
    return book.finished() or book.publish()


def ids_of(manifest: Manifest) -> tuple[list[str], list[str]]:
    """(ids written, ids rejected), sorted."""
    data = [storage.read_bytes(manifest.path(file)) for file in manifest.files]
    data += [storage.read_bytes(storage.join(manifest.uri, path)) for path in manifest.reject_files]
    ids = [pq.read_table(io.BytesIO(one)).column("id").to_pylist() for one in data]
    files = len(manifest.files)
    return sorted(itertools.chain(*ids[:files])), sorted(itertools.chain(*ids[files:]))


ALL_WRITTEN = ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
ALL_REJECTED = ["0-3", "1-3"]


def test_a_job_from_plan_to_manifest(place: str) -> None:
    made = run_job(place)
    read = read_manifest(place, "pairs")
    assert ids_of(read) == (ALL_WRITTEN, ALL_REJECTED)
    assert (read.files, read.planned, read.rejected) == (made.files, {"pairs": 8}, {"pairs": {"missing": 2}})
    assert read.written("pairs") == 6
    assert read.stamp == STAMP
    assert (read.number, read.plan) == (1, 1)
    assert read.select("pairs") == list(read.files)
    assert read.select("texts") == []


def test_a_rerun_finds_everything_done(place: str) -> None:
    first = run_job(place)
    before = list(storage.walk_files(place))
    again = begin(place, Stamp(STAMP.kind, STAMP.identity, recorded(note="later")), plan)
    assert again.committed() == {0, 1}
    assert run_job(place).files == first.files
    assert list(storage.walk_files(place)) == before


def test_another_stamp_is_refused_with_both_values(tmp_path: Path) -> None:
    begin(str(tmp_path), STAMP, plan)
    other = Stamp("embeddings", {"source": {"path": "/other"}, "rows": 4, "dim": 512}, schema_version=3)
    with pytest.raises(UserError) as caught:
        begin(str(tmp_path), other, plan)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}: made with other settings:"
    assert '  source.path: "/in" there, "/other" now' in lines
    assert '  kind: "pairs" there, "embeddings" now' in lines
    assert "  dim: nothing there, 512 now" in lines
    assert "  schema_version: 2 there, 3 now" in lines
    assert not any("rows" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("notes.txt", "notes.txt"),
        ("config.yaml", "config.yaml"),
        ("plan/notes.txt", "plan/notes.txt"),
        ("manifests/00000001.json", "manifests"),
        ("commits/000000.json", "commits"),
        ("pairs/x.parquet", "pairs"),
    ],
)
def test_a_folder_of_something_else_is_refused(place: str, name: str, told: str) -> None:
    storage.write_atomic(storage.join(place, name), b"{}")
    with pytest.raises(UserError, match=f"already holds {told}; choose an empty or new output"):
        begin(place, STAMP, plan)


def test_what_a_killed_start_leaves_is_no_hindrance(tmp_path: Path) -> None:
    for name in ("plan/0123/000000.arrows", "plan/.0.arrows.0123.tmp"):
        storage.write_atomic(str(tmp_path / name), b"half")
    assert ids_of(run_job(str(tmp_path))) == (ALL_WRITTEN, ALL_REJECTED)


def test_two_starts_share_the_plan_of_the_first(tmp_path: Path) -> None:
    def plan_while_another_starts() -> Iterable[pa.Table]:
        begin(str(tmp_path), STAMP, plan)
        return iter([pa.table({"id": ["late"]})])

    book = begin(str(tmp_path), STAMP, plan_while_another_starts)
    assert book.unit_rows.tolist() == [ROWS_PER_UNIT] * UNITS
    assert book.rows(1).column("id").to_pylist() == ["1-0", "1-1", "1-2", "1-3"]


def test_a_start_that_lost_to_another_stamp_is_refused(tmp_path: Path) -> None:
    def plan_while_another_starts() -> Iterable[pa.Table]:
        begin(str(tmp_path), Stamp("pairs", {"rows": 5}), plan)
        return plan()

    with pytest.raises(UserError, match="rows: 5 there, 4 now"):
        begin(str(tmp_path), STAMP, plan_while_another_starts)


def test_units_keep_their_rows_over_many_plan_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "PLAN_FILE_UNITS", 3)
    sizes = [1, 5, 2, 7, 3, 1, 4]
    units = [pa.table({"id": [f"{unit}-{row}" for row in range(size)]}) for unit, size in enumerate(sizes)]
    book = begin(str(tmp_path), STAMP, lambda: iter(units))
    assert book.unit_rows.tolist() == sizes
    assert len(book.plan_files) == 3
    assert [book.rows(unit) for unit in range(7)] == units


def test_a_unit_is_committed_once_and_the_loser_leaves_nothing(place: str) -> None:
    book = begin(place, STAMP, plan)
    assert commit(book, 0)
    before = list(storage.walk_files(place))
    assert not commit(book, 0, rejected=2)
    assert list(storage.walk_files(place)) == before
    assert commit(book, 1)
    assert ids_of(book.publish()) == (ALL_WRITTEN, ALL_REJECTED)


def at_once(work: Callable[[], Any], count: int = 6) -> list[Any]:
    start, results = threading.Barrier(count), []

    def one() -> None:
        start.wait()
        results.append(work())

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == count, "one of them failed"
    return results


def test_many_attempts_and_publishers_at_once(place: str) -> None:
    book = begin(place, STAMP, plan)
    for unit in range(UNITS):
        assert at_once(lambda: commit(book, unit)).count(True) == 1  # noqa: B023
    manifests = at_once(book.publish)
    assert len({json.dumps(manifest.to_json()) for manifest in manifests}) == 1
    assert storage.names(storage.join(place, "manifests")) == ["00000001.json"]
    assert ids_of(read_manifest(place)) == (ALL_WRITTEN, ALL_REJECTED)
    named = {manifest_file.path for manifest_file in manifests[0].files} | set(manifests[0].reject_files)
    there = {path.removeprefix(f"{place}/") for path, _ in storage.walk_files(place)}
    assert named == {path for path in there if path.startswith(("pairs/", "rejects/"))}


def test_a_table_per_split(tmp_path: Path) -> None:
    book = begin(str(tmp_path), STAMP, lambda: iter([pa.table({"id": ["a", "b", "c"]})]))
    tables: Tables = {("pairs", "train"): shard(["a", "b"], "train"), ("pairs", "test"): shard(["c"], "test")}
    book.commit(0, tables, {"pairs": 3}, [])
    manifest = book.publish()
    assert [(file.split, file.rows) for file in manifest.select("pairs")] == [("train", 2), ("test", 1)]
    assert [file.path.rpartition("/")[0] for file in manifest.select("pairs", "test")] == ["pairs/test"]


def test_no_manifest_while_a_unit_is_missing(tmp_path: Path) -> None:
    book = begin(str(tmp_path), STAMP, plan)
    commit(book, 1)
    with pytest.raises(RuntimeError, match="1 of 2 units are not committed"):
        book.publish()
    with pytest.raises(UserError, match=r"these pairs are not finished \(1 of 2 units\)"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize(("written", "rejects"), [(3, 0), (4, 1), (0, 3)])
def test_no_manifest_when_rows_were_dropped_or_doubled(tmp_path: Path, written: int, rejects: int) -> None:
    book = begin(str(tmp_path), STAMP, lambda: iter([pa.table({"id": list("abcd")})]))
    lost = [reject(str(row)) for row in range(rejects)]
    book.commit(0, {("pairs", None): shard(list("abcd")[:written])}, {"pairs": 4}, lost)
    with pytest.raises(RuntimeError, match=rf"pairs: planned 4 rows != written {written} \+ rejected {rejects}"):
        book.publish()
    assert storage.names(str(tmp_path / "manifests")) == []


def test_a_drop_in_one_table_is_not_made_up_by_another(tmp_path: Path) -> None:
    book = begin(str(tmp_path), STAMP, lambda: iter([pa.table({"id": list("abcd")})]))
    tables: Tables = {("pairs", None): shard(list("abc"))}
    book.commit(0, tables, {"pairs": 4, "texts": 0}, [reject("d", table="texts")])
    with pytest.raises(RuntimeError, match="planned"):
        book.publish()


def test_readers_see_what_the_manifest_names_and_nothing_else(tmp_path: Path) -> None:
    uri = str(tmp_path)
    run_job(uri)
    for name in ("pairs/000000-stray.parquet", "rejects/000009-stray.parquet", "commits/.000000.json.1.tmp"):
        storage.write_atomic(storage.join(uri, name), b"stray")
    assert ids_of(read_manifest(uri)) == (ALL_WRITTEN, ALL_REJECTED)
    assert begin(uri, STAMP, plan).committed() == {0, 1}


def test_the_highest_manifest_counts(tmp_path: Path) -> None:
    manifest = run_job(str(tmp_path))
    value = json.loads((tmp_path / "manifests" / "00000001.json").read_text())
    value["planned"] = {"pairs": 9}
    (tmp_path / "manifests" / "00000002.json").write_text(json.dumps(value))
    assert read_manifest(str(tmp_path)).planned == {"pairs": 9}
    assert read_manifest(str(tmp_path)).files == manifest.files


def test_a_finished_table_may_be_moved(tmp_path: Path) -> None:
    run_job(str(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert ids_of(read_manifest(str(tmp_path / "there"))) == (ALL_WRITTEN, ALL_REJECTED)


def test_what_is_no_finished_table(tmp_path: Path) -> None:
    def message(uri: Path, kind: str | None = None) -> str:
        with pytest.raises(UserError) as caught:
            read_manifest(str(uri), kind)
        return str(caught.value).removeprefix(f"{uri}: ")

    assert message(tmp_path / "none") == "no such folder"
    assert message(tmp_path) == "not a table of clipdist (no plans, no manifests)"
    begin(str(tmp_path / "started"), STAMP, plan)
    assert message(tmp_path / "started").startswith("these pairs are not finished (0 of 2 units): run the job")
    run_job(str(tmp_path / "done"))
    assert message(tmp_path / "done", "embeddings") == "expected embeddings, this folder holds pairs"
    path = tmp_path / "done" / "manifests" / "00000001.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 99'))
    assert message(tmp_path / "done") == "schema version 99 there, 2 expected: make it anew"


def test_an_empty_input_gives_an_empty_table(tmp_path: Path) -> None:
    book = begin(str(tmp_path), STAMP, lambda: iter([]))
    assert (list(book.units), book.missing()) == ([], [])
    manifest = book.publish()
    assert (manifest.files, manifest.planned) == ((), {})


# --- killed between any two steps ------------------------------------------------------------------------------------


def run_killed_at(uri: str, step: int, shard_units: int) -> None:
    """Runs the job and ends the process, as SIGKILL does, before or after the n-th call that changes the disk."""
    left = [step]

    def tick() -> None:
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            tick()
            result = real(*args)
            tick()
            return result

        return call

    for name in ("fsync", "replace", "link", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    run_job(uri, shard_units)
    os._exit(0)


KILL_AT_EVERY_STEP = """
import itertools, os, sys
from tests.unit.test_ledger import run_job, run_killed_at
shard_units = int(sys.argv[2])
run_job(f"{sys.argv[1]}/undisturbed", shard_units)  # so that the children import nothing
for step in itertools.count():
    child = os.fork()
    if child == 0:
        run_killed_at(f"{sys.argv[1]}/{step:03d}", step, shard_units)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.parametrize("shard_units", [0, 1, 2])
def test_a_job_killed_at_any_step_and_run_again_gives_every_row_once(tmp_path: Path, shard_units: int) -> None:
    command = [sys.executable, "-c", KILL_AT_EVERY_STEP, str(tmp_path), str(shard_units)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    folders = sorted(tmp_path.iterdir())  # the last two ran undisturbed
    assert len(folders) > 40
    unfinished = 0
    for folder in folders:
        uri = str(folder)
        try:
            assert ids_of(read_manifest(uri)) == (ALL_WRITTEN, ALL_REJECTED)
        except UserError:
            unfinished += 1
        assert ids_of(run_job(uri, shard_units)) == (ALL_WRITTEN, ALL_REJECTED), folder.name
        manifest = read_manifest(uri)
        assert ids_of(manifest) == (ALL_WRITTEN, ALL_REJECTED)
        assert manifest.number == 1
        book = open_ledger(uri)
        assert book is not None
        book.sweep(manifest)  # as the next job does
        there = {path.removeprefix(f"{uri}/") for path, _ in storage.walk_files(uri)}
        tables = {path for path in there if path.startswith(("pairs/", "rejects/", "pieces/"))}
        assert {path for path in tables if not path.endswith(".tmp")} == manifest.names()
    assert 20 < unfinished < len(folders) - 2


# --- joined shards, retries -------------------------------------------------------------------------------------------


def test_units_are_joined_into_shards_and_leave_nothing_behind(place: str) -> None:
    manifest = run_job(place, shard_units=2)
    assert [(file.path[:12], file.rows) for file in manifest.files] == [("pairs/000000", 6)]
    assert ids_of(manifest) == (ALL_WRITTEN, ALL_REJECTED)
    there = {path.removeprefix(f"{place}/") for path, _ in storage.walk_files(place)}
    rest = {path for path in there if not path.startswith(("plan/", "plans/", "manifests/", "shards/"))}
    assert rest == manifest.names(), "no pieces, no commits of units"


def test_many_joins_at_once_give_one_shard(place: str) -> None:
    book = begin(place, STAMP, plan, shard_units=2)
    for unit in book.units:
        commit(book, unit)

    def one() -> bool:
        try:
            return book.join(0, join)
        except FileNotFoundError:  # another one was done, and has cleaned up
            return False

    assert at_once(one).count(True) == 1
    assert ids_of(book.publish()) == (ALL_WRITTEN, ALL_REJECTED)


def test_an_attempt_that_comes_after_its_shard_was_joined_changes_nothing(place: str) -> None:
    book = begin(place, STAMP, plan, shard_units=1)
    for unit in book.units:
        commit(book, unit)
    book.join(0, join)
    assert commit(book, 0, rejected=3), "its record was gone"
    assert book.missing() == []
    assert len(book.records()) == 2
    book.join(1, join)
    assert ids_of(book.publish()) == (ALL_WRITTEN, ALL_REJECTED)
    assert storage.names(storage.join(place, "commits")) == []


def test_no_manifest_while_a_shard_is_not_joined(tmp_path: Path) -> None:
    book = begin(str(tmp_path), STAMP, plan, shard_units=2)
    for unit in book.units:
        commit(book, unit)
    with pytest.raises(RuntimeError, match="not committed"):
        book.publish()


def plan_of_rejects(book: Ledger) -> Ledger:
    again = retry_plan(book)
    assert again is not None
    return again


@pytest.mark.parametrize("shard_units", [0, 2])
def test_only_rejected_rows_are_tried_again(place: str, shard_units: int) -> None:
    first = run_job(place, shard_units)
    book = open_ledger(place)
    assert book is not None
    again = plan_of_rejects(book)
    assert (again.number, again.purpose, again.stamp) == (2, "retry", STAMP)
    assert [id_ for unit in again.units for id_ in again.rows(unit).column("id").to_pylist()] == ALL_REJECTED
    for unit in again.missing():
        commit(again, unit, rejected=int(unit == again.units[0]))
    for number in set(again.shards) - again.closed():
        again.join(number, join)
    manifest = again.publish()
    saved = len(ALL_REJECTED) - 1
    assert (manifest.number, manifest.plan, manifest.planned) == (2, 2, {"pairs": 8})
    assert (manifest.written("pairs"), sum(manifest.rejected["pairs"].values())) == (6 + saved, 1)
    assert set(first.files) < set(manifest.files), "what was written stays as it is"
    assert sorted(itertools.chain(*ids_of(manifest))) == sorted(ALL_WRITTEN + ALL_REJECTED)


def test_rejects_that_stay_rejects_are_not_tried_again(place: str) -> None:
    book = begin(place, STAMP, lambda: iter([pa.table({"id": ["a", "b"]})]))
    lost = [reject("a") | {"row": None}, reject("b")]
    book.commit(0, {}, {"pairs": 2}, lost)
    again = plan_of_rejects(book)
    assert again.rows(1).column("id").to_pylist() == ["b"]
    commit(again, 1, rejected=0)
    assert ids_of(again.publish()) == (["b"], ["a"])
    assert retry_plan(again) is None


def test_what_the_manifest_before_names_stays_for_its_readers_and_older_files_go(place: str) -> None:
    first = run_job(place)
    for number in (2, 3):
        book = open_ledger(place)
        assert book is not None
        state = book.finished()
        assert state is not None
        kept = [file for file in state.files if number == 2 or file != state.files[-1]]
        planned = {"pairs": sum(file.rows for file in kept)}
        base = replace(state, files=tuple(kept), reject_files=(), rejected={}, planned=planned)
        book.extend(STAMP, [], base, purpose="remove").publish()
        there = {path.removeprefix(f"{place}/") for path, _ in storage.walk_files(place)}
        assert (set(first.reject_files) <= there) == (number == 2)
        assert {file.path for file in first.files} <= there
    assert read_manifest(place).written("pairs") == 3
    assert storage.names(storage.join(place, "manifests")) == ["00000002.json", "00000003.json"]
