"""Index: shards + exact top-k; Ranking: plain data. Needs numpy and pyarrow; neither torch nor ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from clipdist import storage
from clipdist.cache import DiskCache, default_cache
from clipdist.code_store import CodeStore
from clipdist.config import UserError
from clipdist.manifest import read_manifest
from clipdist.scan import top_k_by_codes
from clipdist.schema import Stamp
from clipdist.scores import check_dim, exact_scores
from clipdist.shards import Shards, row_of_id
from clipdist.topk import Keep, TopK, top_k
from clipdist.where import Expression, Filter, parse

Where: TypeAlias = str | Expression


@dataclass(frozen=True)
class Ranking:
    """The best rows of every query, best first: `ids[i]`, exact `scores[i]` float64 [n], row numbers `rows[i]` int64
    [n] for `Index.describe`. n differs between queries under a `min_score`, or where near-duplicates are left out."""

    ids: list[Sequence[str]]
    scores: Sequence[NDArray[np.float64]]
    rows: Sequence[NDArray[np.int64]]


@dataclass
class Index:
    """One table of an embeddings artefact, ready to be searched. Nothing is built: the shards are the index."""

    shards: Shards
    cache: DiskCache | None = None
    device: str = "cpu"
    _last_filter: tuple[str, NDArray[np.bool_]] | None = field(default=None, repr=False)

    @staticmethod
    def open(uri: str, table: str = "images", *, cache: DiskCache | None = None, device: str = "cpu") -> Index:
        """Opens `images` or `texts` at `uri`. UserError when that is not a finished embeddings artefact.

        `cache`: where this machine keeps what it reads from a store and the codes of the first pass (default: 50 GiB of
        `~/.cache/clipdist`). `device`: a GPU, such as "cuda", holds the codes and goes through them."""
        manifest = read_manifest(storage.absolute(uri), "embeddings")
        if table not in manifest.planned:
            raise UserError(f"{uri}: has no {table} (there: {', '.join(manifest.planned)})")
        cache = cache or default_cache()
        return Index(Shards(manifest, table, cache), cache, device)

    @property
    def stamp(self) -> Stamp:
        return self.shards.manifest.stamp

    @property
    def dim(self) -> int:
        return self.shards.dim

    def __len__(self) -> int:
        return len(self.shards)

    def search(
        self,
        queries: ArrayLike,
        k: int = 10,
        where: Where | None = None,
        *,
        offset: int = 0,
        min_score: float | None = None,
        collapse: float | None = None,
    ) -> Ranking:
        """The top-k rows by dot product for queries [q, dim] or [dim], exact, ties by id. Rows that can never be
        returned (NaN) and k above the number of rows give fewer hits.

        `where`: only rows that fit, such as "colour = 'red' and price < 50" (`clipdist.where`), or an Arrow expression;
        exact among them. `offset`: how many of the best to pass over, for the next page. `min_score`: no row with a
        lower score. `collapse`: a row whose cosine with a better hit of the same query is at least this is left out as
        a near-duplicate, and the next best takes its place.

        ValueError for queries of another dimension or with NaN, k < 1, offset < 0; UserError for a `where` that cannot
        be read."""
        if offset < 0:
            raise ValueError(f"offset is the number of hits to pass over and must be at least 0, not {offset}")
        matrix = np.atleast_2d(np.asarray(queries))
        if matrix.dtype not in (np.float32, np.float64):
            matrix = matrix.astype(np.float32)
        if matrix.ndim == 2:  # else `top_k` says what it should be
            check_dim(matrix.shape[1], self.dim)
        keep = None if where is None else self._keep(where)
        if collapse is None:
            found = self._top(matrix, offset + k if k > 0 else k, keep)
            pairs = list(zip(found.rows, found.scores, strict=True))
        else:
            pairs = self._collapsed(matrix, offset + k if k > 0 else k, keep, collapse)
        kept = [page(rows, scores, offset, min_score) for rows, scores in pairs]
        rows, scores = [rows for rows, _ in kept], [scores for _, scores in kept]
        ids = iter(self._ids(np.concatenate([np.zeros(0, np.int64), *rows])))
        return Ranking([list(islice(ids, len(numbers))) for numbers in rows], scores, rows)

    def describe(self, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Every column but the vector, of the given row numbers [n], in that order."""
        described: list[dict[str, Any]] = self.shards.take(np.asarray(rows), self.shards.column_names()).to_pylist()
        return described

    def vector(self, row_id: str) -> NDArray[np.float32]:
        """The stored embedding of an id, float32 [dim]. KeyError when the table has no such id."""
        row = row_of_id(self.shards, row_id)
        if row is None:
            raise KeyError(row_id)
        return np.asarray(self.shards.vectors(np.array([row]))[0], np.float32)

    def _top(self, queries: NDArray[Any], k: int, keep: Keep | None) -> TopK:
        kernel = self._store.kernel(len(queries))
        if kernel is None:
            return top_k(self.shards.blocks(), queries, k, self._ids, keep=keep)
        return top_k_by_codes(self._store.parts(kernel), kernel, queries, k, self._ids, keep=keep)

    @cached_property
    def _store(self) -> CodeStore:
        return CodeStore(self.shards, self.cache, self.device)

    def _collapsed(
        self, queries: NDArray[Any], k: int, keep: Keep | None, cosine: float
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """The k best rows of every query that are no near-duplicates of better ones; looks as deep as it takes."""
        answers: dict[int, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        depth = 2 * k
        while len(answers) < len(queries):
            open_ones = np.array([number for number in range(len(queries)) if number not in answers])
            found = self._top(queries[open_ones], depth, keep)
            for number, rows, scores in zip(open_ones, found.rows, found.scores, strict=True):
                first = without_near_duplicates(self.shards.vectors(rows), cosine, k)
                if len(first) == k or len(rows) < depth:
                    answers[int(number)] = rows[first], scores[first]
            depth *= 4
        return [answers[number] for number in range(len(queries))]

    def _keep(self, where: Where) -> Keep:
        """Which rows fit, as `top_k` asks for them. The last filter's answer is kept: queries come in sessions."""
        if not isinstance(where, str):  # two Arrow expressions cannot be compared
            mask = self._mask(where)
        else:
            if self._last_filter is None or self._last_filter[0] != where:
                self._last_filter = (where, self._mask(where))
            mask = self._last_filter[1]
        return lambda first, stop: mask[first:stop]

    def _mask(self, where: Where) -> NDArray[np.bool_]:
        schema = self.shards.schema()
        condition = parse(where, schema) if isinstance(where, str) else Filter(where, tuple(schema.names))
        masks = [np.zeros(0, bool)]
        try:
            masks += [condition.mask(found) for _, _, found in self.shards.by_file(condition.columns)]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:  # of somebody's own expression
            raise UserError(f"where: {error}") from None
        return np.concatenate(masks)

    def _ids(self, rows: NDArray[np.int64]) -> Sequence[str]:
        ids: list[str] = self.shards.take(np.asarray(rows), ["id"]).column("id").to_pylist()
        return ids


def page(
    rows: NDArray[np.int64], scores: NDArray[np.float64], offset: int, min_score: float | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    end = len(rows) if min_score is None else int(np.count_nonzero(scores >= min_score))
    return rows[offset:end], scores[offset:end]


def without_near_duplicates(vectors: NDArray[Any], cosine: float, k: int) -> NDArray[np.int64]:
    """Places of the first k vectors [n, dim] whose cosine with every one taken before them is below `cosine`."""
    norms = np.sqrt([exact_scores(row[None], row.astype(np.float64))[0] for row in vectors])
    taken: list[int] = []
    for place, row in enumerate(vectors):
        products = exact_scores(vectors[taken], row.astype(np.float64)) if taken else np.zeros(0)
        if not (products >= cosine * norms[taken] * norms[place]).any():
            taken.append(place)
            if len(taken) == k:
                break
    return np.array(taken, np.int64)
