"""Filters of a search: `colour = 'red' and price < 50` -> an Arrow expression over the columns of a table.

The grammar is the part of SQL's WHERE that people type: = != < <= > >=, in (...), between a and b, like 'red%',
is null, not, and, or, parentheses. Names with spaces or of keywords stand in double quotes. A row whose value is null
fits no comparison, nor its opposite, as in SQL.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipdist.config import UserError

Expression: TypeAlias = Any  # a pyarrow.compute.Expression; pyarrow has no types

TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^']|'')*')|(?P<quoted>"(?:[^"]|"")*")|(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"""
    r"""|(?P<word>[^\W\d]\w*)|(?P<sign><=|>=|<>|!=|==|[=<>(),]))"""
)
KEYWORDS = {"and", "or", "not", "in", "is", "null", "between", "like", "true", "false"}
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne, "<>": operator.ne,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
DEEPEST = 100
"""Parentheses within parentheses."""


@dataclass(frozen=True)
class Filter:
    """A condition, and the columns that it reads."""

    expression: Expression
    columns: tuple[str, ...]

    def mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """bool [rows]: which rows of a table with these columns fit."""
        import pyarrow.dataset as ds  # brings pandas, which a search without a filter is spared

        found = ds.dataset(table).scanner(columns={"fits": self.expression}, use_threads=False).to_table()
        mask: NDArray[np.bool_] = pc.fill_null(found.column("fits"), False).to_numpy()
        return mask


def parse(text: str, schema: pa.Schema) -> Filter:
    """The condition that `text` writes. UserError with the place of what is wrong, of an unknown column (with one that
    is meant, perhaps), and of a value that cannot be compared with its column."""
    parser = _Parser(text, schema)
    expression = parser.either()
    if parser.next.kind != "end":
        raise parser.wrong("expected and, or, or the end")
    return Filter(expression, tuple(dict.fromkeys(parser.read)))


@dataclass(frozen=True)
class _Token:
    kind: str
    value: Any
    start: int


def _tokens(text: str) -> Sequence[_Token]:
    found, place = [], 0
    while text[place:].strip():
        match = TOKEN.match(text, place)
        if match is None:
            start = place + len(text[place:]) - len(text[place:].lstrip())
            raise _error(text, start, "a quote is never closed" if text[start] in "'\"" else "cannot be read")
        kind, value = str(match.lastgroup), match[str(match.lastgroup)]
        start, place = match.start(kind), match.end()
        if kind == "number":
            found.append(_Token("value", float(value) if re.search(r"[.eE]", value) else int(value), start))
        elif kind == "text":
            found.append(_Token("value", value[1:-1].replace("''", "'"), start))
        elif kind == "quoted":
            found.append(_Token("name", value[1:-1].replace('""', '"'), start))
        elif value.lower() in ("true", "false"):
            found.append(_Token("value", value.lower() == "true", start))
        else:
            keyword = kind == "sign" or value.lower() in KEYWORDS
            found.append(_Token(value.lower() if keyword else "name", value, start))
    return [*found, _Token("end", "", len(text))]


def _error(text: str, start: int, what: str) -> UserError:
    return UserError(f"where: {what}\n    {text}\n    {' ' * start}^")


class _Parser:
    """Recursive descent, one method per rule."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text, self.schema = text, schema
        self.tokens, self.place, self.depth = _tokens(text), 0, 0
        self.read: list[str] = []

    @property
    def next(self) -> _Token:
        return self.tokens[self.place]

    def take(self, *kinds: str) -> _Token | None:
        """The next token if it is one of these."""
        token = self.next
        if token.kind not in kinds:
            return None
        self.place += 1
        return token

    def need(self, kind: str, expected: str) -> _Token:
        token = self.take(kind)
        if token is None:
            raise self.wrong(f"expected {expected}")
        return token

    def wrong(self, what: str, at: _Token | None = None) -> UserError:
        return _error(self.text, (at or self.next).start, what)

    def either(self) -> Expression:
        found = self.both()
        while self.take("or"):
            found = found | self.both()
        return found

    def both(self) -> Expression:
        found = self.negated()
        while self.take("and"):
            found = found & self.negated()
        return found

    def negated(self) -> Expression:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.wrong("too many parentheses")
        try:
            if self.take("not"):
                return ~self.negated()
            if self.take("("):
                inner = self.either()
                self.need(")", "a closing parenthesis")
                return inner
            return self.condition()
        finally:
            self.depth -= 1

    def condition(self) -> Expression:
        name = self.need("name", "a column, such as colour = 'red'")
        kind = self.column(name)
        field = pc.field(str(name.value))
        if sign := self.take(*COMPARISONS):
            return COMPARISONS[sign.kind](field, self.value(name, kind))
        if self.take("is"):
            unknown = self.take("not") is None
            self.need("null", "null")
            return field.is_null() if unknown else field.is_valid()
        opposite = self.take("not") is not None
        if self.take("in"):
            found = self.among(name, kind, field)
        elif self.take("between"):
            low = self.value(name, kind)
            self.need("and", "and")
            found = (field >= low) & (field <= self.value(name, kind))
        elif self.take("like"):
            found = self.like(name, kind, field)
        elif pa.types.is_boolean(kind) and not opposite:
            return field
        else:
            raise self.wrong("expected a comparison, such as = 'red', < 50, in ('red', 'blue') or is null")
        return ~found if opposite else found

    def among(self, name: _Token, kind: pa.DataType, field: Expression) -> Expression:
        self.need("(", "an opening parenthesis")
        values = [self.value(name, kind)]
        while self.take(","):
            values.append(self.value(name, kind))
        self.need(")", "a comma or a closing parenthesis")
        found = field == values[0]
        for value in values[1:]:
            found = found | (field == value)
        return found

    def like(self, name: _Token, kind: pa.DataType, field: Expression) -> Expression:
        pattern = self.next
        if not pa.types.is_string(kind) or not isinstance(self.value(name, kind), str):
            raise self.wrong("like compares texts", pattern)
        return pc.match_like(field, str(pattern.value))

    def column(self, name: _Token) -> pa.DataType:
        if name.value not in self.schema.names:
            close = difflib.get_close_matches(str(name.value), self.schema.names, n=1, cutoff=0.6)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            raise self.wrong(f'no column "{name.value}"{hint} (columns: {", ".join(self.schema.names)})', name)
        self.read.append(str(name.value))
        return self.schema.field(str(name.value)).type

    def value(self, name: _Token, kind: pa.DataType) -> Any:
        token = self.need("value", "a value: a text in single quotes, a number, true or false")
        wanted = "a text" if pa.types.is_string(kind) else "true or false" if pa.types.is_boolean(kind) else "a number"
        given = {str: "a text", bool: "true or false"}.get(type(token.value), "a number")
        if wanted != given:
            raise self.wrong(f'"{name.value}" holds {_plural(wanted)}: expected {wanted}, got {given}', token)
        return token.value


def _plural(kind: str) -> str:
    return {"a text": "texts", "a number": "numbers"}.get(kind, kind)
