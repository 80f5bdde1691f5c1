"""Training state to and from a folder, and which checkpoint is complete.

checkpoints/01-all-000240/   open_clip's local-dir layout, clipdist.json, optimizer.safetensors, progress.json
checkpoints/01-all-000240/complete.json   written last: without it the folder does not count
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from clipdist import storage
from clipdist.towers import Towers

OPTIMIZER, PROGRESS, COMPLETE = "optimizer.safetensors", "progress.json", "complete.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: `epoch` of `stage` are done, `step` optimizer updates of the whole run."""

    stage: int
    stage_name: str
    epoch: int
    step: int
    metrics: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.stage:02d}-{self.stage_name}-{self.step:06d}"


def save(run: str, towers: Towers, optimizer: torch.optim.Optimizer, progress: Progress) -> str:
    """Writes checkpoints/<name> of the run, its completion record last. Returns the folder's path."""
    path = storage.join(run, "checkpoints", progress.name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(path) if storage.is_local(path) else Path(temporary) / progress.name
        facts = {"stage": progress.stage_name, "step": progress.step}
        digest = towers.save(folder, final_path=path, facts=facts)
        save_file(_flat_state(optimizer), folder / OPTIMIZER)
        (folder / PROGRESS).write_text(json.dumps(asdict(progress)))
        if not storage.is_local(path):
            fs, inner = storage.filesystem(path)
            fs.put(str(folder) + "/", inner + "/", recursive=True)
    record = {"weights_sha256": digest, **asdict(progress)}
    storage.write_atomic(storage.join(path, COMPLETE), json.dumps(record).encode())
    return path


def complete(run: str) -> list[tuple[str, Progress]]:
    """The complete checkpoints of a run as (path, progress), oldest first."""
    found = []
    for name in storage.names(storage.join(run, "checkpoints")):
        path = storage.join(run, "checkpoints", name)
        if storage.exists(storage.join(path, COMPLETE)):
            found.append((path, Progress(**json.loads(storage.read_bytes(storage.join(path, PROGRESS))))))
    return sorted(found, key=lambda item: item[1].step)


def restore_optimizer(path: str, optimizer: torch.optim.Optimizer) -> None:
    """Moments and step counts of the same parameters in the same order."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in load(storage.read_bytes(storage.join(path, OPTIMIZER))).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def best(checkpoints: list[tuple[str, Progress]], metric: str) -> tuple[str, Progress]:
    """The checkpoint with the highest metric; of equal ones the earliest. Where nothing was measured, the last."""
    measured = [item for item in checkpoints if metric in item[1].metrics]
    if not measured:
        return checkpoints[-1]
    return max(measured, key=lambda item: (item[1].metrics[metric], -item[1].step))


def prune(run: str, metric: str) -> None:
    """Keeps the best and the last complete checkpoint."""
    checkpoints = complete(run)
    keep = {path for path, _ in (checkpoints[-1], best(checkpoints, metric))}
    for path, _ in checkpoints:
        if path not in keep:
            storage.remove(storage.join(path, COMPLETE))
            storage.remove_tree(path)


def _flat_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value.contiguous() for index, values in state.items() for key, value in values.items()}
