"""Options of a run on two ranks: those of speed keep the curve, those of judgement end or mix the training."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from clipdist import checkpoint, journal, loop, models
from clipdist.interpolate import interpolated
from clipdist.loop import run_stages
from clipdist.models import ModelConfig
from clipdist.opening import Worker
from tests.conftest import TINY_CLIP
from tests.distributed.rank_processes import run_ranks
from tests.distributed.test_runs import last_state, manifest_of, settings, train, write_pairs

STAGE = {"name": "all", "learns": ["all"], "steps": 6, "learning_rate": 1e-3}
SPEED = {
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "plain": {"fused_adamw": False, "channels_last": False, "tf32": False},
    "compile": {"compile": True},
    "bf16": {"precision": "bf16"},
}
EPOCH = {"name": "all", "learns": ["all"], "epochs": 1, "learning_rate": 1e-3}
FROZEN = {"name": "frozen", "learns": ["projections", "logit_scale"], "epochs": 2, "learning_rate": 1e-3}
BEST = "text_to_image/mrr@10"
WISE = {"validation": {"best": BEST}, "interpolate": {"alphas": [0, 0.5, 1]}}


def all_runs(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    shared = folder.parent
    found: dict[str, Any] = {}

    def one(name: str, **more: Any) -> dict[str, Any]:
        config = settings(folder / name, shared / "clip.json", **({"stages": [STAGE]} | more))
        return train(config, shared, rank)

    found["default"] = one("default")
    for name, speed in SPEED.items():
        found[name] = one(name, speed=speed)
    found["harder"] = one("harder", stages=[STAGE | {"learning_rate": 2e-3}])
    still = {"stages": [STAGE | {"steps": 40, "learning_rate": 1e-12}]}
    found["patience"] = one("patience", **still, validation={"patience": 2})
    held = {**STAGE, "steps": 12}
    found["free"], found["held"] = one("free", stages=[held]), one("held", stages=[held | {"distillation": 3.0}])
    found["drift"] = {name: drift(str(folder / name)) for name in ("free", "held")}
    found["epoch"], found["wise"] = one("epoch", stages=[EPOCH]), one("wise", stages=[EPOCH], **WISE)
    with mock.patch.object(loop, "read_manifest", return_value=manifest_of(shared)):
        one("general", stages=[EPOCH], **(WISE | {"interpolate": {"alphas": [0, 1], "general": "other pairs"}}))
    plain = {"stages": [FROZEN], "reuse_frozen_features": False}
    found["frozen"], found["computed"] = one("frozen", stages=[FROZEN]), one("computed", **plain)
    found["encoded"] = encoded_row_groups(rank, folder / "encoded", shared)
    return found | {"left": left_while_mixing(rank, folder / "left", shared)}


def drift(output: str) -> float:
    """How far the embeddings of one picture moved from the starting model's, 1 - cosine."""
    start, (end, _) = checkpoint.start_of(output), checkpoint.complete(output)[-1]
    pixels = torch.arange(32 * 32 * 3, dtype=torch.uint8).reshape(1, 32, 32, 3)
    with torch.no_grad():
        ours, theirs = (
            towers.project_image(towers.image_tower_output(pixels))
            for towers in (models.load(ModelConfig(name=path)) for path in (start, end))
        )
    return 1 - float(torch.cosine_similarity(ours, theirs))


def encoded_row_groups(rank: int, output: Path, shared: Path) -> list[int]:
    """Row groups of training pairs that this rank encodes: before it is left at a step, and when it goes on."""
    config = settings(output, shared / "clip.json", stages=[FROZEN])
    counts = []
    for asks in (True, False):
        events = list[dict[str, Any]]()
        wants = lambda asks=asks, events=events: asks and any(e["event"] == "step" for e in events)  # noqa: E731
        run_stages(config, manifest_of(shared), Worker(torch.device("cpu"), 1, 0, events.append, wants))
        torch.distributed.barrier()
        counts.append(sum(e["event"] == "encoded" and e["split"] == "train" for e in events))
    return counts


def left_while_mixing(rank: int, output: Path, shared: Path) -> list[bool]:
    """Rank 1 asks to leave after the second mixture; then again without."""
    config = settings(output, shared / "clip.json", stages=[EPOCH], **WISE)
    finished, events = [], list[dict[str, Any]]()
    for asks in (True, False):
        wants = lambda asks=asks: asks and rank == 1 and sum(e["event"] == "interpolated" for e in events) == 2  # noqa: E731
        finished.append(
            run_stages(config, manifest_of(shared), Worker(torch.device("cpu"), 1, 0, events.append, wants))
        )
        torch.distributed.barrier()
    return finished


@cache
def ranks() -> tuple[list[dict[str, Any]], Path]:
    shared = Path(tempfile.mkdtemp())
    (shared / "clip.json").write_text(json.dumps(TINY_CLIP))
    write_pairs(shared)
    return run_ranks(2, all_runs, shared / "ranks"), shared / "ranks"


def runs() -> tuple[dict[str, Any], Path]:
    found, folder = ranks()
    return found[0], folder


@pytest.mark.parametrize("name", ["gradient_checkpointing", "plain", "compile"])
def test_options_of_speed_keep_the_curve(name: str) -> None:
    found, _ = runs()
    assert found[name]["losses"] == pytest.approx(found["default"]["losses"], rel=2e-4)
    assert found["harder"]["losses"] != pytest.approx(found["default"]["losses"], rel=2e-4)


def test_bf16_keeps_the_curve_to_its_own_rounding() -> None:
    found, _ = runs()
    assert found["bf16"]["losses"] == pytest.approx(found["default"]["losses"], rel=2e-2)
    assert found["bf16"]["losses"] != pytest.approx(found["default"]["losses"], rel=1e-7)


def test_outputs_of_frozen_towers_are_computed_once_by_all_ranks_and_change_nothing() -> None:
    found, _ = ranks()
    first, resumed = (sum(one["encoded"][call] for one in found) for call in (0, 1))
    assert first == 11, "every row group by one rank"
    assert min(one["encoded"][0] for one in found) == 5, "the ranks share the work"
    assert resumed == 0, "a run that goes on finds them"
    assert found[0]["frozen"]["losses"] == pytest.approx(found[0]["computed"]["losses"], rel=2e-3)  # float16


def test_a_stage_that_has_stopped_rising_ends() -> None:
    found, output = runs()
    stages = [event["epoch"] for event in found["patience"]["validated"]]
    assert stages == [0, 1, 2, 3], "the first measurement of the stage, and two that were no better"
    assert found["patience"]["finished"]
    assert checkpoint.complete(str(output / "patience"))[-1][1].stage_done


def test_distillation_holds_the_model_near_its_start() -> None:
    drifted = runs()[0]["drift"]
    assert 0 < drifted["held"] < drifted["free"] / 2


def test_the_best_mixture_is_the_last_checkpoint() -> None:
    found, folder = runs()
    output = str(folder / "wise")
    lines = [line for line in journal.read(output) if line["event"] == "interpolated"]
    assert [line["alpha"] for line in lines] == [0, 0.5, 1]
    path, progress = checkpoint.complete(output)[-1]
    assert progress.stage_name == "interpolated"
    assert progress.metrics[BEST] == max(line["scores"][0] for line in lines)
    scores = [event[BEST] for event in found["wise"]["validated"]]
    assert lines[0]["scores"][0] == pytest.approx(scores[0]), "nothing of the trained weights: the start"
    assert lines[2]["scores"][0] == pytest.approx(scores[-1]), "all of them: the end"
    start, end = (models.load(ModelConfig(name=one)).model.state_dict() for one in (checkpoint.start_of(output), path))
    without = checkpoint.complete(str(folder / "epoch"))[-1][0]
    trained = models.load(ModelConfig(name=without)).model.state_dict()
    mixed = interpolated(start, trained, progress.metrics["alpha"])
    assert all(torch.equal(value, end[name]) for name, value in mixed.items())
    assert any(not torch.equal(value, start[name]) for name, value in mixed.items())


def test_a_general_set_counts_as_much_as_the_domains_own() -> None:
    _, folder = runs()
    scores = [line["scores"] for line in journal.read(str(folder / "general")) if line["event"] == "interpolated"]
    assert [len(one) for one in scores] == [2, 2]
    assert all(one == pytest.approx(other) for one, other in scores), "here it is the same set"


def test_mixing_that_was_left_is_done_again() -> None:
    found, folder = runs()
    assert found["left"] == [False, True]
    left, whole = (journal.read(str(folder / name)) for name in ("left", "wise"))
    facts = ("event", "stage", "step", "loss", "alpha", "scores")
    told = [[{name: line[name] for name in facts if name in line} for line in lines] for lines in (left, whole)]
    assert [line for line in told[0] if line["event"] != "workers"] == told[1][1:]
    states = last_state(str(folder / "left")), last_state(str(folder / "wise"))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
