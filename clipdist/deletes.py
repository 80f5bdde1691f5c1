"""Deleted rows: small Parquet files beside the shards that name rows by file and row number; shards never change."""

from __future__ import annotations

import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipdist import storage
from clipdist.config import UserError
from clipdist.manifest import File, Manifest

DELETES = pa.schema([pa.field("path", pa.string(), nullable=False), pa.field("row", pa.int64(), nullable=False)])
"""`path`: a `File.path` of the manifest; `row`: a row number in that file, from 0."""

_READERS = 8


def write_deletes(rows: Mapping[str, NDArray[np.integer[Any]]]) -> bytes:
    """A file of deletes: row numbers [n] per `File.path`, in any order, repeats allowed."""
    sorted_rows = {path: np.unique(np.asarray(numbers, np.int64)) for path, numbers in rows.items()}
    parts = [
        pa.table([pa.array([path] * len(numbers), pa.string()), pa.array(numbers)], schema=DELETES)
        for path, numbers in sorted_rows.items()
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.concat_tables([DELETES.empty_table(), *parts]), buffer, compression="zstd")
    return buffer.getvalue()


def deleted_rows(manifest: Manifest) -> dict[str, NDArray[np.int64]]:
    """The deleted row numbers per `File.path`, ascending, each once. UserError when they do not fit the files.
    Of a part of a table: those of its files."""
    files = {file.path: file for file in manifest.files}
    found: dict[str, list[NDArray[np.int64]]] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        uris = [storage.join(manifest.uri, path) for path in manifest.delete_files]
        for uri, table in zip(uris, pool.map(_read, uris), strict=True):
            for path, rows in _by_path(table):
                if manifest.is_part and path not in files:
                    continue
                _check(uri, path, files.get(path), rows)
                found.setdefault(path, []).append(rows)
    return {path: np.unique(np.concatenate(rows)) for path, rows in found.items()}


def _read(uri: str) -> pa.Table:
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(uri)), columns=DELETES.names).cast(DELETES)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{uri}: this file of deleted rows is missing or damaged ({error})") from None
    return table


def _by_path(table: pa.Table) -> list[tuple[str, NDArray[np.int64]]]:
    paths = table.column("path").combine_chunks().dictionary_encode()
    which, rows = np.asarray(paths.indices), table.column("row").to_numpy()
    order = np.argsort(which, kind="stable")
    parts = np.split(rows[order], np.searchsorted(which[order], np.arange(1, len(paths.dictionary))))
    return list(zip(paths.dictionary.to_pylist(), parts, strict=True)) if len(table) else []


def _check(uri: str, path: str, file: File | None, rows: NDArray[np.int64]) -> None:
    """Deletes that do not fit belong to another table, or rows that they name would come back to light unseen."""
    if file is None:
        raise UserError(f"{uri}: damaged: it deletes rows of {path}, which is no file of this table")
    outside = rows[(rows < 0) | (rows >= file.rows)]
    if len(outside):
        raise UserError(f"{uri}: damaged: it deletes row {outside[0]} of {path}, which has {file.rows} rows")
