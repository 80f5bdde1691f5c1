"""Raw rows -> planned rows: ids, captions from templates, groups, splits, duplicates; one table per unit.

What can be judged without the picture is judged here; such rows are planned with a `reason` and end as rejects.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from clipdist.batches import MALFORMED, Batch, Column, column, texts, utf8
from clipdist.captions import captions_of, template_columns
from clipdist.config import Section, UserError
from clipdist.duplicates import duplicate_rows
from clipdist.schema import RESERVED
from clipdist.sources import Source, require_columns

TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""A split is a folder of the pairs."""


class ColumnsConfig(Section):
    """Which column is what. Folders and tars bring their own `id`, `text` and `label`."""

    id: str | None = "id"
    """Column with the unique id, read as text; null: the picture's path is the id."""
    group: str | None = None
    """Column with the product id: rows of a group are right answers for each other and stay in one split; null: each
    row is its own group."""
    split: str | None = None
    """Column with the split of each row (train, validation, test), the same for all rows of a group; null: by hash of
    the group, see `split`."""
    keep: tuple[str, ...] = ()
    """Columns to carry along for filters and reports: `colour`, or with a type `price:float` (string, int, float,
    bool)."""

    @field_validator("keep")
    @classmethod
    def _known_types(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        for name, kind in map(_name_and_type, keep):
            if kind not in TYPES:
                raise ValueError(f'type of "{name}": expected {", ".join(TYPES)}, got "{kind}"')
            if name in RESERVED:
                raise ValueError(f'"{name}" is a name that clipdist fills itself; rename the column')
        names = [_name_and_type(item)[0] for item in keep]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)}: named twice; keep one")
        return keep


class SplitConfig(Section):
    """How rows are divided when no column says so: by hash of the group, so that no product is in two splits."""

    validation: float = Field(0.1, ge=0, lt=1)
    """Share of the groups held out for validation."""
    test: float = Field(0.0, ge=0, lt=1)
    """Share of the groups held out for a last test."""
    seed: int = 0
    """Another seed holds out other groups."""

    @model_validator(mode="after")
    def _some_left(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError("validation + test leave nothing to train on; their sum must be under 1")
        return self


def check_columns(
    source: Source, columns: ColumnsConfig, captions: tuple[str, ...], *, need_picture: bool = True
) -> None:
    """UserError naming every column that is asked for and not there, and every broken template."""
    if source.kind == "webdataset":
        return  # the JSON members of a tar may hold any field
    wanted: dict[str, Sequence[str]] = {}
    if need_picture and source.kind in ("csv", "jsonl", "parquet"):
        wanted["source.image_column"] = [source.config.image_column]
    for name in ("id", "group", "split"):
        if (column := getattr(columns, name)) is not None:
            wanted[f"columns.{name}"] = [column]
    wanted["columns.keep"] = [_name_and_type(item)[0] for item in columns.keep]
    for index, template in enumerate(captions):
        wanted[f"captions.{index}"] = template_columns(template)
    require_columns(source, wanted)


def split_of(key: str, config: SplitConfig) -> str:
    """The split of a group: a pure function of (seed, group)."""
    digest = hashlib.blake2b(f"{config.seed}:{key}".encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    if share < config.validation:
        return "validation"
    return "test" if share < config.validation + config.test else "train"


def columns_read(columns: ColumnsConfig, captions: Iterable[str]) -> frozenset[str]:
    """The columns that a plan needs."""
    named = [columns.id, columns.group, columns.split, *(_name_and_type(item)[0] for item in columns.keep)]
    filled = [name for template in captions for name in template_columns(template)]
    return frozenset({"image_uri", MALFORMED, *(name for name in named if name is not None), *filled})


def plan_units(
    source: Source,
    columns: ColumnsConfig,
    captions: tuple[str, ...],
    split: SplitConfig,
    unit_rows: int,
    *,
    need_caption: bool = True,
    first_only: bool = False,
) -> Iterator[pa.Table]:
    """Tables of `unit_rows` planned rows: id, image_uri, captions, group, split, reason, message, kept columns. The
    input is read twice, first its ids alone, because a row is a duplicate by what comes before it. `first_only`: the
    same first unit, without reading the rest of the input."""
    at_most = unit_rows if first_only else None
    duplicates = duplicate_rows(_ids(source, columns, at_most))
    rows = _Rows(columns, captions, split, need_caption)

    def tables() -> Iterator[pa.Table]:
        start = 0
        for batch in source.batches(columns_read(columns, captions)):
            first, last = np.searchsorted(duplicates, [start, start + len(batch)])
            yield rows.planned(batch, duplicates[first:last] - start)
            start += len(batch)

    return itertools.islice(_units(tables(), unit_rows), 1 if first_only else None)


def _ids(source: Source, columns: ColumnsConfig, at_most: int | None) -> Iterator[pa.Array]:
    name, read = columns.id or "image_uri", 0
    for batch in source.batches({name}):
        yield texts(column(batch, name))
        read += len(batch)
        if at_most is not None and read >= at_most:
            return


def _units(tables: Iterable[pa.Table], unit_rows: int) -> Iterator[pa.Table]:
    """The same rows, `unit_rows` at a time; the last table has what is left."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) < unit_rows:
            continue
        rows = pa.concat_tables(waiting)
        whole = len(rows) // unit_rows * unit_rows
        yield from (rows.slice(start, unit_rows).combine_chunks() for start in range(0, whole, unit_rows))
        waiting = [rows.slice(whole)]
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting).combine_chunks()


def not_empty(units: Iterable[pa.Table], path: str) -> Iterator[pa.Table]:
    """The same units. UserError when there is none: an empty table is a mistake, not a result."""
    rows = 0
    for unit in units:
        rows += len(unit)
        yield unit
    if not rows:
        raise UserError(f"{path}: the input holds no row")


def whole_groups(units: Iterable[pa.Table], columns: ColumnsConfig) -> Iterator[pa.Table]:
    """The same units. UserError after the last when a column puts rows of one group into several splits: what is held
    out would hold products that were trained on. Memory: a hash per group, where columns name both."""
    splits: dict[bytes, str] = {}
    torn: dict[bytes, str] = {}
    for unit in units:
        if columns.group and columns.split:
            good = unit.filter(pc.and_(pc.is_valid(unit["group"]), pc.is_null(unit["reason"])))
            for row in good.group_by(["group", "split"], use_threads=False).aggregate([]).to_pylist():
                key = hashlib.blake2b(row["group"].encode(), digest_size=8).digest()
                if (first := splits.setdefault(key, row["split"])) != row["split"]:
                    torn.setdefault(key, f'"{row["group"]}", which is in {first} and in {row["split"]}')
        yield unit
    if torn:
        example = next(iter(torn.values()))
        raise UserError(
            f"columns.split: {len(torn):,} of {len(splits):,} groups ({columns.group}) are in more than one split, "
            f"such as {example}. Products that were trained on would be measured as if held out: give all rows "
            "of a group one split, or set columns.split=null (by hash of the group) or columns.group=null"
        )


def plan_schema(columns: ColumnsConfig) -> pa.Schema:
    names = ("id", "image_uri", "captions", "group", "split", "reason", "message")
    own = [pa.field(name, pa.list_(pa.string()) if name == "captions" else pa.string()) for name in names]
    return pa.schema([*own, *kept_fields(columns)])


def kept_fields(columns: ColumnsConfig) -> list[pa.Field]:
    return [pa.field(name, TYPES[kind]) for name, kind in map(_name_and_type, columns.keep)]


@dataclass(frozen=True)
class _Rows:
    """How raw rows become planned ones."""

    columns: ColumnsConfig
    templates: tuple[str, ...]
    split: SplitConfig
    need_caption: bool

    def planned(self, batch: Batch, duplicates: np.ndarray) -> pa.Table:
        """`duplicates`: the rows of the batch whose id came earlier."""
        malformed = texts(column(batch, MALFORMED))
        ids = texts(column(batch, self.columns.id or "image_uri"))
        captions = captions_of(batch, self.templates)
        broken = pc.not_equal(malformed, "")
        if pc.any(broken).as_py():
            captions = pc.if_else(broken, pa.scalar([], captions.type), captions)
        uri, not_utf8 = _uris(column(batch, "image_uri"))
        group = self._texts(batch, self.columns.group)
        given = self._texts(batch, self.columns.split)
        twice = np.zeros(len(batch), bool)
        twice[duplicates] = True
        found = [
            (broken, "malformed_row", malformed),
            (pc.equal(ids, ""), "empty_id", "the row has no id"),
            (pa.array(twice), "duplicate_id", "an earlier row has this id"),
        ]
        if self.need_caption:
            message = f"nothing to fill {' or '.join(self.templates)} with"
            found.append((pc.equal(pc.list_value_length(captions), 0), "empty_caption", message))
        found += [
            (not_utf8, "malformed_row", _sentence("the picture's path is not UTF-8: ", uri, "")),
            (
                by_value(given, lambda name: bool(name) and not SPLIT_NAME.fullmatch(name), pa.bool_()),
                "bad_split",
                _sentence('"', given, '" names no split: use letters, digits, "_", "-" and "."'),
            ),
        ]
        first = pc.make_struct(*(condition for condition, _, _ in found))
        own = {
            "id": _or_null(ids),
            "image_uri": _or_null(uri),
            "captions": captions,
            "group": _or_null(group),
            "split": self._splits(given, pc.if_else(pc.equal(group, ""), ids, group)),
            "reason": pc.case_when(first, *(reason for _, reason, _ in found)),
            "message": pc.case_when(first, *(message for _, _, message in found)),
        }
        kept = {name: kept_values(column(batch, name), kind) for name, kind in map(_name_and_type, self.columns.keep)}
        return pa.table({**own, **kept}, schema=plan_schema(self.columns))

    def _texts(self, batch: Batch, name: str | None) -> pa.Array:
        return texts(pa.nulls(len(batch)) if name is None else column(batch, name))

    def _splits(self, given: pa.Array, keys: pa.Array) -> pa.Array:
        """The split that the row names, else that of its group."""
        if self.split.validation + self.split.test == 0:
            return pc.if_else(pc.equal(given, ""), "train", given)
        own = pc.equal(given, "")
        hashed = by_value(pc.if_else(own, keys, ""), lambda key: split_of(key, self.split), pa.string())
        return pc.if_else(own, hashed, given)


def _sentence(start: str, values: pa.Array, end: str) -> pa.Array:
    return pc.binary_join_element_wise(start, values, end, "")


def _or_null(values: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(values, ""), None, values)


def _uris(values: Column) -> tuple[pa.Array, pa.Array]:
    """The pictures' places, "" for none, and which of them are not UTF-8, as file names and texts of JSON may be."""
    if isinstance(values, list):
        try:
            values = pa.array(values, pa.string())
        except UnicodeEncodeError:
            fixed = [utf8(value or "") for value in values]
            return pa.array(fixed), pa.array([(a or "") != b for a, b in zip(values, fixed, strict=True)])
    return pc.fill_null(values.cast(pa.string()), ""), pa.array(np.zeros(len(values), bool))


def by_value(values: pa.Array, function: Callable[[str], Any], kind: pa.DataType) -> pa.Array:
    """`function` of every value, called once per distinct one."""
    encoded = values.dictionary_encode()
    return pa.array(map(function, encoded.dictionary.to_pylist()), kind).take(encoded.indices)


def kept_values(values: Column, kind: str) -> pa.Array:
    """The values as the kept column's type; null where empty, or where one does not read as that type."""
    if kind == "string":
        return _or_null(texts(values))
    if kind == "float" and isinstance(values, pa.FloatingPointArray):
        values = values.cast(pa.float64())
        return pc.if_else(pc.is_nan(values), None, values)
    return by_value(texts(values), lambda text: _typed(text, kind), TYPES[kind])


def _typed(text: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
        return (_whole(text) if kind == "int" else float(text)) if text else None
    except ValueError:
        return None


def _whole(text: str) -> int:
    """`2012`, and `2012.0`, as tables with missing numbers write it."""
    number = int(text) if text.removeprefix("-").isdecimal() else float(text)
    if number != number // 1 or not -(2**63) <= number < 2**63:
        raise ValueError(text)
    return int(number)


def _name_and_type(item: str) -> tuple[str, str]:
    name, _, kind = item.rpartition(":")
    return (name, kind) if name else (item, "string")
