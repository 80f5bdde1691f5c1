"""Raw rows on their way from a reader to the plan: batches of them, their columns, and values as text.

A batch is an Arrow record batch where the input has columns, and a list of dicts where every row has its own. What
text a value is, is said once, for one value, in `text`; columns of plain types get the same from Arrow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Row: TypeAlias = dict[str, Any]
Batch: TypeAlias = Any  # pa.RecordBatch | list[Row]; pyarrow has no types
Column: TypeAlias = Any  # pa.Array | list[Any]

BATCH_ROWS = 16_384
MALFORMED = "\0malformed"
"""The only field of a row that cannot be parsed: why. No column has that name."""


def rows_of(batch: Batch) -> list[Row]:
    return batch if isinstance(batch, list) else batch.to_pylist()


def column(batch: Batch, name: str) -> Column:
    """The values of one column; nulls where the batch has none of that name."""
    if isinstance(batch, list):
        return [row.get(name) for row in batch]
    return batch.column(name) if name in batch.schema.names else pa.nulls(len(batch))


def texts(values: Column) -> pa.Array:
    """`text` of every value: a string array without nulls."""
    array = plain(values)
    if array is None:
        items = values if isinstance(values, list) else values.to_pylist()
        return pa.array([text(value) for value in items], pa.string())
    return pc.utf8_trim_whitespace(pc.fill_null(array, ""))


def plain(values: Column) -> pa.Array | None:
    """The column as strings, where Arrow writes its values as Python does; else None."""
    if isinstance(values, list):
        if not {*map(type, values)} <= {str, int, type(None)}:
            return None
        try:
            return pa.array([None if value is None else str(value) for value in values], pa.string())
        except UnicodeEncodeError:
            return None
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if pa.types.is_boolean(kind):
        return pc.if_else(values, "True", "False")
    plain = pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return values.cast(pa.string()) if plain or pa.types.is_null(kind) else None


def text(value: Any) -> str:
    """The value as text: "" for null and NaN, lists joined by commas."""
    if isinstance(value, list | tuple):
        return ", ".join(text(item) for item in value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return utf8(str(value)).strip()


def utf8(value: str) -> str:
    """Half an emoji, as texts cut to a length hold it, becomes "?"; tables could not store it."""
    return value.encode("utf-8", "replace").decode()


def exploded(values: Column) -> tuple[Column, np.ndarray | None]:
    """The elements of a column of lists, and the row of each; a value that is no list is its own element. None for
    the rows: the column holds no list."""
    if not isinstance(values, list):
        kind = values.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return values.flatten(), pc.list_parent_indices(values).to_numpy()
        if not pa.types.is_nested(kind):
            return values, None
        values = values.to_pylist()
    if not any(isinstance(value, list) for value in values):
        return values, None
    pairs = [
        (item, row) for row, value in enumerate(values) for item in (value if isinstance(value, list) else [value])
    ]
    return [item for item, _ in pairs], np.array([row for _, row in pairs], np.int64)


def in_batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        yield batch
