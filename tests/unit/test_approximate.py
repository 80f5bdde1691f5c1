"""The approximate index: recall as told, exact scores, and never of other embeddings than those it was built of."""

import json
from pathlib import Path

import numpy as np
import pytest

from clipdist import approximate
from clipdist.approximate import ApproximateIndex, build
from clipdist.config import UserError
from clipdist.remove import remove
from clipdist.search import Index, Ranking
from tests.unit.some_shards import Vectors, write_embeddings

DIM = 32


def clustered(rows: int, seed: int, shift: float) -> Vectors:
    """Vectors in clusters, and apart from those of another `shift`, as texts are from pictures."""
    centres = np.random.default_rng(0).normal(size=(30, DIM))
    chance = np.random.default_rng(seed)
    vectors = centres[chance.integers(0, 30, rows)] + chance.normal(size=(rows, DIM))
    vectors[:, 0] += shift
    stored: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    return stored


@pytest.fixture
def indexes(tmp_path: Path) -> tuple[Index, Index]:
    write_embeddings(str(tmp_path / "images"), [clustered(3000, 1, 3), clustered(2000, 2, 3)])
    write_embeddings(str(tmp_path / "texts"), [clustered(600, 3, -3)], "texts")
    return Index.open(str(tmp_path / "images")), Index.open(str(tmp_path / "texts"), "texts")


def recall(found: Ranking, exact: Ranking) -> float:
    pairs = zip(found.rows, exact.rows, strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in pairs]))


def test_the_target_is_reached_with_exact_scores_and_saved(indexes: tuple[Index, Index], tmp_path: Path) -> None:
    index, texts = indexes
    made = build(index, texts, str(tmp_path / "out"), recall=0.9, queries=600)
    queries = texts.shards.matrix().astype(np.float32)
    found, exact = made.search(queries, 10), index.search(queries, 10)
    assert recall(found, exact) >= 0.88
    assert made.probes["texts"] < made.faiss_index.nlist
    for ids, rows, scores, everything in zip(
        found.ids, found.rows, found.scores, index.search(queries, len(index)).scores, strict=True
    ):
        assert set(scores.tolist()) <= set(everything.tolist()), "scores to the bit"
        assert (np.diff(scores) <= 0).all()
        assert [row["id"] for row in index.describe(rows)] == list(ids)
    again = ApproximateIndex.open(str(tmp_path / "out"), Index.open(index.shards.manifest.uri)).search(queries, 10)
    assert list(again.ids) == found.ids
    assert "recall@10, held out" in made.report
    assert "texts" in made.report


def test_tuning_is_what_reaches_it(
    indexes: tuple[Index, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, texts = indexes
    made = build(index, texts, str(tmp_path / "out"), recall=0.9, queries=600)
    queries = texts.shards.matrix().astype(np.float32)
    few = made._search(queries, 10, max(1, made.probes["texts"] // 3))
    assert recall(few, index.search(queries, 10)) < 0.85, "the control: fewer probes miss the target"
    everything = made._search(queries, 10, made.faiss_index.nlist)
    exact = index.search(queries, 10)
    assert [list(ids) for ids in everything.ids] == [list(ids) for ids in exact.ids], "all lists: exhaustive"


def test_stale_damaged_and_foreign_ones_are_refused(indexes: tuple[Index, Index], tmp_path: Path) -> None:
    index, texts = indexes
    out, uri = tmp_path / "out", index.shards.manifest.uri
    build(index, None, str(out), recall=0.5, queries=100)
    with pytest.raises(UserError, match="not tuned for texts"):
        ApproximateIndex.open(str(out), index).search(np.ones(DIM), 3)
    with pytest.raises(UserError, match="something is there already"):
        build(index, texts, str(out))
    remove(uri, [str(index.describe(np.array([1]))[0]["id"])])
    with pytest.raises(UserError, match="manifest: 1 there, 2 in the embeddings"):
        ApproximateIndex.open(str(out), Index.open(uri))
    data = bytearray((out / approximate.FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (out / approximate.FILE).write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        ApproximateIndex.open(str(out), index)
    (out / approximate.RECORD).unlink()
    with pytest.raises(UserError, match="not an approximate index"):
        ApproximateIndex.open(str(out), index)


def test_a_record_says_what_was_measured(indexes: tuple[Index, Index], tmp_path: Path) -> None:
    index, texts = indexes
    with pytest.raises(UserError, match="recall above 0"):
        build(index, texts, str(tmp_path / "out"), recall=1.5)
    assert not (tmp_path / "out").exists()
    build(index, texts, str(tmp_path / "out"), recall=1.0, queries=100)
    record = json.loads((tmp_path / "out" / approximate.RECORD).read_text())
    assert set(record["probes"]) == {"texts", "images"}
    assert "the exact search is faster" in record["report"] or "times as fast" in record["report"]
