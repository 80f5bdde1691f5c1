"""Learning rates by step, and what a stage's config may say."""

import math
from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from clipdist.stages import (
    DEFAULT_STAGES,
    PARTS,
    StageConfig,
    learning_rates,
    rate_factor,
    steps_per_epoch,
    total_steps,
)


def stage(**changes: Any) -> StageConfig:
    return StageConfig(**{"name": "one", "learns": ("all",), "epochs": 1, "learning_rate": 1e-3, **changes})


def factors(steps: int, warmup: float, schedule: str = "cosine") -> list[float]:
    return [rate_factor(step, steps, warmup, schedule) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_rate_rises_in_equal_steps_and_never_starts_at_zero(schedule: str) -> None:
    found = factors(40, 0.25, schedule)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[9] == found[10] == 1.0
    assert max(found) == 1.0


def test_the_cosine_falls_from_the_top_to_zero() -> None:
    falling = factors(40, 0.25)[10:]
    assert falling == pytest.approx([(1 + math.cos(math.pi * step / 30)) / 2 for step in range(30)])
    assert all(a > b for a, b in pairwise(falling))
    assert falling[15] == pytest.approx(0.5)
    assert 0 < falling[-1] < 0.01
    assert rate_factor(40, 40, 0.25, "cosine") == pytest.approx(0.0), "where the step after the last would be"


def test_constant_stays_at_the_top() -> None:
    assert factors(40, 0.25, "constant")[10:] == [1.0] * 30


@pytest.mark.parametrize(("steps", "warmup", "first"), [(10, 0.0, 1.0), (1, 0.0, 1.0), (1, 0.1, 1.0), (3, 0.99, 1 / 3)])
def test_short_stages_and_no_warmup(steps: int, warmup: float, first: float) -> None:
    found = factors(steps, warmup)
    assert found[0] == pytest.approx(first)
    assert all(0 < factor <= 1 for factor in found)


@pytest.mark.parametrize(
    ("rows", "batch", "steps"), [(8, 4, 2), (10, 4, 3), (9, 4, 2), (3, 4, 1), (5, 4, 1), (1, 4, 1)]
)
def test_the_last_smaller_batch_is_a_step_unless_it_is_a_single_pair(rows: int, batch: int, steps: int) -> None:
    assert steps_per_epoch(rows, batch) == steps


def test_a_stage_lasts_its_steps_or_its_epochs() -> None:
    assert total_steps(stage(epochs=3), per_epoch=7) == 21
    assert total_steps(stage(epochs=None, steps=5), per_epoch=7) == 5


def test_parts_have_their_own_rates_under_one_schedule() -> None:
    one = stage(learns=("logit_scale", "image_tower"), learning_rates={"image_tower": 1e-5}, warmup=0.5)
    assert learning_rates(one, 0, 8) == pytest.approx({"logit_scale": 0.25e-3, "image_tower": 0.25e-5})
    assert learning_rates(one, 4, 8) == pytest.approx({"logit_scale": 1e-3, "image_tower": 1e-5})


@pytest.mark.parametrize(
    ("learns", "parts"),
    [
        (("all",), PARTS),
        (("text_tower", "projections"), ("projections", "new_tokens", "text_tower")),
        (("image_tower", "all"), PARTS),
        (("logit_scale", "projections"), ("projections", "logit_scale")),
        (("last_2_text_blocks", "new_tokens"), ("new_tokens", "text_tower")),
        (("last_2_image_blocks",), ("image_tower",)),
    ],
)
def test_parts_stand_in_one_order_however_they_are_named(learns: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert stage(learns=learns).parts() == parts
    assert tuple(learning_rates(stage(learns=learns), 0, 1)) == parts


def test_the_last_blocks_of_a_tower_learn_with_what_stands_behind_them() -> None:
    one = stage(learns=("last_2_image_blocks", "last_12_image_blocks", "last_1_text_blocks"))
    assert [level for level in range(20) if one.level_learns("image_tower", level)] == list(range(13))
    assert [level for level in range(20) if one.level_learns("text_tower", level)] == [0, 1]
    for part in ("projections", "logit_scale", "new_tokens"):
        assert not one.level_learns(part, 0)  # type: ignore[arg-type]


def test_a_whole_tower_learns_at_every_level_and_the_text_tower_with_its_new_tokens() -> None:
    one = stage(learns=("text_tower", "last_1_text_blocks"))
    assert all(one.level_learns("text_tower", level) for level in range(20))
    assert one.level_learns("new_tokens", 13)
    assert not one.level_learns("image_tower", 0)


@pytest.mark.parametrize(
    ("learns", "towers"),
    [
        (("projections", "logit_scale"), []),
        (("logit_scale",), []),
        (("projections", "text_tower"), ["text"]),
        (("new_tokens",), ["text"]),
        (("last_1_text_blocks",), ["text"]),
        (("image_tower",), ["image"]),
        (("last_3_image_blocks", "projections"), ["image"]),
        (("all",), ["image", "text"]),
    ],
)
def test_a_tower_learns_when_anything_below_its_projection_does(learns: tuple[str, ...], towers: list[str]) -> None:
    assert [tower for tower in ("image", "text") if stage(learns=learns).tower_learns(tower)] == towers  # type: ignore[arg-type]


def test_the_default_stages_first_keep_the_towers_then_train_all() -> None:
    assert [one.tower_learns("image") or one.tower_learns("text") for one in DEFAULT_STAGES] == [False, True]
    assert DEFAULT_STAGES[-1].parts() == PARTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learns": ()}, "learns"),
        ({"learns": ("towers",)}, "projections"),
        ({"learns": ("projections",), "learning_rates": {"text_tower": 1e-5}}, "text_tower, which does not learn"),
        ({"learning_rates": {"text_tower": 0.0}}, "learning_rates.text_tower: expected a positive number, got 0.0"),
        ({"learning_rates": {"backbone": 1e-5}}, "learning_rates"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"epochs": 0}, "epochs"),
        ({"steps": 5}, "stage one: give either epochs or steps"),
        ({"epochs": None}, "stage one: give either epochs or steps"),
        ({"learns": ("last_0_image_blocks",)}, "such as last_4_image_blocks; got"),
        ({"learns": ("last_4_blocks",)}, "such as last_4_image_blocks; got"),
        ({"layer_decay": 1.5}, "layer_decay"),
        ({"global_batch_size": 1}, "global_batch_size"),
        ({"warmup": 1.0}, "warmup"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"schedule": "linear"}, "schedule"),
        ({"name": "Stage one"}, "name"),
        ({"epoch": 3}, "epoch"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(**changes)
