"""Repeated ids: the first row of each wins, wherever the others are, and memory does not grow with the ids."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from clipdist import duplicates, spill
from clipdist.duplicates import duplicate_rows


def in_batches(ids: list[str], rows: int) -> Iterator[pa.Array]:
    return (pa.array(ids[start : start + rows], pa.string()) for start in range(0, len(ids), rows))


@pytest.mark.parametrize("spill_bytes", [24, 100_000, 1 << 30])
def test_duplicates_of_a_large_input(monkeypatch: pytest.MonkeyPatch, spill_bytes: int) -> None:
    """With and without the disk."""
    rows = 500 if spill_bytes == 24 else 50_000
    ids = [str(n) for n in np.random.default_rng(0).integers(0, rows, rows).tolist()]
    seen: set[str] = set()
    expected = [row for row, n in enumerate(ids) if n in seen or seen.add(n)]  # type: ignore[func-returns-value]
    monkeypatch.setattr(spill, "SPILL_BYTES", spill_bytes)
    found = duplicate_rows(in_batches(ids, 99))
    assert (found.dtype, found.tolist()) == (np.dtype(np.int64), expected)


def test_no_partition_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    partitions: list[int] = []
    real = duplicates._repeated
    monkeypatch.setattr(duplicates, "_repeated", lambda records: partitions.append(len(records)) or real(records))
    monkeypatch.setattr(spill, "SPILL_BYTES", 1 << 20)
    assert len(duplicate_rows(in_batches([str(n) for n in range(100_000)], 10_000))) == 0
    assert sum(partitions) == 100_000
    assert max(partitions) < 100_000 / spill.PARTITIONS * 1.5


def test_long_ids_in_bounded_memory() -> None:
    """20,000 ids of 2000 characters, 40 MB."""
    tracemalloc.start()
    duplicate_rows(pa.array([f"{n:02000d}" for n in range(start, start + 100)]) for start in range(0, 20_000, 100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


def test_rows_without_an_id_are_not_duplicates_of_each_other() -> None:
    assert duplicate_rows(in_batches(["a", "", "", "", "", "a"], 2)).tolist() == [5]
    assert duplicate_rows(in_batches([], 2)).tolist() == []
