"""Codes: every row's score lies within the stated error of what its integers say; the error is small; files keep them."""

from typing import Any

import numpy as np
import pytest

from clipdist.codes import CodedQueries, Codes, code_queries, encode
from clipdist.scores import PreparedQueries, exact_scores, prepare_queries

Array = np.ndarray[Any, Any]


def gaussian(rows: int, dim: int, random: np.random.Generator) -> Array:
    return random.standard_normal((rows, dim)) / np.sqrt(dim)


def cone(rows: int, dim: int, random: np.random.Generator) -> Array:
    """As the vectors of one modality: mostly what all share, and a few components far from the others."""
    vectors = 0.2 * gaussian(rows, dim, random) + gaussian(1, dim, random)
    vectors[:, dim // 2] += 3
    return vectors


def outliers(rows: int, dim: int, random: np.random.Generator) -> Array:
    vectors = gaussian(rows, dim, random)
    vectors[:: rows // 3] *= 1000
    vectors[1, 0] = 500
    return vectors


def broken(rows: int, dim: int, random: np.random.Generator) -> Array:
    vectors = gaussian(rows, dim, random)
    vectors[3, 0], vectors[5], vectors[7] = np.nan, np.inf, 0
    return vectors


def tiny(rows: int, dim: int, random: np.random.Generator) -> Array:
    return gaussian(rows, dim, random) * 1e-7


KINDS = {kind.__name__: kind for kind in (gaussian, cone, outliers, broken, tiny)}


def deviation(rows: Array, codes: Codes, queries: PreparedQueries, asked: CodedQueries) -> Array:
    """How far [q, n] each exact scaled score is from what the integers say, as a share of the error allowed."""
    products = asked.integers.astype(np.int64) @ codes.code.astype(np.int64).T
    said = asked.base[:, None] + asked.step[:, None] * products
    with np.errstate(invalid="ignore"):
        exact = np.array([exact_scores(rows, query) for query in queries.exact])
        return np.abs(said - np.ldexp(exact, -queries.exponent[:, None])) / (asked.error[:, None] + 1e-300)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("dim", [1, 7, 512])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_error_bounds_every_row(kind: str, dim: int, dtype: str) -> None:
    random = np.random.default_rng(dim)
    rows = KINDS[kind](3000, dim, random).astype(dtype)
    queries = prepare_queries(
        np.concatenate([gaussian(8, dim, random) * 1e3, rows[:3].astype(np.float32), np.zeros((1, dim))])
    )
    codes = encode(rows)
    sure = np.setdiff1d(np.arange(len(rows)), codes.odd)
    assert len(codes.odd) < 0.02 * len(rows)
    asked = code_queries(codes, queries)
    assert deviation(rows, codes, queries, asked)[:, sure].max() <= 1
    # Control: without its parts the error is no bound.
    if kind == "gaussian" and dim == 512:
        for part in ("residual_norm", "code_norm"):
            less = Codes(**{**vars(codes), part: 0.0})
            assert (deviation(rows, less, queries, code_queries(less, queries))[:-1] > 0.2).any()


def test_the_error_is_small_where_rows_are_ordinary() -> None:
    random = np.random.default_rng(3)
    for kind, limit in ((gaussian, 0.02), (cone, 0.006)):
        rows = kind(20_000, 512, random).astype(np.float16)
        queries = prepare_queries(gaussian(8, 512, random))
        asked = code_queries(encode(rows), queries)
        assert (asked.error / np.linalg.norm(queries.scaled, axis=1)).max() < limit


def test_rows_that_are_not_finite_are_odd() -> None:
    rows = broken(3000, 64, np.random.default_rng(0)).astype(np.float16)
    assert {3, 5} <= set(encode(rows).odd.tolist())
    assert len(encode(np.full((10, 4), np.nan, np.float32)).odd) == 10
    assert encode(np.zeros((0, 4), np.float16)).code.shape == (0, 4)


@pytest.mark.parametrize("rows", [1, 8, 1001])
def test_bytes_keep_them(rows: int) -> None:
    vectors = gaussian(rows, 40, np.random.default_rng(1)).astype(np.float16)
    vectors[rows // 2] = np.nan
    codes = encode(vectors)
    data = codes.to_bytes()
    assert len(data) == Codes.size(rows, 40)
    loaded = Codes.of_bytes(np.frombuffer(data, np.uint8), rows, 40)
    for name, value in vars(codes).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
