"""Retrieval metrics from the ranks of the relevant rows, several of which may belong to a query.

A metric is a number per query, float64 [queries], which depends on nothing but the ranks of that query's positives;
`mean_of` averages. Queries without a positive have no rank: their metrics are NaN, they are left out of every mean and
counted.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_POSITIVES_AT_ONCE = 1 << 22  # while they are collected


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
        number: dict[Hashable, int] = {}
        gallery_rows, gallery_codes = _flat(gallery_keys, lambda key: number.setdefault(key, len(number)))
        starts = np.concatenate(([0], np.cumsum(np.bincount(gallery_codes, minlength=len(number)))))
        rows = gallery_rows[np.argsort(gallery_codes, kind="stable")]  # with key c: rows[starts[c] : starts[c + 1]]
        owners, codes = _flat(query_keys, number.get)
        return cls(*_joined(owners, starts[codes], starts[codes + 1], rows, len(query_keys), len(gallery_keys)))

    @property
    def counts(self) -> Ints:
        """Positives of every query, int64 [queries]."""
        return np.diff(self.offsets)


def _flat(key_sets: Sequence[Iterable[Hashable]], code_of: Callable[[Hashable], int | None]) -> tuple[Ints, Ints]:
    """Every key of every row: (row, code), in the order of the rows; None is no key, nor a key without a code."""
    rows, codes = array("q"), array("q")
    for row, keys in enumerate(key_sets):
        if isinstance(keys, (str, bytes)):
            raise TypeError(f"keys must be a set or tuple of keys, not the string {keys!r}: write ({keys!r},)")
        for key in keys:
            if key is not None and (code := code_of(key)) is not None:
                rows.append(row)
                codes.append(code)
    return np.array(rows, dtype=np.int64), np.array(codes, dtype=np.int64)


def _joined(owners: Ints, first: Ints, last: Ints, rows: Ints, queries: int, gallery: int) -> tuple[Ints, Ints]:
    """Offsets and positives: query owners[i] has rows[first[i]:last[i]], each row once. In parts, to bound memory."""
    total = np.concatenate(([0], np.cumsum(last - first)))
    counts, parts = np.zeros(queries, dtype=np.int64), [np.empty(0, dtype=np.int64)]
    start = 0
    while start < len(owners):
        end = int(np.searchsorted(total, total[start] + _POSITIVES_AT_ONCE, side="right")) - 1
        end = int(np.searchsorted(owners, owners[max(end, start + 1) - 1], side="right"))  # whole queries
        part = slice(start, end)
        sizes = last[part] - first[part]
        place = np.arange(total[start], total[end]) + np.repeat(first[part] - total[part], sizes)
        found = np.unique(np.repeat(owners[part], sizes) * gallery + rows[place])
        counts += np.bincount(found // max(gallery, 1), minlength=queries)
        parts.append(found % max(gallery, 1))
        start = end
    return np.concatenate(([0], np.cumsum(counts))), np.concatenate(parts)


def first_ranks(ranks: Ints, relevance: Relevance) -> Floats:
    """The rank of the first positive of every query."""
    _check(ranks, relevance)
    found, has = np.full(len(relevance.counts), np.nan), relevance.counts > 0
    if has.any():
        found[has] = np.minimum.reduceat(ranks, relevance.offsets[:-1][has])
    return found


def hit_at(ranks: Ints, relevance: Relevance, k: int) -> Floats:
    """1 where at least one positive is in the first k, else 0. The CLIP papers call its mean "R@k"."""
    _check(ranks, relevance, k)
    first = first_ranks(ranks, relevance)
    return np.where(np.isnan(first), np.nan, first <= k)


def recall_at(ranks: Ints, relevance: Relevance, k: int) -> Floats:
    """Share of a query's positives in the first k. Not what the CLIP papers call "R@k"."""
    query_of, near = _within(ranks, relevance, k)
    return _sums(np.ones(len(near)), query_of, relevance.counts)


def reciprocal_rank_at(ranks: Ints, relevance: Relevance, k: int) -> Floats:
    """1 / rank of the first positive, 0 where it is beyond k; its mean is MRR@k."""
    _check(ranks, relevance, k)
    first = first_ranks(ranks, relevance)
    return np.where(first > k, 0.0, 1.0 / first)


def ndcg_at(ranks: Ints, relevance: Relevance, k: int) -> Floats:
    """Binary nDCG@k: sum of 1 / log2(rank + 1) of the positives in the first k, divided by the best possible,
    that of min(k, positives) positives in front (Jarvelin and Kekalainen 2002; as trec_eval's ndcg_cut)."""
    reachable = np.minimum(relevance.counts, k)
    ideal = np.concatenate(([0.0], np.cumsum(1.0 / np.log2(np.arange(2.0, reachable.max(initial=0) + 2)))))
    query_of, near = _within(ranks, relevance, k)
    return _sums(1.0 / np.log2(near + 1.0), query_of, ideal[reachable])


def average_precision_at(ranks: Ints, relevance: Relevance, k: int) -> Floats:
    """Sum of precision@rank over the positives in the first k, divided by the number of all positives (as
    trec_eval's map_cut; some tools divide by min(k, positives)); its mean is mAP@k."""
    query_of, near = _within(ranks, relevance, k)
    order = np.lexsort((near, query_of))
    found = np.arange(len(near)) - np.searchsorted(query_of, query_of) + 1
    return _sums(found / near[order], query_of, relevance.counts)


def query_values(ranks: Ints, relevance: Relevance, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Floats]:
    """Every metric of every query by name: hit_rate@k for every k, the others at the largest k, and first_rank.

    float64 [queries], NaN for a query without a positive. A query's values depend on nothing but its own ranks, so
    what several processes find for their shares of the queries joins to what one process finds for all.
    """
    last = max(ks)
    found = {f"hit_rate@{k}": hit_at(ranks, relevance, k) for k in ks}
    found[f"recall@{last}"] = recall_at(ranks, relevance, last)
    found[f"mrr@{last}"] = reciprocal_rank_at(ranks, relevance, last)
    found[f"ndcg@{last}"] = ndcg_at(ranks, relevance, last)
    found[f"map@{last}"] = average_precision_at(ranks, relevance, last)
    found["first_rank"] = first_ranks(ranks, relevance)
    return found


def mean_of(values: Mapping[str, Floats]) -> dict[str, float]:
    """The means of `query_values` over the queries that have a positive; ValueError where none has.

    Also `median_rank`, of the first positives; `top1_accuracy`, the share of queries whose first row is a positive;
    `queries`, the number of queries in the means, and `queries_without_positive`, that of those left out.
    """
    measured = ~np.isnan(values["first_rank"])
    if not measured.any():
        raise ValueError("no query has a positive in the gallery, so there is nothing to measure")
    found = {name: float(np.mean(value[measured])) for name, value in values.items() if name != "first_rank"}
    first = values["first_rank"][measured]
    found["median_rank"] = float(np.median(first))
    found["top1_accuracy"] = float(np.mean(first == 1))
    found["queries"] = float(np.count_nonzero(measured))
    found["queries_without_positive"] = float(np.count_nonzero(~measured))
    return found


def _check(ranks: Ints, relevance: Relevance, k: int = 1) -> None:
    if k < 1:
        raise ValueError(f"k is the number of rows looked at and must be at least 1, not {k}")
    if len(ranks) != len(relevance.positives):
        raise ValueError(f"there are {len(ranks)} ranks for {len(relevance.positives)} positives")


def _within(ranks: Ints, relevance: Relevance, k: int) -> tuple[Ints, Ints]:
    """Query and rank of the positives in the first k."""
    _check(ranks, relevance, k)
    near = np.flatnonzero(ranks <= k)
    return np.searchsorted(relevance.offsets, near, side="right") - 1, ranks[near]


def _sums(values: Floats, query_of: Ints, divisor: NDArray[Any]) -> Floats:
    """(Sum of each query's `values`) / (its `divisor`); NaN where that is 0: without positives."""
    sums = np.bincount(query_of, weights=values, minlength=len(divisor))
    means: Floats = np.divide(sums, divisor, out=np.full(len(sums), np.nan), where=divisor > 0)
    return means
