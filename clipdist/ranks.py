"""The exact rank of every relevant row among all rows of a gallery, block by block.

`positive_ranks` walks the gallery once per group of queries. A query's ranks have the same bits whatever other queries
are asked with it, so several processes may share the queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdist.metrics import Floats, Ints, Relevance
from clipdist.scores import (
    PreparedQueries,
    bounded_scores,
    check_rows,
    exact_pair_scores,
    exact_scores,
    prepare_queries,
    round_down,
)

_QUERIES_AT_ONCE = 1024
_FEW_POSITIVES = 16  # below it comparing is faster than sorting


def positive_ranks(
    queries: NDArray[Any], gallery: NDArray[Any], relevance: Relevance, block_rows: int = 8192, best: int | None = None
) -> Ints:
    """The rank (1 = first) of every positive among all gallery rows, aligned with `relevance.positives`.

    `queries` [q, d] and `gallery` [n, d] (float16 or float32) are L2-normalised embeddings. Higher score
    first; of equal scores the lower row number first: id order when the gallery is sorted by id. Scores are
    compared exactly (`scores.exact_scores`), so equal vectors do tie and ranks do not depend on `block_rows`.
    `best`: only that many positives of each query, the highest, are ranked, and the others get n + 1. No other can be
    among the first `best` rows, so metrics at k <= best are the same, in far less time where a query has hundreds.
    Memory: O(1024 * (block_rows + positives of a query)). ValueError for shapes that do not fit or a gallery row that
    is not finite.
    """
    if len(queries) != len(relevance.offsets) - 1:
        raise ValueError(f"there are {len(queries)} queries but relevance for {len(relevance.offsets) - 1}")
    if relevance.positives.max(initial=-1) >= len(gallery):
        raise ValueError(f"a positive is row {relevance.positives.max()} of a gallery of {len(gallery)} rows")
    check_rows(gallery, queries.shape[1])
    ranks = np.full(len(relevance.positives), len(gallery) + 1, dtype=np.int64)
    active = np.flatnonzero(relevance.counts)
    for start in range(0, len(active), _QUERIES_AT_ONCE):
        group = active[start : start + _QUERIES_AT_ONCE]
        # The positives of consecutive active queries are consecutive too: between them no query has any.
        first, last = int(relevance.offsets[group[0]]), int(relevance.offsets[group[-1] + 1])
        positives = relevance.positives[first:last]
        owner = np.repeat(np.arange(len(group)), relevance.counts[group])
        prepared = prepare_queries(queries[group])
        target = exact_pair_scores(gallery, prepared.exact, positives, owner)
        kept = np.arange(len(owner)) if best is None else _highest(target, owner, best)
        ahead = _rows_ahead(prepared, gallery, positives[kept], owner[kept], target[kept], block_rows)
        ranks[first + kept] = 1 + ahead
    return ranks


def _highest(target: Floats, owner: Ints, best: int) -> Ints:
    """Places of the `best` highest positives of each query, ascending; of equal ones the earlier."""
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    return np.sort(np.lexsort((-target, owner))[place < best])


def _rows_ahead(
    queries: PreparedQueries, gallery: NDArray[Any], positives: Ints, owner: Ints, target: Floats, block_rows: int
) -> Ints:
    """How many rows come before each positive, which is one of query `owner` (ascending) with the score `target`."""
    edges = np.searchsorted(owner, np.arange(len(queries.exact) + 1))
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
