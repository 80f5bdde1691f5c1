"""Removal of ids: found rows go from both tables at once, and stay gone."""

from pathlib import Path

import pytest

from clipdist import cli, info, lease, ledger, storage
from clipdist.config import UserError
from clipdist.ledger import Ledger
from clipdist.manifest import read_manifest
from clipdist.remove import read_ids, remove
from tests.unit.some_catalog import changed, embed, held, item, read, rejected

ROWS = [item(str(number)) for number in range(8)]


def test_ids_go_from_both_tables(place: str) -> None:
    embed(place, ROWS)
    found = remove(place, ["1", "6", "none", "1"])
    assert (found.rows, found.unknown) == ({"images": 2, "texts": 4, "rejects": 0}, ["none"])
    assert read(place) == held([*ROWS[:1], *ROWS[2:6], ROWS[7]])
    assert read_manifest(place).planned == {"images": 6, "texts": 12}
    with pytest.raises(UserError, match=r"none of the 2 ids is there \(1, 6\)"):
        remove(place, ["1", "6"])
    assert read_manifest(place).number == 2
    assert remove(place, ["6", "7"]).unknown == ["6"]
    assert read(place) == held([*ROWS[:1], *ROWS[2:6]])


def test_the_rejects_of_an_id_go_with_it(tmp_path: Path) -> None:
    """Or a later retry would bring its picture back."""
    uri = str(tmp_path)
    embed(uri, [*ROWS, changed(item("b"), uri="/broken/b.jpg"), changed(item("c"), uri="/broken/c.jpg")])
    assert remove(uri, ["b"]).rows == {"images": 0, "texts": 2, "rejects": 1}
    assert rejected(uri) == [("c", "images", "missing")]
    assert set(read(uri)) == set(held(ROWS)) | {"c#0", "c#1"}


def test_all_rows(tmp_path: Path) -> None:
    uri = str(tmp_path)
    embed(uri, ROWS)
    remove(uri, [row.id or "" for row in ROWS])
    assert read(uri) == {}
    assert embed(uri, ROWS).number == 2, "a rerun of the same input finds the table finished"
    embed(uri, ROWS[:2], "add")
    assert read(uri) == held(ROWS[:2])


def test_a_removal_killed_before_its_manifest_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path)
    embed(uri, ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove(uri, ["1"])
    assert info.describe(uri)["state"] == "finished; a removal is under way"
    assert read(uri) == held(ROWS)
    assert remove(uri, ["1", "2"]).rows == {"images": 2, "texts": 4, "rejects": 0}
    assert read(uri) == held([ROWS[0], *ROWS[3:]])
    assert info.describe(uri)["last change"] == "a removal"


def test_what_cannot_be_changed(tmp_path: Path) -> None:
    uri = str(tmp_path / "embeddings")
    with pytest.raises(UserError, match="no such folder"):
        remove(uri, ["1"])
    embed(uri, ROWS)
    with lease.held(uri), pytest.raises(UserError, match="another run is at work"):
        remove(uri, ["1"])
    ledger.begin(str(tmp_path / "new"), read_manifest(uri).stamp, lambda: iter([]))
    with pytest.raises(UserError, match="not finished"):
        remove(str(tmp_path / "new"), ["1"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri, ids = str(tmp_path / "embeddings"), tmp_path / "ids.txt"
    embed(uri, ROWS)
    ids.write_text("\ufeff1\n\n 2 \nx1\nx2\nx3\nx4\nx5\nx6\n", encoding="utf-8")
    assert cli.main(["remove", uri, str(ids), "--id", "3", "--id", "4"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == ["removed: 4 images, 8 texts, 0 rejects", "not there: 6 ids (x1, x2, x3, x4, x5, ...)"]
    assert read(uri) == held([ROWS[0], *ROWS[5:]])
    assert cli.main(["remove", uri, str(ids)]) == 2
    assert cli.main(["remove", uri]) == 2
    assert cli.main(["remove", uri, str(tmp_path / "none.txt")]) == 2
    assert "give ids" in capsys.readouterr().err
    assert cli.main(["compact", uri]) == 0
    assert "files" in capsys.readouterr().out
    assert storage.names(storage.join(uri, "deletes"))


def test_ids_are_lines_and_nothing_else_ends_one(tmp_path: Path) -> None:
    ids = ["x\u2028y", "a\x0bb", "plain", "caf\u00e9\x85"]
    (tmp_path / "ids.txt").write_bytes("\r\n".join(ids).encode() + b"\n\n")
    assert read_ids(str(tmp_path / "ids.txt")) == [*ids[:3], "caf\u00e9"]


def test_files_of_somebody_else_stay(place: str) -> None:
    embed(place, ROWS)
    foreign = [storage.join(place, name) for name in ("images/mine.txt", "plan/notes/a.txt", "manifests/mine.json")]
    for path in foreign:
        storage.write_atomic(path, b"mine")
    remove(place, ["1"])
    left = storage.join(place, f"pieces/.000001-x.parquet.{'0' * 32}.tmp")  # of a killed writer
    storage.write_atomic(left, b"half")
    remove(place, ["2"])
    assert storage.exists(left) == (not storage.is_local(place)), "a store has no such files"
    assert [storage.read_bytes(path) for path in foreign] == [b"mine"] * 3
    assert read(place) == held([ROWS[0], *ROWS[3:]])
