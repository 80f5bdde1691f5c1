"""Ranks and metrics: hand-made matrices with known answers, and a naive implementation on random data."""

import math
import time
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import clipdist.metrics as metrics
import clipdist.ranks as ranks_module
from clipdist.metrics import Relevance
from clipdist.ranks import positive_ranks
from clipdist.scores import exact_scores

Array = NDArray[Any]


def unit(vectors: Array) -> Array:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def random_unit(n: int, dim: int, seed: int) -> Array:
    return unit(np.random.default_rng(seed).standard_normal((n, dim)))


def diagonal(n: int) -> Relevance:
    return Relevance(np.arange(n + 1), np.arange(n))


def relevance_of(sets: list[set[int]]) -> Relevance:
    return Relevance.from_keys(sets, [{row} for row in range(1000)])


def ranks_of_scores(scores: list[list[float]], relevance: Relevance) -> Array:
    """Ranks for a given matrix of scores: against the unit vectors, a query's scores are its components."""
    matrix = np.array(scores, dtype=np.float32)
    return positive_ranks(matrix, np.eye(matrix.shape[1], dtype=np.float32), relevance)


def summary(ranks: Array, relevance: Relevance, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    return metrics.mean_of(metrics.query_values(ranks, relevance, ks))


def naive_summary(scores: Array, sets: list[set[int]], k: int) -> dict[str, float]:
    """Every metric at k from sorted lists, one query at a time."""
    per_query: list[dict[str, float]] = []
    for row, positives in zip(scores, sets, strict=True):
        if positives:
            order = sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))  # type: ignore[misc]
            hits = [int(j in positives) for j in order]
            best = hits.index(1) + 1
            ideal = sum(1 / math.log2(i + 2) for i in range(min(k, len(positives))))
            precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(k) if i < len(hits) and hits[i]]
            per_query.append(
                {
                    f"hit_rate@{k}": any(hits[:k]),
                    f"recall@{k}": sum(hits[:k]) / len(positives),
                    f"mrr@{k}": 1 / best if best <= k else 0.0,
                    f"ndcg@{k}": sum(h / math.log2(i + 2) for i, h in enumerate(hits[:k])) / ideal,
                    f"map@{k}": sum(precisions) / len(positives),
                    "top1_accuracy": hits[0],
                    "best": best,
                }
            )
    found = {name: float(np.mean([q[name] for q in per_query])) for name in per_query[0] if name != "best"}
    found["median_rank"] = float(np.median([q["best"] for q in per_query]))
    found["queries"] = float(len(per_query))
    found["queries_without_positive"] = float(len(sets) - len(per_query))
    return found


def test_text_to_image_by_hand() -> None:
    """Six captions of three pictures (rows 0, 0, 1, 1, 2, 2)."""
    scores = [
        [0.9, 0.1, 0.2],  # picture 0: rank 1
        [0.3, 0.5, 0.4],  # picture 0: rank 3
        [0.8, 0.7, 0.1],  # picture 1: rank 2
        [0.1, 0.2, 0.0],  # picture 1: rank 1
        [0.6, 0.5, 0.4],  # picture 2: rank 3
        [-0.3, -0.2, -0.1],  # picture 2: rank 1
    ]
    relevance = relevance_of([{0}, {0}, {1}, {1}, {2}, {2}])
    ranks = ranks_of_scores(scores, relevance)
    assert ranks.tolist() == [1, 3, 2, 1, 3, 1]
    assert metrics.hit_at(ranks, relevance, 1).tolist() == [1, 0, 0, 1, 0, 1]
    assert metrics.hit_at(ranks, relevance, 2).tolist() == [1, 0, 1, 1, 0, 1]
    assert metrics.hit_at(ranks, relevance, 5).all()
    assert metrics.reciprocal_rank_at(ranks, relevance, 2).tolist() == [1, 0, 1 / 2, 1, 0, 1]
    assert summary(ranks, relevance)["median_rank"] == 1.5
    assert summary(ranks, relevance)["top1_accuracy"] == 0.5


def test_image_to_text_by_hand() -> None:
    """Three pictures with captions {0, 1}, {2, 3}, {4}, and one picture without any."""
    scores = [
        [0.9, 0.5, 0.8, 0.1, 0.2],  # captions at ranks 1, 3
        [0.6, 0.5, 0.1, 0.2, 0.4],  # captions at ranks 5, 4
        [0.1, 0.2, 0.3, 0.4, 0.35],  # caption at rank 2
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ]
    relevance = relevance_of([{0, 1}, {2, 3}, {4}, set()])
    ranks = ranks_of_scores(scores, relevance)
    assert ranks.tolist() == [1, 3, 5, 4, 2]
    found = summary(ranks, relevance, ks=(1, 3))
    first = 1 / (1 + 1 / math.log2(3))
    assert found == pytest.approx(
        {
            "hit_rate@1": 1 / 3,
            "hit_rate@3": 2 / 3,
            "recall@3": (1 + 0 + 1) / 3,
            "mrr@3": (1 + 0 + 1 / 2) / 3,
            "ndcg@3": (first * (1 + 1 / 2) + 0 + 1 / math.log2(3)) / 3,
            "map@3": ((1 + 2 / 3) / 2 + 0 + 1 / 2) / 3,
            "median_rank": 2.0,
            "top1_accuracy": 1 / 3,
            "queries": 3.0,
            "queries_without_positive": 1.0,
        }
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 4, 10, 500])
def test_equals_a_naive_implementation(dtype: Any, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random sets of 0 to 60 positives; a third of the gallery are duplicates of other rows."""
    monkeypatch.setattr(ranks_module, "_QUERIES_AT_ONCE", 7)
    rng = np.random.default_rng(1)
    queries, gallery = random_unit(40, 16, 2), random_unit(300, 16, 3).astype(dtype)
    gallery[rng.permutation(300)[:100]] = gallery[rng.integers(300, size=100)]
    sizes = [0, 1, 1, 2, 5, 60, 0, 33] * 5
    sets = [{int(row) for row in rng.choice(300, size, replace=False)} for size in sizes]
    scores = np.stack([exact_scores(gallery, query) for query in queries])
    relevance = relevance_of(sets)
    found = summary(positive_ranks(queries, gallery, relevance), relevance, ks=(k,))
    assert found == pytest.approx(naive_summary(scores, sets, k), rel=1e-12)


def test_ranks_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for rows that a float32 product cannot tell apart."""
    rng = np.random.default_rng(4)
    gallery = np.repeat(random_unit(1, 64, 5).astype(np.float16), 200, axis=0)
    gallery.view(np.uint16)[np.arange(200), rng.integers(64, size=200)] += rng.integers(3, size=200).astype(np.uint16)
    queries = gallery[:12].astype(np.float32)
    relevance = relevance_of([{int(row) for row in rng.choice(200, 9)} for _ in range(12)])
    expected = []
    for i, (start, stop) in enumerate(zip(relevance.offsets[:-1], relevance.offsets[1:], strict=True)):
        scores = exact_scores(gallery, queries[i])
        order = np.lexsort((np.arange(200), -scores))
        expected += [int(np.argmax(order == row)) + 1 for row in relevance.positives[start:stop]]
    for block_rows in (1, 7, 200, 4096):
        for at_once, few in ((5, 0), (1024, 32)):
            monkeypatch.setattr(ranks_module, "_QUERIES_AT_ONCE", at_once)
            monkeypatch.setattr(ranks_module, "_FEW_POSITIVES", few)
            ranks = positive_ranks(queries, gallery, relevance, block_rows)
            assert ranks.tolist() == expected
    approximate = queries @ gallery.astype(np.float32).T
    order = np.argsort(-approximate, axis=1, kind="stable")
    float32_only = [
        int(np.argmax(order[i] == row)) + 1
        for i, row in zip(np.repeat(np.arange(12), relevance.counts), relevance.positives, strict=True)
    ]
    assert float32_only != expected, "control: this data must need exact scores"


def test_ranking_only_the_best_positives_changes_no_metric() -> None:
    """Many positives, many of them equal. The control: fewer than k are not enough."""
    rng = np.random.default_rng(13)
    queries, gallery = random_unit(30, 6, 14), random_unit(400, 6, 15)
    gallery[rng.integers(400, size=150)] = gallery[rng.integers(400, size=150)]
    sets = [{int(row) for row in rng.choice(400, size, replace=False)} for size in [0, 1, 9, 10, 11, 300] * 5]
    relevance = relevance_of(sets)
    everything = positive_ranks(queries, gallery, relevance)
    best = positive_ranks(queries, gallery, relevance, best=10)
    assert summary(best, relevance) == summary(everything, relevance)
    assert set(best[best != everything].tolist()) == {401}
    assert np.bincount(np.repeat(np.arange(30), relevance.counts)[best <= 400]).max() == 10
    assert summary(positive_ranks(queries, gallery, relevance, best=4), relevance) != summary(everything, relevance)


def test_of_equal_scores_the_lower_row_comes_first() -> None:
    gallery = np.repeat(random_unit(1, 8, 6), 10, axis=0)
    relevance = relevance_of([{0}, {9}, {3, 4, 7}])
    ranks = positive_ranks(gallery[:3], gallery, relevance, block_rows=4)
    assert ranks.tolist() == [1, 10, 4, 5, 8]


def test_all_equal_embeddings_score_no_better_than_chance() -> None:
    """A collapsed model must not look perfect: with "ties count as hits" it would."""
    same = np.repeat(random_unit(1, 8, 7), 100, axis=0)
    relevance = diagonal(100)
    assert summary(positive_ranks(same, same, relevance), relevance)["hit_rate@10"] == 0.1


def test_random_embeddings_are_at_chance() -> None:
    n = 2000
    relevance = diagonal(n)
    ranks = positive_ranks(random_unit(n, 32, 8), random_unit(n, 32, 9), relevance)
    expected = 10 / n
    spread = math.sqrt(expected * (1 - expected) / n)
    assert abs(summary(ranks, relevance)["hit_rate@10"] - expected) < 4 * spread
    assert abs(summary(ranks, relevance)["median_rank"] - n / 2) < 0.05 * n


def test_keys_are_joined_pairwise_and_not_through_others() -> None:
    queries: list[Iterable[Hashable]] = [
        {"g1", "red shoe"},
        {"g2"},
        ("g3", "g3", "red shoe"),
        set(),
        {None},
        {"unknown"},
    ]
    gallery: list[Iterable[Hashable]] = [
        {"g1"},
        {"red shoe", "g2"},
        {"g2"},
        {"red shoe", "g1"},
        set(),
        {None},
    ]
    relevance = Relevance.from_keys(queries, gallery)
    assert relevance.offsets.tolist() == [0, 3, 5, 7, 7, 7, 7]
    assert relevance.positives.tolist() == [0, 1, 3, 1, 2, 1, 3]
    assert relevance.counts.tolist() == [3, 2, 2, 0, 0, 0]
    with pytest.raises(TypeError, match="not the string 'abc'"):
        Relevance.from_keys(["abc"], gallery)


def test_keys_are_joined_as_by_hand_at_any_part_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(12)
    queries, gallery = (
        [{int(key) for key in rng.integers(40, size=rng.integers(4))} for _ in range(rows)] for rows in (60, 90)
    )
    expected = [[row for row, keys in enumerate(gallery) if keys & query] for query in queries]
    for at_once in (1, 50, 1 << 22):
        monkeypatch.setattr(metrics, "_POSITIVES_AT_ONCE", at_once)
        relevance = Relevance.from_keys(queries, gallery)
        assert [part.tolist() for part in np.split(relevance.positives, relevance.offsets[1:-1])] == expected
    for nothing in (Relevance.from_keys([], gallery), Relevance.from_keys([], [])):
        assert (len(nothing.offsets), len(nothing.positives)) == (1, 0)
    assert Relevance.from_keys(queries, []).counts.tolist() == [0] * 60


def test_the_time_to_join_keys_does_not_grow_with_queries_times_rows() -> None:
    """Ten times the rows, about ten times the time; row by row it would be a hundred times."""

    def seconds(rows: int) -> float:
        keys = [{row, ("group", row // 3)} for row in range(rows)]
        started = time.perf_counter()
        assert len(Relevance.from_keys(keys, keys).positives) == pytest.approx(3 * rows, abs=4)
        return time.perf_counter() - started

    small = min(seconds(5_000) for _ in range(3))
    assert min(seconds(50_000) for _ in range(3)) < 40 * small


def test_duplicates_count_as_positives() -> None:
    """Control: with the diagonal alone a perfect model is punished for the catalog's duplicates."""
    gallery = random_unit(50, 16, 10)
    gallery[25:] = gallery[:25]
    keys = [{row % 25} for row in range(50)]
    by_key = Relevance.from_keys(keys, keys)
    assert summary(positive_ranks(gallery, gallery, by_key), by_key)["top1_accuracy"] == 1.0
    assert summary(positive_ranks(gallery, gallery, diagonal(50)), diagonal(50))["top1_accuracy"] == 0.5


def test_hit_rate_is_not_recall() -> None:
    relevance = relevance_of([{0, 1, 2, 3}])
    ranks = np.array([1, 40, 50, 60])
    assert metrics.hit_at(ranks, relevance, 10).tolist() == [1.0]
    assert metrics.recall_at(ranks, relevance, 10).tolist() == [0.25]


def test_default_summary_names() -> None:
    relevance = diagonal(3)
    assert list(summary(np.array([1, 2, 3]), relevance)) == [
        *("hit_rate@1", "hit_rate@5", "hit_rate@10", "recall@10", "mrr@10", "ndcg@10", "map@10"),
        *("median_rank", "top1_accuracy", "queries", "queries_without_positive"),
    ]


def test_mistakes_are_named() -> None:
    rows = random_unit(4, 8, 11)
    broken = rows.copy()
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match="gallery row 2 holds NaN"):
        positive_ranks(rows, broken, diagonal(4))
    with pytest.raises(ValueError, match="query 2 holds NaN"):
        positive_ranks(broken, rows, diagonal(4))
    with pytest.raises(ValueError, match="3 queries but relevance for 4"):
        positive_ranks(rows[:3], rows, diagonal(4))
    with pytest.raises(ValueError, match="row 3 of a gallery of 3 rows"):
        positive_ranks(rows, rows[:3], diagonal(4))
    with pytest.raises(ValueError, match="8 dimensions but the rows have 7"):
        positive_ranks(rows, rows[:, :7], diagonal(4))
    assert np.isnan(metrics.ndcg_at(np.empty(0, dtype=np.int64), Relevance.from_keys([set()], [{1}]), 10)).all()
    with pytest.raises(ValueError, match="nothing to measure"):
        summary(np.empty(0, dtype=np.int64), Relevance.from_keys([set()], [{1}]))
    with pytest.raises(ValueError, match="2 ranks for 4 positives"):
        metrics.average_precision_at(np.array([1, 2]), diagonal(4), 10)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        metrics.ndcg_at(np.arange(4) + 1, diagonal(4), 0)
    for offsets, positives in (([0, 3], [0, 1]), ([0, 2, 1, 3], [0, 1, 2]), ([0, 2], [1, 1]), ([0, 1], [-1])):
        with pytest.raises(ValueError, match=r"offsets|ascending"):
            Relevance(np.array(offsets), np.array(positives))
    Relevance(np.array([0, 0, 2, 2, 3, 3]), np.array([4, 5, 1]))
