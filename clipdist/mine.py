"""The mining job: many query vectors -> the hits of each, exact and exactly once, for evaluation and hard negatives.

query Parquet -> units -> search over actors -> one file of hits per unit, committed through the ledger
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from clipdist import lease, planning, query_tables, runtime, storage
from clipdist.config import Section, UserError, dump
from clipdist.ledger import Ledger, begin, open_ledger
from clipdist.manifest import File, Manifest, read_manifest, refuse_other_stamp
from clipdist.progress import Progress
from clipdist.query_tables import Queries, open_queries
from clipdist.schema import HITS, Stamp, recorded
from clipdist.search_job import ClusterIndex
from clipdist.shards import Shards
from clipdist.where import parse

Table = Literal["images", "texts"]
AT_ONCE = 2
"""Units under way: while one is searched for, another is read or written."""


class MineConfig(Section):
    """Query vectors -> the best rows of each, in Parquet."""

    embeddings: str
    """What `embed` made: the rows that are searched."""
    find: Table = "images"
    """Which of its tables is searched."""
    queries: str
    """Query vectors: embeddings (the same ones, or others of the same model), or a Parquet file or a folder of them
    with the columns `id` and `embedding`."""
    query_table: Table = "texts"
    """Which table of embeddings holds the queries."""
    output: str
    """Where the hits go: a new folder or prefix."""
    top: int = Field(10, ge=1)
    """Hits per query."""
    where: str | None = None
    """Only rows that fit: a condition over the columns, such as "colour = 'red' and price < 50"."""
    min_score: float | None = None
    """No hits with a lower score."""
    exclude_self: bool = False
    """Leave out the row with the query's own id, and texts of its own picture: hard negatives."""
    max_rejected_fraction: float = Field(0.05, ge=0, le=1)
    """The job fails when a larger share of the queries holds no usable vector."""
    unit_rows: int = Field(2048, ge=1, le=100_000)
    """Queries per unit of work: what is committed at once; a kill loses two or three of them."""
    actors: int | None = Field(None, ge=1)
    """Processes that share the searched rows; null: one per node, with all its cores."""


class Found(NamedTuple):
    """Rows, scores and ids of the hits of one query, best first."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float64]
    ids: Sequence[str]


def run(config: MineConfig) -> Manifest:
    """Makes the hits at `config.output`, or goes on with them, or finds them finished."""
    searched, queries = _open(config)
    output, stamp = storage.absolute(config.output), _stamp(config, searched, queries)
    there = open_ledger(output)
    if there is not None:
        refuse_other_stamp(output, stamp, there.stamp)
        if (manifest := there.finished()) is not None:
            return manifest
    with lease.held(output) as held:
        ledger = begin(output, stamp, lambda: planning.not_empty(queries.units(config.unit_rows), config.queries))
        update = {"embeddings": searched.uri, "queries": queries.uri, "output": output}
        runtime.save_config(output, dump(config.model_copy(update=update)))
        if todo := ledger.missing():
            with ClusterIndex(searched, config.find, config.actors) as index:
                _do(todo, ledger, queries, index, config, held)
        _judge(ledger, config.max_rejected_fraction)
        held.check()
        return ledger.publish()


def dry_run(config: MineConfig) -> list[tuple[str, str]]:
    """Opens both sides and reads the first queries; writes nothing."""
    searched, queries = _open(config)
    unit = next(planning.not_empty(queries.units(16), config.queries))
    _, wrong = query_tables.vectors(queries.read(unit), queries.dim)
    shards, total = Shards(searched, config.find), len(queries)
    return [
        ("queries", f"{total:,} in {len(queries.files):,} files"),
        (
            "searched",
            f"{len(shards):,} {config.find} of {shards.dim} dimensions in {len(searched.select(config.find)):,} files",
        ),
        ("hits", f"at most {total * min(config.top, len(shards)):,}"),
        ("first queries", f"{len(unit)} read, {len(wrong)} unusable"),
        *(("unusable", why) for why in list(wrong.values())[:3]),
    ]


def derived(config: MineConfig) -> list[tuple[str, str]]:
    return [("queries in memory", f"{AT_ONCE * config.unit_rows:,}, with {config.top} hits each, per search process")]


def summary(manifest: Manifest) -> list[tuple[str, str]]:
    """What came out, for the end of the job."""
    return [("hits", f"{manifest.written('hits'):,}"), ("files", f"{len(manifest.files):,}")]


def _open(config: MineConfig) -> tuple[Manifest, Queries]:
    """UserError for what can be seen before any work."""
    searched = read_manifest(storage.absolute(config.embeddings), "embeddings")
    if config.find not in searched.planned:
        raise UserError(f"find: {config.embeddings}: has no {config.find} (there: {', '.join(searched.planned)})")
    if config.where is not None:
        parse(config.where, Shards(searched, config.find).schema())
    storage.check_writable(storage.absolute(config.output))
    return searched, open_queries(config.queries, config.query_table, searched)


def _stamp(config: MineConfig, searched: Manifest, queries: Queries) -> Stamp:
    settings = config.model_dump(include={"find", "top", "where", "min_score", "exclude_self", "unit_rows"})
    rows = {"embeddings": searched.stamp.identity, "manifest": searched.number}
    return Stamp(
        "hits",
        {"searched": rows, "queries": queries.identity(), **settings},
        recorded(embeddings=searched.uri, queries=queries.uri),
    )


def _do(
    todo: Sequence[int], ledger: Ledger, queries: Queries, index: ClusterIndex, config: MineConfig, held: lease.Lease
) -> None:
    total, left = int(ledger.unit_rows.sum()), sum(ledger.rows_of(unit) for unit in todo)
    with (
        Progress("mine", total, "queries", done=total - left) as progress,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        running: deque[tuple[int, Future[int]]] = deque()
        rejected = 0
        for unit in [*todo, *[None] * AT_ONCE]:
            if unit is not None:
                running.append((unit, pool.submit(_mine_unit, unit, ledger, queries, index, config)))
            if running and (unit is None or len(running) > AT_ONCE):
                done, future = running.popleft()
                rejected += future.result()
                if held.lost:
                    held.check()
                progress.advance(ledger.rows_of(done), rejected=rejected)


def _mine_unit(unit: int, ledger: Ledger, queries: Queries, index: ClusterIndex, config: MineConfig) -> int:
    """Searches for a unit's queries and commits their hits; returns how many queries are unusable."""
    plan = ledger.rows(unit)
    table = queries.read(plan)
    matrix, wrong = query_tables.vectors(table, queries.dim)
    ids = table.column("id").cast(pa.string()).to_pylist()
    own = table.column("pair_id").to_pylist() if "pair_id" in table.column_names else ids
    good = [row for row in range(len(ids)) if row not in wrong]
    found = best(index, matrix[good], [own[row] for row in good], config)
    data, file = _encode(_table([ids[row] for row in good], found, index))
    uri = plan.column("file")[0].as_py()
    rejects = [
        {"id": ids[row], "table": "hits", "uri": uri, "reason": "unusable_query", "message": why, "row": None}
        for row, why in sorted(wrong.items())
    ]
    ledger.commit(unit, {("hits", None): (data, file)}, {"hits": file.rows + len(rejects)}, rejects)
    return len(rejects)


def best(index: ClusterIndex, matrix: NDArray[Any], own: Sequence[str], config: MineConfig) -> list[Found]:
    """The hits of every query. Where its own rows are left out, it looks as deep as it takes for `top` others."""
    answers: dict[int, Found] = {}
    depth = config.top + config.exclude_self
    while len(answers) < len(matrix):
        open_ones = [number for number in range(len(matrix)) if number not in answers]
        ranking = index.search(matrix[open_ones], depth, config.where, min_score=config.min_score)
        owners = _owners(index, ranking.rows, config)
        for number, rows, scores, ids in zip(open_ones, ranking.rows, ranking.scores, ranking.ids, strict=True):
            others = [place for place, row in enumerate(rows.tolist()) if owners.get(row) != own[number]][: config.top]
            if len(others) == config.top or len(rows) < depth:
                answers[number] = Found(rows[others], scores[others], [ids[place] for place in others])
        depth *= 2
    return [answers[number] for number in range(len(matrix))]


def _owners(index: ClusterIndex, rows: Sequence[NDArray[np.int64]], config: MineConfig) -> dict[int, str]:
    """Whose row each is: of a picture its id, of a text its picture's. Empty unless that counts."""
    if not config.exclude_self or not rows:
        return {}
    distinct = np.unique(np.concatenate(rows))
    column = "pair_id" if config.find == "texts" else "id"
    return dict(zip(distinct.tolist(), index.take(distinct, [column]).column(column).to_pylist(), strict=True))


def _table(ids: Sequence[str], found: Sequence[Found], index: ClusterIndex) -> pa.Table:
    counts = [len(one.rows) for one in found]
    rows = np.concatenate([np.zeros(0, np.int64), *(one.rows for one in found)])
    distinct, which = np.unique(rows, return_inverse=True)
    described = index.take(distinct, ["caption", "image_uri"]).take(pa.array(which))
    columns = {
        "query_id": pa.array(np.repeat(np.array(ids, dtype=object), counts), pa.string()),
        "rank": pa.array(np.concatenate([np.zeros(0, np.int32), *(np.arange(1, n + 1) for n in counts)]), pa.int32()),
        "id": pa.array([row_id for one in found for row_id in one.ids], pa.string()),
        "score": pa.array(np.concatenate([np.zeros(0), *(one.scores for one in found)])),
        "caption": described.column("caption").cast(pa.string()),
        "image_uri": described.column("image_uri").cast(pa.string()),
    }
    return pa.table(columns, schema=HITS)


def _encode(table: pa.Table) -> tuple[bytes, File]:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=max(1, len(table)))
    data = buffer.getvalue()
    return data, File("", "hits", len(table), (len(table),), len(data))


def _judge(ledger: Ledger, limit: float) -> None:
    """UserError when more queries than the limit were unusable."""
    lost = sum(sum(record["rejected"].get("hits", {}).values()) for record in ledger.records())
    total = int(ledger.unit_rows.sum())
    if lost > limit * total:
        examples = [f"    {example}" for example in ledger.reject_examples(3)]
        raise UserError(
            "\n".join(
                [
                    f"{lost:,} of {total:,} queries hold no usable vector; max_rejected_fraction allows "
                    f"{100 * limit:.1f} %. Nothing was published. For example:",
                    *examples,
                    "  Mend them and choose a new output, or raise max_rejected_fraction.",
                ]
            )
        )


def hits_of(manifest: Manifest) -> Iterator[pa.Table]:
    """The hits, file by file: `query_id`, `rank`, `id`, `score`, `caption`, `image_uri`."""
    for file in manifest.select("hits"):
        yield pq.read_table(io.BytesIO(storage.read_bytes(manifest.path(file))))
