"""What embedding a catalog will take, before it starts: rows, bytes, files, requests to the store, hours."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import numpy as np

from clipdist.catalog import EmbedConfig, Input
from clipdist.duplicates import ID_BYTES
from clipdist.report import duration, file_size, number
from clipdist.spill import SPILL_BYTES


@dataclass(frozen=True)
class Sample:
    """What a few rows took on this machine: rows/s of reading, decoding and encoding one after the other."""

    rows: int
    captions: int
    row_bytes: float
    picture_bytes: float
    seconds: float


def requests(config: EmbedConfig, rows: int) -> dict[str, int]:
    """Requests to the output's store, by what they cost: writes (PUT, and the listing of names) and reads; deletes are
    free. Per unit: its plan is read, a piece per table and a commit are written, all are read once more when its shard
    is joined, and deleted."""
    units, tables = -(-rows // config.unit_rows), len(config.towers)
    shards = -(-units // config.shard_units)
    writes = units * (tables + 1) + shards * (tables + 2)
    reads = units * (1 + 1 + 1 + tables) + shards * (tables + 2)
    return {"writes": writes, "reads": reads, "deletes": units * (tables + 1)}


def estimate(given: Input, dim: int, sample: Sample) -> list[tuple[str, str]]:
    """Facts for a person."""
    config, (rows, exact) = given.config, given.rows()
    vectors = {"images": rows, "texts": round(rows * sample.captions / max(sample.rows, 1))}
    stored = sum(vectors[tower] for tower in config.towers) * (dim * np.dtype(config.dtype).itemsize + sample.row_bytes)
    units = -(-rows // config.unit_rows)
    files = -(-units // config.shard_units) * len(config.towers)
    asked = requests(config, rows)
    facts = [("rows", f"{rows:,}" if exact else f"about {rows:,}")]
    facts += [("vectors", ", ".join(f"{vectors[tower]:,} {tower}" for tower in config.towers))]
    facts += [("files", f"{files:,}, about {file_size(stored)}, from {units:,} units of work")]
    facts += [("requests", f"about {asked['writes']:,} writes and {asked['reads']:,} reads of the output")]
    if rows * ID_BYTES > SPILL_BYTES and config.catalog is not None:
        place = f"in {tempfile.gettempdir()} while the input is planned (TMPDIR moves it)"
        facts += [("disk here", f"about {file_size(rows * ID_BYTES)} {place}")]
    if "images" in config.towers:
        facts += [("pictures", f"{rows:,} to read, about {file_size(sample.picture_bytes * rows)}")]
    if sample.rows and sample.seconds > 0:
        rate = sample.rows / sample.seconds
        facts += [("speed", f"{number(rate)} rows/s on this machine, rows one after the other (reading included)")]
        facts += [
            ("time", f"about {duration(rows / rate)} at that speed; divide by the machines or GPUs that share it")
        ]
    return facts
