"""Compaction: fewer files, the same rows with the same bits; killed anywhere, it goes on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from clipdist import compact as module
from clipdist import info, storage
from clipdist.compact import compact
from clipdist.config import UserError
from clipdist.ledger import Ledger, open_ledger
from clipdist.manifest import Manifest, read_manifest
from clipdist.remove import remove
from clipdist.shard_writer import STAMP_KEY
from clipdist.shards import Shards
from tests.unit.some_catalog import SHARD_ROWS, Item, changed, embed, held, item, read, rejected, stamp_of

ROOT = Path(__file__).parents[2]
ROWS = [item(str(number)) for number in range(10)]
NEW = [item("3", 1), item("new")]


def files_of(manifest: Manifest, table: str) -> list[int]:
    return [file.rows for file in manifest.select(table)]


def in_pieces(uri: str) -> list[Item]:
    """A table of many small files and deletes."""
    embed(uri, [*ROWS, changed(item("b"), uri="/broken/b.jpg")])
    embed(uri, NEW, "add")
    embed(uri, [item("4", 1)], "add")
    remove(uri, ["0", "new"])
    return [*ROWS[1:3], *ROWS[5:], NEW[0], item("4", 1), changed(item("b"), uri="/broken/b.jpg")]


def test_small_files_become_full_ones_and_nothing_else_differs(place: str) -> None:
    rows = in_pieces(place)
    before = read_manifest(place)
    found = Shards(before, "images")
    open_readers = found.columns(["id"]), np.concatenate([np.asarray(block) for _, block in found.blocks()])
    assert (files_of(before, "images"), before.deleted) == ([6, 4, 2, 1], {"images": 4, "texts": 8})
    done = compact(place)
    assert (done.before.files, done.after.number, done.after.deleted) == (before.files, 5, {"images": 0, "texts": 0})
    assert done.after.delete_files == ()
    assert files_of(done.after, "images") == [SHARD_ROWS, 3]
    assert files_of(done.after, "texts") == [10, SHARD_ROWS, 4], "a large file stays"
    assert read(place) == held(rows)
    assert rejected(place) == [("b", "images", "missing")]
    assert (done.after.planned, done.after.stamp) == (before.planned, before.stamp)
    assert found.columns(["id"]).equals(open_readers[0]), "who opened the table before still reads it"
    assert found.matrix().tobytes() == open_readers[1].tobytes()
    again = compact(place)
    assert again.before is again.after
    assert read_manifest(place).number == 5


def test_footers_have_the_present_stamp(tmp_path: Path) -> None:
    uri = str(tmp_path)
    in_pieces(uri)
    done = compact(uri)
    now = done.after
    for file in set(now.files) - set(done.before.files):
        footer = pq.read_metadata(now.path(file)).metadata[STAMP_KEY.encode()]
        assert stamp_of([item("4", 1)]).identity["input"]["source"].encode() in footer


def test_full_files_with_few_deletes_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path)
    rows = [item(str(number), captions=1) for number in range(15)]
    embed(uri, rows)
    remove(uri, ["1"])
    first = read_manifest(uri)
    monkeypatch.setattr(module, "FEW_DELETED", 0.2)
    monkeypatch.setattr(module, "FULL", 0.8)
    assert (
        compact(uri).show() == f"nothing to do: {module._size(first)}, fewer than 20% of each file; --every drops them"
    )
    assert "6 files" in compact(uri).show()
    embed(uri, [item("new", captions=1)], "add")
    after = compact(uri).after
    assert set(first.files) & set(after.files) == {file for file in first.files if file.rows == 6}
    assert after.deleted == {"images": 1, "texts": 1}
    assert read(uri) == held([rows[0], *rows[2:], item("new", captions=1)])
    assert compact(uri, every=True).after.deleted == {"images": 0, "texts": 0}
    assert read(uri) == held([rows[0], *rows[2:], item("new", captions=1)])


def test_a_table_whose_rows_are_all_deleted(tmp_path: Path) -> None:
    uri = str(tmp_path)
    embed(uri, ROWS)
    remove(uri, [row.id or "" for row in ROWS])
    assert compact(uri).after.files == ()
    assert read(uri) == {}
    embed(uri, ROWS[:4], "mirror")
    assert read(uri) == held(ROWS[:4])


def test_others_wait_for_a_compaction_and_readers_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path)
    rows = in_pieces(uri)
    with monkeypatch.context() as patch:
        real, left = Ledger.commit_shard, iter([True, True])

        def commit(*args: Any) -> bool:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*args)

        patch.setattr(Ledger, "commit_shard", commit)
        with pytest.raises(KeyboardInterrupt):
            compact(uri)
    assert info.describe(uri)["state"] == "finished; a compaction is under way: 2 of 4 units"
    assert read(uri) == held(rows)
    for job in (lambda: embed(uri, [item("4", 1)]), lambda: embed(uri, NEW, "add"), lambda: remove(uri, ["1"])):
        with pytest.raises(UserError, match=f"a compaction is under way.*finish that first: clipdist compact {uri}"):
            job()
    before = {file.path for file in read_manifest(uri).files}
    assert {file.path for file in compact(uri).before.files} == before
    assert read(uri) == held(rows)


def test_updates_go_on_after_a_compaction(tmp_path: Path) -> None:
    uri = str(tmp_path)
    rows = in_pieces(uri)
    compact(uri)
    embed(uri, [item("1", 1), item("new", 1)], "add")
    book = open_ledger(uri)
    assert book is not None
    assert book.per_shard == book.shard_units == 2
    assert read(uri) == held([*rows[1:], item("1", 1), item("new", 1)])


# --- killed between any two steps -------------------------------------------------------------------------------------


def change(uri: str, what: str) -> None:
    if what == "compact":
        compact(uri)
    elif what == "remove":
        remove(uri, ["1", "b"])
    else:
        embed(uri, [*ROWS[2:], item("1", 1), item("x")], "mirror")


def changed_table(what: str, rows: list[Item]) -> list[Item]:
    if what == "remove":
        return [row for row in rows if row.id not in ("1", "b")]
    return rows if what == "compact" else [*ROWS[2:], item("1", 1), item("x")]


def killed_at(uri: str, what: str, step: int) -> None:
    """Ends the process, as SIGKILL does, before the n-th call that changes the table."""
    left = [step]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            left[0] -= str(args[0]).startswith(uri)
            if left[0] < 0:
                os._exit(9)
            return real(*args, **more)

        return call

    for name in ("replace", "link", "unlink", "remove"):
        setattr(os, name, counted(getattr(os, name)))
    change(uri, what)
    os._exit(0)


KILL_AT_EVERY_STEP = """
import itertools, os, shutil, sys
from tests.unit.test_compact import change, in_pieces, killed_at
folder, what = sys.argv[1:]
in_pieces(f"{folder}/start")
shutil.copytree(f"{folder}/start", f"{folder}/undisturbed")
change(f"{folder}/undisturbed", what)  # so that the children import nothing
for step in itertools.count():
    shutil.copytree(f"{folder}/start", f"{folder}/{step:03d}")
    child = os.fork()
    if child == 0:
        killed_at(f"{folder}/{step:03d}", what, step)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.parametrize("what", ["compact", "remove", "update"])
def test_a_change_killed_at_any_step_and_run_again_is_done_once(tmp_path: Path, what: str) -> None:
    rows = in_pieces(str(tmp_path / "model"))
    after = held(changed_table(what, rows))
    subprocess.run([sys.executable, "-c", KILL_AT_EVERY_STEP, str(tmp_path), what], cwd=ROOT, check=True, timeout=400)
    folders = sorted(folder for folder in tmp_path.iterdir() if folder.name.isdecimal())
    assert len(folders) > 8
    before = 0
    for folder in folders:
        uri = str(folder)
        (folder / "running.json").unlink(missing_ok=True)
        seen = read(uri)
        assert seen in (held(rows), after), "the old state or the new one, at any moment"
        before += read_manifest(uri).number == 4
        if what == "remove" and seen == after != held(rows):
            assert open_ledger(uri).finished() is not None  # type: ignore[union-attr]
        else:
            change(uri, what)
        assert read(uri) == after, folder.name
        manifest, book = read_manifest(uri), open_ledger(uri)
        assert book is not None
        assert book.finished() is not None
        book.sweep(manifest)
        kept = manifest.names() | Manifest.from_json(uri, _before(uri, manifest)).names()
        there = {path.removeprefix(f"{uri}/") for path, _ in storage.walk_files(uri) if not path.endswith(".tmp")}
        folders_of_rows = ("images/", "texts/", "rejects/", "deletes/", "pieces/")
        assert {path for path in there if path.startswith(folders_of_rows)} == kept, "and nothing is left behind"
    assert 3 < before < len(folders) - 1


def _before(uri: str, manifest: Manifest) -> Any:
    return json.loads(storage.read_bytes(storage.join(uri, f"manifests/{manifest.number - 1:08d}.json")))


def test_slices_are_cut_without_gaps() -> None:
    files = [("a", 3), ("b", 0), ("c", 14), ("d", 1)]
    shards = list(module._cut(files, 6))
    assert [sum(rows for _, _, rows in shard) for shard in shards] == [6, 6, 6]
    order = [(path, first + row) for shard in shards for path, first, rows in shard for row in range(rows)]
    assert order == [(path, row) for path, rows in files for row in range(rows)]
