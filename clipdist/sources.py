"""Raw inputs as a stream of rows: CSV, TSV, JSONL and Parquet tables, picture folders, class folders, WebDataset tars.

A row is a dict of the input's own columns plus `image_uri`, where its picture's bytes are (`pictures.py` reads them):
a path or URL, `FILE.tar#bytes=OFFSET+SIZE`, or `FILE.parquet#row=GROUP:ROW:COLUMN`. No picture is read here.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from clipdist import storage
from clipdist.config import Section, UserError

Row = dict[str, Any]
SourceKind = Literal["csv", "jsonl", "parquet", "folder", "class_folders", "webdataset"]

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
EXTENSIONS: dict[str, SourceKind] = {
    ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "webdataset",
}  # fmt: skip
OWN_COLUMNS = {
    "folder": ("id", "text"),
    "class_folders": ("id", "label"),
    "webdataset": ("id", "text", "label"),
}


class SourceConfig(Section):
    """Where the raw rows are."""

    path: str
    """A CSV, TSV, JSONL or Parquet file (or a folder or glob of them), a folder of pictures with .txt captions
    beside them, a folder per class, or WebDataset tars. A local path or a URL such as s3://bucket/prefix."""
    kind: Literal["auto", "csv", "jsonl", "parquet", "folder", "class_folders", "webdataset"] = "auto"
    """What `path` is; auto goes by the file names."""
    image_column: str = "image"
    """Column of a table with the picture: a relative or absolute path, a URL, or the bytes (Parquet)."""
    image_root: str | None = None
    """Where relative picture paths start; by default the folder of the table."""


@dataclass(frozen=True)
class Source:
    """An opened input: its files, its columns, and a fingerprint that changes when the files do."""

    config: SourceConfig
    kind: SourceKind
    files: tuple[str, ...]
    columns: tuple[str, ...]

    def fingerprint(self) -> dict[str, Any]:
        """The names of all files, the content of the first thousand and of the captions beside them."""
        files = list(self.files[:1000])
        files += [_sidecar(path) for path in files] if self.kind == "folder" else []
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(lambda path: storage.fingerprint(path) if storage.exists(path) else None, files)
            content = {path: mark for path, mark in zip(files, found, strict=True) if mark is not None}
        names = hashlib.sha256("\n".join(self.files).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        shape = {"kind": self.kind, "image_column": self.config.image_column}
        shape |= {name: self.absolute_config().model_dump()[name] for name in ("path", "image_root")}
        return {**shape, "files": len(self.files), "names": names, "content": content}

    def absolute_config(self) -> SourceConfig:
        """The config with its local paths made absolute, so that it can be run from anywhere."""
        root = self.config.image_root
        places = {"path": storage.absolute(self.config.path), "image_root": root and storage.absolute(root)}
        return self.config.model_copy(update=places)

    def rows(self) -> Iterator[Row]:
        """All rows, in a fixed order. One that cannot be parsed comes as {"\\0malformed": message}; no column has
        that name."""
        readers = {"csv": _csv_rows, "jsonl": _jsonl_rows, "parquet": _parquet_rows, "webdataset": _tar_rows}
        if self.kind in ("folder", "class_folders"):
            yield from _folder_rows(self)
            return
        for path in self.files:
            if self.kind in ("csv", "parquet") and path != self.files[0]:
                _require_same_columns(self, path)
            yield from readers[self.kind](self, path)


def open_source(config: SourceConfig) -> Source:
    """Finds the files and their columns. UserError when there are none. Empty CSV files are left out."""
    root = storage.absolute(config.path)
    files = _files(root)
    if not files:
        raise UserError(f"source.path: {config.path}: no such file or folder")
    kind = _kind(config, root, files)
    wanted = [name for name in files if name.lower().endswith(tuple(_extensions(kind)))]
    if not wanted:
        raise UserError(f"source.path: {config.path}: holds no {' or '.join(_extensions(kind))} file")
    if kind == "csv" and len(wanted) > 1:
        wanted = [name for name in wanted if storage.size(name)] or wanted[:1]
    return Source(config, kind, tuple(wanted), _columns(kind, wanted[0]))


def require_columns(source: Source, wanted: Mapping[str, Sequence[str]]) -> None:
    """UserError that names every column that the config asks for and the input lacks."""
    problems = []
    for key, names in wanted.items():
        for name in names:
            if name not in source.columns:
                close = difflib.get_close_matches(name, source.columns, n=1, cutoff=0.6)
                hint = f'; did you mean "{close[0]}"?' if close else ""
                there = ", ".join(source.columns)
                problems.append(f'{key}: {source.config.path} has no column "{name}"{hint} (columns: {there})')
    if problems:
        raise UserError(*problems)


def _require_same_columns(source: Source, path: str) -> None:
    """A table whose columns were renamed half-way would give rows without captions or groups."""
    missing = [name for name in source.columns if name not in _columns(source.kind, path)]
    if missing:
        raise UserError(f"source.path: {path} has no column {', '.join(missing)}, as {source.files[0]} has")


def _extensions(kind: SourceKind) -> tuple[str, ...]:
    if kind in ("folder", "class_folders"):
        return PICTURES
    return tuple(extension for extension, of in EXTENSIONS.items() if of == kind)


def _files(root: str) -> list[str]:
    if "*" in root:
        return storage.glob(root)
    if storage.is_file(root):
        return [root]
    return [path for path, _ in storage.walk_files(root)] if storage.is_directory(root) else []


def _kind(config: SourceConfig, root: str, files: Sequence[str]) -> SourceKind:
    if config.kind != "auto":
        return config.kind
    tables = {EXTENSIONS[suffix] for path in files if (suffix := PurePosixPath(path.lower()).suffix) in EXTENSIONS}
    if len(tables) == 1:
        return tables.pop()
    if tables:
        raise UserError(
            f"source.kind: {config.path} holds {' and '.join(sorted(tables))} files; say which kind to read"
        )
    pictures = [path for path in files if path.lower().endswith(PICTURES)]
    if not pictures:
        raise UserError(f"source.path: {config.path}: neither a table, nor pictures, nor tars are there")
    sidecars = {path for path in files if path.endswith(".txt")}
    if any(str(PurePosixPath(path).with_suffix(".txt")) in sidecars for path in pictures[:1000]):
        return "folder"
    deep = all(len(PurePosixPath(_relative(path, root)).parts) > 1 for path in pictures[:1000])
    return "class_folders" if deep else "folder"


def _columns(kind: SourceKind, path: str) -> tuple[str, ...]:
    if kind in OWN_COLUMNS:
        return OWN_COLUMNS[kind]
    try:
        with storage.open_read(path) as file:
            if kind == "parquet":
                return tuple(pq.read_schema(file).names)
            if kind == "jsonl":
                return _jsonl_columns(path, file)
            first = file.readline().decode("utf-8-sig")
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise UserError(f"source.path: {path}: cannot be read as {kind}: {error}") from None
    names = next(csv.reader([first], delimiter=_delimiter(path)), [])
    if not names or len(set(names)) != len(names):
        raise UserError(f"source.path: {path}: the first line must name the columns, each once; got {names}")
    return tuple(names)


def _jsonl_columns(path: str, lines: Iterator[bytes]) -> tuple[str, ...]:
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


def _delimiter(path: str) -> str:
    return "\t" if path.lower().endswith(".tsv") else ","


def _csv_rows(source: Source, path: str) -> Iterator[Row]:
    bad: list[str] = []

    def invalid(row: pacsv.InvalidRow) -> str:
        bad.append(f"expected {row.expected_columns} columns, got {row.actual_columns}: {row.text[:120]!r}")
        return "skip"

    names = _columns("csv", path)
    row: Row = {}
    with storage.open_read(path) as file:
        try:
            reader = pacsv.open_csv(
                file,
                parse_options=pacsv.ParseOptions(
                    delimiter=_delimiter(path), newlines_in_values=True, invalid_row_handler=invalid
                ),
                # Every column is text: an id "007" stays "007".
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
                ),
            )
            for batch in reader:
                for row in batch.to_pylist():
                    yield row | {"image_uri": _image_uri(source, path, row.get(source.config.image_column))}
        except pa.ArrowInvalid as error:
            if "Empty CSV" not in str(error):  # a header, and not even a line break
                raise UserError(f"source.path: {path}: cannot be read as CSV: {error}") from None
    if row and _in_open_quote(path, [*row.values()][-1]):
        raise UserError(f'source.path: {path}: a quote (") is never closed in the row that begins {str(row)[:120]}')
    yield from ({"\0malformed": message} for message in bad)


def _in_open_quote(path: str, last_value: str) -> bool:
    """Whether the file ends inside a quoted value, which Arrow takes for the last value: rows would be lost in it."""
    size = storage.size(path)
    end = storage.read_bytes(path, max(size - 64, 0), size).rstrip()
    return ("\n" in last_value or "\r" in last_value) and not end.endswith(b'"')


def _jsonl_rows(source: Source, path: str) -> Iterator[Row]:
    with storage.open_read(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield {"\0malformed": f"{path}:{number}: not valid JSON: {error}"}
                continue
            if not isinstance(row, dict):
                yield {"\0malformed": f"{path}:{number}: expected a JSON object, got {line[:60]!r}"}
                continue
            yield row | {"image_uri": _image_uri(source, path, row.get(source.config.image_column))}


def _parquet_rows(source: Source, path: str) -> Iterator[Row]:
    column = source.config.image_column
    with storage.open_read(path) as opened:
        file = pq.ParquetFile(opened)
        kind = file.schema_arrow.field(column).type
        bytes_column = _bytes_column(column, kind)
        names = [name for name in file.schema_arrow.names if name != column or bytes_column is None]
        for group in range(file.num_row_groups):
            offset = 0
            for batch in file.iter_batches(4096, row_groups=[group], columns=names):
                for row in batch.to_pylist():
                    if bytes_column is None:
                        yield row | {"image_uri": _image_uri(source, path, row[column])}
                    else:
                        yield row | {"image_uri": f"{path}#row={group}:{offset}:{bytes_column}"}
                    offset += 1


def _bytes_column(column: str, kind: pa.DataType) -> str | None:
    """The leaf that holds picture bytes: a binary column, or `bytes` of Hugging Face's {bytes, path} struct."""
    if pa.types.is_struct(kind) and "bytes" in [kind.field(index).name for index in range(kind.num_fields)]:
        return f"{column}.bytes"
    return column if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


def _folder_rows(source: Source) -> Iterator[Row]:
    root = storage.absolute(source.config.path)
    for path in source.files:
        relative = PurePosixPath(_relative(path, root))
        row: Row = {"id": str(relative.with_suffix("")), "image_uri": path}
        if source.kind == "class_folders":
            yield row | {"label": relative.parts[0].replace("_", " ") if len(relative.parts) > 1 else ""}
            continue
        sidecar = _sidecar(path)
        text = storage.read_bytes(sidecar).decode("utf-8", "replace").strip() if storage.exists(sidecar) else ""
        yield row | {"text": text}


def _sidecar(path: str) -> str:
    return path[: path.rindex(".")] + ".txt"


def _tar_rows(source: Source, path: str) -> Iterator[Row]:
    """WebDataset: neighbouring members with the same name up to the first dot are one row."""
    row: Row = {}
    with storage.open_read(path) as opened:
        try:
            with tarfile.open(fileobj=opened, mode="r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if not member.isfile():
                        continue
                    if row and row["id"] != key:
                        yield row
                        row = {}
                    row = row or {"id": key, "image_uri": None}
                    _add_member(row, path, tar, member, extension.lower())
                opened.seek(tar.offset)
                if opened.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                    raise tarfile.ReadError(f"damaged at byte {tar.offset}")
        except tarfile.TarError as error:
            raise UserError(f"source.path: {path}: cannot be read as tar: {error}") from None
    if row:
        yield row


def _add_member(row: Row, path: str, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
    """`jpg` goes before `mask.png`; several captions become a list; a .json that cannot be read spoils its row."""
    if f".{extension}".endswith(PICTURES):
        if row["image_uri"] is None or f".{extension}" in PICTURES:
            row["image_uri"] = f"{path}#bytes={member.offset_data}+{member.size}"
        return
    if extension not in ("txt", "caption", "cls", "json"):
        return
    content = tar.extractfile(member)
    data = content.read().decode("utf-8", "replace").strip() if content else ""
    fields: Any = {"label" if extension == "cls" else "text": data}
    if extension == "json":
        try:
            fields = json.loads(data)
        except json.JSONDecodeError as error:
            fields = {"\0malformed": f"{path}: {member.name}: not valid JSON: {error}"}
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if name not in row:
            row[name] = value
        elif name not in ("id", "image_uri", "\0malformed") and row[name] != value:
            row[name] = [*(row[name] if isinstance(row[name], list) else [row[name]]), value]


def _image_uri(source: Source, table: str, value: object) -> str | None:
    """Where the picture is: URLs and absolute paths as they are, others from `image_root` or the table's folder."""
    if value is None or not str(value).strip():
        return None
    path = str(value).strip()
    if "://" in path or path.startswith("/"):
        return path.removeprefix("file://")
    root = storage.absolute(source.config.image_root) if source.config.image_root else table.rpartition("/")[0]
    return storage.join(root, path)


def _relative(path: str, root: str) -> str:
    """The part of `path` below `root`: a folder, a glob, or the file itself."""
    root = root.partition("*")[0].rpartition("/")[0] if "*" in root else root
    return path[len(root.rstrip("/")) + 1 :] if path != root else path.rpartition("/")[2]
