"""Ready query vectors in Parquet: a table of embeddings, or any file or folder with `id` and `embedding` columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipdist import storage
from clipdist.config import UserError
from clipdist.manifest import File, Manifest, read_manifest
from clipdist.shards import Shards

MODEL_KEYS = ("weights_sha256", "dim", "normalised")
"""What two tables must have in common for their vectors to be compared."""


@dataclass(frozen=True)
class Queries:
    """Query vectors in Parquet files of `dim` dimensions. `shards`: of an embeddings artefact, whose deleted rows
    are no queries."""

    uri: str
    files: tuple[str, ...]
    dim: int
    columns: tuple[str, ...]
    shards: Shards | None = None

    def identity(self) -> dict[str, Any]:
        """Changes when the queries do."""
        if self.shards is not None:
            manifest = self.shards.manifest
            return {"embeddings": manifest.stamp.identity, "manifest": manifest.number, "table": self.shards.table}
        return {"content": {file: storage.fingerprint(file) for file in self.files}}

    def __len__(self) -> int:
        if self.shards is not None:
            return len(self.shards)
        return sum(_metadata(file).num_rows for file in self.files)

    def units(self, rows: int) -> Iterator[pa.Table]:
        """Which rows of which row group are a unit of at most so many queries."""
        live = {} if self.shards is None else _live(self.shards)
        for file in self.files:
            metadata, start = _metadata(file), 0
            for group in range(metadata.num_row_groups):
                size = metadata.row_group(group).num_rows
                inside = np.arange(size)
                if file in live:
                    inside = live[file][(live[file] >= start) & (live[file] < start + size)] - start
                start += size
                for first in range(0, len(inside), rows):
                    part = inside[first : first + rows]
                    where = {"file": [file] * len(part), "group": np.full(len(part), group), "row": part}
                    yield pa.table(where)

    def read(self, unit: pa.Table) -> pa.Table:
        """The queries of a unit: `id`, `embedding`, and `pair_id` where there is one."""
        file, group = unit.column("file")[0].as_py(), unit.column("group")[0].as_py()
        names = [name for name in ("id", "pair_id", "embedding") if name in self.columns]
        try:
            with storage.open_read(file) as opened:
                return pq.ParquetFile(opened).read_row_group(group, columns=names).take(unit.column("row"))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"queries: {file}: cannot be read ({type(error).__name__}: {error})") from None


def open_queries(uri: str, table: str, searched: Manifest) -> Queries:
    """Queries that fit the searched embeddings. UserError naming what does not."""
    path = storage.absolute(uri)
    if "manifests" in storage.names(path):
        return _of_embeddings(path, table, searched)
    if not storage.exists(path):
        raise UserError(f"queries: {uri}: no such file or folder")
    files = [path] if storage.is_file(path) else [f for f, _ in storage.walk_files(path) if f.endswith(".parquet")]
    if not files:
        raise UserError(f"queries: {uri}: holds no Parquet file")
    dim = int(searched.stamp.identity["dim"])
    problems = [problem for file in files for problem in _problems(file, dim)]
    if problems:
        raise UserError(*problems)
    return Queries(path, tuple(files), dim, tuple(_schema(files[0]).names))


def vectors(found: pa.Table, dim: int) -> tuple[NDArray[Any], dict[int, str]]:
    """The query vectors [n, dim] of a unit, and what is wrong with some of them (their rows are zero)."""
    column = found.column("embedding").combine_chunks()
    lengths = pa.compute.list_value_length(column).fill_null(-1).to_numpy()
    ids = found.column("id").is_valid().to_numpy()
    good = (lengths == dim) & ids
    flat = column.filter(pa.array(lengths == dim)).flatten()
    values = flat.to_numpy(zero_copy_only=False)
    matrix = np.zeros((len(found), dim), np.float64 if values.dtype == np.float64 else np.float32)
    matrix[lengths == dim] = values.reshape(-1, dim)
    finite = (np.abs(matrix) <= np.finfo(np.float32).max).all(axis=1)
    wrong = {int(row): "no id" for row in np.flatnonzero(~ids)}
    wrong |= {int(row): f"{lengths[row]} dimensions, not {dim}" for row in np.flatnonzero((lengths != dim) & ids)}
    wrong |= {int(row): "NaN, inf, null or a value beyond float32" for row in np.flatnonzero(good & ~finite)}
    wrong |= {row: "no vector" for row in wrong if lengths[row] < 0}
    matrix[list(wrong)] = 0
    return matrix, wrong


def _of_embeddings(path: str, table: str, searched: Manifest) -> Queries:
    manifest = read_manifest(path, "embeddings")
    if table not in manifest.planned:
        raise UserError(f"queries: {path}: has no {table} (there: {', '.join(manifest.planned)})")
    theirs, ours = manifest.stamp.identity, searched.stamp.identity
    differ = [key for key in MODEL_KEYS if theirs.get(key) != ours.get(key)]
    if differ:
        raise UserError(
            *(
                f"queries: {path}: {key} is {theirs.get(key)} there, {ours.get(key)} in {searched.uri}; "
                "queries and catalog must be embedded by the same model"
                for key in differ
            )
        )
    shards = Shards(manifest, table)
    files: list[File] = manifest.select(table)
    columns = (*shards.column_names(), "embedding")
    return Queries(path, tuple(manifest.path(file) for file in files), shards.dim, columns, shards)


def _live(shards: Shards) -> dict[str, NDArray[np.int64]]:
    manifest = shards.manifest
    return {manifest.path(file): shards.live_rows(file) for file in manifest.select(shards.table)}


def _problems(file: str, dim: int) -> list[str]:
    schema = _schema(file)
    if missing := [name for name in ("id", "embedding") if name not in schema.names]:
        return [f"queries: {file}: has no column {' and no '.join(missing)} (there: {', '.join(schema.names)})"]
    kind = schema.field("embedding").type
    if not (pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return [f"queries: {file}: embedding holds {kind}; expected lists of {dim} numbers"]
    if not pa.types.is_floating(kind.value_type):
        return [f"queries: {file}: embedding holds lists of {kind.value_type}; expected floating-point numbers"]
    if pa.types.is_fixed_size_list(kind) and kind.list_size != dim:
        return [f"queries: {file}: vectors of {kind.list_size} dimensions, the searched ones have {dim}"]
    return []


def _schema(file: str) -> pa.Schema:
    return _metadata(file).schema.to_arrow_schema()


def _metadata(file: str) -> pq.FileMetaData:
    try:
        with storage.open_read(file) as opened:
            return pq.read_metadata(opened)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"queries: {file}: not a Parquet file that can be read ({error})") from None
