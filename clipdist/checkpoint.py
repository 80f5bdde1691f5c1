"""Training state to and from a folder, and which checkpoint is complete.

checkpoints/01-all-000240/   open_clip's local-dir layout, clipdist.json, optimizer.safetensors, progress.json
checkpoints/01-all-000240/complete.json   written last: without it the folder does not count

Nothing else has to be kept for an exact resume: data order, captions, augmentation and dropout are functions of the
step. A folder on a remote store is written on this machine first and uploaded while the training goes on.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load, save_file
from torch import Tensor

from clipdist import storage
from clipdist.towers import Towers

OPTIMIZER, PROGRESS, COMPLETE = "optimizer.safetensors", "progress.json", "complete.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: `stage_step` steps of stage number `stage` are done, `step` of the whole run.

    `micro_batch_size` is what memory allowed in this stage: a resumed run sums in the same slices. `stale` counts the
    stage's last measurements without a new best of the stage, `stage_best`.
    """

    stage: int
    stage_name: str
    stage_step: int
    step: int
    epoch: int = 0
    stage_done: bool = False
    micro_batch_size: int | None = None
    stage_best: float | None = None
    stale: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.stage:02d}-{self.stage_name}-{self.step:06d}"


START = Progress(0, "start", 0, 0)
"""The model before its first step, with the domain's tokens: what WiSE-FT and distillation hold on to."""

INTERPOLATED = "interpolated"
"""The last checkpoint of a run whose weights were mixed with those of its start."""


class Writer:
    """Writes the checkpoints of a run, one after the other; uploads and pruning run beside the training.

    An upload that failed is raised by the next call.
    """

    def __init__(self, run: str, metric: str) -> None:
        self.run, self.metric = run, metric
        self._pool, self._pending = ThreadPoolExecutor(1), Future[None]()
        self._pending.set_result(None)

    def save(self, towers: Towers, optimizer: Mapping[str, Tensor], progress: Progress) -> None:
        self.wait()
        path = storage.join(self.run, "checkpoints", progress.name)
        local = storage.is_local(path)
        folder = Path(path) if local else Path(tempfile.mkdtemp(prefix="clipdist-checkpoint-")) / progress.name
        facts = {"stage": progress.stage_name, "step": progress.step}
        digest = towers.save(folder, final_path=path, facts=facts)
        save_file({name: value.detach().cpu().contiguous() for name, value in optimizer.items()}, folder / OPTIMIZER)
        (folder / PROGRESS).write_text(json.dumps(asdict(progress)))
        self._pending = self._pool.submit(self._finish, path, folder, {"weights_sha256": digest, **asdict(progress)})
        if local:
            self.wait()

    def measured(self, progress: Progress) -> None:
        """The last checkpoint was measured: its progress gets the metrics."""
        self.wait()
        path = storage.join(self.run, "checkpoints", progress.name)
        storage.write_atomic(storage.join(path, PROGRESS), json.dumps(asdict(progress)).encode())
        prune(self.run, self.metric)

    def wait(self) -> None:
        """Until the last checkpoint is complete."""
        self._pending.result()

    def done(self) -> bool:
        """Whether the last checkpoint is complete."""
        return self._pending.done()

    def _finish(self, path: str, folder: Path, record: dict[str, object]) -> None:
        if not storage.is_local(path):
            try:
                storage.upload(str(folder), path)
            finally:
                shutil.rmtree(folder.parent)
        storage.write_atomic(storage.join(path, COMPLETE), json.dumps(record).encode())
        prune(self.run, self.metric)


def complete(run: str) -> list[tuple[str, Progress]]:
    """The complete checkpoints of a run as (path, progress), in the order of training."""
    found = []
    for name in storage.names(storage.join(run, "checkpoints")):
        path = storage.join(run, "checkpoints", name)
        if storage.exists(storage.join(path, COMPLETE)):
            found.append((path, Progress(**json.loads(storage.read_bytes(storage.join(path, PROGRESS))))))
    return sorted(found, key=lambda item: (item[1].step, item[1].stage, item[1].stage_done))


def start_of(run: str) -> str:
    """The folder of the model before its first step."""
    return storage.join(run, "checkpoints", START.name)


def remove_incomplete(run: str) -> list[str]:
    """Removes what a killed run left half written; returns the names. Only the holder of the run's lease may."""
    folder = storage.join(run, "checkpoints")
    left = [name for name in storage.names(folder) if not storage.exists(storage.join(folder, name, COMPLETE))]
    for name in left:
        storage.remove_tree(storage.join(folder, name))
    return left


def optimizer_state(path: str) -> dict[str, Tensor]:
    """Moments and step counts by parameter, on the CPU."""
    return dict(load(storage.read_bytes(storage.join(path, OPTIMIZER))))


def best(checkpoints: list[tuple[str, Progress]], metric: str) -> tuple[str, Progress]:
    """The checkpoint with the highest metric; of equal ones the earliest. Where nothing was measured, the last."""
    measured = [item for item in checkpoints if metric in item[1].metrics]
    if not measured:
        return checkpoints[-1]
    return max(measured, key=lambda item: (item[1].metrics[metric], -item[1].step))


def prune(run: str, metric: str) -> None:
    """Keeps the start, the best and the last complete checkpoint."""
    checkpoints = complete(run)
    keep = {start_of(run), *(path for path, _ in (checkpoints[-1], best(checkpoints, metric)))}
    for path, _ in checkpoints:
        if path not in keep:
            storage.remove(storage.join(path, COMPLETE))
            storage.remove_tree(path)
