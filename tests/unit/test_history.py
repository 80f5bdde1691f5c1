"""What stays of a training: its lines, without those of steps that were lost, its curves, and remarks that help."""

import json
from pathlib import Path
from typing import Any

import pytest

from clipdist import storage
from clipdist.history import History, summary
from clipdist.models import ModelConfig
from clipdist.progress import Progress
from clipdist.recipe import TrainConfig
from clipdist.stages import StageConfig

BEST = "text_to_image/hit_rate@10"
STAGES = (StageConfig(name="all", learns=("all",), epochs=3, learning_rate=1e-3),)
ROWS = 40


def history(output: Path | str, **changes: Any) -> History:
    facts = {"pairs": "p", "output": str(output), "model": ModelConfig(name="x"), "stages": STAGES}
    config = TrainConfig(**{**facts, "global_batch_size": 4, "log_every_steps": 2, **changes})
    return History(config, ROWS, Progress("train", 3 * ROWS, "pairs"))


def workers(step: int) -> dict[str, Any]:
    return {"event": "workers", "workers": 2, "stage": 0, "stage_step": step, "step": step}


def step(number: int, **more: Any) -> dict[str, Any]:
    facts = {"stage": "all", "epoch": 1, "step": number, "pairs": 4, "loss": 1 / number, "gradient_norm": 1.0}
    return {"event": "step", **facts, "learning_rate": 1e-3, "logit_scale": 10.0, "memory_bytes": 5 * number, **more}


def validated(number: int, value: float) -> dict[str, Any]:
    return {"event": "validated", "stage": "all", "epoch": number // 10, "step": number, BEST: value}


def lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_bytes(storage.join(output, "metrics.jsonl")).splitlines()]


def test_the_first_step_every_nth_and_every_validation_is_a_line(place: str) -> None:
    one = history(place)
    one.add([workers(0), *(step(number) for number in range(1, 8)), validated(7, 0.5), step(8)])
    found = lines(place)
    assert [(line["event"], line["step"]) for line in found] == [
        ("workers", 0), ("step", 1), ("step", 2), ("step", 4), ("step", 6), ("validated", 7),
    ]  # fmt: skip
    assert found[3]["loss"] == 0.25
    one.write()
    assert lines(place)[-1]["step"] == 8
    assert one.bar.done == 32
    assert one.facts["memory_bytes"] == 40


def test_a_run_that_goes_on_drops_the_lines_of_steps_that_it_takes_again(tmp_path: Path) -> None:
    first = history(tmp_path)
    first.add([workers(0), *(step(number) for number in range(1, 11)), validated(10, 0.5), step(12)])
    first.write()
    again = history(tmp_path)
    again.add([workers(5), *(step(number) for number in range(6, 9))])
    again.write()
    found = [(line["event"], line["step"]) for line in lines(str(tmp_path))]
    assert found == [("workers", 0), ("step", 1), ("step", 2), ("step", 4), ("workers", 5), ("step", 6), ("step", 8)]
    assert again.bar.done == 8 * 4, "what was done before counts, what was lost does not"


def test_workers_that_start_again_within_a_job_move_the_bar_back() -> None:
    one = history("/nowhere")
    one.add([workers(0), *(step(number) for number in range(1, 8)), workers(5)])
    assert one.bar.done == 20
    assert [line["step"] for line in one.lines] == [0, 1, 2, 4, 5]


def test_problems_of_workers_are_kept() -> None:
    one = history("/nowhere")
    one.add([{"event": "failed", "problems": ["a", "b"]}, {"event": "failed", "problems": ["c"]}])
    assert one.problems == ["a", "b", "c"]


def test_remarks_tell_what_reuse_saved_and_what_waiting_cost() -> None:
    one = history("/nowhere")
    assert one.remarks() == []
    one.add([{"event": "outputs", "stage": "all", "seconds": 30.0, "images": True, "texts": True}])
    one.add([{"event": "epoch", "stage": "all", "epoch": 1, "step": 10, "seconds": 90.0}])
    assert one.remarks() == [], "the first epoch starts everything"
    one.add([{"event": "epoch", "stage": "all", "epoch": n, "step": 10 * n, "seconds": 1.0 * n} for n in (2, 3)])
    (found,) = one.remarks()
    assert "computed once in 30" in found
    assert "an epoch on them takes 2.50 s, 12 times less" in found
    one.add([step(31, data_wait=0.04)])
    assert len(one.remarks()) == 1
    one.add([step(32, data_wait=0.31)])
    assert "31" in one.remarks()[1]
    assert "raise workers.decoders" in one.remarks()[1]


def test_curves_are_written_beside_the_run(place: str) -> None:
    pytest.importorskip("tensorboardX")
    one = history(place, tensorboard=True)
    one.add([workers(0), step(1), step(2), validated(2, 0.5)])
    assert any("tfevents" in name for name in storage.names(storage.join(place, "tensorboard")))


def test_the_summary_has_start_and_best_and_says_when_nothing_was_gained() -> None:
    result = {
        "start_metrics": {BEST: 0.25}, "metrics": {BEST: 0.75, "image_to_text/hit_rate@1": 0.5}, "seconds": 61.0,
        "best": "checkpoints/01-all-000030", "remarks": ["a remark"],
    }  # fmt: skip
    shown = summary("/runs/a", result)
    rows = [line.split() for line in shown.splitlines()]
    assert ["start", "text", "to", "image", "-", "-", "0.250", "-", "-"] in rows
    assert ["best", "image", "to", "text", "0.500", "-", "-", "-", "-"] in rows
    assert "/runs/a/checkpoints/01-all-000030" in shown
    assert shown.endswith("a remark")
    assert "No step was better" not in shown
    assert "lower the learning rates" in summary("/runs/a", {**result, "best": "checkpoints/00-start-000000"})
