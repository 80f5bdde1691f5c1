"""One worker's run of all stages: decode, embed, gather, step, validate, checkpoint. Knows nothing of Ray.

batches.rows(stage, step) -> decode, tokenise -> towers -> all_gather -> loss -> exact gradients -> step
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from clipdist import batches, checkpoint, collectives, stages, step
from clipdist.batches import Loader, LocalBatch, Pairs, key_hash
from clipdist.checkpoint import Progress
from clipdist.config import Section, UserError
from clipdist.ledger import Manifest
from clipdist.retrieval import DIRECTIONS, HIGHER_IS_BETTER, Gallery, measure, normal_caption
from clipdist.stages import StageConfig
from clipdist.towers import ModelConfig, Towers, load
from clipdist.vocab import VocabularyConfig

ENCODE_ROWS = {"cpu": 32, "cuda": 256}
"""Rows per forward pass where no gradient is needed. Larger ones cost CPUs a third: their activations are too large
for the allocator to keep, so every pass faults its pages in anew."""

Report = Callable[[dict[str, Any]], None]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


class ValidationConfig(Section):
    """Retrieval on held-out pairs after every epoch."""

    split: str = "validation"
    """The split to measure on."""
    max_rows: int = Field(10_000, ge=1)
    """At most this many of its pairs, evenly drawn."""
    best: str = "text_to_image/hit_rate@10"
    """The metric that chooses the best checkpoint: DIRECTION/METRIC."""

    @field_validator("best")
    @classmethod
    def _known(cls, best: str) -> str:
        names = [f"{direction}/{name}" for direction in DIRECTIONS for name in HIGHER_IS_BETTER]
        if best not in names:
            raise ValueError(f'expected one of {", ".join(names)}; got "{best}"')
        return best


class WorkersConfig(Section):
    """How the work is spread. The result does not depend on it (to rounding)."""

    num_workers: int | None = Field(None, ge=1)
    """Training processes; null: one per GPU of the cluster, without GPUs two (or one on a single core)."""
    use_gpu: bool | None = None
    """null: when the cluster has GPUs."""
    decode_threads: int = Field(4, ge=1)
    """Threads per worker that decode pictures ahead."""


class TrainConfig(Section):
    """Pairs + a CLIP -> a CLIP of the domain."""

    pairs: str
    """What `prepare` made."""
    output: str
    """Folder or prefix of the run."""
    model: ModelConfig
    """The CLIP to start from."""
    vocabulary: VocabularyConfig = VocabularyConfig()
    """Domain words that become new tokens."""
    stages: tuple[StageConfig, ...] = Field(stages.DEFAULT_STAGES, min_length=1)
    """The schedule, in order."""
    global_batch_size: int = Field(256, ge=2)
    """Pairs per optimizer step over all workers; every pair sees all others of it as negatives."""
    loss: Literal["auto", "contrastive", "sigmoid"] = "auto"
    """auto: sigmoid for models with a logit_bias (SigLIP), else contrastive."""
    gradient_clip: float = Field(1.0, gt=0)
    """The gradient's L2 norm is cut to this."""
    seed: int = Field(0, ge=0)
    """Orders the pairs and chooses captions."""
    reuse_frozen_features: bool = True
    """Compute tower outputs once in stages where only the projections learn."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the towers; auto: bf16 on GPUs, fp32 on CPUs. The loss is at least fp32 always."""
    validation: ValidationConfig = ValidationConfig()
    """How progress is judged."""
    workers: WorkersConfig = WorkersConfig()
    """How the work is spread."""


@dataclass
class Run:
    """What all stages share."""

    config: TrainConfig
    towers: Towers
    train: Pairs
    validation: Pairs
    device: torch.device
    report: Report
    autocast: torch.dtype | None
    relevance: dict[str, Any] = field(default_factory=dict)

    @property
    def loss_name(self) -> step.LossName:
        if self.config.loss == "auto":
            return "contrastive" if self.towers.logit_bias() is None else "sigmoid"
        return self.config.loss


def keep_freed_memory() -> None:
    """On a CPU, glibc hands the activations of a pass back to the kernel, which zeroes every page for the next pass: a
    third of the time of a small model. This process keeps them instead. Does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def run_stages(config: TrainConfig, manifest: Manifest, device: torch.device, report: Report) -> None:
    """Trains from the last complete checkpoint, or from the start, to the end. Every rank calls it."""
    if device.type == "cpu":
        keep_freed_memory()
    done = checkpoint.complete(config.output)
    position = collectives.broadcast_object(done[-1][1] if done else None)
    path = collectives.broadcast_object(done[-1][0] if done else None)
    run = _open_run(config, manifest, device, report, path)
    if position is None:
        report({"event": "validated", "stage": "start", "epoch": 0, "step": 0, **_validate(run, None)})
    for index, stage in enumerate(config.stages):
        if position is not None and (index < position.stage or _stage_done(position, index, stage)):
            continue
        resumed = position if position is not None and position.stage == index else None
        position = _run_stage(run, index, stage, position.step if position else 0, resumed, path if resumed else None)


def _stage_done(position: Progress, index: int, stage: StageConfig) -> bool:
    return position.stage == index and position.epoch >= stage.epochs


def _open_run(
    config: TrainConfig, manifest: Manifest, device: torch.device, report: Report, checkpoint_path: str | None
) -> Run:
    if checkpoint_path is None:
        torch.manual_seed(config.seed)  # a model without weights must start the same on every rank
        towers = load(config.model)
        added = towers.add_terms(config.vocabulary.all_terms())
        report({"event": "vocabulary", "new_tokens": len(added)})
    else:
        towers = load(ModelConfig(name=checkpoint_path))
    train = batches.read_pairs(manifest, "train")
    validation = batches.read_pairs(manifest, config.validation.split, config.validation.max_rows)
    half = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    run = Run(config, towers.to(device), train, validation, device, report, torch.bfloat16 if half else None)
    if len(validation):
        captions = [run.validation.captions(row) for row in range(len(validation))]
        pair_of_text = np.repeat(np.arange(len(validation)), [len(texts) for texts in captions])
        groups = validation.table.column("group").to_pylist()
        gallery = Gallery(groups, [text for texts in captions for text in texts], pair_of_text)
        run.relevance = gallery.relevance() if collectives.rank() == 0 else {}
    return run


def _run_stage(
    run: Run, index: int, stage: StageConfig, steps_before: int, resumed: Progress | None, path: str | None
) -> Progress:
    """All epochs of a stage that are still to do. DDP and the optimizer are new: another set of parameters learns."""
    config, towers = run.config, run.towers
    learning = step.set_learning(towers, stage.parts())
    if learning == 0:
        raise UserError(f"stages.{index}: the model has nothing that learns in {', '.join(stage.learns)}")
    optimizer = step.make_optimizer(towers, stage.parts(), stage.weight_decay)
    if path is not None:
        checkpoint.restore_optimizer(path, optimizer)
    model = collectives.wrap(step.GlobalLoss(towers, run.loss_name, run.autocast))
    reuse = config.reuse_frozen_features and stage.frozen_towers() and towers.reusable()
    features = TowerOutputs.compute(run, run.train, "train") if reuse else None
    held_out = TowerOutputs.compute(run, run.validation, "validation") if reuse else None
    first = resumed.epoch if resumed else 0
    per_epoch = stages.steps_per_epoch(len(run.train), config.global_batch_size)
    steps_before -= first * per_epoch
    progress = resumed
    for epoch in range(first, stage.epochs):
        _run_epoch(run, index, stage, epoch, model, optimizer, features)
        metrics = _validate(run, held_out)
        progress = Progress(index, stage.name, epoch + 1, steps_before + (epoch + 1) * per_epoch, metrics)
        run.report({"event": "validated", "stage": stage.name, "epoch": epoch + 1, "step": progress.step, **metrics})
        if collectives.rank() == 0:
            checkpoint.save(config.output, towers, optimizer, progress)
            checkpoint.prune(config.output, config.validation.best)
        collectives.barrier()
    assert progress is not None
    return progress


def _run_epoch(
    run: Run,
    index: int,
    stage: StageConfig,
    epoch: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    features: TowerOutputs | None,
) -> None:
    config = run.config
    per_epoch = stages.steps_per_epoch(len(run.train), config.global_batch_size)
    loader = Loader(run.train, run.towers.preprocess, threads=config.workers.decode_threads)
    started, seen = time.perf_counter(), 0
    try:
        local_batches = loader.epoch(_shares(run, index, epoch), seed=config.seed, epoch=epoch, decode=features is None)
        for number, local in enumerate(local_batches):
            rates = stages.learning_rates(stage, epoch * per_epoch + number, stage.epochs * per_epoch)
            batch = device_batch(run, local, features)
            stepped = step.optimise(
                model, run.towers, optimizer, batch, rates, config.gradient_clip, seed=config.seed + number
            )
            seen += local.global_rows
            seconds = time.perf_counter() - started
            run.report(
                {"event": "step", "stage": stage.name, "epoch": epoch + 1, "step_of_epoch": number + 1}
                | {
                    "pairs": local.global_rows,
                    "loss": stepped.loss,
                    "gradient_norm": stepped.gradient_norm,
                    "learning_rate": max(rates.values()),
                }
                | {"logit_scale": float(run.towers.logit_scale()), "pairs_per_second": seen / seconds}
                | {"data_wait": loader.wait_seconds / seconds}
            )
    finally:
        loader.close()


def _shares(run: Run, index: int, epoch: int) -> list[tuple[batches.Indices, int]]:
    """This rank's rows of every global batch of an epoch; a rank without rows runs one row with weight 0."""
    order = batches.epoch_order(len(run.train), run.config.seed, index, epoch)
    size, shares = run.config.global_batch_size, []
    for number in range(stages.steps_per_epoch(len(order), size)):
        whole = batches.global_batch(order, number, size)
        shares.append((batches.local_rows(whole, collectives.rank(), collectives.world_size()), len(whole)))
    return shares


def device_batch(run: Run, local: LocalBatch, features: TowerOutputs | None) -> step.Batch:
    device, rows = run.device, len(local.rows)
    groups = run.train.table.column("group")
    keys = [
        [
            key_hash("group", group) if (group := groups[int(row)].as_py()) else 0,
            key_hash("caption", normal_caption(text)),
        ]
        for row, text in zip(local.rows, local.captions, strict=True)
    ]
    key_tensor = torch.tensor(keys, dtype=torch.int64, device=device).reshape(rows, 2)
    if features is not None:
        shown, texts = features.take(local, device)
    elif rows:
        assert local.pixels is not None
        shown, texts = (
            torch.from_numpy(local.pixels).to(device),
            run.towers.tokenise(local.captions).to(device),
        )
    else:
        size = run.towers.preprocess.size
        shown = torch.zeros((1, size, size, 3), dtype=torch.uint8, device=device)
        texts = run.towers.tokenise(["none"]).to(device)
    return step.Batch(shown, texts, key_tensor, rows, local.global_rows, features is not None, features is not None)


@dataclass(frozen=True)
class TowerOutputs:
    """Both towers' outputs of all pairs and captions, computed once and shared by all ranks; float16 on the CPU."""

    images: Tensor
    texts: Tensor
    first_text: batches.Indices

    @staticmethod
    def compute(run: Run, pairs: Pairs, name: str) -> TowerOutputs:
        """Every rank computes its share, then the shares are gathered."""
        counts = np.array([len(texts) for texts in pairs.table.column("captions").to_pylist()], np.int64)
        if not len(pairs):
            empty = torch.zeros((0, run.towers.dim))
            return TowerOutputs(empty, empty, counts)
        mine = batches.local_rows(np.arange(len(pairs)), collectives.rank(), collectives.world_size())
        images, texts = [], []
        for shown, tokens in _encode_inputs(run, pairs, mine, name):
            with (
                torch.no_grad(),
                torch.autocast(run.device.type, run.autocast, enabled=run.autocast is not None),
            ):
                images.append(run.towers.image_tower_output(shown).half())
                texts.append(torch.cat([run.towers.text_tower_output(part).half() for part in tokens]))
        gathered = [_gather_outputs(run, parts) for parts in (images, texts)]
        return TowerOutputs(gathered[0], gathered[1], np.cumsum(counts) - counts)

    def take(self, local: LocalBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(local.rows if len(local.rows) else np.zeros(1, np.int64))
        choices = self.first_text[rows.numpy()] + (local.choices if len(local.rows) else 0)
        shown, texts = self.images[rows], self.texts[torch.from_numpy(choices)]
        return shown.to(device).float(), texts.to(device).float()


def _encode_inputs(run: Run, pairs: Pairs, rows: batches.Indices, name: str) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Pixels and tokens of ENCODE_ROWS pairs at a time; a rank without rows still takes part with nothing."""
    loader = Loader(pairs, run.towers.preprocess, threads=run.config.workers.decode_threads)
    size = ENCODE_ROWS[run.device.type]
    shares = [(rows[start : start + size], 0) for start in range(0, len(rows), size)]
    try:
        for local in loader.epoch(shares, seed=0, epoch=0, decode=True):
            assert local.pixels is not None
            texts = [text for row in local.rows for text in pairs.captions(int(row))]
            tokens = run.towers.tokenise(texts).to(run.device)
            yield torch.from_numpy(local.pixels).to(run.device), list(tokens.split(size))
            run.report({"event": "encoded", "split": name, "pairs": len(local.rows), "of": len(rows)})
    finally:
        loader.close()


def _gather_outputs(run: Run, parts: list[Tensor]) -> Tensor:
    width = max(collectives.row_counts(parts[0].shape[1] if parts else 0, run.device))
    local = torch.cat(parts) if parts else torch.zeros((0, width), dtype=torch.float16, device=run.device)
    local = local.float()  # gloo gathers no float16
    return collectives.gather_rows(local, collectives.row_counts(len(local), run.device)).half().cpu()


def _validate(run: Run, outputs: TowerOutputs | None) -> dict[str, float]:
    """Retrieval over the held-out pairs: all ranks encode, every rank gets rank 0's numbers."""
    if not len(run.validation):
        return {}
    towers = run.towers
    outputs = outputs or TowerOutputs.compute(run, run.validation, "validation")
    with torch.no_grad():
        shown = torch.nn.functional.normalize(towers.project_image(outputs.images.to(run.device).float()), dim=-1)
        texts = torch.nn.functional.normalize(towers.project_text(outputs.texts.to(run.device).float()), dim=-1)
    found = {}
    if collectives.rank() == 0:
        found = measure(shown.float().cpu().numpy(), texts.float().cpu().numpy(), run.relevance)
    result: dict[str, float] = collectives.broadcast_object(found)
    return result
