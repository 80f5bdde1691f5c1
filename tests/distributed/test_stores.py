"""A run whose output is on S3 (a server on loopback): uploads beside the training, exact resumption, failing uploads."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from clipdist import checkpoint, journal, storage
from tests.conftest import TINY_CLIP
from tests.distributed.rank_processes import run_ranks
from tests.distributed.test_runs import last_state, settings, train, write_pairs

STAGES = [
    {"name": "projections", "learns": ["projections", "logit_scale"], "epochs": 1, "learning_rate": 1e-3},
    {"name": "all", "learns": ["all"], "steps": 6, "learning_rate": 1e-3, "distillation": 0.1},
]
OFTEN = {"every_minutes": None, "every_steps": 3}


def all_runs(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    shared = folder.parent
    bucket = (shared / "bucket").read_text()

    def config(output: str) -> Any:
        name = bucket if output.startswith("s3") else str(folder)
        chosen = settings(folder, shared / "clip.json", stages=STAGES, checkpoints=OFTEN, log_every_steps=1)
        return chosen.model_copy(update={"output": f"{name}/{output}"})

    found: dict[str, Any] = {"disk": train(config("disk"), shared, rank)}
    stopped = config("s3-stopped")
    found["stopped"] = [train(stopped, shared, rank, 7), train(stopped, shared, rank)]
    failing = config("s3-failing")
    upload = checkpoint.Writer._finish

    def fails(self: Any, path: str, *more: Any) -> None:
        if path.endswith("000006"):
            storage.write_atomic(storage.join(path, "progress.json"), b"{}")  # a part of it had arrived
            raise OSError("503 SlowDown")
        upload(self, path, *more)

    with mock.patch.object(checkpoint.Writer, "_finish", fails):
        try:
            train(failing, shared, rank)
        except (OSError, RuntimeError) as error:  # rank 0 says why, the other misses it
            found["failed"] = str(error)
    return found


def again(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    shared = folder.parent
    bucket = (shared / "bucket").read_text()
    chosen = settings(folder, shared / "clip.json", stages=STAGES, checkpoints=OFTEN, log_every_steps=1)
    return train(chosen.model_copy(update={"output": f"{bucket}/s3-failing"}), shared, rank)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, s3_bucket: str) -> Path:
    home = tmp_path_factory.mktemp("stores")
    (home / "clip.json").write_text(json.dumps(TINY_CLIP))
    (home / "bucket").write_text(f"{s3_bucket}/stores")
    write_pairs(home)
    return home


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, Any]:
    return run_ranks(1, all_runs, home / "ranks")[0]


def same_end(home: Path, found: dict[str, Any], name: str) -> None:
    output, disk = f"{(home / 'bucket').read_text()}/{name}", str(home / "ranks" / "disk")
    ours, expected = last_state(output), last_state(disk)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in ours.items())
    losses = [
        [(line["step"], line["loss"]) for line in journal.read(run) if line["event"] == "step"]
        for run in (output, disk)
    ]
    assert losses[0] == losses[1]
    kept = storage.names(storage.join(output, "checkpoints"))
    assert sorted(kept) == sorted(path.rpartition("/")[2] for path, _ in checkpoint.complete(output))


def test_a_run_on_s3_that_was_left_ends_as_one_on_a_disk(home: Path, found: dict[str, Any]) -> None:
    first, second = found["stopped"]
    assert not first["finished"]
    assert min(second["losses"]) == 8, "nothing was lost when it was left"
    same_end(home, found, "s3-stopped")


def test_an_upload_that_fails_ends_the_run_and_the_next_one_goes_on_before_it(
    home: Path, found: dict[str, Any]
) -> None:
    assert "503 SlowDown" in found["failed"]
    output = f"{(home / 'bucket').read_text()}/s3-failing"
    assert [progress.step for _, progress in checkpoint.complete(output)][-1] < 6
    resumed = run_ranks(1, again, home / "again")[0]
    assert resumed["finished"]
    assert min(resumed["losses"]) <= 6
    same_end(home, found, "s3-failing")
