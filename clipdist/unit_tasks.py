"""The Ray tasks on both sides of an encoder: a unit is loaded, a unit is written. Their processes import neither torch
nor open_clip, so that they are there in a second and small."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from clipdist.attempts import may_begin, suspect
from clipdist.ledger import Ledger
from clipdist.loading import Reading, Times, load_rows, rejects_of, stack, texts_of
from clipdist.manifest import File
from clipdist.schema import Dtype
from clipdist.shard_writer import encode_shard
from clipdist.unit_tables import from_bytes, to_bytes, unit_tables
from clipdist.units import report


def load_unit(
    row: dict[str, Any], ledger: Ledger, reading: Reading, watch: Any, slots: tuple[float, float]
) -> dict[str, Any]:
    """A unit's pictures as pixels, and its texts; a row that fails is carried as a reject."""
    unit = int(row["unit"])
    empty = {"pixels": np.zeros((0, 1, 1, 3), np.uint8), "texts": "[]", "rejects": "{}", "facts": "{}", "plan": b""}
    if not may_begin(watch, unit, "load"):
        return {"unit": unit, **empty}
    plan = ledger.rows(unit)
    if len(plan) != ledger.rows_of(unit):
        raise RuntimeError(f"{ledger.uri}: unit {unit}: {ledger.rows_of(unit)} rows planned, {len(plan)} there")
    rows, times = plan.to_pylist(), Times()
    try:
        loaded = load_rows(rows, reading, times)
    except MemoryError:  # of one row, most likely: they are tried apart
        return {"unit": unit, **empty}
    return {
        "unit": unit,
        "pixels": stack(loaded, reading.preprocess.size),
        "texts": json.dumps(texts_of(rows, reading)),
        "rejects": json.dumps(rejects_of(loaded)),
        "facts": json.dumps({"rows": len(rows), **times.facts(*slots)}),
        "plan": to_bytes(plan),
    }


def write_unit(
    row: dict[str, Any], ledger: Ledger, towers: tuple[str, ...], dtype: Dtype, cores: float
) -> dict[str, Any]:
    """Joins a unit's vectors with its rows again, writes its pieces, commits."""
    unit = int(row["unit"])
    if not row["plan"]:
        return suspect(unit)
    started, facts = time.monotonic(), json.loads(row["facts"])
    vectors = {table: row[table] for table in towers}
    pieces = unit_tables(from_bytes(row["plan"]), json.loads(row["rejects"]), vectors, dtype)
    tables: dict[tuple[str, str | None], tuple[bytes, File]] = {
        (name, None): encode_shard(rows, name, ledger.stamp) for name, rows in pieces.tables.items()
    }
    ledger.commit(unit, tables, pieces.planned, pieces.rejects)
    facts.setdefault("seconds", {})["write"] = time.monotonic() - started
    facts.setdefault("slots", {})["write"] = cores
    return dict(report(unit, pieces.planned, pieces.rejects, facts))
