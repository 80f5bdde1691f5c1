"""Retrieval metrics from the ranks of the relevant rows, several of which may belong to a query.

`positive_ranks` walks the gallery once per group of queries; every metric is then a function of the ranks.
Queries without a positive have no rank: they are left out of every mean and counted by `summary`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdist.topk import (
    PreparedQueries,
    bounded_scores,
    check_rows,
    exact_pair_scores,
    exact_scores,
    prepare_queries,
    round_down,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_QUERIES_AT_ONCE = 1024
_FEW_POSITIVES = 16  # below it comparing is faster than sorting


@dataclass(frozen=True)
class Relevance:
    """Which gallery rows are positives of query i: positives[offsets[i]:offsets[i + 1]].

    `offsets` int64 [queries + 1], `positives` int64 row numbers of the gallery, ascending within a query.
    """

    offsets: Ints
    positives: Ints

    def __post_init__(self) -> None:
        offsets, positives = self.offsets, self.positives
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(positives) or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets must rise from 0 to the number of positives, {len(positives)}")
        inside = np.ones(max(len(positives) - 1, 0), dtype=np.bool_)
        starts = offsets[1:-1]
        inside[starts[(starts > 0) & (starts < len(positives))] - 1] = False
        if (positives < 0).any() or (np.diff(positives)[inside] <= 0).any():
            raise ValueError("the positives of a query must be row numbers in ascending order, each once")

    @classmethod
    def from_keys(
        cls, query_keys: Sequence[Iterable[Hashable]], gallery_keys: Sequence[Iterable[Hashable]]
    ) -> Relevance:
        """A gallery row is a positive of a query when the two share at least one key (not transitive).

        Keys are, for instance, the product id and the normalised captions of a row, made distinct by their
        kind: `{("group", "g1"), ("caption", "red shoe")}`. None is no key: rows without one share nothing.
        """
        rows_of: dict[Hashable, list[int]] = {}
        for row, keys in enumerate(gallery_keys):
            for key in _key_set(keys):
                rows_of.setdefault(key, []).append(row)
        offsets = np.zeros(len(query_keys) + 1, dtype=np.int64)
        positives: list[int] = []
        for i, keys in enumerate(query_keys):
            positives += sorted({row for key in _key_set(keys) for row in rows_of.get(key, ())})
            offsets[i + 1] = len(positives)
        return cls(offsets, np.array(positives, dtype=np.int64))

    @property
    def counts(self) -> Ints:
        """Positives of every query, int64 [queries]."""
        return np.diff(self.offsets)

    @property
    def query_of(self) -> Ints:
        """The query of every positive, int64 [positives]."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)


def _key_set(keys: Iterable[Hashable]) -> set[Hashable]:
    if isinstance(keys, (str, bytes)):
        raise TypeError(f"keys must be a set or tuple of keys, not the string {keys!r}: write ({keys!r},)")
    return set(keys) - {None}


def positive_ranks(queries: NDArray[Any], gallery: NDArray[Any], relevance: Relevance, block_rows: int = 8192) -> Ints:
    """The rank (1 = first) of every positive among all gallery rows, aligned with `relevance.positives`.

    `queries` [q, d] and `gallery` [n, d] (float16 or float32) are L2-normalised embeddings. Higher score
    first; of equal scores the lower row number first: id order when the gallery is sorted by id. Scores are
    compared exactly (`topk.exact_scores`), so equal vectors do tie and ranks do not depend on `block_rows`.
    Memory: O(1024 * block_rows). ValueError for shapes that do not fit or a gallery row that is not finite.
    """
    if len(queries) != len(relevance.offsets) - 1:
        raise ValueError(f"there are {len(queries)} queries but relevance for {len(relevance.offsets) - 1}")
    if relevance.positives.max(initial=-1) >= len(gallery):
        raise ValueError(f"a positive is row {relevance.positives.max()} of a gallery of {len(gallery)} rows")
    check_rows(gallery, queries.shape[1])
    ranks = np.ones(len(relevance.positives), dtype=np.int64)
    active = np.flatnonzero(relevance.counts)
    for start in range(0, len(active), _QUERIES_AT_ONCE):
        group = active[start : start + _QUERIES_AT_ONCE]
        # The positives of consecutive active queries are consecutive too: between them no query has any.
        part = slice(int(relevance.offsets[group[0]]), int(relevance.offsets[group[-1] + 1]))
        edges = np.append(relevance.offsets[group] - part.start, part.stop - part.start)
        prepared = prepare_queries(queries[group])
        ranks[part] += _rows_ahead(prepared, gallery, relevance.positives[part], edges, block_rows)
    return ranks


def _rows_ahead(queries: PreparedQueries, gallery: NDArray[Any], positives: Ints, edges: Ints, block_rows: int) -> Ints:
    """How many rows come before each positive; those of query i are positives[edges[i]:edges[i + 1]]."""
    owner = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    target = exact_pair_scores(gallery, queries.exact, positives, owner)
    scaled = np.ldexp(target, -queries.exponent[owner])
    ahead = np.zeros(len(positives), dtype=np.int64)
    for first in range(0, len(gallery), block_rows):
        block = gallery[first : first + block_rows]
        scores, error, unsure = bounded_scores(block, queries)
        if unsure.any():
            row = first + int(np.argmax(unsure))
            raise ValueError(f"gallery row {row} holds NaN or inf or is far from normalised")
        low = round_down(scaled - error[owner])
        high = -round_down(-(scaled + error[owner]))  # at least `high`: surely ahead; below `low`: surely not
        for i in range(len(edges) - 1):
            mine = slice(int(edges[i]), int(edges[i + 1]))
            surely, windows = _split(scores[i], low[mine], high[mine])
            ahead[mine] += surely
            ahead[mine] += _ahead_in(windows, block, queries.exact[i], target[mine], positives[mine] - first)
    return ahead


def _split(scores: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32]) -> tuple[Ints, list[Ints]]:
    """For every positive: how many scores reach `high`, and the places of those in [low, high)."""
    if len(low) < _FEW_POSITIVES:
        surely = [np.count_nonzero(scores >= cut) for cut in high]
        windows = [np.flatnonzero((scores >= a) & (scores < b)) for a, b in zip(low, high, strict=True)]
        return np.array(surely, dtype=np.int64), windows
    order = np.argsort(scores)
    starts, stops = (np.searchsorted(scores[order], cuts) for cuts in (low, high))
    return len(scores) - stops, [order[a:b] for a, b in zip(starts, stops, strict=True)]


def _ahead_in(windows: list[Ints], block: NDArray[Any], query: Floats, target: Floats, place: Ints) -> Ints:
    """Of the rows in each positive's window: how many are ahead of it by exact score, then by place."""
    near = np.concatenate(windows)
    owner = np.repeat(np.arange(len(windows)), [len(window) for window in windows])
    rows, inverse = np.unique(near, return_inverse=True)
    score = exact_scores(block[rows], query)[inverse]
    ahead = (score > target[owner]) | ((score == target[owner]) & (near < place[owner]))
    return np.bincount(owner[ahead], minlength=len(windows))


def best_ranks(ranks: Ints, relevance: Relevance) -> Ints:
    """The rank of the first positive of every query that has one, int64; ValueError if none has."""
    _check(ranks, relevance, 1)
    return np.asarray(np.minimum.reduceat(ranks, relevance.offsets[:-1][relevance.counts > 0]))


def hit_rate_at(ranks: Ints, relevance: Relevance, k: int) -> float:
    """Share of queries with at least one positive in the first k. The CLIP papers call it "R@k"."""
    _check(ranks, relevance, k)
    return float(np.mean(best_ranks(ranks, relevance) <= k))


def top1_accuracy(ranks: Ints, relevance: Relevance) -> float:
    """Share of queries whose first row is a positive: hit_rate@1."""
    return hit_rate_at(ranks, relevance, 1)


def recall_at(ranks: Ints, relevance: Relevance, k: int) -> float:
    """Share of a query's positives in the first k, mean over queries. Not what the CLIP papers call "R@k"."""
    _check(ranks, relevance, k)
    return _mean_of_sums(ranks <= k, relevance, relevance.counts)


def mrr_at(ranks: Ints, relevance: Relevance, k: int) -> float:
    """Mean of 1 / rank of the first positive, 0 where it is beyond k."""
    _check(ranks, relevance, k)
    best = best_ranks(ranks, relevance)
    return float(np.mean(np.where(best <= k, 1.0 / best, 0.0)))


def ndcg_at(ranks: Ints, relevance: Relevance, k: int) -> float:
    """Binary nDCG@k: sum of 1 / log2(rank + 1) of the positives in the first k, divided by the best possible,
    that of min(k, positives) positives in front (Jarvelin and Kekalainen 2002; as trec_eval's ndcg_cut)."""
    _check(ranks, relevance, k)
    gains = np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)
    reachable = np.minimum(relevance.counts, k)
    ideal = np.concatenate(([0.0], np.cumsum(1.0 / np.log2(np.arange(2.0, reachable.max(initial=0) + 2)))))
    return _mean_of_sums(gains, relevance, ideal[reachable])


def mean_average_precision_at(ranks: Ints, relevance: Relevance, k: int) -> float:
    """Mean over queries of the sum of precision@rank over the positives in the first k, divided by the number
    of all positives (as trec_eval's map_cut; some tools divide by min(k, positives))."""
    _check(ranks, relevance, k)
    query_of = relevance.query_of
    ordered = ranks[np.lexsort((ranks, query_of))]
    found = np.arange(len(ranks)) - relevance.offsets[query_of] + 1
    return _mean_of_sums(np.where(ordered <= k, found / ordered, 0.0), relevance, relevance.counts)


def median_rank(ranks: Ints, relevance: Relevance) -> float:
    """Median over queries of the rank of the first positive."""
    return float(np.median(best_ranks(ranks, relevance)))


def summary(ranks: Ints, relevance: Relevance, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """All metrics by name: hit_rate@k for every k, the others at the largest k.

    `queries` is the number of queries in the means; `queries_without_positive` that of those left out.
    """
    last = max(ks)
    found = {f"hit_rate@{k}": hit_rate_at(ranks, relevance, k) for k in ks}
    found[f"recall@{last}"] = recall_at(ranks, relevance, last)
    found[f"mrr@{last}"] = mrr_at(ranks, relevance, last)
    found[f"ndcg@{last}"] = ndcg_at(ranks, relevance, last)
    found[f"map@{last}"] = mean_average_precision_at(ranks, relevance, last)
    found["median_rank"] = median_rank(ranks, relevance)
    found["top1_accuracy"] = top1_accuracy(ranks, relevance)
    found["queries"] = float(np.count_nonzero(relevance.counts))
    found["queries_without_positive"] = float(np.count_nonzero(relevance.counts == 0))
    return found


def _check(ranks: Ints, relevance: Relevance, k: int) -> None:
    if k < 1:
        raise ValueError(f"k is the number of rows looked at and must be at least 1, not {k}")
    if len(ranks) != len(relevance.positives):
        raise ValueError(f"there are {len(ranks)} ranks for {len(relevance.positives)} positives")
    if not len(ranks):
        raise ValueError("no query has a positive in the gallery, so there is nothing to measure")


def _mean_of_sums(values: NDArray[Any], relevance: Relevance, divisor: NDArray[Any]) -> float:
    """Mean over the queries with positives of (sum of their `values`) / (their `divisor`)."""
    measured = relevance.counts > 0
    sums = np.bincount(relevance.query_of, weights=values, minlength=len(measured))
    return float(np.mean(sums[measured] / divisor[measured]))
