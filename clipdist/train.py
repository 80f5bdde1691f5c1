"""Ray Train: the workers of `loop.py`, their restarts, and the record of what came out.

Contract: run again, a finished output is left alone, an unfinished one goes on from its last complete checkpoint, one
that was made with other settings is refused. A dead worker, node or driver costs the steps since the last checkpoint;
a signal or a preemption notice costs nothing, because the state is saved first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
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

from clipdist import checkpoint, collectives, history, lease, models, recipe, runtime, stages, storage
from clipdist.config import UserError, dump
from clipdist.history import History
from clipdist.lanes import DEFAULT_LANES
from clipdist.ledger import Manifest, read_manifest, refuse_other_stamp
from clipdist.loader import Loader, Shares
from clipdist.loop import run_stages
from clipdist.opening import PAIR_COLUMNS, Worker
from clipdist.optimizer import make_optimizer, set_learning
from clipdist.outputs import row_groups
from clipdist.progress import Progress
from clipdist.reader import RowGroups, Rows
from clipdist.recipe import TrainConfig
from clipdist.schema import Stamp, recorded
from clipdist.step import Batch, GlobalLoss, optimise
from clipdist.towers import Towers
from clipdist.vocab import VocabularyConfig

REPORT_SECONDS = 0.5


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains at `config.output`, or goes on, or finds the run finished. Returns result.json's content."""
    manifest = _checked_pairs(config)
    absolute = _absolute(config)
    output, stamp = absolute.output, _stamp(absolute, manifest)
    _refuse_other_run(output, stamp)
    if storage.exists(storage.join(output, "result.json")):
        return read_result(output)
    runtime.connect()
    scale = _scale(absolute)
    towers = _checked_model(absolute, manifest)
    with lease.held(output):
        storage.put_if_absent(storage.join(output, "stamp.json"), json.dumps(stamp.to_json()).encode())
        resolved = recipe.resolved(absolute, towers, _lanes(absolute, scale.workers))
        del towers
        runtime.save_config(output, dump(absolute))
        with Progress("train", _pairs_in_all(resolved, manifest), "pairs") as bar:
            watched = History(resolved, _rows(manifest, "train"), bar)
            _train(resolved, manifest, scale, watched)
        return _finish(resolved, watched)


def read_result(output: str) -> dict[str, Any]:
    """What a finished run says of itself."""
    result: dict[str, Any] = json.loads(storage.read_bytes(storage.join(output, "result.json")))
    return result


def summary(output: str, result: dict[str, Any]) -> str:
    return history.summary(output, result)


def dry_run(config: TrainConfig) -> list[tuple[str, str]]:
    """Opens the pairs, builds the model and runs one tiny step in this process; writes nothing."""
    manifest = _checked_pairs(config)
    towers = _checked_model(config, manifest)
    stage = recipe.resolved(config, towers, 1).stages[-1]
    learning = set_learning(towers, stage)
    groups = row_groups(manifest, "train", (*PAIR_COLUMNS, "image"))
    first = RowGroups(groups.files[:1], groups.indices[:1], groups.rows[:1], groups.columns)
    shares = Shares(config.seed, 0, 8, 1, 1, 0, 1)
    rows = Rows([first], in_memory=True)
    local = next(Loader(rows, shares, towers.preprocess, stage.augment, decoders=0).batches())
    assert local.pixels is not None
    batch = Batch(local.pixels, towers.tokenise(local.captions), local.keys, local.rows, local.global_rows)
    optimizer = make_optimizer(learning, stage.weight_decay, fused=True)
    loss, started = GlobalLoss(towers, config.loss_of(towers)), time.perf_counter()
    rates = dict.fromkeys(stage.parts(), 0.0)
    stepped = optimise(loss, towers, optimizer, batch, rates, config.gradient_clip, seed=0)
    seconds, learns = time.perf_counter() - started, sum(one.parameter.numel() for one in learning)
    values = sum(parameter.numel() for parameter in towers.parameters())
    return [
        ("pairs", f"{manifest.written('pairs'):,}"),
        ("model", f"{values:,} values, {learns:,} learn in {stage.name}"),
        ("input", f"{towers.preprocess.size} x {towers.preprocess.size} px, {towers.text_length} tokens"),
        ("new tokens", f"{len(towers.terms)}: {', '.join(towers.terms[:8])}"),
        ("one step", f"{local.rows} pairs, loss {stepped.loss:.4f}, {seconds:.2f} s"),
    ]


def derived(config: TrainConfig) -> list[tuple[str, str]]:
    """Numbers that follow from the config; those of the data only when the pairs are there."""
    try:
        rows = _rows(_checked_pairs(config), "train")
    except UserError:
        return [("steps", "unknown: the pairs are not there yet")]
    found, total = [("training pairs", f"{rows:,}")], 0
    for stage in config.stages:
        size = config.batch_size_of(stage)
        per_epoch = stages.steps_per_epoch(rows, size)
        steps = stages.total_steps(stage, per_epoch)
        total += steps
        found.append((f"stage {stage.name}", f"{steps:,} steps of {size:,} pairs, {steps / per_epoch:g} epochs"))
    return [*found, ("steps in all", f"{total:,}")]


def _absolute(config: TrainConfig) -> TrainConfig:
    """The same run with whole paths, every domain term, and the model's place."""
    pretrained, interpolate = config.model.pretrained, config.interpolate
    if pretrained is not None and storage.exists(pretrained):
        pretrained = storage.absolute(pretrained)
    if interpolate is not None and interpolate.general is not None:
        interpolate = interpolate.model_copy(update={"general": storage.absolute(interpolate.general)})
    name = models.locate(config.model.name).name
    return config.model_copy(
        update={
            "output": storage.absolute(config.output),
            "pairs": storage.absolute(config.pairs),
            "vocabulary": VocabularyConfig(terms=config.vocabulary.all_terms(), start=config.vocabulary.start),
            "model": config.model.model_copy(update={"name": name, "pretrained": pretrained}),
            "interpolate": interpolate,
        }
    )


def _rows(manifest: Manifest, split: str) -> int:
    return sum(file.rows for file in manifest.select("pairs", split))


def _pairs_in_all(config: TrainConfig, manifest: Manifest) -> int:
    rows = _rows(manifest, "train")
    return recipe.pairs_seen(config, rows, len(config.stages), 0)


def _checked_pairs(config: TrainConfig) -> Manifest:
    manifest = read_manifest(storage.absolute(config.pairs), "pairs")
    problems = []
    if not _rows(manifest, "train"):
        problems.append(f"pairs: {config.pairs} has no row in the split train")
    if not _rows(manifest, config.validation.split):
        splits = sorted({file.split or "" for file in manifest.select("pairs")})
        problems.append(f"validation.split: no row in {config.validation.split} (splits: {', '.join(splits)})")
    if problems:
        raise UserError(*problems)
    return manifest


def _checked_model(config: TrainConfig, manifest: Manifest) -> Towers:
    """The model as the run will start with it. UserError with everything that is wrong with the recipe."""
    towers = models.load(config.model)
    towers.add_terms(config.vocabulary.all_terms(), start=config.vocabulary.start)
    wrong, strange = recipe.problems(config, towers, _rows(manifest, "train"))
    if config.interpolate is not None and config.interpolate.general is not None:
        general = read_manifest(config.interpolate.general, "pairs")
        if not _rows(general, config.validation.split):
            wrong.append(f"interpolate.general: no row in the split {config.validation.split}")
    if config.tensorboard:
        with contextlib.suppress(ImportError):
            history.open_curves(tempfile.mkdtemp()).close()
    if wrong:
        raise UserError(*wrong)
    for remark in strange:
        print(f"note: {remark}", file=sys.stderr)
    return towers


def _stamp(config: TrainConfig, manifest: Manifest) -> Stamp:
    settings, pairs = recipe.identity(config), json.dumps(manifest.stamp.identity, sort_keys=True)
    settings["model"]["weights_sha256"] = models.locate(config.model.name).weights_sha256()
    settings["pairs_sha256"] = hashlib.sha256(pairs.encode()).hexdigest()
    return Stamp("checkpoint", settings, recorded())


def _refuse_other_run(output: str, stamp: Stamp) -> None:
    path = storage.join(output, "stamp.json")
    if storage.exists(path):
        refuse_other_stamp(output, stamp, Stamp.from_json(json.loads(storage.read_bytes(path))))
    elif strange := [name for name in storage.names(output) if name not in ("config.yaml", "running.json")]:
        raise UserError(f"{output}: this folder already holds {strange[0]}; choose an empty or new output")


def _lanes(config: TrainConfig, workers: int) -> int:
    """The run's lanes, chosen when it first starts: another number would be another order of the pairs."""
    path = storage.join(config.output, "lanes.json")
    chosen = config.lanes or max(DEFAULT_LANES, workers)
    storage.put_if_absent(path, json.dumps(chosen).encode())
    lanes = int(json.loads(storage.read_bytes(path)))
    if lanes < workers:
        raise UserError(
            f"workers.num_workers: {workers} workers, but this run was started with {lanes} lanes, each read by one "
            f"worker; use at most {lanes} workers, or a new output"
        )
    if lanes % workers:
        even = -(-lanes // workers) * workers
        print(f"note: {workers} workers share {lanes} lanes unevenly; with lanes={even} none waits", file=sys.stderr)
    return lanes


@ray.remote(num_cpus=0)
class EventBox:
    """Where rank 0 puts what happened, and hears whether the driver wants it to leave."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.leaving = False

    def add(self, events: list[dict[str, Any]]) -> bool:
        self.events += events
        return self.leaving

    def take(self) -> list[dict[str, Any]]:
        taken, self.events = self.events, []
        return taken

    def leave(self) -> None:
        self.leaving = True


def _train(config: TrainConfig, manifest: Manifest, scale: runtime.Scale, watched: History) -> None:
    scratch = tempfile.mkdtemp(prefix="clipdist-ray-")  # Ray's own notes; our checkpoints are not reported to it
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    box = EventBox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    decoders = config.workers.decoders
    trainer = ray.train.torch.TorchTrainer(
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
            _fit(trainer, box, watched)
    finally:
        watched.write()
        shutil.rmtree(scratch, ignore_errors=True)
    if watched.problems:
        raise UserError(*dict.fromkeys(watched.problems))
    if signals:
        raise KeyboardInterrupt


def _fit(trainer: ray.train.torch.TorchTrainer, box: Any, watched: History) -> None:
    """Runs the trainer in a thread, so that signals are ours, and takes events until it ends."""
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
    watched.add(ray.get(box.take.remote()))
    try:
        outcome.result()
    except ray.train.TrainingFailedError as error:
        raise _unwrapped(error) from None


@contextlib.contextmanager
def _leaving_on_signals(box: Any) -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM saves and leaves; a second one leaves at once. Gives the signals that came."""
    came: list[int] = []

    def on_signal(number: int, _: Any) -> None:
        came.append(number)
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


def _scale(config: TrainConfig) -> runtime.Scale:
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

    def report(event: dict[str, Any]) -> None:
        if collectives.rank() != 0:
            return
        pending.append(event | {"time": time.time()})
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
    except (UserError, FloatingPointError) as error:  # all ranks meet these alike; trying again would not help
        problems = error.problems if isinstance(error, UserError) else [str(error)]
        report({"event": "failed", "problems": list(problems)})
        return
    if collectives.rank() == 0:
        ray.get(box.add.remote(pending))
    while not finished and _preempted():  # saved; Ray starts all workers anew where there is room
        time.sleep(1)


def _preempted() -> bool:
    """Whether a node of this run is about to be taken away. The public function is a barrier: too slow for a step."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def _finish(config: TrainConfig, watched: History) -> dict[str, Any]:
    """Writes result.json: the run is finished."""
    found = checkpoint.complete(config.output)
    if not found:
        raise RuntimeError(f"{config.output}: training ended without a complete checkpoint")
    best_path, best = checkpoint.best(found, config.validation.best)
    last_path, last = found[-1]
    started = [line["time"] for line in watched.lines if line["event"] == "workers"]
    result = {
        "best": "checkpoints/" + best_path.rpartition("/")[2],
        "last": "checkpoints/" + last_path.rpartition("/")[2],
        "best_metric": config.validation.best,
        "metrics": best.metrics,
        "start_metrics": found[0][1].metrics,
        "last_metrics": last.metrics,
        "data_wait": watched.facts.get("data_wait"),
        "memory_bytes": watched.facts.get("memory_bytes"),
        "seconds": watched.lines[-1]["time"] - started[0] if started else None,
        "remarks": watched.remarks(),
    }
    storage.write_atomic(storage.join(config.output, "result.json"), json.dumps(result, indent=1).encode())
    return result
