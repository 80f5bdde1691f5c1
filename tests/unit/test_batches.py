"""Values as text: Arrow's way for whole columns says the same as the one for single values."""

import datetime
import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clipdist.batches import column, exploded, text, texts

STRINGS = ["", " ", "a", " a\u00a0", "\x1ca\x85", "\u3000", "a  b", "한글 ", "\u200b", "\ufeff", None, "nan"]
DAY = datetime.date(2020, 1, 2)


@pytest.mark.parametrize(
    "values",
    [
        pa.array(STRINGS),
        pa.array(STRINGS, pa.large_string()),
        pa.array(STRINGS).dictionary_encode(),
        pa.array([1, None, 1]).dictionary_encode(),
        pa.array([0, -1, None, 2**63 - 1]),
        pa.array([2**64 - 1, None], pa.uint64()),
        pa.array([True, False, None]),
        pa.nulls(3),
        pa.array([1.0, float("nan"), float("-inf"), 1e20, 1e-7, 0.1, None]),
        pa.array([0.1, None], pa.float32()),
        pa.array([DAY, None]),
        pa.array([decimal.Decimal("1.50"), None]),
        pa.array([b"x", b"\xff", None]),
        pa.array([["a", None], [], None]),
        pa.array([{"a": 1}, None]),
        pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
    ],
    ids=lambda values: str(values.type)[:30],
)
def test_columns_say_what_values_say(values: pa.Array) -> None:
    expected = [text(value) for value in values.to_pylist()]
    for given in (values, values.to_pylist(), values.slice(1)):
        found = texts(given)
        assert (found.type, found.null_count) == (pa.string(), 0)
        assert found.to_pylist() == expected[-len(given) :]


@pytest.mark.parametrize("values", [["a", 1, None, " b "], ["a", 1.0, True], ["cut \ud83d", "a"], [10**30, "x"], []])
def test_values_of_several_types(values: list[Any]) -> None:
    assert texts(values).to_pylist() == [text(value) for value in values]


def test_every_space_of_python_is_one_of_arrow() -> None:
    values = [chr(code) for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000]
    assert texts(pa.array(values)).to_pylist() == [value.strip() for value in values]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.string()), None])
def test_elements_of_lists(kind: pa.DataType | None) -> None:
    values = [["a", None], None, [], ["b"]]
    items, rows = exploded(values if kind is None else pa.array(values, kind))
    assert rows is not None
    found = [(row, item) for row, item in zip(rows.tolist(), texts(items).to_pylist(), strict=True) if item]
    assert found == [(0, "a"), (3, "b")]


def test_a_column_without_lists_is_its_own_elements() -> None:
    for values in (["a", 1], pa.array(["a"])):
        assert exploded(values) == (values, None)
    items, rows = exploded(["a", ["b", "c"], 1])
    assert (items, np.asarray(rows).tolist()) == (["a", "b", "c", 1], [0, 1, 1, 2])


def test_a_column_that_is_not_there_is_null() -> None:
    assert column(pa.record_batch({"a": [1, 2]}), "b").to_pylist() == [None, None]
    assert column([{"a": 1}, {"b": 2}], "b") == [None, 2]
