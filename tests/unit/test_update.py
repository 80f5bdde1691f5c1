"""Updates: new and changed rows are embedded, the others stay as they are, and every reader finds the new state."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clipdist import compare, spill, storage
from clipdist.compact import compact
from clipdist.compare import Mode
from clipdist.config import UserError
from clipdist.ledger import open_ledger
from clipdist.manifest import read_manifest
from clipdist.remove import remove
from tests.unit.some_catalog import (
    Item,
    changed,
    embed,
    finish,
    held,
    item,
    open_embeddings,
    planned,
    read,
    rejected,
    stamp_of,
)

TWO = ("images", "texts")
FIRST = [item(f"{number}") for number in range(8)]


def planned_ids(uri: str) -> list[str | None]:
    book = open_ledger(uri)
    assert book is not None
    return [id_ for unit in book.units for id_ in book.rows(unit).column("id").to_pylist()]


@pytest.mark.parametrize("mode", ["add", "mirror"])
@pytest.mark.parametrize(
    "values",
    [
        {"uri": "/pictures/other.jpg"},
        {"captions": ("3 신발 0 0",)},
        {"captions": ("3 신발 0 1", "3 신발 0 0")},
        {"captions": ("3 신발 0 0", "other")},
        {"captions": ()},
        {"group": "other"},
        {"group": None},
        {"price": 0.25},
        {"price": None},
    ],
)
def test_a_row_is_changed_by_anything_that_is_stored_of_it(tmp_path: Path, mode: Mode, values: dict[str, Any]) -> None:
    uri = str(tmp_path)
    embed(uri, FIRST)
    now = [changed(one, **values) if one.id == "3" else one for one in FIRST]
    embed(uri, now, mode)
    assert planned_ids(uri) == ["3"]
    assert read(uri) == held(now)
    assert read(uri) != held(FIRST), "a control"


def test_nothing_differs_but_the_order(tmp_path: Path) -> None:
    uri = str(tmp_path)
    first = embed(uri, FIRST)
    after = embed(uri, FIRST[::-1], "mirror")
    assert planned_ids(uri) == []
    assert (after.files, after.number, after.delete_files) == (first.files, 2, ())
    assert after.stamp.identity == stamp_of(FIRST[::-1]).identity


def test_new_rows_are_in_full_units_and_old_files_stay(place: str) -> None:
    first = embed(place, FIRST)
    now = [item("3", 1), *FIRST[4:], *(item(f"new {number}") for number in range(5))]
    after = embed(place, now, "add")
    book = open_ledger(place)
    assert book is not None
    assert book.unit_rows.tolist() == [3, 3]
    assert (book.number, book.purpose, book.stamp.recorded) == (
        2,
        "update",
        {"update": "add", "tried_again": {"images": 0, "texts": 0}},
    )
    assert set(first.files) < set(after.files)
    assert read(place) == held([*FIRST[:3], *now])
    embed(place, [*now, *FIRST], "mirror")
    assert read(place) == held([*FIRST[:3], *now])


def test_the_second_update_of_an_input_does_nothing(tmp_path: Path) -> None:
    uri = str(tmp_path)
    embed(uri, FIRST)
    embed(uri, FIRST[2:], "mirror")
    before = list(storage.walk_files(uri))
    for mode in ("mirror", "add", None):
        embed(uri, FIRST[2:], mode)  # type: ignore[arg-type]
    assert list(storage.walk_files(uri)) == before


def test_mirror_after_add_of_the_same_input_deletes_what_is_not_in_it(tmp_path: Path) -> None:
    uri = str(tmp_path)
    embed(uri, FIRST)
    embed(uri, [item("new")], "add")
    assert read(uri) == held([*FIRST, item("new")])
    embed(uri, [item("new")], "mirror")
    assert read(uri) == held([item("new")])


def test_rejects_of_an_update(tmp_path: Path) -> None:
    uri = str(tmp_path)
    broken, nameless = changed(item("b"), uri="/broken/b.jpg"), Item(None, "/pictures/x.jpg", ("x",))
    gone = changed(item("gone"), uri="/broken/gone.jpg")
    first = [*FIRST, broken, gone, FIRST[0], nameless]
    embed(uri, first)
    missing = [("b", "images", "missing"), ("gone", "images", "missing")]
    same = [("0", "images", "duplicate_id"), ("0", "texts", "duplicate_id")]
    unnamed = [(None, "images", "empty_id"), (None, "texts", "empty_id")]
    assert rejected(uri) == sorted([*missing, *same, *unnamed], key=str)
    embed(uri, [*FIRST, changed(broken, captions=("b",)), nameless], "add")
    assert rejected(uri) == sorted([*missing, *unnamed], key=str), "each once"
    embed(uri, [*FIRST, nameless, broken], "mirror")
    assert rejected(uri) == sorted([missing[0], *unnamed], key=str)
    assert read(uri) == held([*FIRST, broken])
    embed(uri, [*FIRST, item("b")], "mirror")
    assert (rejected(uri), read(uri)) == ([], held([*FIRST, item("b")]))


def test_a_row_that_has_become_bad_goes(tmp_path: Path) -> None:
    """As it would not be there, had the input been embedded anew."""
    uri = str(tmp_path)
    embed(uri, FIRST)
    now = [changed(one, uri="/broken/3.jpg") if one.id == "3" else one for one in FIRST]
    embed(uri, now, "add")
    assert read(uri) == held(now)
    assert "3" not in read(uri)


@pytest.mark.parametrize("tower", TWO)
def test_one_tower(tmp_path: Path, tower: str) -> None:
    uri = str(tmp_path)
    embed(uri, FIRST, towers=[tower])
    now = [*FIRST[2:], item("new"), item("7", 1)]
    now.remove(FIRST[7])
    embed(uri, now, "mirror", towers=[tower])
    assert set(planned_ids(uri)) == {"new", "7"}
    assert read(uri) == held(now, [tower])


def test_another_input_is_refused_without_update(tmp_path: Path) -> None:
    uri = str(tmp_path)
    embed(uri, FIRST)
    with pytest.raises(UserError) as caught:
        embed(uri, FIRST[1:])
    assert "input.source: " in str(caught.value)
    assert "with update=add or update=mirror" in str(caught.value)
    with pytest.raises(UserError, match="towers") as caught:
        embed(uri, FIRST[1:], "add", towers=["images"])
    assert "update=add" not in str(caught.value)
    assert read(uri) == held(FIRST)


def test_an_unfinished_output_is_finished_first(tmp_path: Path) -> None:
    uri = str(tmp_path)
    open_embeddings(uri, FIRST, None, TWO)
    with pytest.raises(
        UserError, match=r"the first run is under way: 0 of 3 units, and with update=... its rows are not done again"
    ):
        embed(uri, FIRST[1:], None)
    embed(uri, FIRST)
    open_embeddings(uri, FIRST[1:], "add", TWO)
    for job in (lambda: compact(uri), lambda: remove(uri, ["1"])):
        with pytest.raises(
            UserError, match="an update is under way.*; finish that first: clipdist embed .*config.yaml"
        ):
            job()
    embed(uri, FIRST[1:], "add")
    embed(uri, FIRST[1:], "mirror")
    assert read(uri) == held(FIRST[1:])


def test_a_killed_update_goes_on_with_its_plan(place: str) -> None:
    embed(place, FIRST)
    book = open_embeddings(place, [*FIRST[4:], item("new")], "mirror", TWO)
    again = open_embeddings(place, [*FIRST[4:], item("new")], "mirror", TWO)
    assert (again.number, again.plan_files) == (2, book.plan_files)
    assert read(place) == held(FIRST), "until it is published"
    finish(again)
    assert read(place) == held([*FIRST[4:], item("new")])


def test_other_kept_columns_are_refused(tmp_path: Path) -> None:
    uri = str(tmp_path)
    embed(uri, FIRST)

    def other() -> Any:
        return (unit.rename_columns({"price": "cost"}) for unit in planned(FIRST))

    from clipdist.update import begin_or_update

    with pytest.raises(UserError, match=r"kept columns: price \(double\) there, cost \(double\) now"):
        begin_or_update(uri, stamp_of(FIRST[1:]), other, "add", shard_units=2)


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    from clipdist.update import begin_or_update

    uri = str(tmp_path)
    embed(uri, FIRST)
    for second in (FIRST[2:], [*FIRST[1:], item("new")], [*FIRST[1:7], item("7", 1)]):
        inputs = iter([FIRST[1:], second])
        with pytest.raises(UserError, match="the input changed while it was read"):
            begin_or_update(uri, stamp_of(FIRST[1:]), lambda: planned(next(inputs)), "add", shard_units=2)  # noqa: B023
    assert read(uri) == held(FIRST)


def test_comparing_in_many_small_parts_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "SPILL_BYTES", 100)
    monkeypatch.setattr(compare, "DELETES_AT_ONCE", 2)
    uri, rows = str(tmp_path), [item(str(number)) for number in range(60)]
    embed(uri, rows)
    now = [item(one.id or "", int(one.id or 0) % 2) for one in rows[20:]]
    after = embed(uri, now, "mirror")
    assert len(after.delete_files) > 3
    assert read(uri) == held(now)


def test_hashes_of_contents_tell_rows_apart() -> None:
    rows = [("a", "b"), ("ab", ""), ("", "ab"), (None, "b"), ("-", "b"), ("1:a", "b"), ("a", None), (None, None)]
    hashes = spill.content_hashes([pa.array(column, pa.string()) for column in zip(*rows, strict=True)])
    assert len(np.unique(hashes)) == len(rows)


# --- random sequences, beside a plain dict -----------------------------------------------------------------------------


def some_rows(random_: random.Random) -> list[Item]:
    ids = random_.sample([f"{number}" for number in range(14)], random_.randrange(1, 11))
    rows = [item(one, random_.randrange(2), random_.randrange(4)) for one in ids]
    rows = [changed(one, uri=f"/broken/{one.id}") if random_.random() < 0.15 else one for one in rows]
    return rows + random_.choices(rows, k=random_.randrange(3))


def step(uri: str, model: dict[str | None, Item], random_: random.Random) -> dict[str | None, Item]:
    """One change of the table and of the model: id -> row."""
    what = random_.choice(["add", "mirror", "remove", "compact"])
    if what == "compact":
        compact(uri)
        return model
    if what == "remove":
        ids = random_.sample([f"{number}" for number in range(14)], 3)
        if set(ids) & model.keys():
            remove(uri, ids)
        else:
            with pytest.raises(UserError, match="none of the 3 ids"):
                remove(uri, ids)
        return {one: row for one, row in model.items() if one not in ids}
    rows = some_rows(random_)
    embed(uri, rows, "add" if what == "add" else "mirror")
    first = {row.id: row for row in reversed(rows)}
    return first if what == "mirror" else model | first


@pytest.mark.parametrize("seed", range(12))
def test_random_sequences_hold_what_a_dict_holds(tmp_path: Path, seed: int) -> None:
    uri, random_ = str(tmp_path), random.Random(seed)
    rows = some_rows(random_)
    embed(uri, rows)
    model = {row.id: row for row in reversed(rows)}
    differed = 0
    for _ in range(10):
        before = held(model.values())
        model = step(uri, model, random_)
        assert read(uri) == held(model.values())
        assert {one for one, _, reason in rejected(uri) if reason == "missing"} == {
            one for one, row in model.items() if row.broken
        }
        differed += read(uri) != before
    assert differed > 2, "or nothing was tried"
    there = {path.removeprefix(f"{uri}/") for path, _ in storage.walk_files(uri)}
    kept = read_manifest(uri).names()
    assert len({path for path in there if path.startswith(("images/", "texts/"))} - kept) < 40
