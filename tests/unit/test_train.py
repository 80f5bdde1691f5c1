"""What a finished training calls its best, and what is told before one starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipdist import checkpoint, train
from clipdist.checkpoint import INTERPOLATED, START, Progress
from clipdist.config import UserError, load
from clipdist.recipe import TrainConfig

BEST = "text_to_image/hit_rate@10"


def config(output: Path, **more: Any) -> TrainConfig:
    values = {"pairs": "/none", "output": str(output), "model.name": "ViT-B-32"} | more
    return load(TrainConfig, None, [f"{name}={value}" for name, value in values.items()]).config


@pytest.mark.parametrize(("mixed", "expected"), [(True, "01-interpolated-000020"), (False, "00-all-000015")])
def test_a_mixture_that_was_chosen_on_all_sets_is_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: bool, expected: str
) -> None:
    """On the domain's own set alone the trained weights may look better; that is why there was a general one."""
    trained = Progress(0, "all", 15, 15, metrics={BEST: 0.82})
    last = Progress(1, INTERPOLATED, 0, 20, stage_done=True, metrics={BEST: 0.80})
    if not mixed:
        last = replace(last, stage=0, stage_name="all", stage_step=20)
    found = [replace(START, metrics={BEST: 0.5}), trained, last]
    monkeypatch.setattr(checkpoint, "complete", lambda run: [(f"{run}/checkpoints/{one.name}", one) for one in found])
    assert train._finish(config(tmp_path))["best"] == f"checkpoints/{expected}"


def test_what_is_wrong_with_pairs_model_and_vocabulary_is_told_at_once(tmp_path: Path) -> None:
    wrong = config(tmp_path, **{"pairs": "/no/pairs", "model.name": "/no/model", "vocabulary.file": "/no/terms.txt"})
    for check in (train.run, train.dry_run):
        with pytest.raises(UserError) as told:
            check(wrong)
        problems = "\n".join(told.value.problems)
        assert len(told.value.problems) == 3, problems
        assert "pairs: /no/pairs" in problems
        assert "model.name: " in problems
        assert "/no/terms.txt" in problems
