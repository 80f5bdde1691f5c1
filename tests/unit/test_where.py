"""Filters: what people type means what it means in SQL, and what is wrong is shown where it is."""

import random
import sqlite3

import numpy as np
import pyarrow as pa
import pytest

from clipdist.config import UserError
from clipdist.where import parse

TABLE = pa.table(
    {
        "colour": ["red", "blue", None, "it's", "red", "Red wine"],
        "price": [10.0, 60.5, 20.0, None, 50.0, 0.5],
        "year": pa.array([2010, 2011, None, 2013, 2014, -3], pa.int64()),
        "kids": [True, False, None, True, False, True],
        "shoe size": ["a", "b", "c", "d", "e", None],
    }
)


def fits(text: str) -> list[int]:
    found = parse(text, TABLE.schema)
    assert set(found.columns) <= set(TABLE.column_names)
    return np.flatnonzero(found.mask(TABLE.select(list(found.columns)))).tolist()


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("colour = 'red'", [0, 4]),
        ("colour == 'red' AND price<50", [0]),
        ("colour = 'red' or price > 60 and not kids", [0, 1, 4]),
        ("(colour = 'red' or price > 60) and not kids", [1, 4]),
        ("colour = 'it''s'", [3]),
        ("colour != 'red'", [1, 3, 5]),
        ("not colour = 'red'", [1, 3, 5]),
        ("colour <> 'red' or colour is null", [1, 2, 3, 5]),
        ("price is not null and year is null", [2]),
        ("year in (2010, 2014, 1)", [0, 4]),
        ("colour not in ('red', 'blue')", [3, 5]),
        ("price between 10 and 50", [0, 2, 4]),
        ("price not between 10 and 50.0", [1, 5]),
        ("colour like 'r_d%'", [0, 4]),
        ("colour not like '%d'", [1, 3, 5]),
        ("kids", [0, 3, 5]),
        ("kids = false", [1, 4]),
        ("year >= -3 and year < 2.011e3", [0, 5]),
        ("\"shoe size\" = 'b'", [1]),
        ("price = .5", [5]),
    ],
)
def test_conditions(text: str, rows: list[int]) -> None:
    assert fits(text) == rows


@pytest.mark.parametrize("seed", range(30))
def test_random_conditions_mean_what_sqlite_means(seed: int) -> None:
    chance = random.Random(seed)

    def condition(depth: int) -> str:
        if depth and chance.random() < 0.6:
            parts = [condition(depth - 1), condition(depth - 1)]
            return chance.choice(["({} and {})", "({} or {})", "(not {} or {})", "{} and not ({})"]).format(*parts)
        column = chance.choice(["colour", "price", "year"])
        value = {"colour": "'red'", "price": "20", "year": "2011"}[column]
        other = {"colour": "'blue'", "price": "60.5", "year": "2013"}[column]
        forms = [f"= {value}", f"!= {value}", f"< {value}", f">= {other}", f"in ({value}, {other})", "is null"]
        forms += [f"not in ({value})", f"between {value} and {other}", "is not null"]
        return f"{column} {chance.choice(forms)}"

    base = sqlite3.connect(":memory:")
    base.execute("create table t (row integer, colour text, price real, year integer)")
    rows = TABLE.select(["colour", "price", "year"]).to_pylist()
    base.executemany("insert into t values (?, ?, ?, ?)", [(n, *row.values()) for n, row in enumerate(rows)])
    for _ in range(20):
        text = condition(3)
        expected = [row for (row,) in base.execute(f"select row from t where {text} order by row")]
        assert fits(text) == expected, text


@pytest.mark.parametrize(
    ("text", "told", "place"),
    [
        ("color = 'red'", 'no column "color"; did you mean "colour"?', 0),
        ("colour = red", "expected a value: a text in single quotes", 9),
        ("colour = 5", '"colour" holds texts: expected a text, got a number', 9),
        ("price < '5'", '"price" holds numbers: expected a number, got a text', 8),
        ("kids = 1", '"kids" holds true or false: expected true or false, got a number', 7),
        ("colour", "expected a comparison", 6),
        ("colour = 'red' blue", "expected and, or, or the end", 15),
        ("(colour = 'red'", "expected a closing parenthesis", 15),
        ("colour = 'red", "a quote is never closed", 9),
        ("price < 5 and", "expected a column", 13),
        ("", "expected a column", 0),
        ("price ; drop", "cannot be read", 6),
        ("price like 5", "like compares texts", 11),
        ("year in ()", "expected a value", 9),
        ("(" * 200 + "kids", "too many parentheses", 100),
    ],
)
def test_mistakes_are_shown_where_they_are(text: str, told: str, place: int) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, TABLE.schema)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"where: {told}")
    assert lines[2] == " " * (4 + place) + "^"
