"""An approximate index (faiss IVF), tuned with real queries: an extra for tables where the exact search is too slow.

Texts lie elsewhere than pictures, so that an index of pictures finds less for texts with the same effort. The effort
is therefore chosen for each kind of query on real ones, and the recall told is that of others. IVF, because it reaches
every recall: with all its lists probed it is exhaustive. Scores are exact; only rows may be missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipdist.config import UserError, differences
from clipdist.export import import_faiss, local_folder, new_folder
from clipdist.report import cell, duration, table
from clipdist.schema import Stamp
from clipdist.scores import exact_pair_scores
from clipdist.search import Index, Ranking

Kind = Literal["texts", "images"]
RECORD, FILE = "approximate.json", "index.faiss"
TRAIN_ROWS_PER_LIST = 50
SPARE = 2
"""Candidates per hit that faiss is asked for: it knows the vectors as float16 only."""
TIMED_QUERIES = 50


@dataclass
class ApproximateIndex:
    """Most of the best rows of an `Index`, with exact scores. `probes`: lists that are looked into, per kind
    of query."""

    index: Index
    faiss_index: Any
    probes: dict[str, int]
    report: str = ""

    @staticmethod
    def open(folder: str, index: Index) -> ApproximateIndex:
        """What `build` wrote. UserError when it was built of other embeddings, or is damaged. faiss reads its file with
        native code: open only folders of your own."""
        place = local_folder(folder)
        try:
            record = json.loads((place / RECORD).read_text())
        except (OSError, ValueError):
            raise UserError(f"{folder}: not an approximate index (no {RECORD} that can be read)") from None
        if found := differences(_stamp(index).identity, record["stamp"]["identity"]):
            lines = [f"  {key}: {there!r} there, {now!r} in the embeddings" for key, now, there in found]
            raise UserError("\n".join([f"{folder}: the embeddings are others by now; build it again:", *lines]))
        if (size := (place / FILE).stat().st_size) != record["bytes"] or _sha256(place / FILE) != record["sha256"]:
            raise UserError(f"{place / FILE}: damaged: {record['bytes']} bytes written, {size} there; build it again")
        return ApproximateIndex(index, import_faiss().read_index(str(place / FILE)), record["probes"], record["report"])

    def search(self, queries: ArrayLike, k: int = 10, *, queries_are: Kind = "texts") -> Ranking:
        """Most of the k best rows for queries [q, dim] or [dim], best first, ties by id. Exact, filtered or paged
        answers: `Index.search`."""
        if queries_are not in self.probes:
            raise UserError(
                f"not tuned for {queries_are} (tuned for {', '.join(self.probes)}): build it with both tables"
            )
        return self._search(np.atleast_2d(np.asarray(queries)), k, self.probes[queries_are])

    def _search(self, queries: NDArray[Any], k: int, probes: int) -> Ranking:
        faiss, shards = import_faiss(), self.index.shards
        options = faiss.SearchParametersIVF(nprobe=probes)
        _, rows = self.faiss_index.search(np.ascontiguousarray(queries, np.float32), SPARE * k, params=options)
        query, place = np.nonzero(rows >= 0)  # -1: fewer were found
        distinct, which = np.unique(rows[query, place], return_inverse=True)
        scores = exact_pair_scores(shards.vectors(distinct), queries.astype(np.float64), which, query)
        names = np.array(shards.take(distinct, ["id"]).column("id").to_pylist(), dtype=object)
        found = Ranking([], [], [])
        for number in range(len(queries)):
            mine = np.flatnonzero(query == number)
            mine = np.array(sorted(mine, key=lambda i: (-scores[i], names[which[i]]))[:k], np.int64)
            found.ids.append(names[which[mine]].tolist())
            found.scores.append(scores[mine])  # type: ignore[attr-defined]
            found.rows.append(distinct[which[mine]])  # type: ignore[attr-defined]
        return found


def build(
    index: Index, texts: Index | None, folder: str, *, recall: float = 0.95, k: int = 10, queries: int = 2000
) -> ApproximateIndex:
    """Builds over `index`, tunes with `queries` rows of `texts` and of `index` itself (half for choosing, half for
    telling), and writes it to a new folder. Memory: two bytes per value, and the training sample."""
    if not (0 < recall <= 1 and k >= 1 and queries >= 2):
        raise UserError("expected a recall above 0 and at most 1, top from 1 up and queries from 2 up")
    if len(index) < 2:
        raise UserError(f"{len(index)} rows: nothing to approximate")
    with new_folder(local_folder(folder)) as place:
        import_faiss().write_index(made := _fill(index), str(place / FILE))
        approximate = ApproximateIndex(index, made, {})
        samples: dict[Kind, Index] = {"texts": texts} if texts is not None and len(texts) else {}
        samples["images"] = index
        rows = [_tune(approximate, kind, source, recall, k, queries) for kind, source in samples.items()]
        approximate.report = _report(rows, recall, k, made.nlist)
        record: dict[str, Any] = {
            "stamp": _stamp(index).to_json(),
            "probes": approximate.probes,
            "report": approximate.report,
        }
        record |= {"bytes": (place / FILE).stat().st_size, "sha256": _sha256(place / FILE)}
        (place / RECORD).write_text(json.dumps(record, indent=1))
    return approximate


def _fill(index: Index) -> Any:
    faiss, shards, total = import_faiss(), index.shards, len(index)
    lists = max(1, min(int(4 * total**0.5), total // TRAIN_ROWS_PER_LIST))
    quantizer = faiss.IndexFlatIP(index.dim)
    codes = faiss.ScalarQuantizer.QT_fp16
    made = faiss.IndexIVFScalarQuantizer(quantizer, index.dim, lists, codes, faiss.METRIC_INNER_PRODUCT, False)
    sample = np.random.default_rng(0).choice(total, min(total, lists * TRAIN_ROWS_PER_LIST), replace=False)
    made.train(np.ascontiguousarray(shards.vectors(np.sort(sample)), np.float32))
    for first, block in shards.blocks():
        assert first == made.ntotal
        made.add(np.ascontiguousarray(block, np.float32))
    return made


def _tune(approximate: ApproximateIndex, kind: Kind, source: Index, recall: float, k: int, queries: int) -> list[Any]:
    """The fewest probes that reach the recall on one half of the queries; a row of the report, of the other half."""
    index, itself = approximate.index, kind == "images"
    chosen = np.random.default_rng(1).choice(len(source), min(queries, len(source)), replace=False)
    vectors = source.shards.vectors(chosen).astype(np.float32)
    exact = index.search(vectors, k + itself)
    skip = chosen if itself else np.full(len(chosen), -1)  # a picture finds itself: no merit
    half, lists = len(chosen) // 2, approximate.faiss_index.nlist

    def reached(part: slice, probes: int) -> float:
        found = approximate._search(vectors[part], k + itself, probes)
        return _recall(found, Ranking(exact.ids[part], exact.scores[part], exact.rows[part]), skip[part], k)

    low, high = 1, lists
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(slice(half), middle) >= recall else (middle + 1, high)
    approximate.probes[kind] = low
    told = reached(slice(half, None), low)
    timed = vectors[half : half + TIMED_QUERIES]
    seconds = _seconds([lambda one: approximate._search(one, k, low), lambda one: index.search(one, k)], timed)
    return [kind, low, reached(slice(half), low), told, *seconds]


def _recall(found: Ranking, exact: Ranking, skip: NDArray[np.int64], k: int) -> float:
    """The mean share of the k best rows, `skip` aside, that were found; equal scores count as equal."""
    shares = []
    for number, own in enumerate(skip):
        best = exact.scores[number][exact.rows[number] != own][:k]
        there = found.scores[number][found.rows[number] != own][:k]
        if len(best):
            shares.append(np.count_nonzero(there >= best[-1]) / len(best))
    return float(np.mean(shares))


def _seconds(searches: Sequence[Callable[[NDArray[Any]], Any]], queries: NDArray[Any]) -> list[float]:
    """The median of single queries for each of the searches, which take turns."""
    spent: list[list[float]] = [[] for _ in searches]
    for query in queries:
        for search, seconds in zip(searches, spent, strict=True):
            started = time.perf_counter()
            search(query[None])
            seconds.append(time.perf_counter() - started)
    return [float(np.median(seconds)) for seconds in spent]


def _report(rows: list[list[Any]], recall: float, k: int, lists: int) -> str:
    header = ["queries", "probes", f"recall@{k}, tuning", f"recall@{k}, held out", "a query", "exact", "times as fast"]
    shown = [
        [r[0], r[1], f"{r[2]:.3f}", f"{r[3]:.3f}", duration(r[4]), duration(r[5]), cell(r[5] / r[4])] for r in rows
    ]
    lines = [
        table(header, shown),
        "",
        f"{lists} lists; the fewest probes with a recall of {recall:g} on the tuning half",
    ]
    lines += [f"{r[0]}: only {r[3]:.3f} on the held-out half, below {recall:g}" for r in rows if r[3] < recall]
    slower = [r[0] for r in rows if r[4] >= r[5]]
    lines += [f"queries that are {kind}: the exact search is faster; do without this index" for kind in slower]
    return "\n".join(lines)


def _stamp(index: Index) -> Stamp:
    manifest = index.shards.manifest
    identity = {"embeddings": manifest.stamp.identity, "manifest": manifest.number, "table": index.shards.table}
    return Stamp("approximate", identity)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
