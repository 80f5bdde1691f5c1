"""A search over actors answers what one Index answers, to the bit, however the shards are shared, and outlives actors."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import ray

from clipdist import search_actors
from clipdist.config import Fault, UserError
from clipdist.manifest import Manifest
from clipdist.remove import remove
from clipdist.search import Index, Ranking
from clipdist.search_job import ClusterIndex
from clipdist.shards import Shards
from clipdist.topk import TopK
from tests.unit.some_shards import some_vectors, write_embeddings

DIM = 16
QUERIES = some_vectors(5, DIM, 99, "float32")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Manifest:
    """Six shards with many equal vectors across them, deleted rows, one shard of which no row is left, and NaN."""
    parts = [some_vectors(rows, DIM, seed) for seed, rows in enumerate((40, 3, 60, 1, 25, 30))]
    parts[2][:10] = parts[0][:10]
    parts[4][5:15] = parts[0][:10]
    parts[5][:3] = np.nan
    uri = str(tmp_path_factory.mktemp("table"))
    ids = [str(row * 7919 % 100_003) for row in range(159)]
    write_embeddings(uri, parts)
    remove(uri, [ids[row] for row in (0, 39, 40, 41, 42, 60, 103, 110)])
    return Index.open(uri).shards.manifest


def same(found: Ranking, expected: Ranking) -> bool:
    """Ids, row numbers, and scores to the bit."""
    return (
        [list(ids) for ids in found.ids] == [list(ids) for ids in expected.ids]
        and all(np.array_equal(a, b) for a, b in zip(found.rows, expected.rows, strict=True))
        and all(a.tobytes() == b.tobytes() for a, b in zip(found.scores, expected.scores, strict=True))
    )


CASES: list[dict[str, Any]] = [
    {"k": 1},
    {"k": 7},
    {"k": 1000},
    {"k": 5, "offset": 8},
    {"k": 5, "offset": 500},
    {"k": 20, "min_score": 0.1},
    {"k": 8, "where": "price < 20"},
    {"k": 8, "where": pc.field("price") > 30},
    {"k": 8, "where": "price > 1000"},
    {"k": 30, "collapse": 0.99},
    {"k": 200, "collapse": 0.5, "offset": 2, "min_score": 0.0, "where": "price between 2 and 35"},
]


@pytest.fixture(scope="module", params=[2, 50])
def split(request: pytest.FixtureRequest, table: Manifest) -> Iterator[ClusterIndex]:
    with ClusterIndex(table, "images", request.param) as index:
        assert len(index._actors) == min(request.param, 6)
        yield index


def test_answers_are_those_of_one_index(table: Manifest, split: ClusterIndex) -> None:
    whole = Index(Shards(table, "images"))
    for case in CASES:
        for queries in (QUERIES, QUERIES[0], QUERIES[:0], QUERIES.astype(np.float16)):
            assert same(split.search(queries, **case), whole.search(queries, **case)), case
    assert (len(split), split.dim, split.stamp) == (len(whole), whole.dim, whole.stamp)
    rows = np.random.default_rng(0).permutation(len(whole))[:40]
    assert split.describe(rows) == whole.describe(rows)
    assert split.describe(rows[:0]) == []
    np.testing.assert_array_equal(split.vectors(rows), whole.shards.vectors(rows))
    for row in whole.describe(np.array([0, 50, len(whole) - 1])):
        np.testing.assert_array_equal(split.vector(row["id"]), whole.vector(row["id"]))


def test_mistakes_are_told_as_by_one_index(table: Manifest, split: ClusterIndex) -> None:
    whole = Index(Shards(table, "images"))
    mistakes: list[tuple[np.ndarray, dict[str, Any]]] = [
        (QUERIES, {"k": 0}),
        (QUERIES, {"offset": -1}),
        (QUERIES[:, :8], {}),
        (QUERIES * np.nan, {}),
        (QUERIES, {"where": "prise < 3"}),
    ]
    for queries, options in mistakes:
        with pytest.raises((ValueError, UserError)) as expected:
            whole.search(queries, **options)
        with pytest.raises(expected.type) as told:
            split.search(queries, **options)
        assert str(told.value) == str(expected.value)
    with pytest.raises(KeyError, match="nobody"):
        split.vector("nobody")


def test_a_merge_that_ignores_ids_at_ties_is_seen(table: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(parts: list[TopK], k: int, ids: Any) -> TopK:
        rows, scores = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return TopK(np.take_along_axis(rows, best, 1), np.take_along_axis(scores, best, 1))

    monkeypatch.setattr("clipdist.search_job.merge", careless)
    with ClusterIndex(table, "images", 3) as index:
        assert not same(index.search(QUERIES, 100), Index(Shards(table, "images")).search(QUERIES, 100))


@pytest.mark.parametrize("files", [True, False])
def test_a_table_without_rows(tmp_path: Path, local_ray: None, files: bool) -> None:
    shards = write_embeddings(str(tmp_path), [some_vectors(3, DIM)])
    remove(str(tmp_path), [row["id"] for row in Index(shards).describe(np.arange(3))])
    emptied = Index.open(str(tmp_path)).shards.manifest
    manifest = emptied if files else replace(emptied, files=(), delete_files=())
    whole = Index(Shards(manifest, "images"))
    with ClusterIndex(manifest, "images", 2) as index:
        assert same(index.search(QUERIES, 3), whole.search(QUERIES, 3))
        assert len(index) == len(whole) == 0
        with pytest.raises(KeyError):
            index.vector("0")


def test_what_is_no_such_table_is_refused(tmp_path: Path, table: Manifest) -> None:
    with pytest.raises(UserError, match="has no texts"):
        ClusterIndex.open(table.uri, "texts")
    with pytest.raises(UserError, match="no such folder"):
        ClusterIndex.open(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="at least one"):
        ClusterIndex.open(table.uri, actors=0)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Manifest:
    """So large that a search of many queries takes a second."""
    parts = [some_vectors(40_000, 64, seed) for seed in range(2)]
    return write_embeddings(str(tmp_path_factory.mktemp("large")), parts).manifest


def processes(index: ClusterIndex) -> list[int]:
    return list(ray.get([actor.sign.remote() for actor in index._actors]))


class Killer(threading.Thread):
    """SIGKILLs an actor's process while it answers: after `delay` seconds, `times` times."""

    def __init__(self, index: ClusterIndex, times: int, delay: float = 0.3) -> None:
        super().__init__(daemon=True)
        self.index, self.times, self.delay, self.killed = index, times, delay, list[int]()

    def run(self) -> None:
        actor = self.index._actors[0]
        while len(self.killed) < self.times:
            time.sleep(self.delay)
            try:
                pid = ray.get(actor.sign.remote(), timeout=30)
            except ray.exceptions.RayError:
                continue
            if pid not in self.killed:
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)


def test_a_process_killed_in_the_middle_of_a_query(large: Manifest) -> None:
    queries = some_vectors(3000, 64, 5, "float32")
    with ClusterIndex(large, "images", 2) as index:
        expected = index.search(queries, 20)
        before = processes(index)
        killer = Killer(index, 1)
        killer.start()
        found = index.search(queries, 20)
        assert killer.killed == before[:1], "killed while it answered"
        assert same(found, expected)
        after = processes(index)
        assert after[0] != before[0]
        assert after[1] == before[1]


def test_a_question_that_always_kills_ends(large: Manifest) -> None:
    queries = some_vectors(3000, 64, 5, "float32")
    with ClusterIndex(large, "images", 2) as index:
        index.search(queries[:2], 3)
        killer = Killer(index, search_actors.RETRIES + 1, delay=0.05)
        killer.start()
        with pytest.raises(Fault, match="died 4 times"):
            index.search(np.concatenate([queries] * 8), 20)
        killer.join()
        assert len(index.search(queries[:2], 3).rows) == 2, "afterwards it answers again"


def test_an_actor_without_a_place_is_told(large: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_actors, "SIGN_SECONDS", 0.5)

    @ray.remote(num_cpus=2)
    class Other:
        def is_there(self) -> bool:
            return True

    other = Other.remote()
    assert ray.get(other.is_there.remote())
    try:
        with ClusterIndex(large, "images", 1) as index:
            index.patience_seconds = 2.0
            with pytest.raises(Fault, match="1 of 1 search processes gave no sign of life for 2 s"):
                index.search(some_vectors(1, 64), 3)
    finally:
        ray.kill(other)
