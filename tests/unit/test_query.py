"""Queries: what a person types, what a program adds, and the vector that comes out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipdist.config import UserError
from clipdist.query import Query, Term, is_picture, parse

VECTORS = {"red": [3.0, 0, 0], "pool": [0, 1, 0], "floral": [0, 0, 0.5], "black": [-1, 0, 0], "nothing": [0, 0, 0]}
PICTURE = Image.new("RGB", (4, 4), "red")


def embed(term: Term) -> Any:
    return np.array(VECTORS[str(term.value)])


def terms(query: Query) -> list[tuple[str, Any, float]]:
    return [(term.kind, term.value, term.weight) for term in query.terms]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red dress", [("text", "red dress", 1)]),
        ("t-shirt", [("text", "t-shirt", 1)]),
        (
            "red dress + ./pool.jpg - floral",
            [("text", "red dress", 1), ("image", "./pool.jpg", 1), ("text", "floral", -1)],
        ),
        ("2:golden retriever - 0.5:id:007", [("text", "golden retriever", 2), ("id", "007", -0.5)]),
        ("id:a b#c", [("id", "a b#c", 1)]),
        ("https://example.com/a.jpg", [("image", "https://example.com/a.jpg", 1)]),
        ('"./not a path.jpg"', [("text", "./not a path.jpg", 1)]),
        ("16:9 screen", [("text", "9 screen", 16)]),
        ('"16:9 screen"', [("text", "16:9 screen", 1)]),
        ("- floral", [("text", "floral", -1)]),
        ("C++ book", [("text", "C++ book", 1)]),
        ("빨간 원피스 - 꽃무늬", [("text", "빨간 원피스", 1), ("text", "꽃무늬", -1)]),
    ],
)
def test_what_a_person_types(text: str, expected: list[tuple[str, Any, float]]) -> None:
    assert terms(parse(text)) == expected


@pytest.mark.parametrize("text", ["", "   ", "red + ", "2:", "red -  + blue"])
def test_an_empty_term(text: str) -> None:
    with pytest.raises(UserError, match="expected a text"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("shoe.jpg", True), ("photos/shoe.PNG", True), ("~/x", True), ("../x.webp", True), ("http://a/b", True),
        ("s3://bucket/a.jpg", True), ("shoe", False), ("what is a .jpg", False), ("and/or", False), (". dot", False),
    ],
)  # fmt: skip
def test_what_is_a_picture(text: str, is_one: bool) -> None:
    assert is_picture(text) == is_one


def test_a_picture_whose_name_has_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_picture("red dress.jpg")
    PICTURE.save(tmp_path / "red dress.jpg")
    assert is_picture("red dress.jpg")


def test_terms_have_the_same_length_before_their_weights() -> None:
    found = (Query("red") + "pool" - 0.5 * Query("floral")).vector(embed)
    np.testing.assert_allclose(found, np.array([1, 1, -0.5]) / 1.5, rtol=1e-6)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, parse("red + pool - 0.5:floral").vector(embed))
    assert (found != parse("red + pool - floral").vector(embed)).any(), "the control: the weight counts"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: "red" + Query.text("pool"), [("text", "red", 1), ("text", "pool", 1)]),
        (lambda: "red" - Query.text("pool"), [("text", "red", 1), ("text", "pool", -1)]),
        (lambda: Query.text("red") * 2 - 3 * Query.id("7"), [("text", "red", 2), ("id", "7", -3)]),
        (lambda: np.float64(2) * (Query.text("red") - "pool"), [("text", "red", 2), ("text", "pool", -2)]),
        (lambda: Query.text("red") + Path("a.jpg"), [("text", "red", 1), ("image", Path("a.jpg"), 1)]),
    ],
)
def test_programs_add_and_subtract(make: Callable[[], Query], expected: list[tuple[str, Any, float]]) -> None:
    assert terms(make()) == expected


def test_arrays_are_pictures_or_vectors() -> None:
    for value, kind in ((np.zeros((2, 2, 3), np.uint8), "image"), (np.ones(3), "vector"), (PICTURE, "image")):
        assert [term.kind for term in Query(value).terms] == [kind]
        assert [term.kind for term in (Query.text("red") + value).terms] == ["text", kind]
        assert [term.kind for term in (value + Query.text("red")).terms] == [kind, "text"]
    with pytest.raises(UserError, match="not int"):
        Query(3)


@pytest.mark.parametrize(
    ("query", "told"),
    [
        (Query.text("red") - "red", "cancel"),
        (Query.text("red") + "black", "cancel"),
        (0 * Query.text("red"), "cancel|nothing"),
        (Query.text("nothing"), "zero"),
        (Query(()), "empty"),
    ],
)
def test_what_points_nowhere(query: Query, told: str) -> None:
    with pytest.raises(UserError, match=told):
        query.vector(embed)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_numbers(weight: float) -> None:
    with pytest.raises(UserError, match="weight"):
        weight * Query.text("red")


def test_names() -> None:
    assert str(parse("red + ./a.jpg - 0.5:id:7")) == "red + ./a.jpg - 0.5:id:7"
    opened = parse("red - 2:./a.jpg").opened(lambda picture: PICTURE)
    assert (str(opened), opened.terms[1].value) == ("red - 2:./a.jpg", PICTURE)
    assert parse("red - id:7 + id:8").ids == {"7", "8"}
