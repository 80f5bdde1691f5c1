"""Raw inputs: which files, of which kind, with which columns; their rows in batches; about how many there are.

A row is the input's own columns plus `image_uri`, where its picture's bytes are (`pictures.py` reads them): a path or
URL, `FILE.tar#bytes=OFFSET+SIZE`, or `FILE.parquet#row=GROUP:ROW:COLUMN`. No picture is read here.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from clipdist import folders, storage, tables
from clipdist.batches import Batch, Row, in_batches, rows_of
from clipdist.config import Section, UserError
from clipdist.folders import PICTURES, relative, sidecar

SourceKind = Literal["csv", "jsonl", "parquet", "folder", "class_folders", "webdataset"]

EXTENSIONS: dict[str, SourceKind] = {
    ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "webdataset",
}  # fmt: skip
OWN_COLUMNS = {
    "folder": ("id", "text"),
    "class_folders": ("id", "label"),
    "webdataset": ("id", "text", "label"),
}
COUNTED_BYTES = 1 << 20
"""A smaller input is read to be counted; of a larger one as much of a few files is a sample."""
SAMPLED_FILES = 4
MARKED_FILES = 1000
FOOTERS = 2000


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

    def absolute(self) -> SourceConfig:
        """The same with local paths made absolute, so that it can be run from anywhere."""
        root = self.image_root
        return self.model_copy(
            update={"path": storage.absolute(self.path), "image_root": root and storage.absolute(root)}
        )


@dataclass(frozen=True)
class Source:
    """An opened input: its files, its columns, and a fingerprint that changes when the files do. `sizes`: bytes per
    table or tar. `captioned`: 1 for each picture of a folder that has a .txt beside it, else 0. `listing`: a hash of
    all names and sizes."""

    config: SourceConfig
    kind: SourceKind
    files: tuple[str, ...]
    columns: tuple[str, ...]
    sizes: tuple[int, ...]
    listing: str
    captioned: bytes = b""

    def fingerprint(self, wanted: Collection[str] | None = None) -> dict[str, Any]:
        """The content of the first thousand files and, where the column `text` is `wanted` (None: it is), of the
        captions beside them; of more files the names and sizes of all."""
        files = list(self.files[:MARKED_FILES])
        if _has(wanted, "text"):
            files += [sidecar(path) for path, there in zip(files, self.captioned, strict=False) if there]
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(_mark, files)
            content = {path: mark for path, mark in zip(files, found, strict=True) if mark is not None}
        shape = self.config.absolute().model_dump(include={"path", "image_root", "image_column"})
        rest = {"listing": self.listing} if len(self.files) > MARKED_FILES else {}
        return {"kind": self.kind, **shape, "files": len(self.files), **rest, "content": content}

    def rows(self) -> Iterator[Row]:
        """All rows one by one, for a look at them."""
        for batch in self.batches():
            yield from rows_of(batch)

    def batches(self, wanted: Collection[str] | None = None) -> Iterator[Batch]:
        """All rows, in a fixed order, with at least the columns that are `wanted` (None: all). One that cannot be
        parsed comes as {MALFORMED: message}."""
        root = storage.absolute(self.config.path)
        if self.kind == "folder":
            yield from folders.folder_batches(self.files, root, self.captioned if _has(wanted, "text") else None)
        elif self.kind == "class_folders":
            yield from folders.class_batches(self.files, root)
        else:
            for path in self.files:
                if self.kind == "webdataset":
                    yield from in_batches(folders.tar_rows(path))
                else:
                    yield from self._table(path, wanted)

    def _table(self, path: str, wanted: Collection[str] | None) -> Iterator[Batch]:
        if self.kind in ("csv", "parquet") and path != self.files[0]:
            _require_same_columns(self, path)
        readers = {"csv": tables.csv_batches, "jsonl": tables.jsonl_batches, "parquet": tables.parquet_batches}
        root = self.config.image_root
        folder = storage.absolute(root) if root else path.rpartition("/")[0]
        yield from readers[self.kind](path, self.config.image_column, folder, wanted)


def _has(wanted: Collection[str] | None, name: str) -> bool:
    return wanted is None or name in wanted


def _mark(path: str) -> str | None:
    try:
        return storage.fingerprint(path)
    except FileNotFoundError:  # a link to nowhere
        return None


def open_source(config: SourceConfig) -> Source:
    """Finds the files and their columns. UserError when there are none. Empty CSV files are left out."""
    root = storage.absolute(config.path)
    listed = _files(root)
    if not listed:
        empty = "*" not in root and storage.is_directory(root)
        raise UserError(f"source.path: {config.path}: {'an empty folder' if empty else 'no such file or folder'}")
    kind = _kind(config, root, listed)
    wanted = [name for name in listed if name.lower().endswith(tuple(_extensions(kind)))]
    if not wanted:
        raise UserError(f"source.path: {config.path}: holds no {' or '.join(_extensions(kind))} file")
    if kind == "csv" and len(wanted) > 1:
        wanted = [name for name in wanted if listed[name]] or wanted[:1]
    captioned = _captioned(root, listed, wanted) if kind == "folder" else b""
    sizes = () if kind in ("folder", "class_folders") else tuple(listed[name] for name in wanted)
    digest = hashlib.sha256()
    for name in wanted:
        digest.update(f"{name}\t{listed[name]}\n".encode("utf-8", "surrogateescape"))
    return Source(config, kind, tuple(wanted), _columns(kind, wanted[0]), sizes, digest.hexdigest()[:16], captioned)


def refuse_inside(config: SourceConfig, output: str) -> None:
    """UserError when what is written to `output` would be read as part of the input by the next run."""
    root, place = storage.absolute(config.path), storage.absolute(output)
    if "*" in root:
        root = root.partition("*")[0].rpartition("/")[0] if "**" in root else ""
    if root and f"{place}/".startswith(f"{root.rstrip('/')}/"):
        raise UserError(f"output: {output} lies in source.path, all of which is the input: choose a place outside")


def estimate_rows(source: Source) -> tuple[int, bool]:
    """The number of rows, and whether it is exact: from listings, footers and samples, in seconds for any input."""
    if source.kind in ("folder", "class_folders"):
        return len(source.files), True
    if source.kind == "parquet":
        chosen = _spread(len(source.files), FOOTERS)
        with ThreadPoolExecutor(16) as pool:
            counts = list(pool.map(_footer_rows, [source.files[index] for index in chosen]))
        if len(chosen) == len(source.files):
            return sum(counts), True
        share = sum(source.sizes[index] for index in chosen) / sum(source.sizes)
        return round(sum(counts) / share), False
    if sum(source.sizes) <= COUNTED_BYTES:
        return sum(len(batch) for batch in source.batches(())), True
    chosen = [index for index in _spread(len(source.files), SAMPLED_FILES) if source.sizes[index]]
    per_row = [_bytes_per_row(source, source.files[index]) for index in chosen]
    return round(sum(source.sizes) * len(per_row) / sum(per_row)), False


def _spread(count: int, at_most: int) -> list[int]:
    """Up to `at_most` of the numbers below `count`, evenly."""
    return [index * count // min(count, at_most) for index in range(min(count, at_most))]


def _footer_rows(path: str) -> int:
    try:
        with storage.open_read(path) as file:
            return int(pq.read_metadata(file).num_rows)
    except pa.ArrowInvalid as error:
        raise UserError(f"source.path: {path}: cannot be read as parquet: {error}") from None


def _bytes_per_row(source: Source, path: str) -> float:
    if source.kind == "webdataset":
        return folders.tar_bytes_per_row(path)
    return tables.bytes_per_row(source.kind, path, storage.read_bytes(path, 0, COUNTED_BYTES))


def require_columns(source: Source, wanted: Mapping[str, Sequence[str]]) -> None:
    """UserError that names every column that the config asks for and the input lacks."""
    problems = []
    for key, names in wanted.items():
        for name in names:
            if name not in source.columns:
                plain = {column.strip().lower(): column for column in source.columns}
                close = difflib.get_close_matches(name.lower(), plain, n=1, cutoff=0.6)
                hint = f'; did you mean "{plain[close[0]]}"?' if close else ""
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


def _files(root: str) -> dict[str, int]:
    """Every file that `root` means, with its size, in order."""
    if "*" in root:
        return storage.glob(root)
    if storage.is_file(root):
        return {root: storage.size(root)}
    return dict(storage.walk_files(root)) if storage.is_directory(root) else {}


def _captioned(root: str, listed: Collection[str], pictures: Sequence[str]) -> bytes:
    """From the listing, so that pictures without a caption cost no request. A glob lists pictures only; the folders
    that it goes through are listed for it."""
    if "*" in root or root in listed:
        places = dict.fromkeys(path.rpartition("/")[0] for path in pictures)
        listed = {storage.join(place, name) for place in places for name in storage.names(place)}
    return bytes(sidecar(path) in listed for path in pictures)


def _kind(config: SourceConfig, root: str, files: Collection[str]) -> SourceKind:
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
    if any(sidecar(path) in files for path in pictures[:1000]):
        return "folder"
    deep = all(len(PurePosixPath(relative(path, root)).parts) > 1 for path in pictures[:1000])
    return "class_folders" if deep else "folder"


def _columns(kind: SourceKind, path: str) -> tuple[str, ...]:
    return OWN_COLUMNS[kind] if kind in OWN_COLUMNS else tables.columns_of(kind, path)
