"""What surrounds the units of a job: killers are isolated, rejects are judged, the time is accounted for."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clipdist.attempts import halved
from clipdist.catalog import EmbedConfig
from clipdist.config import UserError, load
from clipdist.estimate import requests
from clipdist.ledger import Ledger, begin
from clipdist.retry import planned_row
from clipdist.schema import Stamp
from clipdist.tally import Tally
from clipdist.throughput import Throughput

STAMP = Stamp("embeddings", {"dim": 4})


def process(killers: set[int], most: int = 10**6) -> tuple[Any, list[Sequence[int]]]:
    """A process that dies over some rows, or over more than `most` of them at once; and what it was asked."""
    asked: list[Sequence[int]] = []

    def attempt(rows: Sequence[int]) -> list[int] | None:
        asked.append(rows)
        return None if killers & set(rows) or len(rows) > most else list(rows)

    return attempt, asked


@pytest.mark.parametrize("killers", [set(), {0}, {511}, {17, 18}, {0, 100, 511}, set(range(8))])
def test_only_the_rows_that_kill_are_lost(killers: set[int]) -> None:
    attempt, asked = process(killers)
    parts = list(halved(range(512), attempt))
    assert [row for rows, _ in parts for row in rows] == list(range(512)), "each row once, in order"
    assert {rows[0] for rows, found in parts if found is None} == killers
    assert [row for _, found in parts if found for row in found] == sorted(set(range(512)) - killers)
    assert len(asked) <= 1 + 21 * len(killers), "two halves per level, and a second attempt at the row"


def test_too_many_rows_at_once_are_no_fault_of_any() -> None:
    attempt, _ = process(set(), most=100)
    parts = list(halved(range(512), attempt))
    assert all(found is not None for _, found in parts)
    assert [row for _, found in parts if found for row in found] == list(range(512))


def test_a_row_that_killed_once_by_chance_is_kept() -> None:
    died: list[int] = []

    def attempt(rows: Sequence[int]) -> list[int] | None:
        if 5 in rows and len(died) < 4:  # the whole, two halves of it, and the row itself, once
            died.append(5)
            return None
        return list(rows)

    parts = list(halved(range(8), attempt))
    assert all(found is not None for _, found in parts)


def table(ids: Sequence[str]) -> pa.Table:
    return pa.table({"id": list(ids)})


@pytest.fixture
def book(tmp_path: Any) -> Ledger:
    return begin(str(tmp_path), STAMP, lambda: iter([table([str(i) for i in range(500)]) for _ in range(4)]))


def reject(row_id: str) -> dict[str, Any]:
    row = planned_row(table([row_id]), 0)
    return {"id": row_id, "table": "images", "uri": "u", "reason": "denied", "message": "no key", "row": row}


def test_a_job_stops_when_nearly_everything_fails(book: Ledger) -> None:
    book.commit(0, {}, {"images": 500}, [reject(str(i)) for i in range(500)])
    tally = Tally(book, 0.5)
    tally.stop_if_hopeless()  # an earlier run met them: they may be mended
    tally.add({"images": 500}, {"images": {"denied": 451}})
    with pytest.raises(UserError, match=r"451 of 500 images were rejected \(90.2 %\).*Nothing was published") as caught:
        tally.stop_if_hopeless()
    assert "951  denied" in str(caught.value)
    assert "retry_rejected=true" in str(caught.value)
    lenient = Tally(book, 1.0)  # a limit of 1 allows it
    lenient.add({"images": 500}, {"images": {"denied": 500}})
    lenient.stop_if_hopeless()


def test_before_a_retry_the_limit_does_not_count_but_hopelessness_does(book: Ledger) -> None:
    tally = Tally(book, 0.05, retry_follows=True)
    tally.add({"images": 500}, {"images": {"missing": 400}})
    tally.stop_if_hopeless()
    tally.add({"images": 1500}, {"images": {"denied": 1500}})
    with pytest.raises(UserError, match="Nothing was published"):
        tally.stop_if_hopeless()


def test_a_job_stops_as_soon_as_the_limit_is_certain_to_be_passed(book: Ledger) -> None:
    book.commit(0, {}, {"images": 500}, [reject(str(i)) for i in range(200)])
    Tally(book, 0.1).stop_if_hopeless()  # 200 of 2,000 rows at most
    with pytest.raises(UserError, match="allows 9.0 %"):
        Tally(book, 0.09).stop_if_hopeless()
    with pytest.raises(UserError, match="allows 10.0 %"):
        Tally(book, 0.1).judge()  # if these were all


def unit(rows: int, **seconds: float) -> dict[str, Any]:
    slots = {"fetch": 32, "decode": 2, "encode": 2, "write": 2}
    return {"rows": rows, "bytes": 1000 * rows, "seconds": seconds, "slots": slots, "wait": 1.0, "busy": 3.0}


def test_the_slowest_stage_is_named_with_what_each_could_do() -> None:
    speed = Throughput()
    for _ in range(4):
        speed.add(unit(100, fetch=16.0, decode=1.0, encode=10.0, write=0.1))
    assert speed.ceilings() == {"fetch": 200.0, "decode": 200.0, "encode": 20.0, "write": 2000.0}
    assert speed.bottleneck() == "encode"
    assert speed.waiting() == 0.25
    assert "encode" in next(line for line in speed.table().splitlines() if "holds it up" in line)
    assert json.loads(json.dumps(speed.summary()))["bottleneck"] == "encode"


def test_nothing_measured_is_no_fault() -> None:
    speed = Throughput()
    speed.add({})
    assert (speed.bottleneck(), speed.shown(), speed.steady_rate()) == (None, {}, None)
    assert speed.table()


def test_requests_grow_with_units_and_not_with_rows() -> None:
    def counted(rows: int, **settings: Any) -> int:
        values = {"output": "o", "pairs": "p", "model.name": "m", **settings}
        config = load(EmbedConfig, None, [f"{name}={json.dumps(value)}" for name, value in values.items()]).config
        return sum(requests(config, rows).values())

    million = counted(10**6)
    assert 0.01 < million / 10**6 < 0.05
    assert np.isclose(counted(10**8), 100 * million, rtol=0.01)
    assert counted(10**6, unit_rows=2048) < 0.3 * million
