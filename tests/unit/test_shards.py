"""Shards are ordinary Parquet and raw matrices at once; the Index over them answers as brute force does."""

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from clipdist import storage
from clipdist.config import UserError
from clipdist.ledger import begin
from clipdist.manifest import read_manifest
from clipdist.schema import Dtype, Stamp
from clipdist.scores import exact_scores
from clipdist.search import Index
from clipdist.shard_writer import encode_shard
from clipdist.shards import Shards, row_of_id
from tests.unit.some_shards import DTYPES, Vectors, encoded, some_vectors, stamp_of, vector_table, write_embeddings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 8, 512, 1152])
@pytest.mark.parametrize("rows", [1, 2, 255])
def test_the_raw_page_is_the_matrix(dim: int, rows: int, dtype: Dtype) -> None:
    vectors = some_vectors(rows, dim, dtype=dtype)
    data, file = encoded(vectors)
    assert (file.rows, file.row_groups, file.file_bytes, len(file.offsets)) == (rows, (rows,), len(data), 1)
    assert data[file.offsets[0] : file.offsets[0] + vectors.nbytes] == vectors.tobytes()


def test_every_bit_pattern_survives() -> None:
    vectors = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(-1, 64)  # NaN, inf, -0 and all others
    data, file = encoded(vectors)
    assert data[file.offsets[0] : file.offsets[0] + vectors.nbytes] == vectors.tobytes()


def test_a_page_that_is_not_raw_is_never_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of Arrow may cut pages or compress them in another way: better no shard than a wrong one."""
    real = pq.ParquetWriter
    for change in ({"max_rows_per_page": 100}, {"compression": "zstd"}, {"use_dictionary": True}):
        monkeypatch.setattr(pq, "ParquetWriter", lambda *a, _change=change, **k: real(*a, **{**k, **_change}))
        with pytest.raises(RuntimeError, match="one raw page"):
            encoded(np.repeat(some_vectors(1, 8), 4000, axis=0))


def test_rows_and_stamp_must_fit() -> None:
    vectors = some_vectors(3, 4, dtype="float32")
    for identity in ({"dim": 4}, {"dim": 5, "dtype": "float32"}):
        with pytest.raises(RuntimeError, match=r"the stamp says fixed_size_list"):
            encode_shard(vector_table(vectors), "images", Stamp("embeddings", identity))
    with pytest.raises(UserError, match="stored as int8; expected float16 or float32"):
        encode_shard(vector_table(vectors), "images", Stamp("embeddings", {"dim": 4, "dtype": "int8"}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_what_was_written(place: str, dtype: Dtype) -> None:
    parts = [some_vectors(rows, 16, seed=rows, dtype=dtype) for rows in (5, 1, 64)]
    write_embeddings(place, parts)
    shards = Shards(read_manifest(place, "embeddings"), "images")
    blocks = list(shards.blocks())
    assert [first for first, _ in blocks] == [0, 5, 6]
    for part, (_, block) in zip(parts, blocks, strict=True):
        assert block.dtype == shards.dtype == np.dtype(dtype)
        assert block.tobytes() == part.tobytes()
        assert isinstance(block, np.memmap) == (not place.startswith("s3://"))
    np.testing.assert_array_equal(shards.matrix(), np.concatenate(parts))
    assert shards.matrix().dtype == np.dtype(dtype)
    assert (len(shards), shards.dim) == (70, 16)


def test_a_shard_of_two_row_groups(tmp_path: Path) -> None:
    vectors = some_vectors(65_536 + 3, 2)
    shards = write_embeddings(str(tmp_path), [vectors])
    assert [(first, len(block)) for first, block in shards.blocks()] == [(0, 65_536), (65_536, 3)]
    np.testing.assert_array_equal(shards.matrix(), vectors)


def test_the_footer_tells_what_made_the_file() -> None:
    data, _ = encoded(some_vectors(3, 8, dtype="float32"))
    found = pq.read_metadata(io.BytesIO(data)).metadata
    assert set(found) == {b"ARROW:schema", b"clipdist", b"layout"}
    assert Stamp.from_json(json.loads(found[b"clipdist"])) == stamp_of(some_vectors(3, 8, dtype="float32"))
    assert found[b"layout"] == b"single_page"


@pytest.fixture(params=[(table, dtype) for table in ("images", "texts") for dtype in DTYPES], ids="-".join)
def lone_shard(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, pa.Table, Vectors]:
    """A shard that somebody got without the rest: its path, and what was written."""
    name, dtype = request.param
    vectors = some_vectors(40, 8, dtype=dtype)
    path = tmp_path / "shard.parquet"
    path.write_bytes(encoded(vectors, table=name)[0])
    return path, vector_table(vectors, table=name), vectors


def test_arrow_reads_a_shard(lone_shard: tuple[Path, pa.Table, Vectors]) -> None:
    path, table, _ = lone_shard
    assert pq.read_table(path).equals(table)


def test_duckdb_reads_a_shard(lone_shard: tuple[Path, pa.Table, Vectors]) -> None:
    path, table, vectors = lone_shard
    rows = duckdb.sql(f"select id, caption, price, embedding from '{path}'").fetchall()
    expected = zip(*(table.column(name).to_pylist() for name in ("id", "caption", "price")), strict=True)
    assert [row[:3] for row in rows] == list(expected)
    assert np.array_equal(np.array([row[3] for row in rows], np.float32), vectors.astype(np.float32))
    nearest = f"select id from '{path}' order by list_dot_product(embedding, ?::FLOAT[]) desc limit 1"
    assert duckdb.execute(nearest, [vectors[7].tolist()]).fetchall() == [(rows[7][0],)]


def test_polars_reads_a_shard(lone_shard: tuple[Path, pa.Table, Vectors]) -> None:
    path, table, vectors = lone_shard
    frame = polars.read_parquet(path)
    assert frame.columns == table.column_names
    for name in ("id", "caption", "price"):
        assert frame[name].to_list() == table.column(name).to_pylist()
    found = frame["embedding"].to_numpy()
    assert found.dtype == vectors.dtype
    assert np.array_equal(found, vectors)


def test_pandas_reads_a_shard(lone_shard: tuple[Path, pa.Table, Vectors]) -> None:
    path, table, vectors = lone_shard
    frame = pandas.read_parquet(path)
    assert list(frame.columns) == table.column_names
    assert frame["id"].tolist() == table.column("id").to_pylist()
    captions = table.column("caption").to_pylist()
    assert frame["caption"].isna().tolist() == [caption is None for caption in captions]
    assert frame["caption"].dropna().tolist() == [caption for caption in captions if caption is not None]
    found = np.stack(frame["embedding"])
    assert found.dtype == vectors.dtype
    assert np.array_equal(found, vectors)


def test_take_gives_rows_in_the_order_asked_for(place: str) -> None:
    parts = [some_vectors(rows, 4, seed=rows) for rows in (5, 1, 30)]
    shards = write_embeddings(place, parts)
    whole = shards.columns(["id", "caption", "price"])
    draw = np.random.default_rng(3)
    for rows in (draw.integers(0, 36, 50), np.arange(36)[::-1], np.array([35, 0, 5, 5]), np.array([4])):
        assert shards.take(rows, ["id", "caption", "price"]).equals(whole.take(pa.array(rows)))
    assert shards.take(np.zeros(0, np.int64), ["id", "price"]).num_rows == 0
    assert shards.column_names() == ["id", "caption", "image_uri", "group", "split", "price"]
    assert row_of_id(shards, whole.column("id")[7].as_py()) == 7
    assert row_of_id(shards, "none") is None


@pytest.mark.parametrize("left", [0.0, 0.5, 0.99, None])
def test_a_damaged_shard_is_told_as_such(place: str, left: float | None) -> None:
    """Cut off, or gone: a message with its path, from every way to read it."""
    shards = write_embeddings(place, [some_vectors(3, 256), some_vectors(200, 256)])
    file = shards.manifest.select("images")[1]
    path = shards.manifest.path(file)
    data = storage.read_bytes(path)
    storage.remove(path)
    if left is not None:
        storage.write_atomic(path, data[: int(len(data) * left)])
    with pytest.raises(UserError, match=f"{file.path}: this shard is missing, unreadable or shorter"):
        shards.take(np.array([100]), ["id"])
    with pytest.raises(UserError, match=f"{file.path}: this shard is missing, unreadable or shorter"):
        Shards(replace(shards.manifest, files=(file,)), "images").column_names()
    if left != 0.99:  # the end of a shard holds no vectors
        with pytest.raises(UserError, match=f"{file.path}: this shard is missing, unreadable or shorter"):
            list(shards.blocks())
    assert shards.take(np.array([2]), ["id"]).num_rows == 1, "the other shard is as good as before"


def test_a_foreign_file_is_told_as_such(place: str) -> None:
    shards = write_embeddings(place, [some_vectors(3, 4)])
    path = shards.manifest.path(shards.manifest.files[0])
    for other in (pa.table({"id": ["a", "b"]}), pa.table({"name": ["a", "b", "c"]})):
        buffer = io.BytesIO()
        pq.write_table(other, buffer)
        storage.write_atomic(path, buffer.getvalue())
        with pytest.raises(UserError, match=f"{shards.manifest.files[0].path}: this shard is missing, unreadable"):
            shards.columns(["id"])


# --- Index -----------------------------------------------------------------------------------------------------------


def brute_force(ids: Sequence[str], vectors: Vectors, query: NDArray[Any], k: int) -> list[tuple[str, float]]:
    """The definition: by exact score, ties by id."""
    scores = exact_scores(vectors, query.astype(np.float64))
    order = sorted((row for row in range(len(ids)) if np.isfinite(scores[row])), key=lambda i: (-scores[i], ids[i]))
    return [(ids[row], float(scores[row])) for row in order[:k]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 1000])
def test_search_is_brute_force(place: str, k: int, dtype: Dtype) -> None:
    vectors = some_vectors(90, 16, dtype=dtype)
    vectors[50:60] = vectors[40]  # ties, across two shards
    vectors[3, 2] = np.nan
    write_embeddings(place, [vectors[:45], vectors[45:46], vectors[46:]])
    index = Index.open(place)
    ids = index.shards.columns(["id"]).column("id").to_pylist()
    queries = np.concatenate([some_vectors(3, 16, seed=9), vectors[40:41]]).astype(np.float32)
    hits = index.search(queries, k)
    assert [len(scores) for scores in hits.scores] == [len(rows) for rows in hits.rows] == [min(k, 89)] * 4
    for number, query in enumerate(queries):
        found = list(zip(hits.ids[number], hits.scores[number].tolist(), strict=True))
        assert found == brute_force(ids, vectors, query, k)
        assert [ids[row] for row in hits.rows[number]] == list(hits.ids[number])
        described = index.describe(hits.rows[number][:5])
        assert [row["id"] for row in described] == list(hits.ids[number])[:5]
    assert len(set(hits.scores[3][:7])) == 1, "the last query has ties, or this test proves nothing"


def test_any_form_of_query(tmp_path: Path) -> None:
    vectors = some_vectors(20, 4)
    write_embeddings(str(tmp_path), [vectors])
    index = Index.open(str(tmp_path))
    expected = index.search(vectors[2].astype(np.float64), 3)
    for query in (vectors[2], vectors[2].astype(np.float32), vectors[2:3], vectors[2].astype(np.float64).tolist()):
        found = index.search(query, 3)
        assert found.ids == expected.ids
        np.testing.assert_array_equal(found.scores, expected.scores)
    assert index.search([1, 0, 0, 0], 1).scores[0].item() == vectors[:, 0].max()
    with pytest.raises(ValueError, match="5"):
        index.search(np.ones(5, np.float32))


def test_the_vector_of_an_id(place: str) -> None:
    vectors = some_vectors(6, 4)
    index = Index(write_embeddings(place, [vectors[:2], vectors[2:]]))
    ids = index.shards.columns(["id"]).column("id").to_pylist()
    for row, row_id in enumerate(ids):
        np.testing.assert_array_equal(index.vector(row_id), vectors[row].astype(np.float32))
    with pytest.raises(KeyError, match="none"):
        index.vector("none")


def test_an_empty_table(tmp_path: Path) -> None:
    write_embeddings(str(tmp_path), [some_vectors(0, 4)])
    index = Index.open(str(tmp_path))
    assert len(index) == 0
    hits = index.search(np.ones((2, 4)), 5)
    assert (hits.ids, [len(scores) for scores in hits.scores]) == ([[], []], [0, 0])
    assert index.describe(hits.rows[0]) == []
    assert index.shards.matrix().shape == (0, 4)
    assert row_of_id(index.shards, "x") is None


def test_what_cannot_be_searched(tmp_path: Path) -> None:
    write_embeddings(str(tmp_path / "embeddings"), [some_vectors(1, 4)])
    with pytest.raises(UserError, match=r"has no texts \(there: images\)"):
        Index.open(str(tmp_path / "embeddings"), "texts")
    with pytest.raises(UserError, match="no such folder"):
        Index.open(str(tmp_path / "nothing"))
    begin(str(tmp_path / "pairs"), Stamp("pairs", {}), lambda: iter([])).publish()
    with pytest.raises(UserError, match="expected embeddings, this folder holds pairs"):
        Index.open(str(tmp_path / "pairs"))


@pytest.mark.parametrize(("module", "heavy"), [("search", []), ("images", ["PIL"])])
def test_a_laptop_can_search_with_numpy_and_pyarrow(module: str, heavy: list[str]) -> None:
    code = f"import sys, json, clipdist.{module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert [name for name in ("torch", "ray", "PIL", "open_clip", "s3fs", "matplotlib") if name in loaded] == heavy
