"""Ray Train: the workers of `loop.py`, their metrics, restarts, and the record of what came out.

Contract: run again, a finished output is left alone, an unfinished one goes on from its last complete checkpoint, one
that was made with other settings is refused; a dead worker costs at most one epoch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from clipdist import checkpoint, collectives, lease, runtime, stages, storage, towers
from clipdist.config import UserError, dump
from clipdist.ledger import Manifest, read_manifest, refuse_other_stamp
from clipdist.loop import TrainConfig, run_stages
from clipdist.progress import Progress
from clipdist.report import duration, percent, table
from clipdist.schema import Stamp, recorded
from clipdist.vocab import VocabularyConfig

REPORT_SECONDS = 0.5
MAX_RESTARTS = 3
HARMLESS = ("output", "pairs", "workers", "reuse_frozen_features")
"""Settings that may change between a run and its resumption: they do not change the result (to rounding)."""


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains at `config.output`, or goes on, or finds the run finished. Returns result.json's content."""
    manifest = _checked_pairs(config)
    place = towers.locate(config.model.name)
    output, pretrained = storage.absolute(config.output), config.model.pretrained
    if pretrained is not None and storage.exists(pretrained):
        pretrained = storage.absolute(pretrained)
    resolved = config.model_copy(
        update={
            "output": output,
            "pairs": storage.absolute(config.pairs),
            "vocabulary": VocabularyConfig(terms=config.vocabulary.all_terms()),
            "model": config.model.model_copy(update={"name": place.name, "pretrained": pretrained}),
        }
    )
    _stamp_output(output, _stamp(resolved, manifest, place.weights_sha256()))
    if storage.exists(storage.join(output, "result.json")):
        return read_result(output)
    with lease.held(output):
        runtime.save_config(output, dump(resolved))
        events = _train(resolved, manifest)
        result = _finish(resolved, events)
    return result


def read_result(output: str) -> dict[str, Any]:
    """What a finished run says of itself."""
    result: dict[str, Any] = json.loads(storage.read_bytes(storage.join(output, "result.json")))
    return result


def dry_run(config: TrainConfig) -> list[tuple[str, str]]:
    """Opens the pairs, builds the model and runs one tiny step in this process; writes nothing."""
    from clipdist import batches, loop, step

    manifest = _checked_pairs(config)
    model = towers.load(config.model)
    added = model.add_terms(config.vocabulary.all_terms())
    pairs = batches.read_pairs(manifest, "train", max_rows=8)
    stage = config.stages[-1]
    learning = step.set_learning(model, stage.parts())
    tiny = loop.Run(config, model, pairs, pairs, torch.device("cpu"), lambda event: None, None)
    loader = batches.Loader(pairs, model.preprocess, threads=2)
    rows = batches.epoch_order(len(pairs), config.seed, 0, 0)
    (local,) = loader.epoch([(rows, len(rows))], seed=config.seed, epoch=0, decode=True)
    loader.close()
    optimizer = step.make_optimizer(model, stage.parts(), stage.weight_decay)
    batch = loop.device_batch(tiny, local, None)
    started = time.perf_counter()
    made = step.optimise(
        step.GlobalLoss(model, tiny.loss_name),
        model,
        optimizer,
        batch,
        dict.fromkeys(stage.parts(), 0.0),
        1.0,
        seed=config.seed,
    )
    return [
        ("pairs", f"{manifest.written('pairs'):,}"),
        (
            "model",
            f"{sum(p.numel() for p in model.parameters()):,} values, {learning:,} learn in {stage.name}",
        ),
        ("input", f"{model.preprocess.size} x {model.preprocess.size} px, {model.text_length} tokens"),
        ("new tokens", f"{len(added)}: {', '.join(list(added)[:8])}"),
        (
            "one step on 8 pairs",
            f"loss {made.loss:.4f}, gradient norm {made.gradient_norm:.3f}, {time.perf_counter() - started:.2f} s",
        ),
    ]


def derived(config: TrainConfig) -> list[tuple[str, str]]:
    """Numbers that follow from the config; those of the data only when the pairs are there."""
    found = [("global batch", f"{config.global_batch_size} pairs")]
    try:
        rows = _rows(_checked_pairs(config), "train")
    except UserError:
        return [*found, ("steps", "unknown: the pairs are not there yet")]
    per_epoch = stages.steps_per_epoch(rows, config.global_batch_size)
    for stage in config.stages:
        found.append((f"stage {stage.name}", f"{stage.epochs} epochs x {per_epoch} steps = {stage.epochs * per_epoch}"))
    total = sum(stage.epochs for stage in config.stages) * per_epoch
    found += [("training pairs", f"{rows:,}"), ("steps in all", f"{total:,}")]
    try:
        dim = towers.load(config.model.model_copy(update={"pretrained": None})).dim
    except UserError:
        return found
    gathered = 2 * config.global_batch_size * dim * 4
    return [
        *found,
        ("gathered per step", f"{gathered:,} bytes of embeddings forward, as many of gradients backward"),
    ]


def _rows(manifest: Manifest, split: str) -> int:
    return sum(file.rows for file in manifest.select("pairs", split))


def _checked_pairs(config: TrainConfig) -> Manifest:
    manifest = read_manifest(storage.absolute(config.pairs), "pairs")
    problems = []
    if not _rows(manifest, "train"):
        problems.append(f"pairs: {config.pairs} has no row in the split train")
    elif _rows(manifest, "train") < 2:
        problems.append(f"pairs: {config.pairs} has a single training pair; a contrast needs two")
    if not _rows(manifest, config.validation.split):
        splits = sorted({file.split or "" for file in manifest.select("pairs")})
        problems.append(f"validation.split: no row in {config.validation.split} (splits: {', '.join(splits)})")
    names = [stage.name for stage in config.stages]
    if len(set(names)) != len(names):
        problems.append(f"stages: each needs a name of its own, got {', '.join(names)}")
    if problems:
        raise UserError(*problems)
    return manifest


def _stamp(config: TrainConfig, manifest: Manifest, weights_sha256: str | None) -> Stamp:
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in HARMLESS}
    pairs = json.dumps(manifest.stamp.identity, sort_keys=True)
    settings["model"]["weights_sha256"] = weights_sha256
    settings["pairs_sha256"] = hashlib.sha256(pairs.encode()).hexdigest()
    return Stamp("checkpoint", settings, recorded())


def _stamp_output(output: str, stamp: Stamp) -> None:
    path = storage.join(output, "stamp.json")
    strange = [name for name in storage.names(output) if name not in ("config.yaml",)]
    if strange and not storage.exists(path):
        raise UserError(f"{output}: this folder already holds {strange[0]}; choose an empty or new output")
    storage.put_if_absent(path, json.dumps(stamp.to_json()).encode())
    refuse_other_stamp(output, stamp, Stamp.from_json(json.loads(storage.read_bytes(path))))


@ray.remote(num_cpus=0)
class EventBox:
    """Where rank 0 puts what happened and the driver takes it from."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def add(self, events: list[dict[str, Any]]) -> None:
        self.events += events

    def take(self) -> list[dict[str, Any]]:
        taken, self.events = self.events, []
        return taken


def _train(config: TrainConfig, manifest: Manifest) -> list[dict[str, Any]]:
    runtime.connect()
    workers, use_gpu = _scale(config)
    scratch = tempfile.mkdtemp(prefix="clipdist-ray-")  # Ray's own notes; our checkpoints are not reported to it
    box = EventBox.remote()  # type: ignore[attr-defined]
    cpus = 1 if use_gpu else max(1, runtime.cpus() // workers)
    resources = {"CPU": cpus} | ({"GPU": 1} if use_gpu else {})
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"config": config, "manifest": manifest, "box": box},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(max_failures=MAX_RESTARTS),
        ),
    )
    history = History(config, _rows(manifest, "train"))
    stop = threading.Event()
    watcher = threading.Thread(target=history.watch, args=(box, stop), daemon=True)
    watcher.start()
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _unwrapped(error) from None
    except SystemExit:  # how Ray ends a run that was interrupted
        raise KeyboardInterrupt from None
    finally:
        stop.set()
        watcher.join()
        shutil.rmtree(scratch, ignore_errors=True)
    return history.events


def _unwrapped(error: ray.train.TrainingFailedError) -> Exception:
    """The person's mistake behind a failed run, if that is what it was."""
    for cause in getattr(error, "worker_failures", {}).values():
        inner = getattr(cause, "cause", cause)
        if isinstance(inner, UserError | FloatingPointError):
            return UserError(str(inner))
    return error


def _scale(config: TrainConfig) -> tuple[int, bool]:
    """Workers, and whether each has a GPU. UserError when the cluster has not enough."""
    gpus, cpus = runtime.gpus(), runtime.cpus()
    use_gpu = config.workers.use_gpu if config.workers.use_gpu is not None else gpus > 0
    workers = config.workers.num_workers or (max(gpus, 1) if use_gpu else min(2, cpus))
    there, kind = (gpus, "GPUs") if use_gpu else (cpus, "CPU cores")
    if workers > there:
        raise UserError(f"workers.num_workers: {workers} workers need {workers} {kind}; the cluster has {there}")
    return workers, use_gpu


def _worker(parameters: dict[str, Any]) -> None:
    """One rank: Ray calls this on every worker, and again on all of them after a failure."""
    box, pending, last = parameters["box"], [], [0.0]

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "validated":
            ray.train.report({name: value for name, value in event.items() if isinstance(value, int | float)})
        if collectives.rank() != 0:
            return
        pending.append(event | {"time": time.time()})
        if event["event"] != "step" or time.monotonic() - last[0] > REPORT_SECONDS:
            last[0] = time.monotonic()
            ray.get(box.add.remote(list(pending)))
            pending.clear()

    logging.getLogger("root").setLevel(logging.ERROR)
    device = ray.train.torch.get_device()
    run_stages(parameters["config"], parameters["manifest"], torch.device(device), report)
    ray.get(box.add.remote(pending))


@dataclass
class History:
    """The driver's view: a bar, a line per validated epoch, metrics.jsonl."""

    config: TrainConfig
    train_rows: int
    events: list[dict[str, Any]] = field(default_factory=list)

    def watch(self, box: Any, stop: threading.Event) -> None:
        epochs = sum(stage.epochs for stage in self.config.stages)
        with Progress("train", epochs * self.train_rows, "pairs") as bar:
            while not stop.wait(REPORT_SECONDS):
                self._take(box, bar)
            self._take(box, bar)

    def _take(self, box: Any, bar: Progress) -> None:
        try:
            taken = ray.get(box.take.remote(), timeout=10)
        except (ray.exceptions.RayError, ConnectionError):
            return
        for event in taken:
            if event["event"] == "step":
                shown = {name: event[name] for name in ("stage", "epoch", "loss", "pairs_per_second", "data_wait")}
                bar.advance(event["pairs"], **shown)
            elif event["event"] == "validated":
                best = self.config.validation.best
                bar.note(
                    f"  {event['stage']:<12} epoch {event['epoch']:>3}  step {event['step']:>6}  "
                    f"{best} {event.get(best, float('nan')):.4f}",
                    **{name: value for name, value in event.items() if name not in ("event", "time")},
                )
            elif event["event"] == "encoded":
                bar.advance(0, computing=f"features of {event['split']}")
        if taken:
            self.events += taken
        if any(event["event"] == "validated" for event in taken):
            self.write()

    def write(self) -> None:
        path = storage.join(self.config.output, "metrics.jsonl")
        earlier = storage.read_bytes(path) if storage.exists(path) else b""
        known = set(earlier.splitlines())
        lines = [json.dumps(event).encode() for event in self.events if event["event"] in ("step", "validated")]
        storage.write_atomic(path, earlier + b"".join(line + b"\n" for line in lines if line not in known))


def _finish(config: TrainConfig, events: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes result.json: the run is finished."""
    found = checkpoint.complete(config.output)
    if not found:
        raise RuntimeError(f"{config.output}: training ended without a complete checkpoint")
    best_path, best = checkpoint.best(found, config.validation.best)
    last_path, last = found[-1]
    steps = [event for event in events if event["event"] == "step"]
    result = {
        "best": "checkpoints/" + best_path.rpartition("/")[2],
        "last": "checkpoints/" + last_path.rpartition("/")[2],
        "best_metric": config.validation.best,
        "metrics": best.metrics,
        "last_metrics": last.metrics,
        "data_wait": steps[-1]["data_wait"] if steps else None,
        "seconds": events[-1]["time"] - events[0]["time"] if events else None,
    }
    storage.write_atomic(storage.join(config.output, "result.json"), json.dumps(result, indent=1).encode())
    return result


def summary(output: str, result: dict[str, Any]) -> str:
    """What a person sees at the end."""
    names = ("hit_rate@1", "hit_rate@5", "hit_rate@10", "mrr@10", "median_rank")
    rows = []
    for direction in ("text_to_image", "image_to_text"):
        values = [result["metrics"].get(f"{direction}/{name}") for name in names]
        rows.append([direction.replace("_", " "), *(f"{value:.3f}" if value is not None else "-" for value in values)])
    path = storage.join(output, result["best"])
    lines = [table(["validation, best checkpoint", *names], rows), "", f"best checkpoint  {path}"]
    lines.append(f"in open_clip     open_clip.create_model_and_transforms({'local-dir:' + path!r})")
    if result["seconds"]:
        wait = (
            f", {percent(result['data_wait'])} of the last epoch's time waiting for data"
            if result["data_wait"] is not None
            else ""
        )
        lines.append(f"took             {duration(result['seconds'])}{wait}")
    return "\n".join(lines)
