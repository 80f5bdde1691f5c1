"""Which rows repeat an id, in memory that does not grow with the ids."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipdist.spill import PLACES, Places, Spill

ID_BYTES = PLACES.itemsize
"""On disk, per row."""


def duplicate_rows(ids: Iterable[pa.Array]) -> Places:
    """Sorted numbers of the rows whose id came earlier; a row whose id is "" has none. `ids`: string arrays without
    nulls. Equal hashes of 128 bit count as equal ids."""
    start = 0
    with tempfile.TemporaryDirectory() as folder:
        spill = Spill(Path(folder) / "ids", PLACES)
        for batch in ids:
            named = pc.not_equal(batch, "")
            spill.add(batch.filter(named), place=start + np.flatnonzero(named.to_numpy(zero_copy_only=False)))
            start += len(batch)
        found = [_repeated(records) for records in spill.partitions()]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *found]))


def _repeated(records: Any) -> Places:
    """The rows of a partition whose hash has an earlier row."""
    records = records[np.lexsort((records["place"], records["low"], records["high"]))]
    same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    return np.ascontiguousarray(records["place"][1:][same])
