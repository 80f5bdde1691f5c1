"""Shards are ordinary Parquet and raw matrices at once; the Index over them answers as brute force does."""

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from clipdist import storage
from clipdist.config import UserError
from clipdist.ledger import begin
from clipdist.manifest import read_manifest
from clipdist.schema import Stamp, embeddings_schema
from clipdist.search import Index
from clipdist.shards import Shards, encode_shard, row_of_id
from clipdist.topk import exact_scores

ROOT = Path(__file__).parents[2]
Halves = NDArray[np.float16]


def some_vectors(rows: int, dim: int, seed: int = 0) -> Halves:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim))
    halves: Halves = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    return halves


def image_table(vectors: Halves, first: int = 0) -> pa.Table:
    """Rows as `embed` writes them; ids are not in row order, and "10" comes before "9"."""
    schema = embeddings_schema("images", vectors.shape[1], [pa.field("price", pa.float64())])
    rows = range(first, first + len(vectors))
    values: dict[str, Any] = {name: pa.nulls(len(vectors), schema.field(name).type) for name in schema.names}
    values["id"] = pa.array([str(row * 7919 % 100_003) for row in rows], pa.string())
    values["caption"] = pa.array([None if row % 3 else f"신발 {row}" for row in rows], pa.string())
    values["image_uri"] = pa.array([f"/pictures/{row}.jpg" for row in rows], pa.string())
    values["price"] = pa.array([row / 4 for row in rows], pa.float64())
    flat = pa.array(vectors.reshape(-1), pa.float16())
    values["embedding"] = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type)
    return pa.table([values[name] for name in schema.names], schema=schema)


def write_embeddings(uri: str, parts: Sequence[Halves], dim: int) -> Shards:
    """A finished embeddings artefact with one shard per part."""
    plan = [pa.table({"unit": [number]}) for number in range(len(parts))]
    book = begin(uri, Stamp("embeddings", {"dim": dim}), lambda: (iter(plan), {}))
    first = 0
    for unit, part in enumerate(parts):
        tables: dict[tuple[str, str | None], Any] = {("images", None): encode_shard(image_table(part, first), "images")}
        book.commit(unit, tables, {"images": len(part)}, [])
        first += len(part)
    return Shards(book.publish(), "images")


@pytest.mark.parametrize("dim", [1, 3, 8, 512, 1152])
@pytest.mark.parametrize("rows", [1, 2, 255])
def test_the_raw_page_is_the_matrix(dim: int, rows: int) -> None:
    vectors = some_vectors(rows, dim)
    data, file = encode_shard(image_table(vectors), "images")
    assert (file.rows, file.row_groups, file.file_bytes, len(file.offsets)) == (rows, (rows,), len(data), 1)
    raw = data[file.offsets[0] : file.offsets[0] + rows * dim * 2]
    assert raw == vectors.tobytes()


def test_every_bit_pattern_survives() -> None:
    vectors = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(-1, 64)  # NaN, inf, -0 and all others
    data, file = encode_shard(image_table(vectors), "images")
    assert data[file.offsets[0] : file.offsets[0] + vectors.nbytes] == vectors.tobytes()


def test_blocks_are_what_was_written(place: str) -> None:
    parts = [some_vectors(rows, 16, seed=rows) for rows in (5, 1, 64)]
    write_embeddings(place, parts, 16)
    shards = Shards(read_manifest(place, "embeddings"), "images")
    blocks = list(shards.blocks())
    assert [first for first, _ in blocks] == [0, 5, 6]
    for part, (_, block) in zip(parts, blocks, strict=True):
        assert block.dtype == np.float16
        assert block.tobytes() == part.tobytes()
        assert isinstance(block, np.memmap) == (not place.startswith("s3://"))
    np.testing.assert_array_equal(shards.matrix(), np.concatenate(parts))
    assert (len(shards), shards.dim) == (70, 16)


def test_a_shard_of_two_row_groups(tmp_path: Path) -> None:
    vectors = some_vectors(65_536 + 3, 2)
    shards = write_embeddings(str(tmp_path), [vectors], 2)
    assert [(first, len(block)) for first, block in shards.blocks()] == [(0, 65_536), (65_536, 3)]
    np.testing.assert_array_equal(shards.matrix(), vectors)


def test_other_readers_see_plain_parquet(tmp_path: Path) -> None:
    table = image_table(some_vectors(40, 8))
    data, _ = encode_shard(table, "images")
    assert pq.read_table(io.BytesIO(data)).equals(table)
    path = tmp_path / "shard.parquet"
    path.write_bytes(data)
    ids = table.column("id").to_pylist()
    for name in ("duckdb", "polars"):
        try:
            reader: Any = __import__(name)
        except ImportError:
            continue
        if name == "duckdb":
            found = [row[0] for row in reader.sql(f"select id from '{path}'").fetchall()]
        else:
            found = reader.read_parquet(path, columns=["id"])["id"].to_list()
        assert found == ids


def test_take_gives_rows_in_the_order_asked_for(place: str) -> None:
    parts = [some_vectors(rows, 4, seed=rows) for rows in (5, 1, 30)]
    shards = write_embeddings(place, parts, 4)
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
    shards = write_embeddings(place, [some_vectors(3, 256), some_vectors(200, 256)], 256)
    file = shards.manifest.select("images")[1]
    path = shards.manifest.path(file)
    data = storage.read_bytes(path)
    storage.remove(path)
    if left is not None:
        storage.write_atomic(path, data[: int(len(data) * left)])
    with pytest.raises(UserError, match=f"{file.path}: this shard is missing, unreadable or shorter"):
        shards.take(np.array([100]), ["id"])
    if left != 0.99:  # the end of a shard holds no vectors
        with pytest.raises(UserError, match=f"{file.path}: this shard is missing, unreadable or shorter"):
            list(shards.blocks())
    assert shards.take(np.array([2]), ["id"]).num_rows == 1, "the other shard is as good as before"


# --- Index -----------------------------------------------------------------------------------------------------------


def brute_force(ids: Sequence[str], vectors: Halves, query: NDArray[Any], k: int) -> list[tuple[str, float]]:
    """The definition: by exact score, ties by id."""
    scores = exact_scores(vectors, query.astype(np.float64))
    order = sorted((row for row in range(len(ids)) if np.isfinite(scores[row])), key=lambda i: (-scores[i], ids[i]))
    return [(ids[row], float(scores[row])) for row in order[:k]]


@pytest.mark.parametrize("k", [1, 7, 1000])
def test_search_is_brute_force(place: str, k: int) -> None:
    vectors = some_vectors(90, 16)
    vectors[50:60] = vectors[40]  # ties, across two shards
    vectors[3, 2] = np.nan
    write_embeddings(place, [vectors[:45], vectors[45:46], vectors[46:]], 16)
    index = Index.open(place)
    ids = index.shards.columns(["id"]).column("id").to_pylist()
    queries = np.concatenate([some_vectors(3, 16, seed=9), vectors[40:41]]).astype(np.float32)
    hits = index.search(queries, k)
    assert hits.scores.shape == hits.rows.shape == (4, min(k, 89))
    for number, query in enumerate(queries):
        found = list(zip(hits.ids[number], hits.scores[number].tolist(), strict=True))
        assert found == brute_force(ids, vectors, query, k)
        assert [ids[row] for row in hits.rows[number]] == list(hits.ids[number])
        described = index.describe(hits.rows[number][:5])
        assert [row["id"] for row in described] == list(hits.ids[number])[:5]
    assert len(set(hits.scores[3][:7])) == 1, "the last query has ties, or this test proves nothing"


def test_any_form_of_query(tmp_path: Path) -> None:
    vectors = some_vectors(20, 4)
    write_embeddings(str(tmp_path), [vectors], 4)
    index = Index.open(str(tmp_path))
    expected = index.search(vectors[2].astype(np.float64), 3)
    for query in (vectors[2], vectors[2].astype(np.float32), vectors[2:3], vectors[2].astype(np.float64).tolist()):
        found = index.search(query, 3)
        assert found.ids == expected.ids
        np.testing.assert_array_equal(found.scores, expected.scores)
    assert index.search([1, 0, 0, 0], 1).scores.item() == vectors[:, 0].max()
    with pytest.raises(ValueError, match="5"):
        index.search(np.ones(5, np.float32))


def test_the_vector_of_an_id(place: str) -> None:
    vectors = some_vectors(6, 4)
    index = Index(write_embeddings(place, [vectors[:2], vectors[2:]], 4))
    ids = index.shards.columns(["id"]).column("id").to_pylist()
    for row, row_id in enumerate(ids):
        np.testing.assert_array_equal(index.vector(row_id), vectors[row].astype(np.float32))
    with pytest.raises(KeyError, match="none"):
        index.vector("none")


def test_an_empty_table(tmp_path: Path) -> None:
    write_embeddings(str(tmp_path), [some_vectors(0, 4)], 4)
    index = Index.open(str(tmp_path))
    assert len(index) == 0
    hits = index.search(np.ones((2, 4)), 5)
    assert (hits.ids, hits.scores.shape, hits.rows.shape) == ([[], []], (2, 0), (2, 0))
    assert index.describe(hits.rows[0]) == []
    assert index.shards.matrix().shape == (0, 4)
    assert row_of_id(index.shards, "x") is None


def test_what_cannot_be_searched(tmp_path: Path) -> None:
    write_embeddings(str(tmp_path / "embeddings"), [some_vectors(1, 4)], 4)
    with pytest.raises(UserError, match=r"has no texts \(there: images\)"):
        Index.open(str(tmp_path / "embeddings"), "texts")
    with pytest.raises(UserError, match="no such folder"):
        Index.open(str(tmp_path / "nothing"))
    begin(str(tmp_path / "pairs"), Stamp("pairs", {}), lambda: (iter([]), {})).publish()
    with pytest.raises(UserError, match="expected embeddings, this folder holds pairs"):
        Index.open(str(tmp_path / "pairs"))


@pytest.mark.parametrize(("module", "heavy"), [("search", []), ("images", ["PIL"])])
def test_a_laptop_can_search_with_numpy_and_pyarrow(module: str, heavy: list[str]) -> None:
    code = f"import sys, json, clipdist.{module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert [name for name in ("torch", "ray", "PIL", "open_clip", "s3fs", "matplotlib") if name in loaded] == heavy
