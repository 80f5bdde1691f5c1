"""Mining: the hits of every query, once, as one Index finds them, whatever is killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdist import mine
from clipdist.cli import main
from clipdist.config import UserError
from clipdist.ledger import begin
from clipdist.manifest import Manifest, read_manifest
from clipdist.mine import MineConfig, hits_of
from clipdist.remove import remove
from clipdist.search import Index
from clipdist.shard_writer import encode_shard
from tests.unit.some_shards import some_vectors, stamp_of, vector_table

DIM, ROWS = 16, 90


def both_tables(uri: str) -> str:
    """Embeddings of 90 pictures in three files, with two texts of each."""
    pictures, texts = some_vectors(ROWS, DIM, 1), some_vectors(2 * ROWS, DIM, 2)
    book = begin(uri, stamp_of(pictures), lambda: iter([pa.table({"unit": [n]}) for n in range(3)]))
    ids = vector_table(pictures).column("id").to_pylist()
    for unit in range(3):
        part = slice(30 * unit, 30 * unit + 30)
        shown = encode_shard(vector_table(pictures[part], 30 * unit), "images", stamp_of(pictures))
        told = vector_table(texts[60 * unit : 60 * unit + 60], 60 * unit, "texts")
        names = [(f"{row_id}#{n}", row_id) for row_id in ids[part] for n in (0, 1)]
        for column, values in zip(("id", "pair_id"), zip(*names, strict=True), strict=True):
            place = told.schema.get_field_index(column)
            told = told.set_column(place, told.schema.field(place), pa.array(values, pa.string()))
        written = {("images", None): shown, ("texts", None): encode_shard(told, "texts", stamp_of(texts))}
        book.commit(unit, written, {"images": 30, "texts": 60}, [])
    book.publish()
    return uri


@pytest.fixture
def embeddings(tmp_path: Path, local_ray: None) -> str:
    uri = both_tables(str(tmp_path / "embeddings"))
    remove(uri, [row["id"] for row in Index.open(uri).describe(np.array([3, 31, 89]))])
    return uri


def config(embeddings: str, tmp_path: Path, **more: Any) -> MineConfig:
    given = {"queries": embeddings, "output": str(tmp_path / "hits"), "unit_rows": 25, "top": 4, "actors": 2}
    return MineConfig(embeddings=embeddings, **(given | more))


def mined(manifest: Manifest) -> dict[str, list[tuple[str, float]]]:
    found: dict[str, list[tuple[str, float]]] = {}
    for table in hits_of(manifest):
        for row in table.to_pylist():
            found.setdefault(row["query_id"], []).append((row["id"], row["score"]))
            assert row["rank"] == len(found[row["query_id"]])
    return found


def expected(embeddings: str, find: str, query_table: str, top: int, exclude_self: bool, **options: Any) -> Any:
    index, queries = Index.open(embeddings, find), Index.open(embeddings, query_table)
    rows = queries.describe(np.arange(len(queries)))
    ranking = index.search(queries.shards.matrix(), len(index), **options)
    owner = {row["id"]: row.get("pair_id", row["id"]) for row in index.describe(np.arange(len(index)))}
    answers = {}
    for row, ids, scores in zip(rows, ranking.ids, ranking.scores, strict=True):
        own = row.get("pair_id", row["id"])
        pairs = [(i, s) for i, s in zip(ids, scores, strict=True) if not (exclude_self and owner[i] == own)]
        if pairs:
            answers[row["id"]] = pairs[:top]
    return answers


@pytest.mark.parametrize(
    ("find", "query_table", "exclude_self", "options"),
    [
        ("images", "texts", False, {}),
        ("images", "texts", True, {"where": "price < 15"}),
        ("texts", "images", True, {}),
        ("texts", "texts", True, {"min_score": 0.3}),
        ("images", "images", True, {}),
    ],
)
def test_hits_are_those_of_one_index(
    embeddings: str, tmp_path: Path, find: str, query_table: str, exclude_self: bool, options: dict[str, Any]
) -> None:
    told = config(embeddings, tmp_path, find=find, query_table=query_table, exclude_self=exclude_self, **options)
    manifest = mine.run(told)
    found = mined(manifest)
    assert found == expected(embeddings, find, query_table, 4, exclude_self, **options)
    assert found != expected(embeddings, find, query_table, 4, not exclude_self, **options)
    assert manifest.planned == {"hits": sum(map(len, found.values()))}
    assert read_manifest(manifest.uri, "hits") == manifest


def test_hits_on_a_store(s3_bucket: str, tmp_path: Path, local_ray: None) -> None:
    bucket = f"{s3_bucket}/{tmp_path.name}"
    uri = both_tables(f"{bucket}/embeddings")
    remove(uri, [row["id"] for row in Index.open(uri).describe(np.array([3, 31]))])
    manifest = mine.run(config(uri, tmp_path, output=f"{bucket}/hits", exclude_self=True))
    assert mined(manifest) == expected(uri, "images", "texts", 4, True)
    assert mine.run(config(uri, tmp_path, output=f"{bucket}/hits", exclude_self=True)) == manifest


def test_a_rerun_does_nothing_and_other_settings_are_refused(embeddings: str, tmp_path: Path) -> None:
    told = config(embeddings, tmp_path)
    manifest = mine.run(told)
    files = {path: path.stat().st_mtime_ns for path in Path(manifest.uri).rglob("*") if path.is_file()}
    assert mine.run(told) == manifest
    assert mine.run(told.model_copy(update={"actors": 1})) == manifest
    assert {path: path.stat().st_mtime_ns for path in Path(manifest.uri).rglob("*") if path.is_file()} == files
    with pytest.raises(UserError, match="top: 4 there, 5 now"):
        mine.run(told.model_copy(update={"top": 5}))
    remove(embeddings, [next(iter(mined(manifest).values()))[0][0]])
    with pytest.raises(UserError, match="searched.manifest: 2 there, 3 now"):
        mine.run(told)


def test_any_parquet_holds_queries_and_unusable_ones_are_rejects(embeddings: str, tmp_path: Path) -> None:
    vectors = some_vectors(40, DIM, 7, "float32")
    vectors[5, 3] = np.nan
    lists: list[Any] = [row.tolist() for row in vectors]
    lists[6], lists[7] = None, [1.0]
    folder = tmp_path / "queries"
    folder.mkdir()
    for start in (0, 20):
        table = pa.table(
            {
                "id": pa.array([None if start + n == 8 else start + n for n in range(20)], pa.int64()),
                "embedding": pa.array(lists[start : start + 20], pa.list_(pa.float32())),
            }
        )
        pq.write_table(table, folder / f"{start}.parquet", row_group_size=7)
    told = config(embeddings, tmp_path, queries=str(folder), max_rejected_fraction=0.2)
    manifest = mine.run(told)
    found, good = mined(manifest), [row for row in range(40) if row not in (5, 6, 7, 8)]
    assert sorted(found) == sorted(map(str, good))
    ranking = Index.open(embeddings).search(vectors[good], 4)
    for row, ids, scores in zip(good, ranking.ids, ranking.scores, strict=True):
        assert found[str(row)] == list(zip(ids, scores, strict=True))
    assert manifest.rejected == {"hits": {"unusable_query": 4}}
    few = told.model_copy(update={"max_rejected_fraction": 0.05, "output": str(tmp_path / "other")})
    with pytest.raises(UserError, match=r"4 of 40 queries hold no usable vector.*\n.*NaN"):
        mine.run(few)


def test_all_that_is_wrong_with_queries_is_told(embeddings: str, tmp_path: Path) -> None:
    folder = tmp_path / "queries"
    folder.mkdir()
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(16, np.float32)), 8)
    pq.write_table(pa.table({"id": ["1", "2"], "embedding": fixed}), folder / "a.parquet")
    pq.write_table(pa.table({"name": ["1"]}), folder / "b.parquet")
    pq.write_table(pa.table({"id": ["1"], "embedding": [[1]]}), folder / "c.parquet")
    with pytest.raises(UserError) as told:
        mine.dry_run(config(embeddings, tmp_path, queries=str(folder)))
    assert [problem.split(": ", 2)[2] for problem in told.value.problems] == [
        "vectors of 8 dimensions, the searched ones have 16",
        "has no column id and no embedding (there: name)",
        "embedding holds lists of int64; expected floating-point numbers",
    ]
    for place, what in (
        (tmp_path / "nothing", "no such file or folder"),
        (tmp_path, "finished|holds no|has no column"),
    ):
        with pytest.raises(UserError, match=what):
            mine.dry_run(config(embeddings, tmp_path, queries=str(place)))


def test_a_killed_job_goes_on(embeddings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"embeddings={embeddings}", f"queries={embeddings}", "unit_rows=2", "top=4", "actors=1"]
    output = tmp_path / "killed"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "clipdist.cli", "mine", *settings, f"output={output}"]
    job = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((output / "commits").glob("*.json"))) < 5:
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    done = {path: path.stat().st_mtime_ns for path in (output / "commits").glob("*.json")}
    assert 5 <= len(done) < 87
    assert main(["mine", *settings, f"output={output}"]) == 0
    assert capsys.readouterr().out.startswith("hits    696\n")
    assert {path: path.stat().st_mtime_ns for path in done} == done, "committed units were not done again"
    manifest = read_manifest(str(output), "hits")
    assert mined(manifest) == expected(embeddings, "images", "texts", 4, False)
    assert len(manifest.files) == len(list((output / "hits").iterdir())) == 87
    assert json.loads((output / "manifests" / "00000001.json").read_text())["stamp"]["kind"] == "hits"
