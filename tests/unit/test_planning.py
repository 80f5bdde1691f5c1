"""The plan: every input row once, with its captions, its split and, if it cannot be used, the reason."""

import csv
import itertools
import json
import random
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from clipdist import batches, planning, tables
from clipdist.captions import captions_of, default_captions, template_columns
from clipdist.catalog import EmbedConfig, open_input
from clipdist.config import UserError
from clipdist.planning import ColumnsConfig, SplitConfig, split_of
from clipdist.sources import Source, SourceConfig, open_source

COLUMNS, SPLIT = ColumnsConfig(), SplitConfig()


def source_of(folder: Path, rows: list[dict[str, Any]]) -> Source:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return open_source(SourceConfig(path=str(path)))


def planned(
    source: Source,
    captions: tuple[str, ...] = ("{title}",),
    columns: ColumnsConfig = COLUMNS,
    split: SplitConfig = SPLIT,
    unit_rows: int = 1000,
    **settings: Any,
) -> list[dict[str, Any]]:
    units = list(planning.plan_units(source, columns, captions, split, unit_rows, **settings))
    return pa.concat_tables(units).to_pylist() if units else []


def pairs(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"id": n, "image": f"{n}.jpg", "title": f"title {n}"} | fields for n in range(count)]


# --- columns ---------------------------------------------------------------------------------------------------------


def test_every_wrong_column_is_told_at_once_with_the_one_meant(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("sku,photo,title,colour,product\n")
    source = open_source(SourceConfig(path=str(tmp_path / "t.csv"), image_column="phoot"))
    columns = ColumnsConfig(id="skuu", group="prodct", split="part", keep=("color:string", "title"))
    with pytest.raises(UserError) as caught:
        planning.check_columns(source, columns, ("{titel} of {colour}", "{title} {what}"))
    starts = {
        "source.image_column": ("phoot", "photo"),
        "columns.id": ("skuu", "sku"),
        "columns.group": ("prodct", "product"),
        "columns.split": ("part", None),
        "columns.keep": ("color", "colour"),
        "captions.0": ("titel", "title"),
        "captions.1": ("what", None),
    }
    there = "(columns: sku, photo, title, colour, product)"
    assert list(caught.value.problems) == [
        f'{key}: {tmp_path}/t.csv has no column "{name}"' + (f'; did you mean "{close}"? ' if close else " ") + there
        for key, (name, close) in starts.items()
    ]


def test_a_column_in_capitals_is_found_close(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("ID, Image\n")
    with pytest.raises(UserError) as caught:
        planning.check_columns(open_source(SourceConfig(path=str(tmp_path / "t.csv"))), ColumnsConfig(), ())
    hints = [problem.partition("; ")[2].partition(" (")[0] for problem in caught.value.problems]
    assert hints == ['did you mean " Image"?', 'did you mean "ID"?']


def test_right_columns_are_silent(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    planning.check_columns(open_source(SourceConfig(path=str(tmp_path))), ColumnsConfig(), ("{text}",))
    source = source_of(tmp_path, [{"id": 1, "image": "a"}, {"id": 2, "title": "in the second row only"}])
    planning.check_columns(source, ColumnsConfig(keep=("title",)), ("{title}",))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (("price:money",), 'type of "price": expected string, int, float, bool, got "money"'),
        (("caption",), '"caption" is a name that clipdist fills itself'),
        (("reason",), '"reason" is a name that clipdist fills itself'),
        (("message:string",), '"message" is a name that clipdist fills itself'),
        (("price", "price:float"), "price: named twice"),
    ],
)
def test_columns_that_cannot_be_kept(keep: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ColumnsConfig(keep=keep)


def test_kept_columns_have_the_type_asked_for(tmp_path: Path) -> None:
    values: dict[str, list[Any]] = {
        "int": [(7, 7), ("7", 7), ("-7", -7), ("2012.0", 2012), (3.0, 3), (3.5, None), ("x", None), ("", None),
                (10**30, None), (2**63 - 1, 2**63 - 1), ("1e400", None), (None, None), (float("nan"), None)],
        "float": [(1, 1.0), ("1.5", 1.5), ("1,5", None), (None, None), (float("nan"), None)],
        "bool": [(True, True), ("yes", True), ("0", False), ("False", False), ("maybe", None), ("", None)],
        "string": [("007", "007"), (5, "5"), (["a", None, "b"], "a, , b"), (" x ", "x"), ("", None),
                   ("cut \ud83d", "cut ?")],
    }  # fmt: skip
    for kind, cases in values.items():
        rows = [row | {"column": given} for row, (given, _) in zip(pairs(len(cases)), cases, strict=True)]
        columns = ColumnsConfig(keep=(f"column:{kind}",))
        units = list(planning.plan_units(source_of(tmp_path, rows), columns, ("{title}",), SplitConfig(), 1000))
        assert units[0].schema.field("column").type == planning.TYPES[kind]
        assert units[0].column("column").to_pylist() == [expected for _, expected in cases], kind


# --- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        (("{title}",), ["Red shoe"]),
        (("{colour} {kind} for {gender}. {title}",), ["red for men. Red shoe"]),  # kind is null
        (("{kind}",), []),
        (("{kind} {empty} {missing}",), []),
        (("{kind}", "{title}", "{title}"), ["Red shoe"]),
        (("a photo of {title}", "{colour}"), ["a photo of Red shoe", "red"]),
        (("{{sale}} {title} {{}}",), ["{sale} Red shoe {}"]),
        (("{tags}",), ["new", "wool, soft"]),
        (("{tags}!",), ["new, wool, soft, !"]),
        (("{no_tags}",), []),
        (("{name.en}, {name[0]}",), ["dotted, indexed"]),
        (("{price}",), ["9.5"]),
        (("{weight}",), []),  # NaN
    ],
)
def test_captions(templates: tuple[str, ...], expected: list[str]) -> None:
    row = {
        "title": " Red \n shoe ", "colour": "red", "kind": None, "gender": "men", "empty": "", "no_tags": [],
        "tags": ["new", "wool, soft", None], "name.en": "dotted", "name[0]": "indexed", "price": 9.5,
        "weight": float("nan"),
    }  # fmt: skip
    assert captions_of([row], templates).to_pylist() == [expected]


@pytest.mark.parametrize("template", ["no column", "{", "}", "{a!r}", "{a:>5}", "", "{{a}}"])
def test_what_is_no_template(template: str) -> None:
    with pytest.raises(ValueError, match="is no caption template|names no column|only plain"):
        template_columns(template)


def test_default_captions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"captions: required for a table.*\(columns: id, image, title\)"):
        default_captions(source_of(tmp_path, pairs(1)))
    (tmp_path / "hat").mkdir()
    (tmp_path / "hat" / "1.jpg").write_bytes(b"x")
    (tmp_path / "rows.jsonl").unlink()
    assert default_captions(open_source(SourceConfig(path=str(tmp_path)))) == ("a photo of {label}",)


# --- rows and reasons ------------------------------------------------------------------------------------------------


def test_every_row_is_planned_and_the_bad_ones_with_their_reason(tmp_path: Path) -> None:
    lines = [
        '{"id": 1, "image": "1.jpg", "title": "fine"}',
        "not json",
        '{"id": " ", "image": "2.jpg", "title": "no id"}',
        '{"id": 3, "image": "3.jpg", "title": " "}',
        '{"id": "1", "image": "4.jpg", "title": "the id of the first"}',
        '{"id": 5, "title": "no picture"}',
        '{"id": 6, "image": "6.jpg", "title": "cut in an emoji \\ud83d", "split": "../../elsewhere"}',
        '{"id": 7, "image": "\\udcff.jpg", "title": "no UTF-8"}',
        '{"id": 8, "image": "8.jpg", "title": "own split", "split": "hold-out.2"}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = open_source(SourceConfig(path=str(tmp_path / "t.jsonl")))
    rows = planned(source, columns=ColumnsConfig(split="split"), unit_rows=2)
    assert [row["reason"] for row in rows] == [
        None, "malformed_row", "empty_id", "empty_caption", "duplicate_id", None, "bad_split", "malformed_row", None,
    ]  # fmt: skip
    assert [row["id"] for row in rows] == ["1", None, None, "3", "1", "5", "6", "7", "8"]
    assert "t.jsonl:2: not valid JSON" in rows[1]["message"]
    assert rows[0]["image_uri"] == f"{tmp_path}/1.jpg"
    assert rows[5]["image_uri"] is None  # reading it is the reject
    assert rows[6]["captions"] == ["cut in an emoji ?"]
    assert rows[8]["split"] == "hold-out.2"
    assert all(row["message"] for row in rows if row["reason"])


def test_half_emoji_as_ids_do_not_stop_the_job(tmp_path: Path) -> None:
    rows = planned(source_of(tmp_path, [{"id": "a\ud83d", "image": "x", "title": "t\ud83d"}]))
    assert (rows[0]["id"], rows[0]["captions"]) == ("a?", ["t?"])


def test_a_catalog_row_without_a_caption_is_judged_like_any_other(tmp_path: Path) -> None:
    lines = [
        '{"id": 1, "image": "\\udcff.jpg", "title": "", "split": "a"}',
        '{"id": 2, "image": "x", "title": "", "split": "a/b"}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = open_source(SourceConfig(path=str(tmp_path / "t.jsonl")))
    rows = planned(source, columns=ColumnsConfig(split="split"), need_caption=False)
    assert [(row["reason"], row["message"].split(":")[0]) for row in rows] == [
        ("malformed_row", "the picture's path is not UTF-8"),
        ("bad_split", '"a/b" names no split'),
    ]


def test_units_have_the_rows_asked_for(tmp_path: Path) -> None:
    source = source_of(tmp_path, pairs(10))
    units = list(planning.plan_units(source, ColumnsConfig(), ("{title}",), SplitConfig(), 4))
    assert [len(unit) for unit in units] == [4, 4, 2]
    assert pa.concat_tables(units).column("id").to_pylist() == [str(n) for n in range(10)]
    assert {str(unit.schema) for unit in units} == {str(planning.plan_schema(ColumnsConfig()))}


def test_a_catalog_row_needs_no_caption(tmp_path: Path) -> None:
    source = source_of(tmp_path, [{"id": 1, "image": "x", "title": ""}, {"id": 1, "image": "y", "title": ""}])
    assert [row["reason"] for row in planned(source, need_caption=False)] == [None, "duplicate_id"]
    assert planned(source, captions=(), need_caption=False)[0]["captions"] == []


def test_without_an_id_column_the_path_is_the_id(tmp_path: Path) -> None:
    rows = [{"id": 1, "image": "x.jpg", "title": "a"}, {"id": 1, "image": "y.jpg", "title": "b"}]
    found = planned(source_of(tmp_path, rows), columns=ColumnsConfig(id=None))
    assert [(row["id"], row["reason"]) for row in found] == [(f"{tmp_path}/x.jpg", None), (f"{tmp_path}/y.jpg", None)]


# --- duplicates ------------------------------------------------------------------------------------------------------


def test_the_first_row_of_an_id_wins(tmp_path: Path) -> None:
    rows = [
        {"id": row_id, "image": f"{n}.jpg", "title": str(n)} for n, row_id in enumerate(["b", "a", "b", "c", "a", "b"])
    ]
    found = planned(source_of(tmp_path, rows), unit_rows=2)
    assert [row["captions"] for row in found if row["reason"] is None] == [["0"], ["1"], ["3"]]
    assert [row["reason"] for row in found].count("duplicate_id") == 3


# --- splits ----------------------------------------------------------------------------------------------------------


def words(count: int, seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    return ("".join(draw.choices(string.ascii_letters + "한글é", k=6)) for _ in range(count))


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.0), (0.2, 0.1), (0.0, 0.0), (0.01, 0.98), (0.0, 0.5)])
def test_shares_are_near_the_asked_ones(validation: float, test: float) -> None:
    config, count = SplitConfig(validation=validation, test=test), 20_000
    found = Counter(split_of(word, config) for word in words(count, seed=1))
    for name, share in (("validation", validation), ("test", test), ("train", 1 - validation - test)):
        deviation = 5 * np.sqrt(share * (1 - share) * count)  # five sigma
        assert abs(found[name] - share * count) <= deviation


def test_no_group_is_in_two_splits_and_order_does_not_matter(tmp_path: Path) -> None:
    groups = list(itertools.islice(itertools.cycle(words(60, seed=2)), 400))
    rows = [row | {"product": group} for row, group in zip(pairs(400), groups, strict=True)]
    columns, split = ColumnsConfig(group="product"), SplitConfig(validation=0.3, test=0.2)
    found = planned(source_of(tmp_path, rows), columns=columns, split=split)
    splits_of: dict[str, set[str]] = {}
    for row in found:
        splits_of.setdefault(row["group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert set.union(*splits_of.values()) == {"train", "validation", "test"}
    random.Random(0).shuffle(rows)
    again = planned(source_of(tmp_path, rows), columns=columns, split=split, unit_rows=7)
    assert {row["id"]: row["split"] for row in again} == {row["id"]: row["split"] for row in found}
    by_row = planned(source_of(tmp_path, rows), split=split)
    mixed = Counter((group, row["split"]) for row, group in zip(by_row, [r["product"] for r in rows], strict=True))
    assert len(mixed) > len(splits_of), "the control: without a group column, groups are torn"


def test_rows_without_a_group_are_their_own(tmp_path: Path) -> None:
    rows = [row | {"product": value} for row, value in zip(pairs(200), itertools.cycle([None, "", float("nan")]))]
    found = planned(
        source_of(tmp_path, rows), columns=ColumnsConfig(group="product"), split=SplitConfig(validation=0.5)
    )
    assert {row["group"] for row in found} == {None}
    assert len({row["split"] for row in found}) == 2


def test_another_seed_holds_out_others() -> None:
    keys = list(words(500, seed=3))
    first, second = ([split_of(key, SplitConfig(validation=0.5, seed=seed)) for key in keys] for seed in (0, 1))
    assert 150 < sum(a != b for a, b in zip(first, second, strict=True)) < 350


def test_a_larger_share_keeps_what_was_held_out() -> None:
    keys = list(words(2000, seed=4))
    small = {key for key in keys if split_of(key, SplitConfig(validation=0.1)) == "validation"}
    large = {key for key in keys if split_of(key, SplitConfig(validation=0.2)) == "validation"}
    assert small < large


def test_a_split_column_goes_before_the_hash(tmp_path: Path) -> None:
    rows = [row | {"part": part} for row, part in zip(pairs(300), itertools.cycle(["train", "test", None]))]
    found = planned(source_of(tmp_path, rows), columns=ColumnsConfig(split="part"), split=SplitConfig(validation=0.5))
    given = {part: {row["split"] for row in found[start::3]} for start, part in enumerate(["train", "test", None])}
    assert given == {"train": {"train"}, "test": {"test"}, None: {"train", "validation"}}


def test_a_column_that_tears_groups_is_refused_with_an_example(tmp_path: Path) -> None:
    """Also where one row has a split and the others get theirs by hash; not where the torn row is a reject."""

    def units(parts: list[tuple[str | None, str | None]], columns: ColumnsConfig) -> Iterator[pa.Table]:
        rows = [
            row | {"product": group, "part": part} for row, (group, part) in zip(pairs(len(parts)), parts, strict=True)
        ]
        split = SplitConfig(validation=0.0)
        plan = planning.plan_units(source_of(tmp_path, rows), columns, ("{title}",), split, 2)
        return planning.whole_groups(plan, columns)

    both = ColumnsConfig(group="product", split="part")
    torn = [
        ("a", "train"),
        ("b", "train"),
        ("b", "train"),
        ("a", "test"),
        ("c", "validation"),
        ("c", None),
        (None, "test"),
    ]
    with pytest.raises(UserError) as caught:
        list(units(torn, both))
    told = str(caught.value)
    assert '2 of 3 groups (product) are in more than one split, such as "a", which is in train and in test' in told
    assert "columns.split=null" in told
    whole = [("a", "train"), ("b", "test"), ("a", "train"), (None, "train"), (None, "test"), ("a", "no / split")]
    assert sum(len(unit) for unit in units(whole, both)) == 6
    for columns in (ColumnsConfig(split="part"), ColumnsConfig(group="product")):
        assert sum(len(unit) for unit in units(torn, columns)) == 7


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValidationError, match="leave nothing to train on"):
        SplitConfig(validation=0.5, test=0.5)


# --- batches ---------------------------------------------------------------------------------------------------------

NASTY = [
    "", " ", "a", " a ", "a\u00a0b", "\x1cx\x85", "\u3000", "two  spaces", "line\nbreak", "한글", "cut \ud83d", "nan", "1.0",
    "7", "-7", "1e400", "1_0", "٣", "yes", "FALSE", "train", "a/b", "x.jpg", "/abs.jpg", "file:///f.jpg", "s3://b/k",
    None, 7, -7, 10**30, 1.0, 0.1, float("nan"), float("inf"), True, False, [], ["a", None, " b "], [["a"], 1], {"k": "v"},
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_planned_alike_alone_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A batch of plain values goes through Arrow, one with odd values through Python, so rows one by one show whether
    the two ways agree; and no row depends on its neighbours but by its id."""
    draw = random.Random(seed)
    names = ("id", "image", "title", "tags", "product", "part", "price")
    columns = {name: [value for value in NASTY if draw.random() < draw.choice([0.2, 0.9])] or [""] for name in names}
    rows = [{name: draw.choice(values) for name, values in columns.items() if draw.random() < 0.9} for _ in range(400)]
    rows = [dict.fromkeys(names, "first"), *rows]
    path = tmp_path / "t.jsonl"
    lines = [json.dumps(row) for row in rows]
    for bad in ("[1]", "{", "7", ""):
        lines.insert(draw.randrange(1, len(lines)), bad)
    path.write_text("\n".join(lines))
    keep = ("price:float", "tags:string", "product:int", "part:bool", "title")
    how = ColumnsConfig(group="product", split="part", keep=keep)
    templates = ("{tags}", "{title} of  {product}", "{title}")
    found = []
    for size in (1, 7, 10_000):
        monkeypatch.setattr(batches, "BATCH_ROWS", size)
        monkeypatch.setattr(tables, "JSONL_BLOCK_LINES", size)
        source = open_source(SourceConfig(path=str(path)))
        found.append(repr(planned(source, templates, how, SplitConfig(validation=0.3), unit_rows=50)))
    assert found[0] == found[1] == found[2]
    assert found[0].count("'reason': 'malformed_row'") >= 3
    assert "'reason': 'duplicate_id'" in found[0]


def test_a_table_has_the_same_plan_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    values = [value for value in NASTY if isinstance(value, str) and "\ud83d" not in value]
    draw = random.Random(0)
    rows = [{name: draw.choice(values) for name in ("id", "image", "title", "part", "price")} for _ in range(300)]
    table = pa.Table.from_pylist(rows)
    how = ColumnsConfig(group="title", split="part", keep=("price:float",))
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=50)
    pq.write_table(pa.table([c.dictionary_encode() for c in table.columns], table.schema.names), tmp_path / "d.parquet")
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([table.schema.names, *(row.values() for row in rows)])
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plans = [
        repr(planned(open_source(SourceConfig(path=str(tmp_path / name))), ("{title}, {price}", "{title}"), how))
        for name in ("t.jsonl", "t.parquet", "d.parquet", "t.csv")
    ]
    assert plans[1:] == plans[:1] * 3
    assert {"duplicate_id", "empty_id", "empty_caption", "bad_split"} <= set(re.findall(r"'reason': '(\w+)'", plans[0]))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_texts_alone_need_no_pictures_but_captions(tmp_path: Path, name: str) -> None:
    rows = [{"id": "7", "title": "red shoe"}, {"id": "8", "title": ""}]
    (tmp_path / "t.csv").write_text("id,title\n7,red shoe\n8,\n")
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    catalog = {"source": {"path": str(tmp_path / name)}, "captions": ["{title}"]}
    values: dict[str, Any] = {"model": {"name": "m"}, "output": "o", "catalog": catalog}
    with pytest.raises(UserError, match='source.image_column: .* has no column "image"'):
        open_input(EmbedConfig(**values))
    (plan,) = open_input(EmbedConfig(**values, towers=("texts",))).plan()
    found = [(row["id"], row["image_uri"], row["captions"], row["reason"]) for row in plan.to_pylist()]
    assert found == [("7", None, ["red shoe"], None), ("8", None, [], "empty_caption")]
    catalog.pop("captions")
    with pytest.raises(ValidationError, match="without any there is no text to embed"):
        EmbedConfig(**values, towers=("texts",))


def test_a_dry_run_plans_the_same_first_unit_without_reading_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_ROWS", 3)
    rows = [{"id": n % 4, "image": f"{n}.jpg", "title": str(n)} for n in range(1000)]
    source = source_of(tmp_path, rows)
    whole = planned(source, unit_rows=5)
    read = []
    real = tables.image_uri
    monkeypatch.setattr(tables, "image_uri", lambda *args: read.append(1) or real(*args))
    assert planned(source, unit_rows=5, first_only=True) == whole[:5]
    assert [row["reason"] for row in whole[:5]] == [None, None, None, None, "duplicate_id"]
    assert len(read) < 10


def test_a_plan_takes_no_more_memory_for_more_rows(tmp_path: Path) -> None:
    def most(count: int) -> int:
        path = tmp_path / f"{count}.parquet"
        ids = pa.array(range(count))
        pq.write_table(pa.table({"id": ids, "image": ids.cast(pa.string()), "title": ids}), path, row_group_size=10_000)
        source = open_source(SourceConfig(path=str(path)))
        before, peak, rows = pa.total_allocated_bytes(), 0, 0
        for unit in planning.plan_units(source, COLUMNS, ("a title {title}",), SPLIT, 500):
            rows += len(unit)
            peak = max(peak, pa.total_allocated_bytes() - before)
        assert rows == count
        return peak

    assert most(160_000) < 1.5 * most(40_000)


def test_a_parquet_input(tmp_path: Path) -> None:
    table = pa.table({"id": pa.array([7, None], pa.int64()), "image": [b"x", b"y"], "title": [["a", "b"], None]})
    pq.write_table(table, tmp_path / "t.parquet")
    found = planned(open_source(SourceConfig(path=str(tmp_path / "t.parquet"))))
    assert [(row["id"], row["captions"], row["reason"]) for row in found] == [
        ("7", ["a", "b"], None),
        (None, [], "empty_id"),
    ]


def test_pictures_in_a_row_group_that_is_too_large_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP_BYTES", 100_000)
    table = pa.table({"id": [str(n) for n in range(64)], "image": [bytes([n]) * 4000 for n in range(64)]})
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=False)
    with pytest.raises(UserError, match="row group with 64 pictures, 264 kB, is read at once.*for example of 2 rows"):
        planned(open_source(SourceConfig(path=str(tmp_path / "t.parquet"))))
    pq.write_table(table, tmp_path / "t.parquet", use_dictionary=False, row_group_size=16)
    assert len(planned(open_source(SourceConfig(path=str(tmp_path / "t.parquet"))))) == 64
