"""Whole runs on one, two and three ranks: the same curve on any number, the same bits after any interruption."""

import io
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from clipdist import checkpoint, models, opening
from clipdist.loop import run_stages
from clipdist.manifest import File, Manifest
from clipdist.models import ModelConfig
from clipdist.opening import Worker
from clipdist.recipe import TrainConfig
from clipdist.schema import Stamp
from tests.conftest import COLOURS, SHAPES, TINY_CLIP, draw_shape
from tests.distributed.rank_processes import run_ranks

GROUP_ROWS, GROUPS = 8, 11
STAGES = [
    {"name": "projections", "learns": ["projections", "logit_scale"], "epochs": 2, "learning_rate": 3e-3},
    {
        "name": "small",
        "learns": ["all"],
        "steps": 6,
        "learning_rate": 1e-3,
        "image_size": 16,
        "text_length": 8,
        "global_batch_size": 32,
        "augment": {"crop_scale": 0.8, "flip": 0.5},
        "distillation": 0.1,
    },
    {
        "name": "last",
        "learns": ["projections", "logit_scale", "new_tokens", "last_1_image_blocks"],
        "epochs": 1,
        "learning_rate": 1e-3,
        "layer_decay": 0.5,
    },
]
STEPS = 8 + 6 + 4
STOPS = (1, 6, 8, 11, 14, 17)
"""Inside an epoch, at its end, at the end of a stage, in each stage."""


def write_pairs(folder: Path) -> None:
    """A table of pairs with many row groups, some short, in two files; a quarter of it again as validation."""
    rows = []
    for number in range(GROUP_ROWS * GROUPS - 1):
        colour, shape = COLOURS[number % 8], SHAPES[number // 8 % 4]
        data = io.BytesIO()
        draw_shape(colour, shape, number % 25).save(data, "PNG")
        captions = [f"a {colour} {shape} {number // 32}", f"{shape}, {colour}"][: 1 + number % 2]
        rows.append({"id": str(number), "image": data.getvalue(), "captions": captions, "group": None})
    table = pa.Table.from_pylist(
        rows,
        pa.schema([("id", "string"), ("image", "binary"), ("captions", pa.list_(pa.string())), ("group", "string")]),
    )
    for name, part in {"a": table[:40], "b": table[40:], "v": table[:24]}.items():
        pq.write_table(part, folder / f"{name}.parquet", row_group_size=GROUP_ROWS)


def manifest_of(folder: Path) -> Manifest:
    def file(name: str, rows: int, split: str) -> File:
        groups = tuple(min(GROUP_ROWS, rows - start) for start in range(0, rows, GROUP_ROWS))
        return File(f"{name}.parquet", "pairs", rows, groups, 1 << 20, split)

    files = (file("a", 40, "train"), file("b", 47, "train"), file("v", 24, "validation"))
    return Manifest(str(folder), Stamp("pairs", {}, {}), files, (), {"pairs": 111}, {}, {})


def settings(output: Path, model: Path, **more: Any) -> TrainConfig:
    values: dict[str, Any] = {"pairs": "pairs", "output": str(output), "model": {"name": str(model)}, "stages": STAGES}
    values |= {"global_batch_size": 24, "lanes": 6, "vocabulary": {"terms": ["triangle", "purple"]}}
    values |= {"checkpoints": {"every_minutes": None}, "seed": 5}
    return TrainConfig.model_validate(values | more)


def train(config: TrainConfig, folder: Path, rank: int, stop: int | None = None, **worker: Any) -> dict[str, Any]:
    """One call of a run on this rank. `stop`: rank 1 (or the only one) asks to leave in this step."""
    events: list[dict[str, Any]] = []
    asked = lambda: stop is not None and len([e for e in events if e["event"] == "step"]) + done == stop - 1  # noqa: E731
    found = checkpoint.complete(config.output)
    done = found[-1][1].step if found else 0
    wants = asked if rank == min(1, torch.distributed.get_world_size() - 1) else lambda: False
    finished = run_stages(config, manifest_of(folder), Worker(torch.device("cpu"), 1, 0, events.append, wants))
    torch.distributed.barrier()
    steps = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
    validated = [
        {k: v for k, v in event.items() if k not in ("event", "time")}
        for event in events
        if event["event"] == "validated"
    ]
    return {"finished": finished, "losses": steps, "validated": validated}


def last_state(output: str) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the last checkpoint."""
    path, _ = checkpoint.complete(output)[-1]
    weights = models.load(ModelConfig(name=path)).model.state_dict()
    return {**weights, **{f"optimizer {name}": value for name, value in checkpoint.optimizer_state(path).items()}}


def all_runs(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    shared = folder.parent.parent
    with mock.patch.object(opening, "IN_MEMORY_BYTES", 0):  # streamed, as a table beyond memory is
        config = settings(folder / "whole", shared / "clip.json")
        found: dict[str, Any] = {"whole": train(config, shared, rank), "state": last_state(config.output)}
        sliced = settings(folder / "sliced", shared / "clip.json", speed={"micro_batch_size": 3})
        found["sliced"] = train(sliced, shared, rank)
        for stop in STOPS if world_size == 3 else ():
            again = settings(folder / f"stop-{stop}", shared / "clip.json")
            first, second = train(again, shared, rank, stop), train(again, shared, rank)
            found[f"stop {stop}"] = {"first": first, "second": second, "state": last_state(again.output)}
        other = settings(folder / "other", shared / "clip.json", seed=6)
        found["other seed"] = train(other, shared, rank)
    in_memory = settings(folder / "memory", shared / "clip.json")
    return found | {"in memory": train(in_memory, shared, rank)}


@cache
def runs(world_size: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary:
        shared = Path(temporary)
        (shared / "clip.json").write_text(json.dumps(TINY_CLIP))
        write_pairs(shared)
        (shared / "ranks").mkdir()
        return run_ranks(world_size, all_runs, shared / "ranks" / str(world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_run_sees_every_stage_and_learns(world_size: int) -> None:
    for ranks in runs(world_size):
        assert ranks["whole"]["finished"]
        losses = ranks["whole"]["losses"]
        assert sorted(losses) == list(range(1, STEPS + 1))
        assert losses[8] < losses[1]
        assert [event["stage"] for event in ranks["whole"]["validated"]] == [
            "start", "projections", "projections", "small", "small", "last",
        ]  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_curve_is_the_same_on_any_number_of_ranks(world_size: int) -> None:
    one, many = runs(1)[0], runs(world_size)[0]
    for name in ("whole", "in memory", "sliced"):
        assert many[name]["losses"] == pytest.approx(one[name]["losses"], rel=2e-4), name
    for ours, theirs in zip(many["whole"]["validated"], one["whole"]["validated"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert many["other seed"]["losses"] != pytest.approx(one["whole"]["losses"], rel=2e-4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_batches_do_not_change_the_curve(world_size: int) -> None:
    ranks = runs(world_size)[0]
    assert ranks["sliced"]["losses"] == pytest.approx(ranks["whole"]["losses"], rel=2e-4)


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_was_left_at_any_step_ends_in_the_same_bits(stop: int) -> None:
    for ranks in runs(3):
        broken = ranks[f"stop {stop}"]
        assert not broken["first"]["finished"]
        assert broken["second"]["finished"]
        assert max(broken["first"]["losses"]) == stop
        assert min(broken["second"]["losses"]) == stop + 1
        assert broken["first"]["losses"] | broken["second"]["losses"] == ranks["whole"]["losses"]
        assert broken["state"].keys() == ranks["state"].keys()
        assert all(torch.equal(value, ranks["state"][name]) for name, value in broken["state"].items())


def test_all_ranks_say_the_same() -> None:
    first, *others = runs(3)
    for other in others:
        assert other["whole"] == first["whole"]
