"""Index: shards + exact top-k; Hits: plain data. Needs numpy and pyarrow; neither torch nor ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from clipdist import storage
from clipdist.config import UserError
from clipdist.manifest import read_manifest
from clipdist.schema import Stamp
from clipdist.shards import Shards, row_of_id
from clipdist.topk import Keep, top_k
from clipdist.where import Expression, Filter, parse

Where: TypeAlias = str | Expression


@dataclass(frozen=True)
class Hits:
    """The best rows of every query, best first: ids and exact scores [queries, k], row numbers for `Index.describe`."""

    ids: list[Sequence[str]]
    scores: NDArray[np.float64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Index:
    """One table of an embeddings artefact, ready to be searched. Nothing is built: the shards are the index."""

    shards: Shards

    @staticmethod
    def open(uri: str, table: str = "images") -> Index:
        """Opens `images` or `texts` at `uri`. UserError when that is not a finished embeddings artefact."""
        manifest = read_manifest(storage.absolute(uri), "embeddings")
        if table not in manifest.planned:
            raise UserError(f"{uri}: has no {table} (there: {', '.join(manifest.planned)})")
        return Index(Shards(manifest, table))

    @property
    def stamp(self) -> Stamp:
        return self.shards.manifest.stamp

    @property
    def dim(self) -> int:
        return self.shards.dim

    def __len__(self) -> int:
        return len(self.shards)

    def search(self, queries: ArrayLike, k: int = 10, where: Where | None = None) -> Hits:
        """The top-k rows by dot product for queries [q, dim] or [dim], exact, ties by id. Rows that can never be
        returned (NaN) and k above the number of rows give fewer hits.

        `where`: only rows that fit, such as "colour = 'red' and price < 50" (`clipdist.where`), or an Arrow expression;
        exact among them. UserError for one that cannot be read."""
        matrix = np.atleast_2d(np.asarray(queries))
        if matrix.dtype not in (np.float32, np.float64):
            matrix = matrix.astype(np.float32)
        keep = None if where is None else self._keep(where)
        found = top_k(self.shards.blocks(), matrix, k, self._ids, keep=keep)
        ids = [self._ids(rows) for rows in found.rows]
        return Hits(ids, found.scores, found.rows)

    def describe(self, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Every column but the vector, of the given row numbers [n], in that order."""
        described: list[dict[str, Any]] = self.shards.take(np.asarray(rows), self.shards.column_names()).to_pylist()
        return described

    def vector(self, row_id: str) -> NDArray[np.float32]:
        """The stored embedding of an id, float32 [dim]. KeyError when the table has no such id."""
        row = row_of_id(self.shards, row_id)
        if row is None:
            raise KeyError(row_id)
        for first, block in self.shards.blocks():
            if first <= row < first + len(block):
                return np.asarray(block[row - first], np.float32)
        raise KeyError(row_id)

    def _keep(self, where: Where) -> Keep:
        """Which rows fit, as `top_k` asks for them."""
        schema = self.shards.schema()
        condition = parse(where, schema) if isinstance(where, str) else Filter(where, tuple(schema.names))
        masks = [np.zeros(0, bool)]
        try:
            masks += [condition.mask(found) for _, _, found in self.shards.by_file(condition.columns)]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:  # of somebody's own expression
            raise UserError(f"where: {error}") from None
        mask = np.concatenate(masks)
        return lambda first, stop: mask[first:stop]

    def _ids(self, rows: NDArray[np.int64]) -> Sequence[str]:
        ids: list[str] = self.shards.take(np.asarray(rows), ["id"]).column("id").to_pylist()
        return ids
