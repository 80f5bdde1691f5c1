"""Exact top-k of blocks of vectors: a fast first pass with a proven bound, an exact second one.

The order is (-exact score, id). The first pass is a float32 matrix product; a row that it cannot rule out is rescored
exactly while its block is at hand, so blocks may be a stream, read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipdist.scores import (
    Floats,
    Ints,
    PreparedQueries,
    bounded_scores,
    check_rows,
    exact_pair_scores,
    prepare_queries,
    round_down,
)

Ids = Callable[[Ints], Sequence[str]]
Keep = Callable[[int, int], NDArray[np.bool_]]

_SUB_BLOCK_VALUES = 1 << 20  # values of one first-pass step: 4 MiB in float32, so that it stays in cache
_TIES_HELD = 1 << 16  # rows held beyond k per query before ties are broken early


class TopK(NamedTuple):
    """The best rows of every query, best first: `rows` int64 [q, k'], exact `scores` float64 [q, k']."""

    rows: Ints
    scores: Floats


class Pool(NamedTuple):
    """Rows of queries, with exact scores; all [n]."""

    query: Ints
    row: Ints
    score: Floats


def top_k(
    blocks: Iterable[tuple[int, NDArray[Any]]],
    queries: NDArray[Any],
    k: int,
    ids: Ids,
    *,
    keep: Keep | None = None,
) -> TopK:
    """The k best rows of every query, ordered by (-exact score, id); k' = min(k, rows that can be returned).

    `blocks` yields (number of the first row, float16 or float32 matrix [rows, dim]) in any order, each row
    once. `queries` is [q, dim], float32 or float64. `ids` turns row numbers into ids; it is asked only for
    rows whose scores tie, most often never. `keep(first, stop)` gives a boolean mask of those rows, False =
    leave out. A row that holds NaN or inf is never returned. Memory: a block + O(q * k). ValueError for
    k < 1, a dimension or dtype that does not fit, or a query that is not finite.
    """
    prepared = prepare_queries(queries)
    best = Best(len(prepared.exact), k, ids)
    step = max(64, min(1 << 16, _SUB_BLOCK_VALUES // max(prepared.exact.shape)))
    buffer = np.empty((step, prepared.exact.shape[1]), dtype=np.float32)
    for first, block in blocks:
        check_rows(block, prepared.exact.shape[1])
        for numbers, rows in _sub_blocks(first, block, step, keep):
            found = candidates(rows, prepared, best.kth_score(), k, buffer)
            best.add(found._replace(row=numbers[found.row]))
    return best.answer()


class Best:
    """The k best rows of every query among those added, each row once. Memory: O(queries * k)."""

    def __init__(self, queries: int, k: int, ids: Ids) -> None:
        if k < 1:
            raise ValueError(f"k is the number of rows to return and must be at least 1, not {k}")
        self.n, self.k, self.ids = queries, k, ids
        self._capacity = queries * k + queries * k // 4
        self._pools: list[Pool] = []
        self._held = 0
        self._kth_score = np.full(queries, -np.inf)

    def add(self, found: Pool) -> None:
        """Rows with their exact scores."""
        if not len(found.row):
            return
        self._pools.append(found)
        self._held += len(found.row)
        if self._held > self._capacity:
            self.settle()

    def kth_score(self) -> Floats:
        """A score of every query that k of the added rows reach, or -inf; the highest such after `settle`."""
        return self._kth_score

    def answer(self) -> TopK:
        pool = _break_ties(_join(self._pools), self.n, self.k, self.ids)
        count = len(pool.row) // self.n if self.n else 0
        return TopK(pool.row.reshape(self.n, count), pool.score.reshape(self.n, count))

    def settle(self) -> None:
        """Forgets rows that k others beat."""
        pool, self._kth_score = _drop_beaten(_join(self._pools), self.n, self.k)
        if len(pool.row) > self._capacity + _TIES_HELD:
            pool = _break_ties(pool, self.n, self.k, self.ids)
        self._pools, self._held = [pool], len(pool.row)


def merge(parts: Iterable[TopK], k: int, ids: Ids) -> TopK:
    """The exact top-k of a whole from that of its disjoint parts (same queries, row numbers of the whole).

    Every part must hold its own k best, or all its rows if it has fewer. `ids` as in `top_k`.
    """
    parts = list(parts)
    counts = {len(part.rows) for part in parts}
    if len(counts) != 1:
        raise ValueError(f"parts must answer the same queries; their numbers of queries are {sorted(counts)}")
    best = Best(counts.pop(), k, ids)
    for part in parts:
        query = np.repeat(np.arange(best.n), part.rows.shape[1])
        best.add(Pool(query, part.rows.ravel(), part.scores.ravel()))
    return best.answer()


def _sub_blocks(first: int, block: NDArray[Any], step: int, keep: Keep | None) -> Iterable[tuple[Ints, NDArray[Any]]]:
    """(row numbers, rows) of the rows to keep, a step at a time."""
    mask = None if keep is None else keep(first, first + len(block))
    if mask is not None and (mask.dtype != np.bool_ or mask.shape != (len(block),)):
        raise ValueError(f"keep must give {len(block)} booleans here, not {mask.dtype} {mask.shape}")
    for start in range(0, len(block), step):
        rows = block[start : start + step]
        numbers = np.arange(first + start, first + start + len(rows))
        if mask is None:
            yield numbers, rows
        elif mask[start : start + step].any():
            kept = mask[start : start + step]
            yield numbers[kept], rows[kept]


def candidates(
    rows: NDArray[Any], queries: PreparedQueries, kth_score: Floats, k: int, buffer: NDArray[np.float32] | None = None
) -> Pool:
    """The (query, place in rows) pairs that may reach the first k, with exact scores. `kth_score` [q]: a score that k
    rows reach, or -inf."""
    scores, error, unsure = bounded_scores(rows, queries, buffer)
    scores[:, unsure] = -np.inf
    cut = np.ldexp(kth_score, -queries.exponent) - error
    alive = scores >= round_down(cut)[:, None]
    if len(rows) > k and np.count_nonzero(alive) > 4 * k * len(scores):
        # A row that k rows of this block surely beat need not be scored.
        kth_here = np.partition(scores, len(rows) - k, axis=1)[:, len(rows) - k]
        alive = scores >= round_down(np.maximum(cut, kth_here - 2 * error))[:, None]
    alive[:, unsure] = True
    query, place = np.nonzero(alive)
    exact = exact_pair_scores(rows, queries.exact, place, query)
    # Finite rows and queries within float32 have finite scores: the others hold NaN or inf.
    found = np.isfinite(exact) & (exact >= kth_score[query])
    return Pool(query[found], place[found], exact[found])


def _join(pools: list[Pool]) -> Pool:
    empty = Pool(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64))
    return Pool(*(np.concatenate(column) for column in zip(empty, *pools, strict=True)))


def _take(pool: Pool, index: NDArray[Any]) -> Pool:
    return Pool(pool.query[index], pool.row[index], pool.score[index])


def _drop_beaten(pool: Pool, n: int, k: int) -> tuple[Pool, Floats]:
    """The pool in order of query and score, without rows below the k-th score; that score [n] or -inf."""
    pool = _take(pool, np.lexsort((-pool.score, pool.query)))
    counts = np.bincount(pool.query, minlength=n)
    starts = np.cumsum(counts) - counts
    full = counts >= k
    kth_score = np.full(n, -np.inf)
    kth_score[full] = pool.score[starts[full] + k - 1]
    return _take(pool, pool.score >= kth_score[pool.query]), kth_score


def _break_ties(pool: Pool, n: int, k: int, ids: Ids) -> Pool:
    """The first k of every query by (-score, id), in that order."""
    pool, _ = _drop_beaten(pool, n, k)
    same = (np.diff(pool.query) == 0) & (np.diff(pool.score) == 0)
    tied = np.zeros(len(pool.row), dtype=np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    place = np.zeros(len(pool.row), dtype=np.int64)
    if tied.any():
        rows, inverse = np.unique(pool.row[tied], return_inverse=True)
        names = list(ids(rows))
        if len(names) != len(rows):
            raise ValueError(f"ids gave {len(names)} ids for {len(rows)} rows")
        rank = np.empty(len(rows), dtype=np.int64)
        rank[sorted(range(len(rows)), key=names.__getitem__)] = np.arange(len(rows))
        place[tied] = rank[inverse]
    pool = _take(pool, np.lexsort((place, -pool.score, pool.query)))
    counts = np.bincount(pool.query, minlength=n)
    position = np.arange(len(pool.row)) - (np.cumsum(counts) - counts)[pool.query]
    return _take(pool, position < k)
