"""Top-k through codes: the answer of the float32 pass, to the bit, whatever the rows, filters and deletes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clipdist import scan
from clipdist.codes import encode
from clipdist.kernels import Kernel, find_kernel
from clipdist.manifest import File
from clipdist.scan import Part, top_k_by_codes
from clipdist.shard_reader import RowGroup
from clipdist.topk import TopK, top_k
from tests.unit.test_topk import clustered_rows, last_bit_rows, random_rows, shuffled_ids

Array = np.ndarray[Any, Any]
KERNEL = Kernel("cpu")
PADDED = Kernel("cpu:0")
"""Takes the way of a GPU, whose products want padding, on a CPU."""


def parts_of(rows: Array, sizes: Sequence[int], deleted: Array | None = None, kernel: Kernel = KERNEL) -> list[Part]:
    """Row groups of these sizes, and one of the rest."""
    found, first, start = [], 0, 0
    for size in [*sizes, len(rows) - sum(sizes)]:
        block = rows[start : start + size]
        gone = np.zeros(0, np.int64) if deleted is None else np.flatnonzero(deleted[start : start + size])
        group = RowGroup(File("", "", size, (size,), 0), 0, size, 0, first, gone)
        codes = encode(block)
        found.append(Part(group, codes, kernel.place(codes.code), block.__getitem__))
        start, first = start + size, first + group.live
    return found


def assert_same(found: TopK, expected: TopK) -> None:
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)


def odd_rows(n: int, dim: int, seed: int) -> Array:
    """NaN, infinities, zeros, and rows a thousand times as long as others."""
    random = np.random.default_rng(seed)
    rows = random_rows(n, dim, seed).astype(np.float16)
    rows[random.integers(0, n, 9)] *= np.float16(1000)
    rows[random.integers(0, n, 5)], rows[random.integers(0, n, 5), 0], rows[random.integers(0, n, 5)] = (
        np.inf,
        np.nan,
        0,
    )
    return rows


def repeated_rows(n: int, dim: int, seed: int) -> Array:
    """Forty different rows: nearly all scores tie."""
    return random_rows(40, dim, seed)[np.random.default_rng(seed).integers(0, 40, n)].astype(np.float16)


KINDS = {kind.__name__: kind for kind in (random_rows, clustered_rows, last_bit_rows, odd_rows, repeated_rows)}


@pytest.mark.parametrize("products", [1 << 11, 1 << 22])
@pytest.mark.parametrize("k", [1, 10, 700])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_answer_of_the_float32_pass(monkeypatch: pytest.MonkeyPatch, kind: str, k: int, products: int) -> None:
    monkeypatch.setattr(scan, "_PRODUCTS_AT_ONCE", products)
    monkeypatch.setattr(scan, "_QUERIES_AT_ONCE", 3)
    rows = KINDS[kind](5000, 48, k)
    random = np.random.default_rng(k)
    queries = np.concatenate([random.standard_normal((5, 48)), rows[:2].astype(np.float64) * 7, np.zeros((1, 48))])
    queries[~np.isfinite(queries)] = 1
    deleted = random.random(len(rows)) < 0.1
    live = rows[~deleted]
    for fits in (None, random.random(len(live)) < 0.5, random.random(len(live)) < 0.004, np.zeros(len(live), bool)):
        keep = None if fits is None else (lambda first, stop, fits=fits: fits[first:stop])
        expected = top_k([(0, live)], queries, k, shuffled_ids, keep=keep)
        assert_same(
            top_k_by_codes(parts_of(rows, (3000, 7), deleted), KERNEL, queries, k, shuffled_ids, keep=keep), expected
        )


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_the_way_of_a_gpu(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    monkeypatch.setattr(scan, "_PRODUCTS_AT_ONCE", 1 << 11)
    rows, asked = clustered_rows(3001, 45, 1), random_rows(queries, 45, 2)
    expected = top_k([(0, rows)], asked, 10, shuffled_ids)
    assert_same(top_k_by_codes(parts_of(rows, (1500, 3), None, PADDED), PADDED, asked, 10, shuffled_ids), expected)


def test_an_error_that_is_too_small_is_seen() -> None:
    """The control: with bounds that are none, right rows are ruled out."""
    rows, queries = clustered_rows(5000, 48, 1), random_rows(20, 48, 2)
    expected = top_k([(0, rows)], queries, 10, shuffled_ids)
    assert_same(top_k_by_codes(parts_of(rows, (3000,)), KERNEL, queries, 10, shuffled_ids), expected)
    wrong = [
        replace(part, codes=replace(part.codes, residual_norm=0.0, code_norm=0.0)) for part in parts_of(rows, (3000,))
    ]
    with pytest.raises((AssertionError, ValueError)):  # ValueError: some queries have lost so many that k are not left
        assert_same(top_k_by_codes(wrong, KERNEL, queries, 10, shuffled_ids), expected)


def test_few_rows_are_scored_exactly() -> None:
    """What the codes are for: of 40,000 rows hardly more than the answer is read as vectors."""
    rows, queries = random_rows(40_000, 256, 1).astype(np.float16), random_rows(4, 256, 2)
    read: list[int] = []
    parts = parts_of(rows, (20_000,))

    def counted(part: Part) -> Part:
        def vectors(places: Array) -> Array:
            read.append(len(places))
            return np.asarray(part.vectors(places))

        return replace(part, vectors=vectors)

    top_k_by_codes([counted(part) for part in parts], KERNEL, queries, 10, shuffled_ids)
    assert sum(read) < 0.01 * len(rows) * len(queries)


def test_the_kernel_is_exact_on_the_largest_sums() -> None:
    kernel = find_kernel("cpu")
    assert kernel is None or kernel == KERNEL
    code = np.full((700, 2048), 127, np.int8)
    code[::2] = -127
    products = KERNEL.products(code[:33], KERNEL.place(code)).numpy()
    np.testing.assert_array_equal(products, code[:33].astype(np.int64) @ code.T.astype(np.int64))


@pytest.mark.parametrize("columns", [1, 31, 32, 100])
def test_products_that_reach_their_limit(columns: int) -> None:
    import torch

    products = np.random.default_rng(columns).integers(-50, 50, (4, columns)).astype(np.int32)
    least = np.array([0, 45, -60, 60], np.int32)
    query, place, value = KERNEL.at_least(torch.from_numpy(products), least)
    assert sorted(zip(query, place, strict=True)) == list(zip(*np.nonzero(products >= least[:, None]), strict=True))
    np.testing.assert_array_equal(products[query, place], value)
