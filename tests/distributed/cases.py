"""What the ranks run: the project's own loss, wrapping, optimizer and step on the tiny towers, as it is or with one
piece replaced by a wrong variant."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipdist import batches, checkpoint, collectives, stages, step
from clipdist.stages import PARTS, Part, StageConfig
from tests.distributed.tiny_towers import Rows, TinyTowers, make_rows
from tests.distributed.wrong_variants import WRONG

NO_CLIP = 1e9
PROJECTIONS: tuple[Part, ...] = ("projections", "logit_scale")

SPLITS: dict[str, dict[int, list[int]]] = {
    "uneven": {1: [10], 2: [7, 3], 3: [3, 5, 2]},
    "first rank empty": {1: [9], 2: [0, 9], 3: [0, 5, 4]},
    "last rank empty": {1: [9], 2: [9, 0], 3: [4, 5, 0]},
    "all on one rank": {1: [9], 2: [9, 0], 3: [0, 9, 0]},
    "even": {1: [12], 2: [6, 6], 3: [4, 4, 4]},
}
"""Rows per rank, by world size."""


@dataclass(frozen=True)
class Case:
    """One step on one global batch. `unfreezes`: a step with only the projections comes first."""

    loss: str
    duplicates: bool = False
    split: str = "uneven"
    parts: tuple[Part, ...] = PARTS
    reused: bool = False
    unfreezes: bool = False
    wrong: str | None = None

    @property
    def name(self) -> str:
        facts = [self.loss, "duplicates" if self.duplicates else "", self.split, "+".join(self.parts)]
        facts += ["reused" if self.reused else "", "unfreezes" if self.unfreezes else "", self.wrong or ""]
        return ", ".join(fact for fact in facts if fact).replace("+".join(PARTS), "all")


LOSSES = ("contrastive", "sigmoid")
GRADIENT_CASES = [
    *(Case(loss, many, split) for loss, many, split in product(LOSSES, (False, True), SPLITS)),
    *(
        Case(loss, True, split, parts)
        for loss, split, parts in product(
            LOSSES,
            ("uneven", "last rank empty"),
            (("image_tower",), ("text_tower", "logit_scale"), ("projections", "text_tower"), ("logit_scale",)),
        )
    ),
    *(
        Case(loss, True, split, parts, reused=True)
        for loss, split, parts in product(LOSSES, ("uneven", "first rank empty"), (PROJECTIONS, ("projections",)))
    ),
    *(Case(loss, True, split, unfreezes=True) for loss, split in product(LOSSES, ("uneven", "last rank empty"))),
]

WRONG_CASES = [
    *(
        Case(loss, split=split, wrong=wrong)
        for wrong, loss, split in product(
            ("own slice live", "own slice live x W", "no gradient gather", "backward averages", "scale all-reduced"),
            LOSSES,
            ("uneven", "even"),
        )
    ),
    *(Case(loss, split=split, wrong="local mean") for loss, split in product(LOSSES, ("uneven", "even"))),
    *(Case(loss, unfreezes=True, wrong="old wrapper") for loss in LOSSES),
    *(Case(loss, True, wrong="positives of the own rank only") for loss in LOSSES),
    *(Case(loss, wrong="positives without the rank's offset") for loss in LOSSES),
]


@dataclass(frozen=True)
class Training:
    """Two stages, twelve steps: first the projections on reused features, then all. The last batch of an epoch has two
    rows, so that of three ranks one has none."""

    optimizer: str
    loss: str
    duplicates: bool = False
    clip: float = NO_CLIP

    rows = 26
    global_batch_size = 8

    @property
    def name(self) -> str:
        facts = [self.optimizer, self.loss, "duplicates" if self.duplicates else ""]
        return ", ".join(fact for fact in [*facts, "clipped" if self.clip < NO_CLIP else ""] if fact)

    def stages(self) -> tuple[StageConfig, StageConfig]:
        rate = {"sgd": 0.05, "adamw": 0.01}[self.optimizer]
        tower_rates: dict[Part, float] = {"image_tower": rate / 4, "text_tower": rate / 2}
        first = StageConfig(name="projections", learns=PROJECTIONS, epochs=1, learning_rate=rate, warmup=0.5)
        return first, StageConfig(
            name="all", learns=("all",), epochs=2, learning_rate=rate, learning_rates=tower_rates, weight_decay=0.3
        )

    def steps(self) -> Iterator[tuple[int, int, int, list[int]]]:
        """(stage, step of the stage, steps of the stage, rows of the global batch)."""
        per_epoch = stages.steps_per_epoch(self.rows, self.global_batch_size)
        for index, stage in enumerate(self.stages()):
            for epoch in range(stage.epochs):
                order = batches.epoch_order(self.rows, 3, index, epoch)
                for number in range(per_epoch):
                    chosen = batches.global_batch(order, number, self.global_batch_size).tolist()
                    yield index, epoch * per_epoch + number, stage.epochs * per_epoch, chosen


TRAININGS = [
    *(Training(optimizer, loss, many) for optimizer, loss, many in product(("sgd", "adamw"), LOSSES, (False, True))),
    Training("sgd", "contrastive", duplicates=True, clip=0.3),
]


def all_cases(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Everything that a world size is asked: by the name of the case, this rank's findings."""
    wrong = WRONG_CASES if world_size > 1 else []
    found = {case.name: one_step(case, rank, world_size) for case in [*GRADIENT_CASES, *wrong]}
    found |= {training.name: train(training, rank, world_size) for training in TRAININGS}
    return found | {"resume": resume(folder / "run", rank), "rebuilt buckets": _rebuilding(folder / "rebuilt", rank)}


def one_step(case: Case, rank: int, world_size: int) -> dict[str, Tensor]:
    """Loss, gradient norm and the gradient of every parameter that has one, by name."""
    counts = SPLITS[case.split][world_size]
    rows, towers = make_rows(sum(counts), case.duplicates), TinyTowers()
    mine = list(range(sum(counts[:rank]), sum(counts[: rank + 1])))
    with WRONG[case.wrong]() if case.wrong in WRONG else nullcontext():
        model = None
        if case.unfreezes:
            model, optimizer = open_stage(towers, case.loss, PROJECTIONS)
            _step(model, towers, optimizer, rows, mine, reused=False)
        if case.wrong == "old wrapper":
            step.set_learning(towers, case.parts)
            optimizer = step.make_optimizer(towers, case.parts, weight_decay=0.1)
        else:
            _old, (model, optimizer) = model, open_stage(towers, case.loss, case.parts)  # the old one stays alive
        loss, norm = _step(model, towers, optimizer, rows, mine, reused=case.reused)
    gradients = {name: p.grad for name, p in towers.model.named_parameters() if p.grad is not None}
    return {
        "loss": torch.tensor(loss, dtype=torch.float64),
        "norm": torch.tensor(norm, dtype=torch.float64),
    } | gradients


def open_stage(towers: TinyTowers, loss: str, parts: tuple[Part, ...]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What the training loop does at the start of a stage."""
    step.set_learning(towers, parts)
    optimizer = step.make_optimizer(towers, parts, weight_decay=0.1)
    return collectives.wrap(step.GlobalLoss(towers, loss)), optimizer


def _step(
    model: nn.Module, towers: TinyTowers, optimizer: torch.optim.Optimizer, rows: Rows, mine: list[int], *, reused: bool
) -> tuple[float, float]:
    """A step at rate 0: it leaves its gradients and changes nothing."""
    batch = local_batch(towers, rows, mine, len(rows), reused=reused)
    return step.optimise(model, towers, optimizer, batch, dict.fromkeys(PARTS, 0.0), NO_CLIP)


def local_batch(towers: TinyTowers, rows: Rows, mine: list[int], global_rows: int, *, reused: bool) -> step.Batch:
    """This rank's rows as the training loop makes them: a rank without rows runs one with `rows` 0."""
    run, own = rows.take(mine or [0]), rows.take(mine)
    images, texts = run.images, run.tokens
    if reused:
        with torch.no_grad():
            images, texts = towers.image_tower_output(images), towers.text_tower_output(texts)
    return step.Batch(images, texts, own.keys(), len(mine), global_rows, reused)


def train(training: Training, rank: int, world_size: int) -> dict[str, Tensor]:
    """The loss of every step, all weights after the first stage ("frozen: ...") and at the end."""
    rows, towers, losses = make_rows(training.rows, training.duplicates), TinyTowers(), []
    found: dict[str, Tensor] = {}
    current, opened = None, []
    for index, number, steps, chosen in training.steps():
        stage = training.stages()[index]
        if index != current:
            current = index
            found |= {f"frozen: {name}": value for name, value in weights(towers).items()} if index else {}
            step.set_learning(towers, stage.parts())
            optimizer = _optimizer(training.optimizer, step.make_optimizer(towers, stage.parts(), stage.weight_decay))
            opened.append(collectives.wrap(step.GlobalLoss(towers, training.loss)))
        mine = batches.local_rows(np.array(chosen), rank, world_size).tolist()
        batch = local_batch(towers, rows, mine, len(chosen), reused=stage.frozen_towers())
        rates = stages.learning_rates(stage, number, steps)
        losses.append(step.optimise(opened[-1], towers, optimizer, batch, rates, training.clip)[0])
    return found | {"losses": torch.tensor(losses, dtype=torch.float64)} | weights(towers)


def _optimizer(name: str, adamw: torch.optim.AdamW) -> torch.optim.Optimizer:
    if name == "adamw":
        return adamw
    return torch.optim.SGD([{key: group[key] for key in ("params", "part")} for group in adamw.param_groups], lr=0.0)


def weights(towers: TinyTowers) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in towers.model.named_parameters()}


def resume(run: Path, rank: int) -> dict[str, dict[str, Tensor]]:
    """Weights after six steps without a stop, after three and three more from a checkpoint, and the same from the
    checkpoint's weights alone."""
    rows, whole = make_rows(10, True), TinyTowers()
    _some_steps(whole, *open_stage(whole, "sigmoid", PARTS), rows, rank, range(6))

    first = TinyTowers()
    model, optimizer = open_stage(first, "sigmoid", PARTS)
    _some_steps(first, model, optimizer, rows, rank, range(3))
    if rank == 0:
        checkpoint.save(str(run), first, optimizer, checkpoint.Progress(0, "all", 1, 3, {}))
    collectives.barrier()
    path, progress = checkpoint.complete(str(run))[-1]

    found = {"whole": weights(whole)}
    for name in ("resumed", "without moments"):
        towers = TinyTowers()
        towers.load(path)
        model, optimizer = open_stage(towers, "sigmoid", PARTS)
        if name == "resumed":
            checkpoint.restore_optimizer(path, optimizer)
        _some_steps(towers, model, optimizer, rows, rank, range(progress.step, 6))
        found[name] = weights(towers)
    return found


def _some_steps(
    towers: TinyTowers, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, rank: int, steps: range
) -> None:
    for number in steps:
        order = batches.epoch_order(len(rows), 0, 0, number)
        mine = batches.local_rows(order, rank, collectives.world_size()).tolist()
        batch = local_batch(towers, rows, mine, len(rows), reused=False)
        step.optimise(model, towers, optimizer, batch, dict.fromkeys(PARTS, 0.3), NO_CLIP)


def _rebuilding(run: Path, rank: int) -> dict[str, dict[str, Tensor]]:
    """`resume` with DDP as it comes: it orders its buckets anew after the first step."""
    if collectives.world_size() == 1:
        return {}
    with mock.patch.object(collectives, "wrap", partial(DistributedDataParallel, gradient_as_bucket_view=True)):
        return resume(run, rank)
