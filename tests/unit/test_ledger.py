"""The ledger: every planned row once, whoever is killed, runs twice, or comes too late."""

import io
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdist import ledger, storage
from clipdist.config import UserError
from clipdist.ledger import File, Ledger, Manifest, begin, read_manifest
from clipdist.schema import Stamp, recorded

ROOT = Path(__file__).parents[2]
Tables = dict[tuple[str, str | None], tuple[bytes, File]]
STAMP = Stamp("pairs", {"source": {"path": "/in"}, "rows": 4})
UNITS = 2
ROWS_PER_UNIT = 4


def plan() -> tuple[Iterable[pa.Table], dict[str, Any]]:
    units = (pa.table({"id": [f"{unit}-{row}" for row in range(ROWS_PER_UNIT)]}) for unit in range(UNITS))
    return units, {"fact": 1}


def shard(ids: list[str], split: str | None = None) -> tuple[bytes, File]:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": ids}), buffer)
    return buffer.getvalue(), File("", "pairs", len(ids), (len(ids),), buffer.tell(), split)


def reject(row_id: str, table: str = "pairs") -> dict[str, Any]:
    return {"id": row_id, "table": table, "uri": None, "reason": "missing", "message": "no such file"}


def commit(book: Ledger, unit: int, rejected: int = 1) -> bool:
    """Writes all rows of a unit but the last `rejected`, which become rejects."""
    ids = book.rows(unit).column("id").to_pylist()
    kept, lost = ids[: len(ids) - rejected], ids[len(ids) - rejected :]
    return book.commit(unit, {("pairs", None): shard(kept)}, {"pairs": len(ids)}, [reject(row) for row in lost])


def run_job(uri: str) -> Manifest:
    """What a job does: open or go on, commit what is missing, publish."""
    book = begin(uri, STAMP, plan)
    for unit in range(len(book.units)):
        if unit not in book.committed():
            commit(book, unit)
    return book.publish(seconds=1)


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
    assert read.facts == {"fact": 1, "seconds": 1}
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
    other = Stamp("embeddings", {"source": {"path": "/other"}, "rows": 4, "dim": 512}, schema_version=2)
    with pytest.raises(UserError) as caught:
        begin(str(tmp_path), other, plan)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}: made with other settings:"
    assert '  source.path: "/in" there, "/other" now' in lines
    assert '  kind: "pairs" there, "embeddings" now' in lines
    assert "  dim: nothing there, 512 now" in lines
    assert "  schema_version: 1 there, 2 now" in lines
    assert not any("rows" in line for line in lines)


@pytest.mark.parametrize("name", ["notes.txt", "manifests/00000001.json", "commits/000000.json", "pairs/x.parquet"])
def test_a_folder_of_something_else_is_refused(place: str, name: str) -> None:
    storage.write_atomic(storage.join(place, name), b"{}")
    with pytest.raises(UserError, match=f"already holds {name.split('/')[0]}; choose an empty or new output"):
        begin(place, STAMP, plan)


def test_what_a_killed_start_leaves_is_no_hindrance(tmp_path: Path) -> None:
    for name in ("config.yaml", "plan/0123/000000.parquet", ".plan.json.0123.tmp"):
        storage.write_atomic(str(tmp_path / name), b"half")
    assert ids_of(run_job(str(tmp_path))) == (ALL_WRITTEN, ALL_REJECTED)


def test_two_starts_share_the_plan_of_the_first(tmp_path: Path) -> None:
    def plan_while_another_starts() -> tuple[Iterable[pa.Table], dict[str, Any]]:
        begin(str(tmp_path), STAMP, plan)
        return iter([pa.table({"id": ["late"]})]), {}

    book = begin(str(tmp_path), STAMP, plan_while_another_starts)
    assert book.units == (ROWS_PER_UNIT,) * UNITS
    assert book.rows(1).column("id").to_pylist() == ["1-0", "1-1", "1-2", "1-3"]


def test_a_start_that_lost_to_another_stamp_is_refused(tmp_path: Path) -> None:
    def plan_while_another_starts() -> tuple[Iterable[pa.Table], dict[str, Any]]:
        begin(str(tmp_path), Stamp("pairs", {"rows": 5}), plan)
        return plan()

    with pytest.raises(UserError, match="rows: 5 there, 4 now"):
        begin(str(tmp_path), STAMP, plan_while_another_starts)


def test_units_keep_their_rows_over_many_plan_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "UNITS_PER_PLAN_FILE", 3)
    sizes = [1, 5, 2, 7, 3, 1, 4]
    units = [pa.table({"id": [f"{unit}-{row}" for row in range(size)]}) for unit, size in enumerate(sizes)]
    book = begin(str(tmp_path), STAMP, lambda: (iter(units), {}))
    assert book.units == tuple(sizes)
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
    return results


def test_many_attempts_and_publishers_at_once(place: str) -> None:
    book = begin(place, STAMP, plan)
    for unit in range(UNITS):
        assert at_once(lambda: commit(book, unit)).count(True) == 1  # noqa: B023
    manifests = at_once(lambda: book.publish(who=threading.get_ident()))
    assert len({json.dumps(manifest.facts) for manifest in manifests}) == 1
    assert storage.names(storage.join(place, "manifests")) == ["00000001.json"]
    assert ids_of(read_manifest(place)) == (ALL_WRITTEN, ALL_REJECTED)
    named = {manifest_file.path for manifest_file in manifests[0].files} | set(manifests[0].reject_files)
    there = {path.removeprefix(f"{place}/") for path, _ in storage.walk_files(place)}
    assert named == {path for path in there if path.startswith(("pairs/", "rejects/"))}


def test_a_table_per_split(tmp_path: Path) -> None:
    book = begin(str(tmp_path), STAMP, lambda: (iter([pa.table({"id": ["a", "b", "c"]})]), {}))
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
    book = begin(str(tmp_path), STAMP, lambda: (iter([pa.table({"id": list("abcd")})]), {}))
    lost = [reject(str(row)) for row in range(rejects)]
    book.commit(0, {("pairs", None): shard(list("abcd")[:written])}, {"pairs": 4}, lost)
    with pytest.raises(RuntimeError, match=rf"pairs: planned 4 rows != written {written} \+ rejected {rejects}"):
        book.publish()
    assert storage.names(str(tmp_path / "manifests")) == []


def test_a_drop_in_one_table_is_not_made_up_by_another(tmp_path: Path) -> None:
    book = begin(str(tmp_path), STAMP, lambda: (iter([pa.table({"id": list("abcd")})]), {}))
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
    value["facts"] = {"compacted": True}
    (tmp_path / "manifests" / "00000002.json").write_text(json.dumps(value))
    assert read_manifest(str(tmp_path)).facts == {"compacted": True}
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
    assert message(tmp_path) == "not a table of clipdist (no plan.json, no manifests)"
    begin(str(tmp_path / "started"), STAMP, plan)
    assert message(tmp_path / "started").startswith("these pairs are not finished (0 of 2 units): run the job")
    run_job(str(tmp_path / "done"))
    assert message(tmp_path / "done", "embeddings") == "expected embeddings, this folder holds pairs"
    path = tmp_path / "done" / "manifests" / "00000001.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    assert message(tmp_path / "done") == "schema version 99 there, 1 expected: make it anew"


def test_units_with_rejects_can_be_tried_again(place: str) -> None:
    book = begin(place, STAMP, plan)
    commit(book, 0, rejected=2)
    commit(book, 1, rejected=0)
    assert book.reject_examples(1) == ["0-2: missing: no such file"]
    assert len(book.reject_examples(9)) == 2
    assert book.forget_rejecting_units() == 1
    assert book.committed() == {1}
    assert book.reject_examples(9) == []
    assert storage.names(storage.join(place, "rejects")) == []
    assert len(storage.names(storage.join(place, "pairs"))) == 1
    commit(book, 0, rejected=0)
    assert ids_of(book.publish()) == (sorted(ALL_WRITTEN + ALL_REJECTED), [])


def test_a_job_killed_while_it_forgets_names_no_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = begin(str(tmp_path), STAMP, plan)
    commit(book, 0)
    commit(book, 1)
    real, removed = storage.remove, []

    def remove_one(path: str) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        real(path)

    monkeypatch.setattr(storage, "remove", remove_one)
    with pytest.raises(KeyboardInterrupt):
        book.forget_rejecting_units()
    monkeypatch.undo()
    assert ids_of(run_job(str(tmp_path))) == (ALL_WRITTEN, ALL_REJECTED)


def test_an_empty_input_gives_an_empty_table(tmp_path: Path) -> None:
    book = begin(str(tmp_path), STAMP, lambda: (iter([]), {}))
    assert (book.units, book.committed()) == ((), set())
    manifest = book.publish()
    assert (manifest.files, manifest.planned) == ((), {})


# --- killed between any two steps ------------------------------------------------------------------------------------


def run_killed_at(uri: str, step: int) -> None:
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
    run_job(uri)
    os._exit(0)


KILL_AT_EVERY_STEP = """
import itertools, os, sys
from tests.unit.test_ledger import run_job, run_killed_at
run_job(f"{sys.argv[1]}/undisturbed")  # so that the children import nothing
for step in itertools.count():
    child = os.fork()
    if child == 0:
        run_killed_at(f"{sys.argv[1]}/{step:03d}", step)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_job_killed_at_any_step_and_run_again_gives_every_row_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILL_AT_EVERY_STEP, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    folders, unfinished = sorted(tmp_path.iterdir()), 0  # the last two ran undisturbed
    assert len(folders) > 40
    for folder in folders:
        uri = str(folder)
        try:
            assert ids_of(read_manifest(uri)) == (ALL_WRITTEN, ALL_REJECTED)
        except UserError:
            unfinished += 1
        assert ids_of(run_job(uri)) == (ALL_WRITTEN, ALL_REJECTED), folder.name
        assert ids_of(read_manifest(uri)) == (ALL_WRITTEN, ALL_REJECTED)
        assert storage.names(f"{uri}/commits") == ["000000.json", "000001.json"]
    assert unfinished > 40, "the kills came too late"
