"""A unit's planned rows and vectors -> its tables and its rejects; every planned row ends in one of the two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipdist.retry import planned_row
from clipdist.schema import Dtype, embeddings_schema

KILLS = ["kills_worker", "its process died twice over this row alone (out of memory, or a crash)"]
PLAN_COLUMNS = ("id", "image_uri", "captions", "group", "split", "reason", "message", "only")


@dataclass(frozen=True)
class UnitTables:
    """What a unit gives: rows per table, how many were planned, and the rejects (`schema.REJECTS`)."""

    tables: dict[str, pa.Table]
    planned: dict[str, int]
    rejects: list[dict[str, Any]]


def unit_tables(
    plan: pa.Table, failed: Mapping[str, list[str]], vectors: Mapping[str, NDArray[Any]], dtype: Dtype
) -> UnitTables:
    """`failed`: row number -> reason and message. `vectors` per table: [good rows, dim], in the order of the plan."""
    rows = plan.to_pylist()
    kept = [field for field in plan.schema if field.name not in PLAN_COLUMNS]
    found = UnitTables({}, {}, [])
    for table in vectors:
        records = list(_records(table, rows, failed, [field.name for field in kept]))
        good = [record for record in records if "reason" not in record]
        for record in (record for record in records if "reason" in record):
            index = record.pop("index")
            again = rows[index]["reason"] is None
            found.rejects.append(record | {"row": planned_row(plan, index) if again else None})
        found.planned[table] = len(records)
        if good:
            found.tables[table] = _vector_table(table, good, vectors[table], kept, dtype)
    return found


def _records(
    table: str, rows: Sequence[dict[str, Any]], failed: Mapping[str, list[str]], kept: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The planned rows of one table, in order, each good or with its reason."""
    for index, row in enumerate(rows):
        if row.get("only") not in (None, table):
            continue
        reason, message = row["reason"], row["message"]
        if reason is None and str(index) in failed and (table == "images" or failed[str(index)] == KILLS):
            reason, message = failed[str(index)]
        common = {name: row[name] for name in ("image_uri", "group", "split", *kept)}
        captions = row["captions"] or []
        if reason is not None:
            reject = {"id": row["id"], "table": table, "uri": row["image_uri"], "reason": reason, "message": message}
            yield reject | {"index": index}
        elif table == "images":
            yield {"id": row["id"], "caption": captions[0] if captions else None, **common}
        else:
            for number, caption in enumerate(captions):
                yield {"id": f"{row['id']}#{number}", "pair_id": row["id"], "caption": caption, **common}


def _vector_table(
    table: str, records: Sequence[dict[str, Any]], vectors: NDArray[Any], kept: Sequence[pa.Field], dtype: Dtype
) -> pa.Table:
    vectors = np.ascontiguousarray(vectors)
    if len(vectors) != len(records):
        raise RuntimeError(f"{len(records)} {table} to write, but {len(vectors)} vectors")
    schema = embeddings_schema(table, vectors.shape[1], kept, dtype)
    flat = pa.array(vectors.reshape(-1))
    columns = {
        name: pa.array([r[name] for r in records], schema.field(name).type)
        for name in schema.names
        if name != "embedding"
    }
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def to_bytes(table: pa.Table) -> bytes:
    """A table as an Arrow stream, to travel inside a row of Ray Data."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
