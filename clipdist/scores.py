"""Scores of rows and queries: the exact one, and a fast one in float32 with a proven bound.

`exact_scores` alone defines the exact score, so no answer depends on blocks, shards, BLAS, its threads, or the machine.

Bound of the first pass (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.5), for every
order of summation: |fl(x.q) - x.q| <= gamma_d |x|.|q| <= gamma_d ||x|| ||q||, with u = 2^-24 and
gamma_d = d u / (1 - d u).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[Any]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_VALUES_AT_ONCE = 1 << 18  # of exact scores: 2 MiB in float64, so that they stay in cache
_PAIRS_AT_ONCE = 1024  # rows gathered for one exact step
_SQUARED_NORM_LIMIT = 2.0**32  # above it (or NaN) the first pass says nothing of a row


class PreparedQueries(NamedTuple):
    """Queries for `bounded_scores`: as given, and divided by 2^exponent so that they sit well in float32."""

    exact: Floats  # [q, d]
    scaled: NDArray[np.float32]  # [q, d], largest component in [0.5, 1)
    exponent: NDArray[np.int64]  # [q]
    slope: Floats  # [q], first-pass error per unit of row norm

    def take(self, which: slice) -> PreparedQueries:
        return PreparedQueries(self.exact[which], self.scaled[which], self.exponent[which], self.slope[which])


def exact_scores(rows: NDArray[Any], query: NDArray[Any]) -> Floats:
    """The score of every row, float64 [n]: sides widened to float64, products summed by halving.

    `rows` is float16 or float32 [n, d]; `query` is [d], or [n, d] with one query per row. Only elementwise
    float64 operations in a fixed order are used: d products, then the upper half is added onto the lower one
    until one number is left. So a row's score has the same bits whatever n, layout, numpy or processor.
    """
    if rows.ndim != 2 or rows.shape[1] == 0 or query.shape not in (rows.shape, rows.shape[1:]):
        raise ValueError(f"rows must be [n, d] and query [d] or [n, d], not {rows.shape} and {query.shape}")
    scores = np.empty(len(rows), dtype=np.float64)
    step = max(1, _VALUES_AT_ONCE // rows.shape[1])
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


def round_down(values: Floats) -> NDArray[np.float32]:
    """float32 numbers that are certainly not above `values`."""
    with np.errstate(over="ignore"):
        return np.nextafter(values.astype(np.float32), np.float32(-np.inf))
