"""Raw rows -> planned rows: ids, captions from templates, groups, splits, duplicates; one table per unit.

What can be judged without the picture is judged here; such rows are planned with a `reason` and end as rejects.
"""

from __future__ import annotations

import hashlib
import math
import re
import string
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from clipdist.config import Section, UserError
from clipdist.schema import RESERVED
from clipdist.sources import Row, Source, require_columns

TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
HASH_PARTITIONS = 64
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


def check_columns(source: Source, columns: ColumnsConfig, captions: tuple[str, ...]) -> None:
    """UserError naming every column that is asked for and not there, and every broken template."""
    if source.kind == "webdataset":
        return  # the JSON members of a tar may hold any field
    wanted: dict[str, Sequence[str]] = {}
    if source.kind in ("csv", "jsonl", "parquet"):
        wanted["source.image_column"] = [source.config.image_column]
    for name in ("id", "group", "split"):
        if (column := getattr(columns, name)) is not None:
            wanted[f"columns.{name}"] = [column]
    wanted["columns.keep"] = [_name_and_type(item)[0] for item in columns.keep]
    for index, template in enumerate(captions):
        wanted[f"captions.{index}"] = template_columns(template)
    require_columns(source, wanted)


def default_captions(source: Source) -> tuple[str, ...]:
    """A folder's or tar's text, a class folder's name; a table has to say."""
    defaults = {"folder": "{text}", "webdataset": "{text}", "class_folders": "a photo of {label}"}
    if source.kind not in defaults:
        raise UserError(
            f"captions: required for a table: templates over its columns, such as "
            f'captions: ["{{{source.columns[-1]}}}"] (columns: {", ".join(source.columns)})'
        )
    return (defaults[source.kind],)


def template_columns(template: str) -> list[str]:
    """The columns that a caption template names. ValueError when it is not a plain template."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f'"{template}" is no caption template: {error}') from None
    if any(spec or conversion for _, name, spec, conversion in parts if name is not None):
        raise ValueError(f'"{template}": only plain {{column}} places are allowed')
    names = [name for _, name, _, _ in parts if name is not None]
    if not names:
        raise ValueError(f'"{template}" names no column; write one in braces, such as "{{title}}"')
    return names


def captions_of(row: Row, templates: Iterable[str]) -> list[str]:
    """The row's captions: one per template, without those whose columns are all empty, each once. A template that is
    one list column gives one caption per element."""
    found: dict[str, None] = {}
    for template in templates:
        names = template_columns(template)
        value = row.get(names[0])
        if isinstance(value, list) and template == f"{{{names[0]}}}":
            texts = [_text(item) for item in value]
        elif any(_text(row.get(name)) for name in names):
            texts = [_filled(template, row)]
        else:
            texts = []
        found |= dict.fromkeys(" ".join(text.split()) for text in texts if text.strip())
    return list(found)


def _filled(template: str, row: Row) -> str:
    """Not str.format, which takes the dot of a column `name.en` for an attribute."""
    parts = string.Formatter().parse(template)
    return "".join(text + ("" if name is None else _text(row.get(name))) for text, name, _, _ in parts)


def split_of(key: str, config: SplitConfig) -> str:
    """The split of a group: a pure function of (seed, group)."""
    digest = hashlib.blake2b(f"{config.seed}:{key}".encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    if share < config.validation:
        return "validation"
    return "test" if share < config.validation + config.test else "train"


def plan_units(
    source: Source,
    columns: ColumnsConfig,
    captions: tuple[str, ...],
    split: SplitConfig,
    unit_rows: int,
    *,
    need_caption: bool = True,
) -> Iterator[pa.Table]:
    """Tables of `unit_rows` planned rows: id, image_uri, captions, group, split, reason, message, kept columns."""
    duplicates = duplicate_rows(_row_id(row, columns) for row in source.rows())
    schema, batch = plan_schema(columns), []
    for number, row in enumerate(source.rows()):
        planned = _planned(row, columns, captions, split, duplicate=number in duplicates)
        if planned["reason"] == "empty_caption" and not need_caption:
            planned |= {"reason": None, "message": None}
        batch.append(planned)
        if len(batch) == unit_rows:
            yield pa.Table.from_pylist(batch, schema)
            batch = []
    if batch:
        yield pa.Table.from_pylist(batch, schema)


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
            for row in unit.select(["group", "split", "reason"]).to_pylist():
                if row["group"] is None or row["reason"] is not None:
                    continue
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


def duplicate_rows(ids: Iterable[str | None]) -> set[int]:
    """Row numbers whose id came earlier in the input. Hashes (128 bit) and row numbers go to partitions on disk, so
    memory holds one partition at a time, never all ids."""
    record = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])
    found: set[int] = set()
    with tempfile.TemporaryDirectory() as folder:
        buffers: list[bytearray] = [bytearray() for _ in range(HASH_PARTITIONS)]
        for number, row_id in enumerate(ids):
            if row_id is None:
                continue
            digest = hashlib.blake2b(row_id.encode(), digest_size=16).digest()
            buffer = buffers[digest[0] % HASH_PARTITIONS]
            buffer += digest + number.to_bytes(8, "little")
            if len(buffer) >= 1 << 20:
                _spill(folder, digest[0] % HASH_PARTITIONS, buffer)
        for partition, buffer in enumerate(buffers):
            _spill(folder, partition, buffer)
            records = np.fromfile(Path(folder) / str(partition), record)
            records = records[np.lexsort((records["row"], records["low"], records["high"]))]
            same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
            found.update(records["row"][1:][same].tolist())
    return found


def _spill(folder: str, partition: int, buffer: bytearray) -> None:
    with (Path(folder) / str(partition)).open("ab") as file:
        file.write(buffer)
    buffer.clear()


def _planned(
    row: Row, columns: ColumnsConfig, templates: tuple[str, ...], split: SplitConfig, *, duplicate: bool
) -> Row:
    row_id, reason, message = _row_id(row, columns), None, None
    captions = captions_of(row, templates) if "\0malformed" not in row else []
    if "\0malformed" in row:
        reason, message = "malformed_row", row["\0malformed"]
    elif row_id is None:
        reason, message = "empty_id", "the row has no id"
    elif duplicate:
        reason, message = "duplicate_id", "an earlier row has this id"
    elif not captions:
        reason, message = "empty_caption", f"nothing to fill {' or '.join(templates)} with"
    group = _text(row.get(columns.group)) or None if columns.group else None
    given = _text(row.get(columns.split)) if columns.split else ""
    uri = row.get("image_uri") or ""
    if reason is None and uri != _utf8(uri):
        reason, message = "malformed_row", f"the picture's path is not UTF-8: {_utf8(uri)}"
    if reason is None and given and not SPLIT_NAME.fullmatch(given):
        reason, message = "bad_split", f'"{given}" names no split: use letters, digits, "_", "-" and "."'
    planned = {"id": row_id, "image_uri": _utf8(uri) or None, "captions": captions, "group": group}
    planned |= {
        "split": given or split_of(group or row_id or "", split),
        "reason": reason,
        "message": message,
    }
    return planned | {name: _typed(row.get(name), kind) for name, kind in map(_name_and_type, columns.keep)}


def _row_id(row: Row, columns: ColumnsConfig) -> str | None:
    return _text(row.get(columns.id or "image_uri")) or None


def _typed(value: Any, kind: str) -> Any:
    """The value as the kept column's type; null when it is empty or does not read as that type."""
    text = _text(value)
    try:
        if kind == "bool":
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
        readers: dict[str, Callable[[str], Any]] = {"string": str, "int": _whole, "float": float}
        return readers[kind](text) if text else None
    except ValueError:
        return None


def _whole(text: str) -> int:
    """`2012`, and `2012.0`, as tables with missing numbers write it."""
    number = int(text) if text.removeprefix("-").isdecimal() else float(text)
    if number != number // 1 or not -(2**63) <= number < 2**63:
        raise ValueError(text)
    return int(number)


def _text(value: Any) -> str:
    """The value as text: "" for null and NaN, lists joined by commas."""
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return _utf8(str(value)).strip()


def _utf8(text: str) -> str:
    """Half an emoji, as texts cut to a length hold it, becomes "?"; tables could not store it."""
    return text.encode("utf-8", "replace").decode()


def _name_and_type(item: str) -> tuple[str, str]:
    name, _, kind = item.rpartition(":")
    return (name, kind) if name else (item, "string")
