"""Search under a filter: the best of the rows that fit, as brute force finds them."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from clipdist.config import UserError
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


@pytest.mark.parametrize(("where", "fits"), WHERES, ids=[str(where) for where, _ in WHERES])
def test_the_best_of_the_rows_that_fit(tmp_path: Path, where: Where, fits: np.ndarray) -> None:
    index, queries = Index(write_embeddings(str(tmp_path), PARTS)), some_vectors(7, 16, 9, "float32")
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


def test_filters_of_both_kinds_one_after_the_other(tmp_path: Path) -> None:
    index = Index(write_embeddings(str(tmp_path), PARTS))
    wheres: list[Where] = [pc.field("price") < 10, "price < 10", "price < 10", pc.field("price") > 10, "price > 10"]
    found = [index.search(PARTS[1], 200, where).rows[0].tolist() for where in wheres]
    assert found[0] == found[1] == found[2] != found[3] == found[4]
