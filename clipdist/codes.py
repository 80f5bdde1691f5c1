"""int8 codes of a row group's vectors for a fast first pass, and a proven bound of what they lose.

A row is x = mean + scale * code + residual (products by component). For a query q, with q' = scale * q written as
t * p + rest in integers p of 8 bits:

    x.q = mean.q + t (code.p) + code.rest + residual.q
    |code.rest + residual.q| <= ||code|| ||rest|| + ||residual|| ||q||    (Cauchy-Schwarz)

where code.p is an exact integer. So half of a float16 row's bytes say its score to within a known error. The mean
takes out what all rows share (the cone of a modality), so that the 255 levels are spent on what differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipdist.scores import Floats, Ints, PreparedQueries, Rows, widen

LAYOUT = 1
"""Raised when codes that were kept on disk would be read wrongly."""

_STEP = 2048  # rows at once: 4 MiB of float32 at 512 dimensions
_LEVELS = 127
_LOOKED_AT = 4096  # rows that mean and deviation are taken from
_FARTHEST = 8.0  # standard deviations: what lies beyond is clipped, instead of making all levels wide
_USUAL, _ODD = 0.95, 1.5  # a row whose residual is so many times that of this share of the rows is odd
_LARGEST_SQUARED_NORM = 2.0**32  # as in the float32 first pass; NaN and infinities are above it


@dataclass(frozen=True)
class Codes:
    """Codes int8 [rows, dim] of one row group. The norms are upper bounds over all rows but the `odd` ones, of which
    the codes say nothing (not finite, or far outside what the others are)."""

    code: NDArray[np.int8]
    mean: NDArray[np.float32]  # [dim]
    scale: NDArray[np.float32]  # [dim]
    residual_norm: float
    code_norm: float
    row_norm: float
    odd: Ints  # places, ascending

    def to_bytes(self) -> bytes:
        levels = np.concatenate([self.mean, self.scale]).astype("<f4")
        norms = np.array([self.residual_norm, self.code_norm, self.row_norm], "<f8")
        odd = np.zeros(len(self.code), bool)
        odd[self.odd] = True
        return b"".join(part.tobytes() for part in (self.code, levels, norms, np.packbits(odd)))

    @staticmethod
    def size(rows: int, dim: int) -> int:
        """Bytes that `to_bytes` gives."""
        return rows * dim + 8 * dim + 24 + -(-rows // 8)

    @staticmethod
    def of_bytes(data: NDArray[np.uint8], rows: int, dim: int) -> Codes:
        """What `to_bytes` gave; the codes are a view of it."""
        code, rest = data[: rows * dim].view(np.int8).reshape(rows, dim), data[rows * dim :].tobytes()
        levels = np.frombuffer(rest, "<f4", 2 * dim)
        residual, code_norm, row = np.frombuffer(rest, "<f8", 3, 8 * dim).tolist()
        odd = np.flatnonzero(np.unpackbits(np.frombuffer(rest, np.uint8, offset=8 * dim + 24), count=rows))
        return Codes(code, levels[:dim], levels[dim:], residual, code_norm, row, odd)


def encode(rows: Rows) -> Codes:
    """Codes of float16 or float32 rows [n, dim]."""
    mean, scale = _levels(rows)
    code = np.empty(rows.shape, np.int8)
    norms = np.empty((3, len(rows)))  # of rows, residuals, codes
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(rows), _STEP):
            part = slice(start, start + _STEP)
            wide = widen(rows[part])
            norms[0, part] = _norms(wide)
            wide = wide - mean
            levels = wide * (1 / scale)
            np.clip(np.rint(levels, out=levels), -_LEVELS, _LEVELS, out=levels)
            code[part] = np.nan_to_num(levels, copy=False) if np.isinf(norms[0, part]).any() else levels
            norms[2, part] = _norms(levels)
            levels *= scale
            wide -= levels
            norms[1, part] = _norms(wide)
    sure = np.isfinite(norms[0])
    usual = float(np.quantile(norms[1][sure], _USUAL)) if sure.any() else 0.0
    sure &= norms[1] <= _ODD * usual + 2.0**-20 * norms[0]
    row_norm, residual_norm, code_norm = (float(values.max(initial=0.0, where=sure)) for values in norms)
    # Three roundings to float32 of each component of a residual.
    residual_norm += 2.0**-20 * (row_norm + float(np.linalg.norm(mean.astype(np.float64))))
    return Codes(code, mean, scale, residual_norm, code_norm, row_norm, np.flatnonzero(~sure))


def _norms(rows: Rows) -> Floats:
    """Upper bounds of the norms [n]; inf for rows that hold NaN or infinities, or are too long."""
    squared = np.einsum("ij,ij->i", rows, rows).astype(np.float64)
    squared[~(squared < _LARGEST_SQUARED_NORM)] = np.inf
    dim = rows.shape[1]
    return np.asarray(np.sqrt((squared + dim * 2.0**-124) / (1 - (dim + 2) * 2.0**-24)))


def _levels(rows: Rows) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and width of a level, per component: a choice, no bound rests on it. Mean and deviation are of a part of the
    rows, the farthest values of all."""
    some = np.asarray(widen(rows[:: max(1, len(rows) // _LOOKED_AT)]), np.float64)
    some = some[np.square(some).sum(axis=1) < _LARGEST_SQUARED_NORM]
    if not len(some):
        return np.zeros(rows.shape[1], np.float32), np.ones(rows.shape[1], np.float32)
    mean, deviation = some.mean(axis=0), some.std(axis=0)
    low, high = some.min(axis=0), some.max(axis=0)
    for start in range(0, len(rows), _STEP):
        wide = widen(rows[start : start + _STEP])
        low, high = np.fmin(low, wide.min(axis=0)), np.fmax(high, wide.max(axis=0))
    farthest = np.minimum(np.maximum(high - mean, mean - low), _FARTHEST * deviation)
    return mean.astype(np.float32), np.maximum(farthest / _LEVELS, 2.0**-60).astype(np.float32)


class CodedQueries(NamedTuple):
    """Queries for the codes of one row group: a row's scaled score is within `error` of base + step * (code.p)."""

    integers: NDArray[np.int8]  # p [q, dim]
    base: Floats  # [q]
    step: Floats  # [q], positive
    error: Floats  # [q]

    def least(self, scores: Floats) -> NDArray[np.int32]:
        """The least code.p [q] that a row with at least these scaled scores can have."""
        with np.errstate(invalid="ignore", over="ignore"):
            least = np.floor((scores - self.base - self.error) / self.step) - 1
        least[np.isnan(least)] = -np.inf
        return np.asarray(np.clip(least, -(2**31) + 1, 2**31 - 1), np.int32)


def code_queries(codes: Codes, queries: PreparedQueries) -> CodedQueries:
    """All in float64; the bound has room for its rounding."""
    scaled = np.ldexp(queries.exact, -queries.exponent[:, None])
    stretched = scaled * codes.scale
    step = np.abs(stretched).max(axis=1) / _LEVELS
    step[step == 0] = 1.0
    integers = np.rint(stretched / step[:, None])
    rest = np.linalg.norm(stretched - integers * step[:, None], axis=1)
    norm = np.linalg.norm(scaled, axis=1)
    mean, scale = (np.linalg.norm(values.astype(np.float64)) for values in (codes.mean, codes.scale))
    dim = scaled.shape[1]
    rounding = 4 * (dim + 8) * 2.0**-53 * norm * (codes.row_norm + mean + codes.code_norm * scale)
    error = (codes.residual_norm * norm + codes.code_norm * rest) * (1 + 2.0**-40) + rounding
    error[np.isinf(queries.slope)] = np.inf
    return CodedQueries(integers.astype(np.int8), scaled @ codes.mean.astype(np.float64), step, error)
