"""Queries: texts, pictures, catalog ids and vectors, alone or added and subtracted with weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipdist import storage
from clipdist.config import UserError

Picture: TypeAlias = "str | Path | Image.Image | NDArray[np.uint8]"
Kind = Literal["text", "image", "id", "vector"]

_WEIGHT = re.compile(r"(?P<weight>\d+\.?\d*|\.\d+)\s*:\s*")
_JOINED = re.compile(r"(?<!\S)([+-])(?!\S)")
_PICTURE_NAME = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)
_SMALLEST = 1e-6  # norm of a sum of unit vectors that still points somewhere


@dataclass(frozen=True)
class Term:
    """One part of a query, with its weight."""

    kind: Kind
    value: Any
    weight: float = 1.0
    name: str | None = None
    """What a person calls it, where the value does not say."""

    def __str__(self) -> str:
        value = self.name or (self.value if isinstance(self.value, str | Path) else self.kind)
        name = f"id:{value}" if self.kind == "id" else str(value)
        return name if abs(self.weight) == 1 else f"{abs(self.weight):g}:{name}"


@dataclass(frozen=True, init=False)
class Query:
    """A weighted sum: `Query("red dress") + Query(photo) - 0.5 * Query("floral")`, or `"red dress" + Query(photo)`.

    A string is a text; a `Path`, a PIL picture or an array is a picture, or a ready vector where the array has one
    dimension; `Query.image("photo.jpg")` and `Query.id("15970")` are for names that are strings. The vector of each
    term has length 1 before its weight; the sum is normalised again.
    """

    terms: tuple[Term, ...]

    def __init__(self, value: Any) -> None:
        object.__setattr__(self, "terms", _terms(value))

    @staticmethod
    def text(text: str) -> Query:
        return Query(Term("text", text))

    @staticmethod
    def image(picture: Picture) -> Query:
        """A path, an http(s) URL, a PIL picture, or an array uint8 [height, width] or [height, width, 3]."""
        return Query(Term("image", picture))

    @staticmethod
    def id(row_id: str) -> Query:
        """The stored vector of a catalog row."""
        return Query(Term("id", row_id))

    def __add__(self, other: Any) -> Query:
        return Query(self.terms + Query(other).terms)

    def __radd__(self, other: Any) -> Query:
        return Query(other) + self

    def __sub__(self, other: Any) -> Query:
        return self + -1 * Query(other)

    def __rsub__(self, other: Any) -> Query:
        return Query(other) - self

    def __mul__(self, weight: float) -> Query:
        if not math.isfinite(weight):
            raise UserError(f"a weight must be a number, not {weight}")
        return Query(tuple(replace(term, weight=term.weight * weight) for term in self.terms))

    __rmul__ = __mul__
    __array_ufunc__ = None  # numpy's numbers and arrays leave the operators to these

    def __str__(self) -> str:
        parts = [f"{'-' if term.weight < 0 else '+'} {term}" for term in self.terms]
        return " ".join(parts).removeprefix("+ ")

    @property
    def ids(self) -> set[str]:
        """Catalog rows that are asked with, and so are no answer."""
        return {term.value for term in self.terms if term.kind == "id"}

    def opened(self, read: Callable[[Picture], Image.Image]) -> Query:
        """The same query with its pictures read, each once."""
        terms = (
            replace(term, value=read(term.value), name=str(replace(term, weight=1.0)))
            if term.kind == "image" and term.name is None
            else term
            for term in self.terms
        )
        return Query(tuple(terms))

    @property
    def only(self) -> Term | None:
        """The term of a query that is no sum."""
        return self.terms[0] if len(self.terms) == 1 else None

    def vector(self, embed: Callable[[Term], NDArray[Any]]) -> NDArray[np.float32]:
        """The normalised sum, float32 [dim], of what `embed` gives for the terms. UserError when nothing is left."""
        if not self.terms:
            raise UserError("the query is empty")
        total = np.zeros(1)
        for term in self.terms:
            vector = np.asarray(embed(term), np.float64)
            length = float(np.linalg.norm(vector))
            if not 0 < length < np.inf:
                raise UserError(f"{term}: its vector is zero or not finite, so it points nowhere")
            total = total + term.weight * vector / length
        length = float(np.linalg.norm(total))
        if length <= _SMALLEST * sum(abs(term.weight) for term in self.terms):
            raise UserError(f"{self}: the terms cancel each other out; nothing is left to search for")
        return np.asarray(total / length, np.float32)


def _terms(value: Any) -> tuple[Term, ...]:
    match value:
        case Query():
            return value.terms
        case Term():
            return (value,)
        case tuple() if all(isinstance(term, Term) for term in value):
            return value
        case str():
            return (Term("text", value),)
        case np.ndarray() if value.ndim == 1:
            return (Term("vector", value),)
        case Path() | Image.Image() | np.ndarray():
            return (Term("image", value),)
    raise UserError(f"a query is a text, a path, a picture or a vector, not {type(value).__name__}")


def parse(text: str) -> Query:
    """A query as a person types it: terms joined by ` + ` and ` - `, each with a weight before it where it is not 1:
    `red dress + ./pool.jpg - 0.5:floral`. A URL, and the path of a picture, are pictures; `id:15970` is a catalog row;
    all else is text, also in double quotes. UserError for an empty term."""
    first, *pieces = _JOINED.split(text.strip())
    query = Query(())
    terms = list(zip(["+", *pieces[0::2]], [first, *pieces[1::2]], strict=True))
    for sign, value in terms[1:] if pieces and not first else terms:
        term = _term(value.strip(), text)
        query = query - term if sign == "-" else query + term
    return query


def _term(value: str, whole: str) -> Query:
    match = _WEIGHT.match(value)
    weight, rest = (float(match["weight"]), value[match.end() :]) if match else (1.0, value)
    if not rest:
        raise UserError(f"{whole.strip() or 'the query'}: expected a text, a picture or id:ID")
    if len(rest) > 1 and rest[0] == rest[-1] == '"':
        return weight * Query.text(rest[1:-1])
    if rest.startswith("id:") and len(rest) > 3:
        return weight * Query.id(rest[3:])
    return weight * (Query.image(rest) if is_picture(rest) else Query.text(rest))


def is_picture(text: str) -> bool:
    """Whether a person means a picture by it: a URL, what begins like a path, or a name with a picture's ending."""
    if re.match(r"(https?|s3)://", text, re.IGNORECASE) or re.match(r"(\.{0,2}/|~/)\S", text):
        return True
    return _PICTURE_NAME.search(text) is not None and (" " not in text or storage.is_file(storage.absolute(text)))
