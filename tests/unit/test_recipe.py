"""What a training run is told: every problem at once before hours of work, and what may change when it goes on."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from clipdist.lanes import batch_bounds
from clipdist.models import ModelConfig
from clipdist.recipe import HARMLESS, TrainConfig, ValidationConfig, identity, pairs_seen, problems, resolved
from clipdist.stages import StageConfig, steps_per_epoch, total_steps
from clipdist.towers import Towers
from tests.unit import zoo


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    """32 pixels in patches of 8, 16 tokens, no logit_bias, no new tokens."""
    return zoo.build("vit", tmp_path_factory.mktemp("model"))


def stage(name: str = "one", *learns: str, **changes: Any) -> StageConfig:
    return StageConfig(**{"name": name, "learns": learns or ("all",), "epochs": 1, "learning_rate": 1e-3, **changes})


def config(*stages: StageConfig, **changes: Any) -> TrainConfig:
    model = ModelConfig(name="x")
    return TrainConfig(pairs="p", output="o", model=model, stages=stages or (stage(),), **changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config(stage("a"), stage("b"), stage("a")), "stages.2 (a): each stage needs a name of its own"),
        (config(stage("start")), "stages.0 (start): each stage needs a name of its own, not start or interpolated"),
        (config(stage("interpolated")), "not start or interpolated"),
        (
            config(stage(global_batch_size=2000)),
            "stages.0 (one): a global batch of 2,000 pairs, but there are only 1,000 training pairs; lower",
        ),
        (config(global_batch_size=1001), "a global batch of 1,001 pairs"),
        (config(stage("one", "new_tokens")), "learns new_tokens, but the model has none; give vocabulary.terms or"),
        (config(stage(image_size=33)), "image_size: image size 33: not a multiple of this image tower's 8 pixels; 32"),
        (config(stage(text_length=17)), "text_length: 17 tokens; the model reads at most 16"),
        (config(loss="sigmoid"), "loss: sigmoid needs a model with a logit_bias (SigLIP); this one has none"),
    ],
)
def test_each_problem_says_where_it_is_and_what_was_expected(towers: Towers, given: TrainConfig, message: str) -> None:
    wrong, strange = problems(given, towers, 1000)
    assert [problem for problem in wrong if message in problem], wrong
    assert strange == []


def test_all_problems_are_told_at_once(towers: Towers) -> None:
    first = stage("start", "new_tokens", image_size=33, text_length=99, global_batch_size=5000)
    wrong, strange = problems(config(first, stage("start", image_size=16), loss="sigmoid"), towers, 1000)
    assert len(wrong) == 7
    assert len(set(wrong)) == 7
    assert strange == ["stages.1 (start): image_size: image size 16: only 2 x 2 patches of 8 pixels; details get lost"]


def test_a_run_without_problems_has_none(towers: Towers, tmp_path: Path) -> None:
    good = config(stage("a", "projections"), stage("b", image_size=64, text_length=8), global_batch_size=1000)
    assert problems(good, towers, 1000) == ([], [])
    grown = zoo.build("siglip", tmp_path)
    grown.add_terms(["fairisle"])
    assert problems(config(stage("one", "new_tokens"), loss="sigmoid"), grown, 1000) == ([], [])


def test_the_loss_is_the_models_unless_it_is_named(towers: Towers, tmp_path: Path) -> None:
    assert config().loss_of(towers) == "contrastive"
    siglip = zoo.build("siglip", tmp_path)
    assert config().loss_of(siglip) == "sigmoid"
    assert config(loss="contrastive").loss_of(siglip) == "contrastive"


def test_resolved_writes_out_what_every_stage_uses(towers: Towers) -> None:
    given = config(stage("a", image_size=16, global_batch_size=8), stage("b", text_length=9), global_batch_size=64)
    found = resolved(given, towers, lanes=48)
    sizes = [(one.image_size, one.text_length, one.global_batch_size) for one in found.stages]
    assert sizes == [(16, 16, 8), (32, 9, 64)]
    assert found.lanes == 48
    assert resolved(found, towers, lanes=48) == found
    assert found.model_copy(update={"stages": given.stages, "lanes": None}) == given, "and changes nothing else"


@pytest.mark.parametrize("rows", [20, 21, 22, 8, 5])
def test_pairs_seen_is_the_sum_of_all_global_batches(rows: int) -> None:
    given = config(stage("a", epochs=2), stage("b", epochs=None, steps=7, global_batch_size=4), global_batch_size=5)
    seen = 0
    for index, settings in enumerate(given.stages):
        size = given.batch_size_of(settings)
        per_epoch = steps_per_epoch(rows, size)
        for step in range(total_steps(settings, per_epoch)):
            assert pairs_seen(given, rows, index, step) == seen
            start, stop = batch_bounds(step % per_epoch, rows, size)
            seen += stop - start
        assert pairs_seen(given, rows, index, total_steps(settings, per_epoch)) == seen


def test_what_changes_no_result_may_change_and_all_else_is_part_of_the_run() -> None:
    assert set(HARMLESS) <= set(TrainConfig.model_fields)
    one = config()
    for changes in ({"log_every_steps": 1}, {"tensorboard": True}, {"reuse_frozen_features": False}):
        assert identity(config(**changes)) == identity(one)
    for changes in ({"seed": 1}, {"lanes": 3}, {"global_batch_size": 8}, {"gradient_clip": 2.0}):
        assert identity(config(**changes)) != identity(one)
    assert identity(config(stage(augment={"flip": 0.5}))) != identity(one)


def test_the_best_metric_must_be_one_that_is_measured() -> None:
    assert ValidationConfig(best="image_to_text/mrr@10").best == "image_to_text/mrr@10"
    with pytest.raises(ValidationError, match=r"expected one of .*text_to_image/hit_rate@1, .*; got \"recall\""):
        ValidationConfig(best="recall")
