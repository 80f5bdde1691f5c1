"""Tables as batches: CSV, TSV, JSONL and Parquet. Each reader gives the columns that are `wanted` (None: all) and, when
it is wanted, `image_uri`; a row that cannot be parsed comes as {MALFORMED: message}."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import uuid
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from clipdist import storage
from clipdist.batches import BATCH_ROWS, MALFORMED, Batch, Column, Row, column, in_batches, plain
from clipdist.config import UserError
from clipdist.report import file_size

CSV_BLOCK_BYTES = 4 << 20
JSONL_BLOCK_LINES = 512
ROW_GROUP_BYTES = 2 << 30
"""Of pictures: a process that reads some holds up to two row groups."""


def columns_of(kind: str, path: str) -> tuple[str, ...]:
    """The names of a table's columns. UserError when it is none."""
    try:
        with storage.open_read(path) as file:
            if kind == "jsonl":
                return _jsonl_columns(path, file)
            if kind == "parquet":
                names, where = pq.read_schema(file).names, "the schema"
            else:
                first, where = file.readline().decode("utf-8-sig"), "the first line"
                names = next(csv.reader([first], delimiter=_delimiter(path)), [])
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise UserError(f"source.path: {path}: cannot be read as {kind}: {error}") from None
    if not names or len(set(names)) != len(names):
        raise UserError(f"source.path: {path}: {where} must name the columns, each once; got {names}")
    return tuple(names)


def _jsonl_columns(path: str, lines: Iterable[bytes]) -> tuple[str, ...]:
    """The keys of the first thousand objects, because a key may be missing in some."""
    first, names = b"", dict[str, None]()
    for line in itertools.islice(lines, 1000):
        first = first or line
        with contextlib.suppress(ValueError):  # such a line becomes a reject
            value = json.loads(line)
            names |= dict.fromkeys(value) if isinstance(value, dict) else {}
    if not names:
        raise UserError(f"source.path: {path}: expected one JSON object per line, got {first[:60]!r}")
    return tuple(names)


def csv_batches(path: str, image_column: str, folder: str, wanted: Collection[str] | None) -> Iterator[Batch]:
    """Every column is text: an id "007" stays "007". Malformed rows come last."""
    bad: list[str] = []

    def invalid(row: pacsv.InvalidRow) -> str:
        bad.append(f"expected {row.expected_columns} columns, got {row.actual_columns}: {row.text[:120]!r}")
        return "skip"

    names = columns_of("csv", path)
    read = [name for name in names if _is_read(name, image_column, wanted) or name == names[-1]]
    parse = pacsv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True, invalid_row_handler=invalid)
    strings = dict.fromkeys(read, pa.string())
    convert = pacsv.ConvertOptions(column_types=strings, strings_can_be_null=False, include_columns=read)
    last: Row = {}
    with storage.open_read(path) as file:
        try:
            options = pacsv.ReadOptions(block_size=CSV_BLOCK_BYTES)
            for batch in pacsv.open_csv(file, options, parse, convert):
                last = batch.slice(len(batch) - 1).to_pylist()[0] if len(batch) else last
                yield _with_uris(batch, image_column, folder, wanted)
        except pa.ArrowInvalid as error:
            if "Empty CSV" not in str(error):  # a header, and not even a line break
                raise UserError(f"source.path: {path}: cannot be read as CSV: {error}") from None
    if last and _in_open_quote(path, last[names[-1]]):
        raise UserError(f'source.path: {path}: a quote (") is never closed in the row that begins {str(last)[:120]}')
    yield from in_batches({MALFORMED: message} for message in bad)


def _in_open_quote(path: str, last_value: str) -> bool:
    """Whether the file ends inside a quoted value, which Arrow takes for the last value: rows would be lost in it."""
    size = storage.size(path)
    end = storage.read_bytes(path, max(size - 64, 0), size).rstrip()
    return ("\n" in last_value or "\r" in last_value) and not end.endswith(b'"')


def jsonl_batches(path: str, image_column: str, folder: str, wanted: Collection[str] | None) -> Iterator[Batch]:
    """Python's parser: Arrow's wants one type per column, and makes dates of texts."""
    with storage.open_read(path) as opened, io.BufferedReader(opened, 1 << 20) as file:
        place = folder if wanted is None or "image_uri" in wanted else None
        yield from in_batches(_jsonl_rows(path, file, image_column, place))


def _jsonl_rows(path: str, lines: Iterable[bytes], image_column: str, folder: str | None) -> Iterator[Row]:
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    while block := list(itertools.islice(numbered, JSONL_BLOCK_LINES)):
        values = _json_values([line for _, line in block])
        for (number, line), value in zip(block, values, strict=True):
            if isinstance(value, ValueError):
                yield {MALFORMED: f"{path}:{number}: not valid JSON: {value}"}
            elif not isinstance(value, dict):
                yield {MALFORMED: f"{path}:{number}: expected a JSON object, got {line[:60]!r}"}
            else:
                if folder is not None:
                    value["image_uri"] = image_uri(value.get(image_column), folder)
                yield value


def _json_values(lines: list[bytes]) -> list[Any]:
    """The value of each line, or its error. All at once where every line is one value, which takes a third of the
    time: between the lines stands a text that none of them can hold, and each must be found where it was put."""
    mark = uuid.uuid4().hex
    try:
        values = json.loads(b"[" + f',"{mark}",'.encode().join(lines) + b"]")
        if values[1::2] == [mark] * (len(lines) - 1) and len(values) == 2 * len(lines) - 1:
            return values[::2]  # type: ignore[no-any-return]
    except ValueError:
        pass
    return [_json_value(line) for line in lines]


def _json_value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return error


def parquet_batches(path: str, image_column: str, folder: str, wanted: Collection[str] | None) -> Iterator[Batch]:
    with storage.open_read(path) as opened:
        file = pq.ParquetFile(opened)
        there = image_column in file.schema_arrow.names  # texts alone need no picture
        leaf = _bytes_column(image_column, file.schema_arrow.field(image_column).type) if there else None
        names = [name for name in file.schema_arrow.names if _is_read(name, image_column, wanted)]
        names = [name for name in names if name != image_column or leaf is None]
        if leaf is not None:
            _check_row_groups(path, file.metadata, leaf)
        for groups in _row_groups(file.metadata, BATCH_ROWS if leaf is None else 0):
            start = 0
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=names):
                if leaf is None:
                    yield _with_uris(batch, image_column, folder, wanted)
                else:
                    rows = pa.array(range(start, start + len(batch))).cast(pa.string())
                    yield _with(batch, pc.binary_join_element_wise(f"{path}#row={groups[0]}:", rows, f":{leaf}", ""))
                start += len(batch)


def _check_row_groups(path: str, metadata: pq.FileMetaData, leaf: str) -> None:
    """UserError for pictures in so large row groups that a process which reads one has no memory left for others."""
    index = [metadata.schema.column(number).path for number in range(metadata.num_columns)].index(leaf)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    largest, rows = max(((g.column(index).total_uncompressed_size, g.num_rows) for g in groups), default=(0, 0))
    if largest > ROW_GROUP_BYTES:
        raise UserError(
            f"source.path: {path}: a row group with {rows:,} pictures, {file_size(largest)}, is read at once; at most "
            f"{file_size(ROW_GROUP_BYTES)} can be: write the file with smaller row groups, for example of "
            f"{max(1, 1 << int(math.log2(rows * (ROW_GROUP_BYTES >> 3) / largest))):,} rows"
        )


def _row_groups(metadata: pq.FileMetaData, at_least: int) -> Iterator[list[int]]:
    """Neighbouring row groups of `at_least` so many rows. Not all at once: a reader keeps all that it read."""
    groups, rows = list[int](), 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        rows += metadata.row_group(group).num_rows
        if rows >= at_least:
            yield groups
            groups, rows = [], 0
    if groups:
        yield groups


def _bytes_column(column: str, kind: pa.DataType) -> str | None:
    """The leaf that holds picture bytes: a binary column, or `bytes` of Hugging Face's {bytes, path} struct."""
    if pa.types.is_struct(kind) and "bytes" in [kind.field(index).name for index in range(kind.num_fields)]:
        return f"{column}.bytes"
    return column if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


def _is_read(name: str, image_column: str, wanted: Collection[str] | None) -> bool:
    return wanted is None or name in wanted or (name == image_column and "image_uri" in wanted)


def _with_uris(batch: Batch, image_column: str, folder: str, wanted: Collection[str] | None) -> Batch:
    if wanted is not None and "image_uri" not in wanted:
        return batch
    return _with(batch, image_uris(column(batch, image_column), folder))


def _with(batch: Batch, uris: pa.Array) -> Batch:
    """`image_uri` is ours, also where the input has a column of that name."""
    columns = {name: batch.column(name) for name in batch.schema.names if name != "image_uri"}
    return pa.RecordBatch.from_pydict({**columns, "image_uri": uris})


def image_uri(value: object, folder: str) -> str | None:
    """Where the picture is: URLs and absolute paths as they are, others from `folder`."""
    path = "" if value is None else str(value).strip()
    if not path:
        return None
    if "://" in path or path.startswith("/"):
        return path.removeprefix("file://")
    return storage.join(folder, path)


def image_uris(values: Column, folder: str) -> pa.Array:
    """`image_uri` of every value of an Arrow array."""
    array = plain(values)
    if array is None:
        return pa.array([image_uri(value, folder) for value in values.to_pylist()], pa.string())
    path = pc.utf8_trim_whitespace(array)
    path = pc.if_else(pc.equal(path, ""), None, path)
    whole = pc.or_(pc.match_substring(path, "://"), pc.starts_with(path, "/"))
    absolute = pc.if_else(pc.starts_with(path, "file://"), pc.utf8_slice_codeunits(path, len("file://")), path)
    return pc.if_else(whole, absolute, pc.binary_join_element_wise(storage.join(folder), path, "/"))


def _delimiter(path: str) -> str:
    return "\t" if path.lower().endswith(".tsv") else ","


def bytes_per_row(kind: str, path: str, sample: bytes) -> float:
    """Of a CSV or JSONL table, from its first bytes."""
    end = max(sample.rfind(b"\n"), sample.rfind(b"\r")) + 1
    if kind == "jsonl":
        rows, header = sum(1 for line in sample[:end].splitlines() if line.strip()), 0
    else:
        text = io.StringIO(sample[:end].decode("utf-8", "replace"), newline="")
        rows = sum(1 for line in csv.reader(text, delimiter=_delimiter(path)) if line) - 1
        header = len(sample[:end].splitlines(keepends=True)[0]) if end else 0
    return (end - header) / rows if rows > 0 else len(sample)
