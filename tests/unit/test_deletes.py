"""A deleted row is never seen, by any reader; the rows that live are numbered as if it had never been."""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from clipdist import info, shard_writer, storage
from clipdist.config import UserError
from clipdist.deletes import deleted_rows, write_deletes
from clipdist.evaluate import EvaluateConfig, read_measured
from clipdist.evaluate import run as evaluate
from clipdist.ledger import begin
from clipdist.manifest import Manifest, read_manifest
from clipdist.schema import Dtype
from clipdist.scores import exact_scores
from clipdist.search import Index
from clipdist.shard_writer import encode_shard
from clipdist.shards import Shards, row_of_id
from tests.unit.some_shards import DTYPES, Vectors, encoded, some_vectors, stamp_of, vector_table, write_embeddings

COLUMNS = ["id", "caption", "price"]
SIZES = (25, 1, 14, 10)
CASES: dict[str, list[int]] = {
    "none": [],
    "some": [0, 9, 10, 24, 26, 33],
    "first and last": [0, 49],
    "a row group": list(range(10, 20)),
    "a row group and its neighbours": list(range(9, 21)),
    "a file": [25],
    "two files": list(range(25, 40)),
    "the last file": list(range(40, 50)),
    "all but one": [row for row in range(50) if row != 17],
    "all": list(range(50)),
}


def with_deletes(manifest: Manifest, *files: bytes) -> Manifest:
    """The manifest after the deletes, written beside the first one as its successor."""
    names = tuple(f"deletes/{number}.parquet" for number in range(len(files)))
    for name, data in zip(names, files, strict=True):
        storage.write_atomic(storage.join(manifest.uri, name), data)
    after = replace(manifest, delete_files=names)
    storage.write_atomic(storage.join(manifest.uri, "manifests/00000002.json"), json.dumps(after.to_json()).encode())
    with contextlib.suppress(UserError):  # that they do not fit is for readers to find
        tables = Counter(file.table for file in manifest.files for _ in deleted_rows(after).get(file.path, ()))
        after = replace(after, deleted=dict(tables))
    storage.write_atomic(storage.join(manifest.uri, "manifests/00000002.json"), json.dumps(after.to_json()).encode())
    return read_manifest(manifest.uri)


def by_file(manifest: Manifest, rows: Sequence[int]) -> dict[str, NDArray[np.int64]]:
    """Row numbers of the whole table as rows of its files."""
    found: dict[str, NDArray[np.int64]] = {}
    start = 0
    for file in manifest.files:
        found[file.path] = np.array([row - start for row in rows if start <= row < start + file.rows], np.int64)
        start += file.rows
    return found


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> list[int]:
    return CASES[request.param]


@pytest.fixture
def small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "ROW_GROUP", 10)


def table_without(uri: str, vectors: Vectors, rows: Sequence[int]) -> tuple[Shards, pa.Table]:
    """The table without the rows; all columns as they were before."""
    before = write_embeddings(uri, np.split(vectors, np.cumsum(SIZES)[:-1]))
    whole = before.columns(COLUMNS)
    return Shards(with_deletes(before.manifest, write_deletes(by_file(before.manifest, rows))), "images"), whole


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_row_groups")
def test_every_reader_sees_the_rows_that_live(tmp_path: Path, case: list[int], dtype: Dtype) -> None:
    every_reader_sees_the_rows_that_live(str(tmp_path), case, dtype)


@pytest.mark.usefixtures("small_row_groups")
def test_every_reader_of_a_store_sees_the_rows_that_live(place: str) -> None:
    every_reader_sees_the_rows_that_live(place, CASES["a row group and its neighbours"], "float32")


def every_reader_sees_the_rows_that_live(place: str, case: list[int], dtype: Dtype) -> None:
    vectors = some_vectors(50, 4, dtype=dtype)
    found, whole = table_without(place, vectors, case)
    live = np.setdiff1d(np.arange(50), case)
    expected = whole.take(pa.array(live))
    assert len(found) == len(live)
    assert found.matrix().tobytes() == vectors[live].tobytes()
    assert found.columns(COLUMNS).to_pylist() == expected.to_pylist()
    for rows in (np.arange(len(live)), np.arange(len(live))[::-1], np.random.default_rng(1).permutation(len(live))[:7]):
        assert found.take(rows, COLUMNS).to_pylist() == expected.take(pa.array(rows)).to_pylist()
    for number, row_id in enumerate(whole.column("id").to_pylist()):
        place_now = int(np.searchsorted(live, number)) if number in live else None
        assert row_of_id(found, row_id) == place_now
        if place_now is None:
            with pytest.raises(KeyError):
                Index(found).vector(row_id)
        else:
            np.testing.assert_array_equal(Index(found).vector(row_id), vectors[number].astype(np.float32))


@pytest.mark.usefixtures("small_row_groups")
def test_numbers_of_blocks_are_without_gaps(tmp_path: Path, case: list[int]) -> None:
    found, _ = table_without(str(tmp_path), some_vectors(50, 4), case)
    blocks = list(found.blocks())
    assert [first for first, _ in blocks] == [sum(len(block) for _, block in blocks[:n]) for n in range(len(blocks))]
    assert all(len(block) for _, block in blocks)
    for (_, block), (start, stop) in zip(blocks, touched_row_groups(case), strict=True):
        assert isinstance(block, np.memmap) == (not set(case) & set(range(start, stop))), (
            "copied only where rows are gone"
        )


def touched_row_groups(gone: Sequence[int]) -> list[tuple[int, int]]:
    """(first, stop) of the row groups with a row that lives."""
    groups, start = [], 0
    for size in SIZES:
        groups += [(start + at, start + min(at + 10, size)) for at in range(0, size, 10)]
        start += size
    return [(first, stop) for first, stop in groups if not set(range(first, stop)) <= set(gone)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", ["images", "texts"])
@pytest.mark.usefixtures("small_row_groups")
def test_search_finds_what_lives(tmp_path: Path, case: list[int], table: str, dtype: Dtype) -> None:
    """Pictures by text and captions by picture; with ties over files, of which some are deleted."""
    vectors = some_vectors(50, 4, dtype=dtype)
    vectors[5:45] = vectors[5]
    before = write_embeddings(str(tmp_path), np.split(vectors, np.cumsum(SIZES)[:-1]), table)
    ids = before.columns(["id"]).column("id").to_pylist()
    with_deletes(before.manifest, write_deletes(by_file(before.manifest, case)))
    index = Index.open(str(tmp_path), table)
    live = np.setdiff1d(np.arange(50), case)
    assert len(index) == len(live)
    for query in (vectors[5], *some_vectors(2, 4, seed=9)):
        scores = exact_scores(vectors[live], query.astype(np.float64))
        order = sorted(range(len(live)), key=lambda n: (-scores[n], ids[live[n]]))
        hits = index.search(query.astype(np.float32), 50)
        assert list(hits.ids[0]) == [ids[live[n]] for n in order]
        assert hits.rows[0].tolist() == order
        assert hits.scores[0].tolist() == scores[order].tolist()
        assert [row["id"] for row in index.describe(hits.rows[0])] == list(hits.ids[0])
    if case:
        gone = Index(before).search(vectors[case[0]].astype(np.float32), 50)
        assert ids[case[0]] in gone.ids[0], "before, the row was found, or this test proves nothing"


def both_tables(uri: str, images: Vectors, texts: Vectors) -> Manifest:
    book = begin(uri, stamp_of(images), lambda: iter([pa.table({"unit": [0]})]))
    captions = vector_table(texts, table="texts")
    place = captions.column_names.index("caption")
    captions = captions.set_column(place, captions.field(place), captions.column("image_uri"))  # a text is never null
    tables: dict[tuple[str, str | None], Any] = {
        ("images", None): encoded(images),
        ("texts", None): encode_shard(captions, "texts", stamp_of(texts)),
    }
    book.commit(0, tables, {"images": len(images), "texts": len(texts)}, [])
    return book.publish()


@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluate_measures_what_lives(tmp_path: Path, dtype: Dtype) -> None:
    """A deleted picture takes its captions from the queries, a deleted caption only itself."""
    uri = str(tmp_path / "embeddings")
    images, texts = (some_vectors(20, 4, seed=seed, dtype=dtype) for seed in (1, 2))
    manifest = both_tables(uri, images, texts)
    ids = Shards(manifest, "images").columns(["id"]).column("id").to_pylist()
    files = {file.table: file.path for file in manifest.files}
    with_deletes(manifest, write_deletes({files["images"]: np.array([3, 7]), files["texts"]: np.array([7, 11])}))
    found = read_measured(EvaluateConfig(embeddings=uri, output=str(tmp_path / "metrics")))
    for rows, vectors, column, live in (
        (found.image_rows, found.images, "id", [n for n in range(20) if n not in (3, 7)]),
        (found.text_rows, found.texts, "pair_id", [n for n in range(20) if n not in (3, 7, 11)]),
    ):
        order = sorted(live, key=lambda n: ids[n])
        assert rows.column(column).to_pylist() == [ids[n] for n in order]
        np.testing.assert_array_equal(vectors, (images if column == "id" else texts)[order].astype(np.float32))
    facts = info.describe(uri)
    assert (facts["rows"], facts["deleted"]) == ({"images": 18, "texts": 18}, {"images": 2, "texts": 2})
    with_deletes(manifest, write_deletes({files["texts"]: np.arange(20)}))
    with pytest.raises(UserError, match="has no texts"):
        read_measured(EvaluateConfig(embeddings=uri, output=str(tmp_path / "metrics")))


def test_metrics_of_before_the_deletes_are_not_taken_for_those_of_now(tmp_path: Path) -> None:
    uri, vectors = str(tmp_path / "embeddings"), some_vectors(20, 4)
    manifest = both_tables(uri, vectors, vectors)
    config = EvaluateConfig(embeddings=uri, output=str(tmp_path / "metrics"), heatmap_rows=2, example_queries=0)
    assert evaluate(config)["gallery"]["pictures"] == "20"
    assert evaluate(config)["gallery"]["pictures"] == "20"
    with_deletes(manifest, write_deletes({manifest.files[0].path: np.array([3])}))
    with pytest.raises(UserError, match=r"delete_files: nothing there, \["):
        evaluate(config)
    other = config.model_copy(update={"output": str(tmp_path / "now")})
    assert evaluate(other)["gallery"]["pictures"] == "19"


def test_several_delete_files_and_repeats(tmp_path: Path) -> None:
    vectors = some_vectors(50, 4)
    before = write_embeddings(str(tmp_path), np.split(vectors, np.cumsum(SIZES)[:-1]))
    first, *_, last = [file.path for file in before.manifest.files]
    parts: list[Mapping[str, NDArray[Any]]] = [
        {first: np.array([3, 1, 3])},
        {},
        {last: np.array([0], np.int32), first: np.array([1, 2])},
    ]
    found = Shards(with_deletes(before.manifest, *map(write_deletes, parts)), "images")
    np.testing.assert_array_equal(found.matrix(), np.delete(vectors, [1, 2, 3, 40], axis=0))
    assert info.describe(str(tmp_path))["rows"] == {"images": 46}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"images/other.parquet": [1]}, "damaged: it deletes rows of images/other.parquet, which is no file of this"),
        ({None: [3]}, "damaged: it deletes row 3 of images/.*, which has 3 rows"),
        ({None: [-1]}, "damaged: it deletes row -1 of images/.*, which has 3 rows"),
    ],
)
def test_deletes_that_do_not_fit(place: str, rows: dict[str | None, list[int]], message: str) -> None:
    """Every way in says so: rows that are meant to be gone must not come back in silence."""
    manifest = write_embeddings(place, [some_vectors(3, 4)]).manifest
    own = manifest.files[0].path
    manifest = with_deletes(manifest, write_deletes({path or own: np.array(numbers) for path, numbers in rows.items()}))
    for read in (len, Shards.matrix, lambda s: s.columns(["id"]), lambda s: s.take(np.array([0]), ["id"])):
        with pytest.raises(UserError, match=f"{manifest.delete_files[0]}: {message}"):
            read(Shards(manifest, "images"))


@pytest.mark.parametrize("left", [0.0, 0.5, None])
def test_a_damaged_file_of_deletes_is_named(place: str, left: float | None) -> None:
    manifest = write_embeddings(place, [some_vectors(3, 4)]).manifest
    data = write_deletes({manifest.files[0].path: np.array([1])})
    manifest = with_deletes(manifest, data if left is None else data[: int(len(data) * left)])
    if left is None:
        storage.remove(storage.join(place, manifest.delete_files[0]))
    with pytest.raises(UserError, match="deletes/0.parquet: this file of deleted rows is missing or damaged"):
        Shards(manifest, "images").matrix()
