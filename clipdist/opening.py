"""What a run and each of its stages work with: the model, the rows to read, the optimizer, the memory."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clipdist import checkpoint, collectives, memory, models, outputs, stages, storage
from clipdist.checkpoint import START, Progress, Writer
from clipdist.config import UserError
from clipdist.journal import Journal, Report
from clipdist.manifest import Manifest
from clipdist.models import ModelConfig
from clipdist.optimizer import Learning, carry_state, make_optimizer, set_learning
from clipdist.outputs import Encoder, row_groups, write_outputs
from clipdist.reader import IN_MEMORY_BYTES, RowGroups, Rows
from clipdist.recipe import TrainConfig
from clipdist.stages import StageConfig
from clipdist.step import GlobalLoss
from clipdist.towers import Towers
from clipdist.validation import HeldOut

COMPILED_GRAPHS = 64
"""Of both towers in one stage: several text lengths, the last batch of an epoch, validation."""
PAIR_COLUMNS = ("id", "captions", "group")


@dataclass(frozen=True)
class Worker:
    """Where this process runs: its device, how many processes share the machine, its decoding processes, what it
    reports to, and whether somebody wants the run to be saved and left."""

    device: torch.device
    sharers: int
    decoders: int
    report: Report
    wants_to_leave: Callable[[], bool] = lambda: False


@dataclass
class Run:
    """What all stages share."""

    config: TrainConfig
    worker: Worker
    towers: Towers
    encoder: Encoder
    pairs: RowGroups
    in_memory: bool
    held_out: HeldOut
    writer: Writer
    journal: Journal | None
    saved_at: float = 0.0
    left: bool = False

    def save(self, progress: Progress, state: dict[str, Tensor]) -> None:
        """Only rank 0 writes: all ranks have the same weights. The others go on and meet it in the next step."""
        self.saved_at = time.monotonic()
        if self.journal is not None:
            self.journal.write()
            self.writer.save(self.towers, state, progress)
            if self.writer.done():
                self.worker.report({"event": "saved"})

    def measured(self, progress: Progress) -> None:
        """The last checkpoint was measured."""
        if self.journal is not None:
            self.journal.write()
            self.writer.measured(progress)


@dataclass
class Stage:
    """What one stage works with."""

    index: int
    config: StageConfig
    learning: list[Learning]
    optimizer: torch.optim.Optimizer
    model: nn.Module
    rows: Rows
    reused: tuple[bool, bool]
    micro_batch_size: int
    per_epoch: int
    steps: int


def prepare_process(config: TrainConfig, device: torch.device) -> None:
    """Settings of the whole process: precision of fp32 products, determinism, memory."""
    torch.set_float32_matmul_precision("high" if config.speed.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.speed.tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if config.speed.compile:
        torch._dynamo.config.recompile_limit = COMPILED_GRAPHS
    if device.type == "cpu":
        memory.keep_freed()


def open_run(config: TrainConfig, manifest: Manifest, worker: Worker) -> tuple[Run, Progress, dict[str, Tensor]]:
    """The run with its weights, how far it is, and the optimizer's state."""
    if collectives.rank() == 0:
        checkpoint.remove_incomplete(config.output)
    found = checkpoint.complete(config.output) if collectives.rank() == 0 else []
    path, position = collectives.broadcast_object(found[-1] if found else (None, START))
    journal = None
    if collectives.rank() == 0:
        journal = Journal(config.output, config.log_every_steps, position.step, measured=bool(position.metrics))
    if journal is not None:
        worker = replace(worker, report=journal.before(worker.report))
    facts = {"stage": position.stage, "stage_step": position.stage_step, "step": position.step}
    worker.report({"event": "workers", "workers": collectives.world_size(), **facts})
    if path is None:
        torch.manual_seed(config.seed)  # a model without weights must start the same on every rank
        towers = models.load(config.model)
        towers.add_terms(config.vocabulary.all_terms(), start=config.vocabulary.start)
    else:
        towers = models.load(ModelConfig(name=path))
    towers.to(worker.device)
    towers.channels_last(config.speed.channels_last)
    towers.gradient_checkpointing(config.speed.gradient_checkpointing)
    half = config.speed.precision == "bf16" or (config.speed.precision == "auto" and worker.device.type == "cuda")
    encoder = Encoder(towers, worker.device, torch.bfloat16 if half else None, worker.decoders, worker.report)
    held_out = HeldOut(row_groups(manifest, config.validation.split, PAIR_COLUMNS), config.validation.max_rows)
    in_memory = sum(file.file_bytes for file in manifest.select("pairs", "train")) <= IN_MEMORY_BYTES
    pairs = row_groups(manifest, "train", PAIR_COLUMNS)
    writer = Writer(config.output, config.validation.best)
    run = Run(config, worker, towers, encoder, pairs, in_memory, held_out, writer, journal, time.monotonic())
    if path is not None:
        return run, position, checkpoint.optimizer_state(path)
    metrics = held_out.measure(encoder, towers_frozen=False)
    worker.report({"event": "validated", "stage": "start", "epoch": 0, "step": 0, **metrics})
    position = replace(START, metrics=metrics)
    run.save(position, {})
    run.writer.wait()
    collectives.barrier()
    return run, position, {}


def open_stage(run: Run, index: int, position: Progress, state: dict[str, Tensor]) -> Stage:
    """Sizes, learning parameters, optimizer, DDP and rows of a stage; moments of parameters that stay are kept."""
    config, settings, towers = run.config, run.config.stages[index], run.towers
    if settings.image_size is not None:
        towers.set_image_size(settings.image_size)
    if settings.text_length is not None:
        towers.text_length = settings.text_length
    run.held_out.frozen = None
    towers.dropout = settings.dropout
    towers.train(settings.dropout)
    learning = set_learning(towers, settings)
    if not learning:
        raise UserError(f"stages.{index}: the model has nothing that learns in {', '.join(settings.learns)}")
    optimizer = make_optimizer(learning, settings.weight_decay, config.speed.fused_adamw)
    carry_state(state, optimizer, learning)
    state.clear()  # or a stage would hold its moments twice
    reused = reusable(config, settings, towers)
    micro_batch_size = config.speed.micro_batch_size
    if micro_batch_size is None:
        micro_batch_size = position.micro_batch_size
    if micro_batch_size is None:
        micro_batch_size = _micro_batch_size(run, settings, learning, reused)
    if config.speed.compile:
        torch.compiler.reset()  # both towers and all stages share a limit of graphs, behind which nothing is compiled
        towers.compile()
    loss = GlobalLoss(towers, config.loss_of(towers), run.encoder.autocast, settings.distillation)
    rows = _open_rows(run, index, position.step, settings, reused)
    per_epoch = stages.steps_per_epoch(len(rows), config.batch_size_of(settings))
    steps = stages.total_steps(settings, per_epoch)
    model = collectives.wrap(loss)
    return Stage(index, settings, learning, optimizer, model, rows, reused, micro_batch_size, per_epoch, steps)


def reusable(config: TrainConfig, stage: StageConfig, towers: Towers) -> tuple[bool, bool]:
    """Whether outputs of the image tower, of the text tower can be computed once and read again in every epoch."""
    fixed = config.reuse_frozen_features and not stage.dropout
    images = fixed and not stage.tower_learns("image") and not stage.augment.active and towers.images_reusable
    return images, fixed and not stage.tower_learns("text") and towers.texts_reusable


def _open_rows(run: Run, index: int, step: int, stage: StageConfig, reused: tuple[bool, bool]) -> Rows:
    """The training rows with what the stage needs of them: pictures, reused outputs, the teacher's embeddings."""
    images, texts = reused
    tables = [run.pairs if images else replace(run.pairs, columns=(*run.pairs.columns, "image"))]
    folder = storage.join(run.config.output, "outputs")
    if images or texts:
        started = time.monotonic()
        name = outputs.digest(run.towers, images=images, texts=texts)
        run.towers.eval()
        place = storage.join(folder, f"{index:02d}-{name}")
        tables.append(write_outputs(run.encoder, run.pairs, place, images=images, texts=texts))
        seconds = time.monotonic() - started
        facts = {"stage": stage.name, "step": step, "seconds": seconds, "images": images, "texts": texts}
        run.worker.report({"event": "outputs", **facts})
    if stage.distillation:
        start = models.load(ModelConfig(name=checkpoint.start_of(run.config.output))).to(run.worker.device)
        encoder = replace(run.encoder, towers=start)
        place = storage.join(folder, "teacher-" + outputs.digest(start, images=True, texts=True))
        tables.append(write_outputs(encoder, run.pairs, place, images=True, texts=True, teacher=True))
    cache_bytes = int(run.config.workers.cache_gib * 2**30)
    return Rows(tables, in_memory=run.in_memory, cache_bytes=cache_bytes)


def _micro_batch_size(run: Run, stage: StageConfig, learning: list[Learning], reused: tuple[bool, bool]) -> int:
    """Rows per slice of a worker's share, 0 when all of it fits into memory at once. The same on every rank."""
    if all(reused):
        return 0
    towers, device = run.towers, run.worker.device

    def forward(rows: int) -> tuple[Tensor, Tensor]:
        size = towers.preprocess.size
        pixels = torch.zeros((rows, size, size, 3), dtype=torch.uint8, device=device)
        tokens = towers.tokenise(["word " * towers.text_length] * rows).to(device)
        with torch.autocast(device.type, run.encoder.autocast, enabled=run.encoder.autocast is not None):
            return towers.image_tower_output(pixels), towers.text_tower_output(tokens)

    learned = sum(one.parameter.numel() * one.parameter.element_size() for one in learning)
    free = memory.free_bytes(device, run.worker.sharers)
    again = run.config.speed.gradient_checkpointing
    fits = memory.rows_that_fit(forward, 4 * learned, free, recomputed=again)
    fits = min(collectives.row_counts(fits, device))
    if fits == 0:
        raise UserError(
            f"stages ({stage.name}): not even one pair fits into the memory of a worker; try "
            "speed.gradient_checkpointing=true, a smaller image_size, or fewer workers per machine"
        )
    share = math.ceil(run.config.batch_size_of(stage) / collectives.world_size())
    return fits if fits < share else 0
