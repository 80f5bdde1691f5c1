"""One worker's run of all stages: read, decode, embed, gather, step, validate, save. Knows nothing of Ray.

lanes (stage, step) -> pictures or reused outputs -> towers -> all_gather -> loss -> exact gradients -> step
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clipdist import checkpoint, collectives, memory, models, outputs, stages, storage
from clipdist.checkpoint import INTERPOLATED, Progress
from clipdist.interpolate import best_alpha, interpolated
from clipdist.lanes import DEFAULT_LANES
from clipdist.loader import Loader, LocalBatch, Shares
from clipdist.manifest import Manifest, read_manifest
from clipdist.models import ModelConfig
from clipdist.opening import PAIR_COLUMNS, Run, Stage, Worker, open_run, open_stage, prepare_process
from clipdist.optimizer import state_of
from clipdist.outputs import row_groups
from clipdist.recipe import TrainConfig
from clipdist.stages import Part
from clipdist.step import Batch, Stepped, optimise
from clipdist.validation import HeldOut


def run_stages(config: TrainConfig, manifest: Manifest, worker: Worker) -> bool:
    """Trains from the last complete checkpoint, or from the start, to the end. Every rank calls it.

    False: somebody wanted to leave; the state is saved, and the next call goes on from there.
    """
    prepare_process(config, worker.device)
    run, position, state = open_run(config, manifest, worker)
    for index, stage in enumerate(config.stages):
        here = position.stage == index and position.stage_name == stage.name
        if position.stage > index or (here and position.stage_done and position.metrics):
            continue
        position, state = _run_stage(run, index, position, state if position.step else {})
        if run.left:
            break
    if not run.left and config.interpolate is not None and position.stage < len(config.stages):
        _interpolate(run, position)
    run.writer.wait()
    if run.left:
        return False
    if collectives.rank() == 0:
        storage.remove_tree(storage.join(config.output, "outputs"))
    collectives.barrier()
    run.worker.report({"event": "finished"})
    return True


def _run_stage(
    run: Run, index: int, position: Progress, state: dict[str, Tensor]
) -> tuple[Progress, dict[str, Tensor]]:
    """The steps of a stage that are still to do. DDP and the optimizer are new: another set of parameters learns."""
    config, settings = run.config, run.config.stages[index]
    resumed = position.stage == index and position.stage_name == settings.name
    if not resumed:
        position = Progress(index, settings.name, 0, position.step)
    stage = open_stage(run, index, position, state)
    if position.stage_step and not position.metrics and _validation_is_due(run, stage, position):
        position = _measured(run, stage, position)  # the run ended between the checkpoint and its validation
    position = replace(position, micro_batch_size=stage.micro_batch_size)
    shares = Shares(
        config.seed,
        index,
        config.batch_size_of(settings),
        stage.steps,
        config.lanes or DEFAULT_LANES,
        collectives.rank(),
        collectives.world_size(),
    )
    preprocess = None if stage.reused[0] else run.towers.preprocess
    tokenise = None if stage.reused[1] else run.towers.tokenise
    pin = run.worker.device.type == "cuda"
    loader = Loader(stage.rows, shares, tokenise, preprocess, settings.augment, run.worker.decoders, pin=pin)
    meter, epoch_started = Meter(), time.perf_counter()
    try:
        for local in loader.batches(position.stage_step) if not position.stage_done else ():
            rates = stages.learning_rates(settings, local.step, stage.steps)
            stepped = _step(run, stage, local, rates, loader.take_wait())
            position = _count(position, stage, local)
            run.worker.report(_step_event(run, stage, local, stepped, rates, meter, position.step))
            if position.stage_step % stage.per_epoch == 0:
                seconds = time.perf_counter() - epoch_started
                facts = {"stage": settings.name, "epoch": position.epoch, "step": position.step, "seconds": seconds}
                run.worker.report({"event": "epoch", **facts})
            due = _validation_is_due(run, stage, position)
            if due or stepped.leave or _checkpoint_is_due(run, position):
                run.save(position, state_of(stage.optimizer, stage.learning))
            if stepped.leave:
                run.left = True
                break
            if due:
                position = _measured(run, stage, position)
                meter.restart()
                epoch_started = time.perf_counter()
            if position.stage_done:
                break
    finally:
        stage.rows.close()
    return position, state_of(stage.optimizer, stage.learning)


@dataclass
class Meter:
    """Speed and waiting of the steps since the last restart; the first step, which starts everything, is left out."""

    pairs: int = 0
    started: float | None = None
    waited: float = 0.0

    def restart(self) -> None:
        self.started = None

    def count(self, pairs: int, waited: float) -> dict[str, float]:
        now = time.perf_counter()
        if self.started is None:
            self.started, self.pairs, self.waited = now, 0, 0.0
            return {}
        self.pairs, self.waited = self.pairs + pairs, self.waited + waited
        seconds = now - self.started
        return {"pairs_per_second": self.pairs / seconds, "data_wait": self.waited / seconds}


def _step(run: Run, stage: Stage, local: LocalBatch, rates: Mapping[Part, float], waited: float) -> Stepped:
    """One optimizer step. Its random numbers are a function of (seed, stage, step), so nothing of them is saved."""
    key = f"{run.config.seed}:{stage.index}:{local.step}"
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    return optimise(
        stage.model,
        run.towers,
        stage.optimizer,
        device_batch(run, stage, local),
        rates,
        run.config.gradient_clip,
        seed=seed,
        micro_batch_size=stage.micro_batch_size,
        leave=run.worker.wants_to_leave(),
        waited=waited,
    )


def device_batch(run: Run, stage: Stage, local: LocalBatch) -> Batch:
    """This rank's rows on the device. A rank without rows brings one that does not count."""
    towers, device, rows = run.towers, run.worker.device, local.rows
    images_reused, texts_reused = stage.reused
    counts = [len(captions) for captions in local.table.column("captions").to_pylist()]

    def column(name: str, chosen: bool) -> Tensor:
        values = local.table.column(name)
        if chosen:
            return outputs.chosen(values, counts, local.choices)
        return outputs.matrix(values)

    shown: Tensor | None
    told: Tensor | None
    if not rows:
        shown, told = _one_row(run, stage)
    else:
        shown = column("image_output", False) if images_reused else local.pixels
        told = column("text_outputs", True) if texts_reused else local.tokens
    assert shown is not None
    assert told is not None
    teacher = None
    if stage.config.distillation:
        own = (column("image_teacher", False), column("text_teachers", True))
        none = torch.zeros((0, towers.dim))
        teacher = (own[0].to(device), own[1].to(device)) if rows else (none.to(device), none.to(device))
    images, texts = shown.to(device, non_blocking=True), told.to(device, non_blocking=True)
    keys = local.keys.to(device)
    return Batch(images, texts, keys, rows, local.global_rows, images_reused, texts_reused, teacher)


def _one_row(run: Run, stage: Stage) -> tuple[Tensor, Tensor]:
    """Inputs of one row without content."""
    size = run.towers.preprocess.size
    shown = torch.zeros((1, size, size, 3), dtype=torch.uint8, device=run.worker.device)
    told = run.towers.tokenise(["none"]).to(run.worker.device)
    with torch.no_grad():
        if stage.reused[0]:
            shown = run.towers.image_tower_output(shown).float()
        if stage.reused[1]:
            told = run.towers.text_tower_output(told).float()
    return shown, told


def _count(position: Progress, stage: Stage, local: LocalBatch) -> Progress:
    """The position after this batch."""
    return replace(
        position,
        stage_step=local.step + 1,
        step=position.step + 1,
        epoch=(local.step + 1) // stage.per_epoch,
        stage_done=local.step + 1 == stage.steps,
        metrics={},
    )


def _validation_is_due(run: Run, stage: Stage, position: Progress) -> bool:
    every = run.config.validation.every_steps
    at_interval = every is not None and position.stage_step % every == 0
    return position.stage_done or position.stage_step % stage.per_epoch == 0 or at_interval


def _checkpoint_is_due(run: Run, position: Progress) -> bool:
    settings = run.config.checkpoints
    by_step = settings.every_steps is not None and position.step % settings.every_steps == 0
    by_time = settings.every_minutes is not None and time.monotonic() - run.saved_at > 60 * settings.every_minutes
    return by_step or by_time


def _measured(run: Run, stage: Stage, position: Progress) -> Progress:
    """The saved position with the held-out metrics; the stage ends early when they have stopped rising."""
    run.towers.eval()
    metrics = run.held_out.measure(run.encoder, towers_frozen=all(stage.reused))
    run.towers.train(stage.config.dropout)
    facts = {"stage": stage.config.name, "epoch": position.epoch, "step": position.step}
    run.worker.report({"event": "validated", **facts, **metrics})
    value, patience = metrics.get(run.config.validation.best), run.config.validation.patience
    if value is None:
        return position
    risen = position.stage_best is None or value > position.stage_best
    stale = 0 if risen else position.stale + 1
    ends = patience is not None and stale >= patience
    best = value if risen else position.stage_best
    done = position.stage_done or ends
    position = replace(position, metrics=metrics, stage_best=best, stale=stale, stage_done=done)
    run.measured(position)
    return position


def _step_event(
    run: Run, stage: Stage, local: LocalBatch, stepped: Stepped, rates: Mapping[Part, float], meter: Meter, step: int
) -> dict[str, Any]:
    return {
        "event": "step",
        "stage": stage.config.name,
        "epoch": local.epoch + 1,
        "step": step,
        "pairs": local.global_rows,
        "loss": stepped.loss,
        "gradient_norm": stepped.gradient_norm,
        "learning_rate": max(rates.values()),
        "learning_rates": dict(rates),
        "logit_scale": float(run.towers.logit_scale().detach()),
        "memory_bytes": memory.used_bytes(run.worker.device),
        **meter.count(local.global_rows, stepped.waited),
    }


def _interpolate(run: Run, position: Progress) -> None:
    """WiSE-FT: the best mixture of the best trained weights and the starting ones, as one more checkpoint."""
    config, settings = run.config, run.config.interpolate
    assert settings is not None
    run.writer.wait()
    collectives.barrier()
    trained = [item for item in checkpoint.complete(config.output) if item[1].step]
    path = collectives.broadcast_object(checkpoint.best(trained, config.validation.best)[0])
    run.towers = models.load(ModelConfig(name=path)).to(run.worker.device)
    encoder = replace(run.encoder, towers=run.towers)
    start = models.load(ModelConfig(name=checkpoint.start_of(config.output)))
    start.set_image_size(run.towers.preprocess.size)
    sets = [run.held_out]
    if settings.general is not None:
        general = read_manifest(settings.general, "pairs")
        sets.append(HeldOut(row_groups(general, config.validation.split, PAIR_COLUMNS), config.validation.max_rows))
    first = start.model.state_dict()
    last = {name: value.clone() for name, value in run.towers.model.state_dict().items()}
    scores, metrics = {}, {}
    for alpha in settings.alphas:
        if any(collectives.gather_objects(run.worker.wants_to_leave())):
            run.left = True  # nothing to save: a resumed run tries all of them again
            return
        run.towers.model.load_state_dict(interpolated(first, last, alpha))
        found = [held_out.measure(encoder, towers_frozen=False) for held_out in sets]
        scores[alpha], metrics[alpha] = [one[config.validation.best] for one in found], found[0]
        facts = {"stage": "interpolated", "step": position.step, "alpha": alpha, "scores": scores[alpha]}
        run.worker.report({"event": "interpolated", **facts})
    alpha = best_alpha(scores)
    run.towers.model.load_state_dict(interpolated(first, last, alpha))
    chosen = {"alpha": alpha, **metrics[alpha]}
    run.save(Progress(len(config.stages), INTERPOLATED, 0, position.step, stage_done=True, metrics=chosen), {})
