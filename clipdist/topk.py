"""Exact top-k of blocks of vectors: a fast first pass with a proven bound, an exact second one.

The order is (-exact score, id). `exact_scores` alone defines the exact score, so the answer does not depend
on blocks, shards, BLAS, its threads, or the machine. The first pass is a float32 matrix product; a row that
it cannot rule out is rescored exactly while its block is at hand, so blocks may be a stream, read once.

Bound of the first pass (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.5), for every
order of summation: |fl(x.q) - x.q| <= gamma_d |x|.|q| <= gamma_d ||x|| ||q||, with u = 2^-24 and
gamma_d = d u / (1 - d u).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Ids = Callable[[Ints], Sequence[str]]
Keep = Callable[[int, int], NDArray[np.bool_]]

_SUB_BLOCK_VALUES = 1 << 20  # values of one first-pass step: 4 MiB in float32, so that it stays in cache
_PAIRS_AT_ONCE = 1024  # rows gathered for one exact step
_TIES_HELD = 1 << 16  # rows held beyond k per query before ties are broken early
_SQUARED_NORM_LIMIT = 2.0**32  # above it (or NaN) the first pass says nothing of a row


class TopK(NamedTuple):
    """The best rows of every query, best first: `rows` int64 [q, k'], exact `scores` float64 [q, k']."""

    rows: Ints
    scores: Floats


class PreparedQueries(NamedTuple):
    """Queries for `bounded_scores`: as given, and divided by 2^exponent so that they sit well in float32."""

    exact: Floats  # [q, d]
    scaled: NDArray[np.float32]  # [q, d], largest component in [0.5, 1)
    exponent: NDArray[np.int64]  # [q]
    slope: Floats  # [q], first-pass error per unit of row norm

    def take(self, which: slice) -> PreparedQueries:
        return PreparedQueries(self.exact[which], self.scaled[which], self.exponent[which], self.slope[which])


class Pool(NamedTuple):
    """Rows of queries, with exact scores; all [n]."""

    query: Ints
    row: Ints
    score: Floats


def exact_scores(rows: NDArray[Any], query: NDArray[Any]) -> Floats:
    """The score of every row, float64 [n]: sides widened to float64, products summed by halving.

    `rows` is float16 or float32 [n, d]; `query` is [d], or [n, d] with one query per row. Only elementwise
    float64 operations in a fixed order are used: d products, then the upper half is added onto the lower one
    until one number is left. So a row's score has the same bits whatever n, layout, numpy or processor.
    """
    if rows.ndim != 2 or rows.shape[1] == 0 or query.shape not in (rows.shape, rows.shape[1:]):
        raise ValueError(f"rows must be [n, d] and query [d] or [n, d], not {rows.shape} and {query.shape}")
    scores = np.empty(len(rows), dtype=np.float64)
    step = max(1, _SUB_BLOCK_VALUES // (4 * rows.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):  # rows that hold NaN or inf
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            products = rows[part].astype(np.float64)
            products *= query if query.ndim == 1 else query[part]
            width = products.shape[1]
            while width > 1:
                half = (width + 1) // 2
                products[:, : width - half] += products[:, half:width]
                width = half
            scores[part] = products[:, 0]
    return scores


def exact_pair_scores(rows: NDArray[Any], queries: Floats, row: Ints, query: Ints) -> Floats:
    """The exact score of `rows[row[i]]` and `queries[query[i]]` for every i, in bounded memory."""
    scores = np.empty(len(row), dtype=np.float64)
    for start in range(0, len(row), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        scores[part] = exact_scores(rows[row[part]], queries[query[part]])
    return scores


def prepare_queries(queries: NDArray[Any]) -> PreparedQueries:
    """Check and scale queries [q, d]; ValueError for another shape, NaN, inf, or values beyond float32."""
    exact = np.asarray(queries, dtype=np.float64)
    if exact.ndim != 2 or exact.shape[1] == 0:
        raise ValueError(f"queries must be a matrix [queries, dim], not of shape {exact.shape}")
    bad = np.flatnonzero(~(np.abs(exact) <= np.finfo(np.float32).max).all(axis=1))
    if bad.size:
        raise ValueError(
            f"query {bad[0]} holds NaN, inf or a value beyond float32 (one of {bad.size} such queries); "
            "a query must be finite: look at how it was embedded"
        )
    largest = np.abs(exact).max(axis=1)
    exponent = np.frexp(largest)[1].astype(np.int64)
    scaled = np.ldexp(exact, -exponent[:, None])
    dim = exact.shape[1]
    # + 4: rounding the query to float32, the exact score's own rounding, and this arithmetic
    gamma = (dim + 4) * 2.0**-24 / (1 - (dim + 4) * 2.0**-24)
    slope = gamma * np.sqrt(np.square(scaled).sum(axis=1))
    slope[(largest > 0) & (exponent < -900)] = np.inf  # the exact products themselves underflow: rescore all
    return PreparedQueries(exact, scaled.astype(np.float32), exponent, slope)


def bounded_scores(
    rows: NDArray[Any], queries: PreparedQueries, buffer: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], Floats, NDArray[np.bool_]]:
    """First pass over a block that fits the cache: (scores float32 [q, n], error [q], unsure [n]).

    For a row that is not `unsure`, |scores[i, j] - 2^-exponent[i] * exact score| <= error[i]. Rows that hold
    NaN or inf, or whose norm exceeds 65536, are unsure and their scores mean nothing. `buffer`, float32 with
    room for the block, saves an allocation per call.
    """
    check_rows(rows, queries.exact.shape[1])
    wide = widen(rows, buffer)
    dim = wide.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        squared = np.einsum("ij,ij->i", wide, wide)
        scores = queries.scaled @ wide.T
        sure = squared < _SQUARED_NORM_LIMIT
    largest = float(squared.max(initial=0.0, where=sure))
    # 2^-124: squares that underflow; in effect also products that do, or that a processor flushes to zero.
    norm = np.sqrt((largest + dim * 2.0**-124) / (1 - (dim + 2) * 2.0**-24))
    return scores, queries.slope * norm, ~sure


def check_rows(rows: NDArray[Any], dim: int) -> None:
    """ValueError unless `rows` is a float16 or float32 matrix with `dim` columns."""
    if rows.ndim != 2 or rows.dtype not in (np.float16, np.float32):
        raise ValueError(f"a block must be a float16 or float32 matrix [rows, dim], not {rows.dtype} {rows.shape}")
    check_dim(dim, rows.shape[1])


def check_dim(queries_dim: int, rows_dim: int) -> None:
    if queries_dim != rows_dim:
        raise ValueError(
            f"queries have {queries_dim} dimensions but the rows have {rows_dim}; "
            "queries and catalog must be embedded by the same model"
        )


def widen(rows: NDArray[Any], buffer: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Rows in float32, in `buffer` where they must be copied. float16 goes through integers, 5x faster than numpy's
    astype; there NaN and inf become numbers of at least 65536 (so: unsure)."""
    if rows.dtype == np.float32:
        if rows.flags.aligned:
            return rows
        # A raw page starts at any byte of its file, and numpy is 10x slower on such rows.
        wide = np.empty(rows.shape, dtype=np.float32) if buffer is None else buffer[: len(rows)]
        np.copyto(wide, rows)
        return wide
    flushes_subnormals = np.float32(2.0**-140) * np.float32(2.0**112) == 0  # a setting of this thread
    if flushes_subnormals:
        return rows.astype(np.float32)
    wide = np.empty(rows.shape, dtype=np.float32) if buffer is None else buffer[: len(rows)]
    bits = wide.view(np.int32)
    np.copyto(bits, rows.view(np.int16))
    bits <<= 13
    bits &= np.int32(-0x70002000)  # 0x8FFFE000: the sign, and exponent and mantissa where float32 has them
    wide *= np.float32(2.0**112)  # the difference of the exponents' biases
    return wide


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


def round_down(values: Floats) -> NDArray[np.float32]:
    """float32 numbers that are certainly not above `values`."""
    with np.errstate(over="ignore"):
        return np.nextafter(values.astype(np.float32), np.float32(-np.inf))


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
