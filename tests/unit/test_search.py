"""Search under a filter: the best of the rows that fit, as brute force finds them."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from clipdist import code_store
from clipdist.cache import DiskCache
from clipdist.codes import encode
from clipdist.config import UserError
from clipdist.kernels import Kernel
from clipdist.search import Index, Where
from tests.unit.some_shards import some_vectors, write_embeddings

PARTS = [some_vectors(rows, 16, seed) for seed, rows in enumerate((50, 1, 80))]
STORED = np.concatenate(PARTS)
PRICES = np.arange(len(STORED)) / 4
WHERES: list[tuple[Where, np.ndarray]] = [
    ("price < 10", PRICES < 10),
    ("price between 12.5 and 12.5", PRICES == 12.5),
    ("caption is null and price > 20", (np.arange(len(STORED)) % 3 > 0) & (PRICES > 20)),
    ("price > 1000", PRICES > 1000),
    (pc.field("price") < 10, PRICES < 10),
]


def use_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for few rows and few queries, and on processors where float32 is faster."""
    monkeypatch.setattr(code_store, "FEWEST_ROWS", 1)
    monkeypatch.setattr(code_store, "_WORTH_TORCH", 0)
    monkeypatch.setattr(code_store, "find_kernel", Kernel)


@pytest.fixture(params=["float32", "codes in memory", "codes in the cache"])
def index(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The same table, searched in every way."""
    shards = write_embeddings(str(tmp_path / "embeddings"), PARTS)
    if request.param != "float32":
        use_codes(monkeypatch)
    return Index(shards, DiskCache(tmp_path / "cache", 1 << 30) if request.param.endswith("cache") else None)


@pytest.mark.parametrize(("where", "fits"), WHERES, ids=[str(where) for where, _ in WHERES])
def test_the_best_of_the_rows_that_fit(index: Index, where: Where, fits: np.ndarray) -> None:
    queries = some_vectors(7, 16, 9, "float32")
    found = index.search(queries, 5, where)
    scores = queries.astype(np.float64) @ STORED.astype(np.float64).T
    scores[:, ~fits] = -np.inf
    expected = np.argsort(-scores, axis=1, kind="stable")[:, : min(5, int(fits.sum()))]
    np.testing.assert_array_equal(found.rows, expected)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, expected, 1))
    assert [list(ids) for ids in found.ids] == [[str(row * 7919 % 100_003) for row in rows] for rows in expected]


@pytest.mark.parametrize(
    ("where", "told"), [("prise < 5", 'did you mean "price"'), (pc.field("none") < 5, "where: .*none")]
)
def test_a_filter_that_cannot_be_read(tmp_path: Path, where: Where, told: str) -> None:
    index = Index(write_embeddings(str(tmp_path), PARTS))
    with pytest.raises(UserError, match=told):
        index.search(PARTS[1], 5, where)


def test_pages_and_a_least_score(index: Index) -> None:
    queries = some_vectors(7, 16, 9, "float32")
    all_of_them = index.search(queries, len(STORED) + 5)
    assert all(len(ids) == len(STORED) for ids in all_of_them.ids)
    page = index.search(queries, 10, offset=20)
    for ids, whole in zip(page.ids, all_of_them.ids, strict=True):
        assert list(ids) == list(whole[20:30])
    high = index.search(queries, 10, min_score=0.3)
    for ids, whole, scores in zip(high.ids, all_of_them.ids, all_of_them.scores, strict=True):
        assert list(ids) == list(whole[: min(10, int((scores >= 0.3).sum()))])
    assert index.search(queries, 10, offset=len(STORED)).ids == [[]] * 7


def test_near_duplicates_are_left_out(tmp_path: Path) -> None:
    rows = np.concatenate([np.repeat(some_vectors(3, 16, 1), 40, axis=0), some_vectors(30, 16, 2)])
    index = Index(write_embeddings(str(tmp_path), [rows]))
    found = index.search(rows[0], 6, collapse=0.999)
    vectors = rows[found.rows[0]].astype(np.float64)
    cosines = vectors @ vectors.T - np.eye(6)
    assert len(found.ids[0]) == 6
    assert cosines.max() < 0.999
    assert index.search(rows[0], 6).scores[0].min() > 0.99  # the control: else they are all the same


def test_what_cannot_be_asked(index: Index) -> None:
    query = some_vectors(1, 16, 9, "float32")
    for wrong, told in ((query[:, :5], "5 dimensions"), (query * np.nan, "NaN"), (query[None], "matrix")):
        with pytest.raises(ValueError, match=told):
            index.search(wrong, 3)
    for arguments in ({"k": 0}, {"k": -3}, {"offset": -1}):
        with pytest.raises(ValueError, match="at least"):
            index.search(query, **arguments)
    np.testing.assert_array_equal(index.search(np.zeros((1, 16)), 3).scores[0], 0)  # all tie: by id


def test_codes_are_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_codes(monkeypatch)
    cache, query = DiskCache(tmp_path / "cache", 1 << 30), some_vectors(1, 16, 9, "float32")
    made: list[int] = []
    monkeypatch.setattr(code_store, "encode", lambda rows: made.append(len(rows)) or encode(rows))
    shards = write_embeddings(str(tmp_path / "embeddings"), PARTS)
    for _ in range(2):
        Index(shards, cache).search(query, 3)
    assert sorted(made) == [1, 50, 80]
    # The control: another table with files of the same sizes has codes of its own.
    others = write_embeddings(str(tmp_path / "others"), [some_vectors(len(part), 16, 77) for part in PARTS])
    assert Index(others, cache).search(query, 3).ids != Index(shards, cache).search(query, 3).ids
    assert sorted(made) == [1, 1, 50, 50, 80, 80]


def test_filters_of_both_kinds_one_after_the_other(tmp_path: Path) -> None:
    index = Index(write_embeddings(str(tmp_path), PARTS))
    wheres: list[Where] = [pc.field("price") < 10, "price < 10", "price < 10", pc.field("price") > 10, "price > 10"]
    found = [index.search(PARTS[1], 200, where).rows[0].tolist() for where in wheres]
    assert found[0] == found[1] == found[2] != found[3] == found[4]
