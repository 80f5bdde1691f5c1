"""Training workers under Ray Train: how many, their events to the driver, signals, preemption, restarts."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipdist import collectives, runtime
from clipdist.config import UserError
from clipdist.history import History
from clipdist.loop import run_stages
from clipdist.manifest import Manifest
from clipdist.opening import Worker
from clipdist.recipe import TrainConfig

REPORT_SECONDS = 0.5
IDLE_SECONDS = 10.0
HELPER_SECONDS = 0.5
HEALTH_CHECK_SECONDS = 0.5
"""How soon a dead worker is noticed, and the end of a run; Ray's default is 2."""


@ray.remote(num_cpus=0)
class EventBox:
    """Where the workers put what happened, and hear whether the driver wants them to leave."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.leaving, self.hopeless = False, False

    def add(self, events: list[dict[str, Any]]) -> bool:
        self.events += events
        return self.leaving

    def take(self) -> list[dict[str, Any]]:
        taken, self.events = self.events, []
        return taken

    def leave(self) -> None:
        self.leaving = True

    def fail(self, problems: list[str]) -> None:
        self.hopeless = True
        self.events.append({"event": "failed", "problems": problems})

    def is_hopeless(self) -> bool:
        return self.hopeless


class _Trainer(ray.train.torch.TorchTrainer):
    """Ray 2.60 waits 12 seconds at every run's end for a helper actor that cannot answer: it leaves from a thread."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        for callback in callbacks:
            if type(callback).__name__ == "PlacementGroupCleanerCallback":
                callback._stop_timeout = HELPER_SECONDS
        return callbacks


def train(config: TrainConfig, manifest: Manifest, scale: runtime.Scale, watched: History) -> None:
    """Runs all stages on the workers. KeyboardInterrupt when a signal made them save and leave; UserError for what a
    worker says that trying again would not mend."""
    scratch = tempfile.mkdtemp(prefix="clipdist-ray-")  # Ray's own notes; our checkpoints are not reported to it
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    box = EventBox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(HEALTH_CHECK_SECONDS))
    decoders = config.workers.decoders
    trainer = _Trainer(
        _worker,
        train_loop_config={
            "config": config,
            "manifest": manifest,
            "box": box,
            "decoders": decoders if decoders is not None else scale.decoders,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=scale.workers, use_gpu=scale.use_gpu, resources_per_worker=scale.resources
        ),
        run_config=ray.train.RunConfig(
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(max_failures=config.workers.max_restarts),
        ),
    )
    try:
        with _leaving_on_signals(box) as signals:
            _fit(trainer, box, watched, signals)
    finally:
        watched.upload_curves()
        shutil.rmtree(scratch, ignore_errors=True)
    if watched.problems:
        raise UserError(*dict.fromkeys(watched.problems))
    if not watched.finished:
        raise KeyboardInterrupt


def _fit(trainer: ray.train.torch.TorchTrainer, box: Any, watched: History, signals: list[float]) -> None:
    """Runs the trainer in a thread, so that signals are ours, and takes events until it ends. After a signal the
    workers have IDLE_SECONDS to begin a step; where they take none, in a long validation, there is nothing to save."""
    outcome: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    while not outcome.done():
        time.sleep(REPORT_SECONDS)
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            watched.add(ray.get(box.take.remote(), timeout=60))
        if watched.problems:  # Ray starts the workers once more; they find that it is hopeless, and end
            return
        if signals and not watched.unsaved and time.monotonic() - signals[0] > IDLE_SECONDS:
            raise KeyboardInterrupt
    watched.add(ray.get(box.take.remote()))
    if watched.problems:
        return
    try:
        outcome.result()
    except ray.train.TrainingFailedError as error:
        raise _unwrapped(error) from None


@contextlib.contextmanager
def _leaving_on_signals(box: Any) -> Iterator[list[float]]:
    """The first Ctrl-C or SIGTERM saves and leaves; a second one leaves at once. Gives the times at which they came."""
    came: list[float] = []

    def on_signal(*_: Any) -> None:
        came.append(time.monotonic())
        if len(came) > 1:
            raise KeyboardInterrupt
        print("\nsaving a checkpoint, then leaving (once more: leave at once)", file=sys.stderr)
        box.leave.remote()

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    earlier = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _unwrapped(error: ray.train.TrainingFailedError) -> Exception:
    """The failure of a worker itself, instead of what Ray says around it."""
    for cause in getattr(error, "worker_failures", {}).values():
        inner = getattr(cause, "cause", cause)
        if isinstance(inner, UserError):
            return inner
    return error


def plan(config: TrainConfig) -> runtime.Scale:
    """Workers and what each gets. UserError when the cluster has not enough."""
    gpus, cpus = runtime.gpus(), runtime.cpus()
    use_gpu = config.workers.use_gpu if config.workers.use_gpu is not None else gpus > 0
    workers = config.workers.num_workers or (max(gpus, 1) if use_gpu else min(2, cpus))
    there, kind = (gpus, "GPUs") if use_gpu else (cpus, "CPU cores")
    if workers > there:
        raise UserError(f"workers.num_workers: {workers} workers need {workers} {kind}; the cluster has {there}")
    return runtime.scale(workers, use_gpu)


def _worker(parameters: dict[str, Any]) -> None:
    """One rank: Ray calls this on every worker, and again on all of them after a failure."""
    box, pending, last, leaving = parameters["box"], [], [0.0], [False]
    if ray.get(box.is_hopeless.remote()):
        return

    def report(event: dict[str, Any]) -> None:
        if collectives.rank() != 0:
            return
        pending.append(event)
        if event["event"] != "step" or time.monotonic() - last[0] > REPORT_SECONDS:
            last[0] = time.monotonic()
            leaving[0] = ray.get(box.add.remote(list(pending)))
            pending.clear()

    logging.getLogger("root").setLevel(logging.ERROR)
    context = ray.train.get_context()
    device = torch.device(ray.train.torch.get_device())
    worker = Worker(
        device, context.get_local_world_size(), parameters["decoders"], report, lambda: leaving[0] or _preempted()
    )
    try:
        finished = run_stages(parameters["config"], parameters["manifest"], worker)
    except (UserError, FloatingPointError) as error:  # trying again would not help
        ray.get(box.fail.remote(list(error.problems) if isinstance(error, UserError) else [str(error)]))
        raise  # or the other ranks would wait for this one
    if collectives.rank() == 0:
        ray.get(box.add.remote(pending))
    while not finished and _preempted():  # saved; Ray starts all workers anew where there is room
        time.sleep(1)


def _preempted() -> bool:
    """Whether a node of this run is about to be taken away. The public function is a barrier: too slow for a step."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
