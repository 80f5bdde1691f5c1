"""Exact top-k: equal to its brute-force definition whatever the blocks, the layout and the near-ties."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import clipdist.topk as topk
from clipdist.scores import bounded_scores, exact_scores, prepare_queries, widen
from clipdist.topk import TopK, merge, top_k

Array = NDArray[Any]


def shuffled_ids(rows: Array) -> list[str]:
    """Ids whose order is not the order of the rows, "10" before "9"."""
    return [str(int(row) * 7919 % 10_007) for row in rows]


def no_ids(rows: Array) -> list[str]:
    raise AssertionError(f"ids were asked for {len(rows)} rows although no score ties")


def brute_force(rows: Array, queries: Array, k: int, mask: Array | None = None) -> TopK:
    """The definition, one query at a time, in Python."""
    finite = np.isfinite(rows.astype(np.float64)).all(axis=1)
    numbers = [int(i) for i in np.flatnonzero(finite if mask is None else finite & mask)]
    ids = shuffled_ids(np.arange(len(rows)))
    best_rows, best_scores = [], []
    for query in queries:
        scores = exact_scores(rows, query.astype(np.float64))
        order = sorted(numbers, key=lambda i: (-scores[i], ids[i]))[:k]
        best_rows.append(order)
        best_scores.append(scores[order])
    width = min(k, len(numbers))
    return TopK(
        np.array(best_rows, dtype=np.int64).reshape(len(queries), width),
        np.array(best_scores, dtype=np.float64).reshape(len(queries), width),
    )


def assert_same(found: TopK, expected: TopK) -> None:
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.rows.dtype == np.int64
    assert found.scores.dtype == np.float64


def blocks_of(rows: Array, sizes: Sequence[int]) -> Iterator[tuple[int, Array]]:
    first = 0
    for size in sizes:
        yield first, rows[first : first + size]
        first += size
    yield first, rows[first:]


def unit(vectors: Array) -> Array:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def random_rows(n: int, dim: int, seed: int) -> Array:
    return unit(np.random.default_rng(seed).standard_normal((n, dim)))


def clustered_rows(n: int, dim: int, seed: int) -> Array:
    """CLIP-like: a narrow cone of tight clusters in float16, so many rows differ in their last bits only."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal(dim) + 0.5 * rng.standard_normal((20, dim))
    rows = centres[rng.integers(20, size=n)] + 1e-4 * rng.standard_normal((n, dim))
    return unit(rows).astype(np.float16)


def last_bit_rows(n: int, dim: int, seed: int) -> Array:
    """One float16 vector n times, each copy with one component moved by one unit in the last place; a third
    of the rows are exact duplicates."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(random_rows(1, dim, seed).astype(np.float16), n, axis=0)
    column = rng.integers(dim, size=n)
    bits = rows.view(np.uint16)
    bits[np.arange(n), column] += rng.integers(3, size=n).astype(np.uint16)
    return rows


def last_bit_singles(n: int, dim: int, seed: int) -> Array:
    """The same in float32, where one unit in the last place is below what a float32 product can tell."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(random_rows(1, dim, seed), n, axis=0)
    rows.view(np.uint32)[np.arange(n), rng.integers(dim, size=n)] += rng.integers(3, size=n).astype(np.uint32)
    return rows


MAKERS: list[Callable[[int, int, int], Array]] = [random_rows, clustered_rows, last_bit_rows, last_bit_singles]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dim", [3, 384, 512])
@pytest.mark.parametrize(("n_queries", "k"), [(1, 10), (70, 3)])
def test_equals_the_definition(make: Callable[[int, int, int], Array], dim: int, n_queries: int, k: int) -> None:
    rows = make(600, dim, 1)
    queries = random_rows(n_queries, dim, 2) + rows[:1].astype(np.float32)
    assert_same(top_k([(0, rows)], queries, k, shuffled_ids), brute_force(rows, queries, k))


@pytest.mark.parametrize("make", [last_bit_rows, last_bit_singles])
def test_float32_alone_is_not_exact_on_this_data(make: Callable[[int, int, int], Array]) -> None:
    """Control: without the second pass the near-ties come out wrong, so the test above can fail."""
    rows = make(600, 512, 1)
    queries = random_rows(5, 512, 2) + rows[:1].astype(np.float32)
    scores = queries @ rows.astype(np.float32).T
    rank = np.argsort(np.array(shuffled_ids(np.arange(600)))).argsort()
    float32_only = np.stack([np.lexsort((rank, -row))[:10] for row in scores])
    assert (float32_only != brute_force(rows, queries, 10).rows).any()


def test_float32_rows_are_ranked_by_their_true_products() -> None:
    """Against exactly rounded sums of exact float64 products, which share no code with `exact_scores`; and the
    control: rounded to float16, as if they were stored so, the rows give another answer."""
    rows = last_bit_singles(400, 64, 3)
    query = random_rows(1, 64, 4) + rows[:1]
    true = [math.fsum((row.astype(np.float64) * query[0].astype(np.float64)).tolist()) for row in rows]
    found = top_k([(0, rows)], query, 400, shuffled_ids)
    in_order = [true[row] for row in found.rows[0]]
    assert all(a >= b - 1e-15 for a, b in pairwise(in_order))
    np.testing.assert_allclose(found.scores[0], in_order, rtol=0, atol=1e-15)
    assert max(true) - min(true) > 1e-9, "the rows must differ by far more than float64 rounds"
    rounded = top_k([(0, rows.astype(np.float16))], query, 400, shuffled_ids)
    assert (rounded.rows != found.rows).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_matrix_at_any_byte_of_a_file(dtype: type) -> None:
    """Raw pages start where they start: numpy's unaligned arrays give the same answer."""
    rows = last_bit_singles(600, 48, 5).astype(dtype)
    raw = np.frombuffer(b"x" + rows.tobytes(), dtype=np.uint8)[1:].view(dtype).reshape(rows.shape)
    assert not raw.flags.aligned
    queries = random_rows(3, 48, 6) + rows[:1].astype(np.float32)
    assert_same(top_k(blocks_of(raw, [100, 7]), queries, 9, shuffled_ids), brute_force(rows, queries, 9))


@pytest.mark.parametrize("sizes", [[1] * 299, [7] * 40, [299], [0, 150, 0, 100], [100, 3, 90]])
@pytest.mark.parametrize("sub_block_values", [1, 1 << 20])
def test_result_does_not_depend_on_blocks(
    sizes: list[int], sub_block_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "_SUB_BLOCK_VALUES", sub_block_values)
    rows = clustered_rows(300, 64, 3)
    rows[200:] = rows[:100]
    queries = random_rows(9, 64, 4)
    blocks = list(blocks_of(rows, sizes))
    expected = brute_force(rows, queries, 12)
    assert_same(top_k(iter(blocks), queries, 12, shuffled_ids), expected)
    assert_same(top_k(reversed(blocks), queries, 12, shuffled_ids), expected)


@pytest.mark.parametrize("ascending", [True, False])
def test_rows_sorted_by_score(ascending: bool) -> None:
    """Ascending is the worst order for a running threshold: every row beats all before it."""
    query = random_rows(1, 16, 5)
    rows = random_rows(5000, 16, 6)
    rows = rows[np.argsort(rows @ query[0])]
    rows = rows if ascending else rows[::-1]
    found = top_k(blocks_of(rows, [64] * 70), query, 10, shuffled_ids)
    assert_same(found, brute_force(rows, query, 10))


@pytest.mark.parametrize("ties_held", [0, 1 << 16])
def test_identical_rows_are_ordered_by_id(ties_held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "_TIES_HELD", ties_held)
    rows = np.repeat(random_rows(1, 32, 7).astype(np.float16), 3000, axis=0)
    asked: list[int] = []

    def ids(numbers: Array) -> list[str]:
        asked.append(len(numbers))
        return shuffled_ids(numbers)

    queries = random_rows(2, 32, 8)
    found = top_k(blocks_of(rows, [500] * 5), queries, 4, ids)
    assert_same(found, brute_force(rows, queries, 4))
    if ties_held == 0:
        assert max(asked) < 3000, "ties must be broken early, before all rows are held"


def test_ids_are_asked_only_for_ties() -> None:
    rows = random_rows(500, 24, 9)
    top_k([(0, rows)], random_rows(3, 24, 10), 20, no_ids)
    rows[7] = rows[3]  # far from the first 2 of its opposite
    top_k([(0, rows)], -rows[3:4], 2, no_ids)
    with pytest.raises(AssertionError, match="2 rows"):
        top_k([(0, rows)], rows[3:4], 2, no_ids)


def test_k_beyond_the_rows_gives_all_of_them() -> None:
    rows = random_rows(8, 5, 11)
    queries = random_rows(3, 5, 12)
    assert_same(top_k(blocks_of(rows, [3, 3]), queries, 100, shuffled_ids), brute_force(rows, queries, 100))
    assert top_k([], queries, 5, no_ids).rows.shape == (3, 0)
    assert top_k([(0, rows[:0])], queries, 5, no_ids).scores.shape == (3, 0)
    assert top_k([(0, rows)], queries[:0], 5, no_ids).rows.shape == (0, 0)


def test_row_numbers_may_have_gaps() -> None:
    rows = random_rows(6, 4, 13)
    found = top_k([(1_000_000, rows[:3]), (40, rows[3:])], rows[:1], 1, no_ids)
    assert found.rows.tolist() == [[1_000_000]]


def cut(mask: Array, first: int, stop: int) -> Array:
    return mask[first:stop]


def test_keep_leaves_rows_out() -> None:
    rows = clustered_rows(400, 48, 14)
    queries = random_rows(6, 48, 15)
    for share in (0.0, 0.01, 0.5, 1.0):
        mask = np.random.default_rng(16).random(400) < share
        keep = partial(cut, mask)
        found = top_k(blocks_of(rows, [90, 200]), queries, 5, shuffled_ids, keep=keep)
        assert_same(found, brute_force(rows, queries, 5, mask))
    with pytest.raises(ValueError, match="keep must give 400 booleans"):
        top_k([(0, rows)], queries, 5, shuffled_ids, keep=lambda a, b: np.ones(3, dtype=np.bool_))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_that_are_not_finite_are_never_returned(dtype: Any) -> None:
    rows = random_rows(50, 8, 17).astype(dtype)
    rows[3, 2], rows[10, 0], rows[20, 7] = np.nan, np.inf, -np.inf
    rows[21], rows[30:34, 0], rows[34:38, 0] = np.nan, np.inf, -np.inf
    queries = random_rows(4, 8, 18)
    found = top_k(blocks_of(rows, [11, 11]), queries, 50, shuffled_ids)
    assert found.rows.shape == (4, 38)
    assert_same(found, brute_force(rows, queries, 50))
    assert_same(top_k([(0, rows)], queries, 3, shuffled_ids), brute_force(rows, queries, 3))


@pytest.mark.parametrize(
    ("row_scale", "query_scale"),
    [(1e-7, 1.0), (6e4, 1e30), (3e38, 3e38), (1e-44, 1e-44), (1.0, 3e-323), (1.0, 0.0), (0.0, 1.0)],
)
def test_extreme_sizes(row_scale: float, query_scale: float) -> None:
    """Subnormal, overflowing (in float32), zero and far from normalised vectors."""
    rng = np.random.default_rng(19)
    raw = rng.uniform(-1, 1, (300, 10)) * row_scale
    queries = rng.uniform(-1, 1, (3, 10)) * query_scale
    for dtype in (np.float32, np.float16):
        if row_scale <= 6e4 or dtype == np.float32:
            rows = raw.astype(dtype)
            assert_same(top_k([(0, rows)], queries, 7, shuffled_ids), brute_force(rows, queries, 7))


def test_one_giant_row_does_not_hide_the_others() -> None:
    rows = random_rows(300, 10, 20)
    rows[5] *= 1e4
    rows[6] *= 1e25
    queries = random_rows(3, 10, 21)
    assert_same(top_k(blocks_of(rows, [50] * 5), queries, 7, shuffled_ids), brute_force(rows, queries, 7))


def test_first_pass_stays_within_its_bound() -> None:
    for make in MAKERS:
        for scale in (1.0, 1e-6, 1e3):
            rows = make(500, 512, 22)
            rows = (rows * scale).astype(rows.dtype)
            queries = prepare_queries(random_rows(4, 512, 23) * np.float32(scale))
            scores, error, unsure = bounded_scores(rows, queries)
            for i in range(4):
                exact = np.ldexp(exact_scores(rows, queries.exact[i]), -int(queries.exponent[i]))
                assert (np.abs(scores[i] - exact)[~unsure] <= error[i]).all()
            assert not unsure.any()
            largest_norm = np.linalg.norm(rows.astype(np.float64), axis=1).max()
            norms = np.linalg.norm(queries.scaled, axis=1) * largest_norm
            assert (error >= 512 * 2.0**-24 * norms).all(), "no proof holds for less"
            assert (error < 4e-5 * norms).all(), "a loose bound would rescore everything"


def test_every_float16_is_widened_exactly() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 64)
    expected = halves.astype(np.float32)
    found = widen(halves)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found.view(np.uint32)[finite], expected.view(np.uint32)[finite])
    assert (np.abs(found[~finite]) >= 65536).all(), "NaN and inf must show as too large"


def test_exact_scores_do_not_depend_on_layout_or_number_of_rows() -> None:
    rng = np.random.default_rng(24)
    for dim in (1, 2, 3, 7, 384, 512):
        rows = rng.standard_normal((700, dim)).astype(np.float16)
        query = rng.standard_normal(dim)
        expected = exact_scores(rows, query)
        one_by_one = np.concatenate([exact_scores(rows[i : i + 1], query) for i in range(700)])
        raw = np.frombuffer(b"x" + rows.tobytes(), dtype=np.uint8)[1:].view(np.float16).reshape(rows.shape)
        wide = np.zeros((700, 2 * dim), dtype=np.float16)
        wide[:, ::2] = rows
        others: list[Array] = [
            np.asfortranarray(rows),
            raw,
            wide[:, ::2],
            rows[::-1][::-1],
            rows.astype(np.float32),
        ]
        for same in [one_by_one, *(exact_scores(other, query) for other in others)]:
            np.testing.assert_array_equal(same, expected)
        np.testing.assert_array_equal(exact_scores(rows, np.tile(query, (700, 1))), expected)
        np.testing.assert_allclose(expected, rows.astype(np.float64) @ query, rtol=0, atol=1e-11)


def test_top_k_does_not_depend_on_layout() -> None:
    rows = clustered_rows(200, 33, 25)
    queries = random_rows(3, 33, 26)
    raw = np.frombuffer(b"x" + rows.tobytes(), dtype=np.uint8)[1:].view(np.float16).reshape(rows.shape)
    expected = brute_force(rows, queries, 9)
    for same in (np.asfortranarray(rows), raw, rows.astype(np.float32)):
        assert_same(top_k([(0, same)], np.asfortranarray(queries), 9, shuffled_ids), expected)


@pytest.mark.parametrize("n_parts", [1, 2, 5])
def test_merge_of_parts_equals_the_whole(n_parts: int) -> None:
    rows = last_bit_rows(300, 40, 27)
    queries = random_rows(6, 40, 28)
    for k in (1, 10, 250):
        edges = np.linspace(0, 300, n_parts + 1).astype(int).tolist()
        parts = [top_k([(a, rows[a:b])], queries, k, shuffled_ids) for a, b in pairwise(edges)]
        assert_same(merge(reversed(parts), k, shuffled_ids), brute_force(rows, queries, k))


def test_mistakes_are_named() -> None:
    rows, queries = random_rows(5, 8, 29), random_rows(2, 8, 30)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        top_k([(0, rows)], queries, 0, no_ids)
    with pytest.raises(ValueError, match="queries have 8 dimensions but the rows have 7"):
        top_k([(0, rows[:, :7])], queries, 1, no_ids)
    with pytest.raises(ValueError, match="float64"):
        top_k([(0, rows.astype(np.float64))], queries, 1, no_ids)
    with pytest.raises(ValueError, match="matrix"):
        top_k([(0, rows)], queries[0], 1, no_ids)
    for bad in (np.nan, np.inf, -np.inf, 1e39):
        broken = queries.astype(np.float64)
        broken[1, 3] = bad
        with pytest.raises(ValueError, match=r"query 1 holds NaN, inf"):
            top_k([(0, rows)], broken, 1, no_ids)
    with pytest.raises(ValueError, match="same queries"):
        merge([top_k([(0, rows)], queries[:i], 1, no_ids) for i in (1, 2)], 1, no_ids)
    with pytest.raises(ValueError, match="ids gave 1 ids for 2 rows"):
        top_k([(0, rows[[0, 0]])], queries, 1, lambda numbers: ["a"])
