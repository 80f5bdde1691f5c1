"""What a person sees of a training: the bar, its curves, and remarks that help."""

from pathlib import Path
from typing import Any

import pytest

from clipdist import storage
from clipdist.history import History, remarks, seconds_of, summary
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


def test_workers_that_start_again_within_a_job_move_the_bar_back() -> None:
    one = history("/nowhere")
    one.add([workers(0), *(step(number) for number in range(1, 8)), workers(5)])
    assert one.bar.done == 20
    assert not one.unsaved


def test_problems_of_workers_are_kept() -> None:
    one = history("/nowhere")
    one.add([{"event": "failed", "problems": ["a", "b"]}, {"event": "failed", "problems": ["c"]}])
    assert one.problems == ["a", "b", "c"]


def test_what_a_signal_would_lose_is_known() -> None:
    one = history("/nowhere")
    found = []
    for event in (workers(0), step(1), {"event": "saved"}, step(2), {"event": "finished"}):
        one.add([event])
        found.append((one.unsaved, one.finished))
    assert found == [(False, False), (True, False), (False, False), (True, False), (True, True)]


def test_remarks_tell_what_reuse_saved_and_what_waiting_cost() -> None:
    assert remarks([]) == []
    lines = [{"event": "outputs", "stage": "all", "seconds": 30.0, "images": True, "texts": True}]
    lines += [{"event": "epoch", "stage": "all", "epoch": 1, "step": 10, "seconds": 90.0}]
    assert remarks(lines) == [], "the first epoch starts everything"
    lines += [{"event": "epoch", "stage": "all", "epoch": n, "step": 10 * n, "seconds": 1.0 * n} for n in (2, 3)]
    (found,) = remarks(lines)
    assert "computed once in 30" in found
    assert "an epoch on them takes 2.50 s, 12 times less" in found
    assert len(remarks([*lines, step(31, data_wait=0.04)])) == 1
    advice = remarks([*lines, step(31, data_wait=0.04), step(32, data_wait=0.31), validated(32, 0.5)])[1]
    assert "31" in advice
    assert "raise workers.decoders" in advice


def test_the_time_of_a_run_leaves_out_what_lay_between_two_starts() -> None:
    times = [(workers(0), 100.0), (step(1), 105.0), (step(2), 110.0), (workers(2), 500.0), (step(3), 507.0)]
    assert seconds_of([{**event, "time": time} for event, time in times]) == 17.0
    assert seconds_of([]) == 0.0


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
