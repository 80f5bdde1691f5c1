"""Search over a cluster: the shards spread over Ray actors, their answers merged exactly.

    queries -> each actor: the exact best of its shards -> merged by (-score, id)

Every actor holds whole files, so that the answers, row numbers included, are those of one `Index`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import ArrayLike, NDArray

from clipdist import runtime, storage
from clipdist.config import UserError
from clipdist.manifest import Manifest, read_manifest
from clipdist.schema import Stamp
from clipdist.search import Ranking, Where, page, without_near_duplicates
from clipdist.search_actors import PATIENCE_SECONDS, ShareSearcher, ask
from clipdist.shards import Shards
from clipdist.shares import Rows, places, spread
from clipdist.topk import TopK, merge


class ClusterIndex:
    """One table of an embeddings artefact, searched by actors that share its files: what `Index` answers, from more
    machines. The actors live until `close`, or until this is forgotten."""

    def __init__(self, manifest: Manifest, table: str, actors: int | None = None) -> None:
        """`actors`: how many processes share the files; null: one per node, with all its cores."""
        if actors is not None and actors < 1:
            raise UserError(f"actors: {actors}: expected at least one, or null for one per node")
        runtime.connect()
        self.manifest, self.patience_seconds = manifest, PATIENCE_SECONDS
        first_rows, rows = places(Shards(manifest, table))
        shares = spread(manifest.select(table), rows, actors or len(_nodes()))
        self._length, self._first = sum(rows.values()), np.array(list(first_rows.values()), np.int64)
        owner = {file.path: number for number, share in enumerate(shares) for file in share}
        self._owner = np.array([owner[path] for path in first_rows], np.int64)
        cores = min(runtime.node_cpus(), runtime.cpus() // len(shares))
        kind = ShareSearcher.options(num_cpus=cores, scheduling_strategy="SPREAD")  # type: ignore[attr-defined]
        with runtime.without_noise():
            self._actors = [kind.remote(manifest.part(share), table, first_rows) for share in shares]

    @staticmethod
    def open(uri: str, table: str = "images", actors: int | None = None) -> ClusterIndex:
        """Opens `images` or `texts` at `uri`. UserError when that is not a finished embeddings artefact."""
        manifest = read_manifest(storage.absolute(uri), "embeddings")
        if table not in manifest.planned:
            raise UserError(f"{uri}: has no {table} (there: {', '.join(manifest.planned)})")
        return ClusterIndex(manifest, table, actors)

    @property
    def stamp(self) -> Stamp:
        return self.manifest.stamp

    @property
    def dim(self) -> int:
        return int(self.stamp.identity["dim"])

    def __len__(self) -> int:
        return self._length

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
        """As `Index.search`, with the same answers to the bit. Fault when actors keep dying over it."""
        if offset < 0:
            raise ValueError(f"offset is the number of hits to pass over and must be at least 0, not {offset}")
        matrix, depth = np.atleast_2d(np.asarray(queries)), offset + k if k > 0 else k
        names: dict[int, str] = {}
        if collapse is None:
            found = self._top(matrix, depth, where, names)
            pairs = list(zip(found.rows, found.scores, strict=True))
        else:
            pairs = self._collapsed(matrix, depth, where, collapse, names)
        kept = [page(rows, scores, offset, min_score) for rows, scores in pairs]
        ids: list[Sequence[str]] = [[names[row] for row in rows.tolist()] for rows, _ in kept]
        return Ranking(ids, [scores for _, scores in kept], [rows for rows, _ in kept])

    def describe(self, rows: Rows) -> list[dict[str, Any]]:
        """Every column but the vector, of the given row numbers [n], in that order."""
        described: list[dict[str, Any]] = self.take(rows, None).to_pylist()
        return described

    def take(self, rows: Rows, names: Sequence[str] | None) -> pa.Table:
        """Columns (None: all but the vector) of the given row numbers [n], in that order."""
        parts, back = self._by_owner("take", rows, names)
        return pa.concat_tables(parts).take(pa.array(back))

    def vectors(self, rows: Rows) -> NDArray[Any]:
        """The stored vectors of the given row numbers [n], in that order: [n, dim]."""
        parts, back = self._by_owner("vectors", rows)
        return np.concatenate(parts)[back]

    def vector(self, row_id: str) -> NDArray[np.float32]:
        """The stored embedding of an id, float32 [dim]. KeyError when the table has no such id."""
        rows = self._ask([(actor, actor.answer.remote("row_of_id", row_id)) for actor in self._actors])
        row = next((row for row in rows if row is not None), None)
        if row is None:
            raise KeyError(row_id)
        return np.asarray(self.vectors(np.array([row]))[0], np.float32)

    def close(self) -> None:
        """Ends the actors."""
        for actor in self._actors:
            ray.kill(actor)

    def __enter__(self) -> ClusterIndex:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _top(self, queries: NDArray[Any], k: int, where: Where | None, names: dict[int, str]) -> TopK:
        """The merged best rows; their ids, and those of others, are put into `names`."""
        there = ray.put(queries)
        rankings = self._ask([(actor, actor.answer.remote("search", there, k, where)) for actor in self._actors])
        for found in rankings:
            for rows, ids in zip(found.rows, found.ids, strict=True):
                names.update(zip(rows.tolist(), ids, strict=True))
        if not len(queries):
            return TopK(np.zeros((0, 0), np.int64), np.zeros((0, 0)))
        parts = [TopK(np.stack(found.rows), np.stack(found.scores)) for found in rankings]
        return merge(parts, k, lambda rows: [names[row] for row in rows.tolist()])

    def _collapsed(
        self, queries: NDArray[Any], k: int, where: Where | None, cosine: float, names: dict[int, str]
    ) -> list[tuple[Rows, NDArray[np.float64]]]:
        """The k best rows of every query that are no near-duplicates of better ones; looks as deep as it takes."""
        answers: dict[int, tuple[Rows, NDArray[np.float64]]] = {}
        depth = 2 * k
        while len(answers) < len(queries):
            open_ones = np.array([number for number in range(len(queries)) if number not in answers])
            found = self._top(queries[open_ones], depth, where, names)
            distinct, which = np.unique(found.rows, return_inverse=True)
            vectors = self.vectors(distinct)
            for number, rows, scores, mine in zip(
                open_ones, found.rows, found.scores, which.reshape(found.rows.shape), strict=True
            ):
                first = without_near_duplicates(vectors[mine], cosine, k)
                if len(first) == k or len(rows) < depth:
                    answers[int(number)] = rows[first], scores[first]
            depth *= 4
        return [answers[number] for number in range(len(queries))]

    def _by_owner(self, method: str, rows: Rows, *more: Any) -> tuple[list[Any], Rows]:
        """What the actors say of their rows, and where each of `rows` is in that."""
        rows = np.asarray(rows, np.int64)
        owners = self._owner[np.searchsorted(self._first, rows, side="right") - 1] if len(rows) else rows
        asked = [(self._actors[one], rows[owners == one]) for one in np.unique(owners).tolist() or [0]]
        calls = [(actor, actor.answer.remote(method, own, *more)) for actor, own in asked]
        return self._ask(calls), np.argsort(np.argsort(owners, kind="stable"), kind="stable")

    def _ask(self, calls: Sequence[tuple[Any, Any]]) -> list[Any]:
        return ask(calls, self.patience_seconds)


def _nodes() -> list[Any]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")] or [None]
