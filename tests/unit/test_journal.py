"""The lines that stay of a training, without those of steps that were lost."""

import json
from pathlib import Path
from typing import Any

from clipdist import journal, storage
from clipdist.journal import Journal


def workers(step: int) -> dict[str, Any]:
    return {"event": "workers", "workers": 2, "step": step}


def step(number: int) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 1 / number}


def names(output: str) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in journal.read(output)]


def test_the_first_step_every_nth_and_every_validation_is_a_line(place: str) -> None:
    reported: list[dict[str, Any]] = []
    one = Journal(place, 2, 0, measured=True)
    report = one.before(reported.append)
    events = [workers(0), *map(step, range(1, 8)), {"event": "saved"}, {"event": "validated", "step": 7}]
    for event in events:
        report(event)
    one.write()
    assert names(place) == [("workers", 0), ("step", 1), ("step", 2), ("step", 4), ("step", 6), ("validated", 7)]
    assert journal.read(place)[3]["loss"] == 0.25
    assert [{name: value for name, value in event.items() if name != "time"} for event in reported] == events


def test_a_run_that_goes_on_drops_the_lines_of_steps_that_it_takes_again(place: str) -> None:
    one = Journal(place, 2, 0, measured=True)
    report = one.before(lambda event: None)
    for event in (workers(0), *map(step, range(1, 11)), {"event": "interpolated", "step": 4}):
        report(event)
    one.write()
    again = Journal(place, 2, 5, measured=True)
    report = again.before(lambda event: None)
    for event in (workers(5), *map(step, range(6, 9))):
        report(event)
    again.write()
    found = [("workers", 0), ("step", 1), ("step", 2), ("step", 4), ("workers", 5), ("step", 6), ("step", 8)]
    assert names(place) == found


def test_a_validation_of_the_last_step_stays_only_when_its_checkpoint_has_it(place: str) -> None:
    one = Journal(place, 1, 0, measured=True)
    report = one.before(lambda event: None)
    for event in (step(1), {"event": "validated", "step": 1}, step(2), {"event": "validated", "step": 2}):
        report(event)
    one.write()
    Journal(place, 1, 2, measured=True)
    assert names(place) == [("step", 1), ("validated", 1), ("step", 2), ("validated", 2)]
    Journal(place, 1, 2, measured=False)
    assert names(place) == [("step", 1), ("validated", 1), ("step", 2)]


def test_on_a_disk_a_line_is_there_at_once_and_a_torn_one_is_none(tmp_path: Path) -> None:
    report = Journal(str(tmp_path), 1, 0, measured=True).before(lambda event: None)
    report(step(1))
    assert names(str(tmp_path)) == [("step", 1)]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(2))[:9])
    assert names(str(tmp_path)) == [("step", 1)]
    Journal(str(tmp_path), 1, 1, measured=False).before(lambda event: None)(step(2))
    assert names(str(tmp_path)) == [("step", 1), ("step", 2)]


def test_a_run_that_has_not_started_has_no_lines(place: str) -> None:
    assert journal.read(place) == []
    Journal(place, 1, 0, measured=True)
    assert storage.exists(storage.join(place, "metrics.jsonl"))
