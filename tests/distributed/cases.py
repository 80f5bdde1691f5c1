"""What the ranks run: the project's own loss, wrapping, optimizer and step on the tiny towers, as it is or with one
piece replaced by a wrong variant."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipdist import checkpoint, collectives, loss, step
from clipdist.optimizer import Learning, carry_state, make_optimizer, set_learning, state_of
from clipdist.stages import PARTS, Part, StageConfig
from tests.distributed.tiny_towers import Rows, TinyTowers, make_rows
from tests.distributed.wrong_variants import WRONG

NO_CLIP = 1e9
PROJECTIONS: tuple[Part, ...] = ("projections", "logit_scale")

SPLITS: dict[str, dict[int, list[int]]] = {
    "uneven": {1: [10], 2: [7, 3], 3: [3, 5, 2], 4: [1, 4, 3, 2]},
    "first rank empty": {1: [9], 2: [0, 9], 3: [0, 5, 4], 4: [0, 4, 3, 2]},
    "last rank empty": {1: [9], 2: [9, 0], 3: [4, 5, 0], 4: [4, 1, 4, 0]},
    "all on one rank": {1: [9], 2: [9, 0], 3: [0, 9, 0], 4: [0, 0, 9, 0]},
    "even": {1: [12], 2: [6, 6], 3: [4, 4, 4], 4: [3, 3, 3, 3]},
}
"""Rows per rank, by world size."""


@dataclass(frozen=True)
class Case:
    """One step on one global batch. `unfreezes`: a step with only the projections comes first. `tile`: rows and columns
    of the loss's tiles; `micro`: rows per micro-batch."""

    loss: str
    duplicates: bool = False
    split: str = "uneven"
    parts: tuple[Part, ...] = PARTS
    reused: tuple[str, ...] = ()
    unfreezes: bool = False
    tile: int | None = None
    micro: int | None = None
    distillation: float = 0.0
    wrong: str | None = None

    @property
    def name(self) -> str:
        facts = [self.loss, "duplicates" if self.duplicates else "", self.split, "+".join(self.parts)]
        facts += ["reused " + "+".join(self.reused) if self.reused else "", "unfreezes" if self.unfreezes else ""]
        facts += [f"{fact} {value}" for fact in ("tile", "micro", "distillation") if (value := getattr(self, fact))]
        return ", ".join(fact for fact in [*facts, self.wrong or ""] if fact).replace("+".join(PARTS), "all")


LOSSES = ("contrastive", "sigmoid")
BOTH = ("images", "texts")
GRADIENT_CASES = [
    *(Case(loss, many, split) for loss, many, split in product(LOSSES, (False, True), SPLITS)),
    *(
        Case(loss, True, split, parts, micro=micro)
        for loss, split, parts, micro in product(
            LOSSES,
            ("uneven", "last rank empty"),
            (("image_tower",), ("text_tower", "logit_scale"), ("projections", "text_tower"), ("logit_scale",)),
            (None, 2),
        )
    ),
    *(
        Case(loss, True, split, parts, reused, micro=micro)
        for loss, split, (parts, reused), micro in product(
            LOSSES,
            ("uneven", "first rank empty"),
            ((PROJECTIONS, BOTH), (("projections",), BOTH), (("projections", "text_tower"), ("images",))),
            (None, 2),
        )
    ),
    *(
        Case(loss, True, split, unfreezes=True, micro=micro)
        for loss, split, micro in product(LOSSES, ("uneven", "last rank empty"), (None, 2))
    ),
    *(Case(loss, True, tile=tile, micro=micro) for loss, tile, micro in product(LOSSES, (1, 3), (None, 1, 2, 3))),
    *(Case(loss, True, split, micro=micro) for loss, split, micro in product(LOSSES, SPLITS, (1, 2, 3))),
    *(
        Case(loss, True, split, tile=tile, micro=micro, distillation=0.7)
        for loss, split, (tile, micro) in product(LOSSES, ("uneven", "last rank empty"), ((None, None), (3, 2)))
    ),
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
    Case("contrastive", wrong="columns of the own rank only"),
    *(
        Case(loss, split="even", micro=2, wrong=wrong)
        for wrong, loss in product(
            (
                "scale in every micro-batch",
                "scale in no micro-batch",
                "every micro-batch synchronised",
                "plain accumulation",
            ),
            LOSSES,
        )
    ),
]


@dataclass(frozen=True)
class Stage:
    """`rates` at the first step; they fall to zero in a line."""

    parts: tuple[Part, ...]
    epochs: int
    rates: dict[Part, float]
    decay: float


@dataclass(frozen=True)
class Training:
    """Two stages, twelve steps: first the projections on reused features, then all. The last batch of an epoch has two
    rows, so that ranks above the second have none."""

    optimizer: str
    loss: str
    duplicates: bool = False
    clip: float = NO_CLIP
    micro: int | None = None
    distillation: float = 0.0

    rows = 26
    global_batch_size = 8

    @property
    def name(self) -> str:
        facts = [self.optimizer, self.loss, "duplicates" if self.duplicates else ""]
        facts += ["clipped" if self.clip < NO_CLIP else "", f"micro {self.micro}" if self.micro else ""]
        return ", ".join(fact for fact in [*facts, "distilled" if self.distillation else ""] if fact)

    def stages(self) -> tuple[Stage, Stage]:
        rate = {"sgd": 0.05, "adamw": 0.01}[self.optimizer]
        rates = dict.fromkeys(PARTS, rate) | {"image_tower": rate / 4, "text_tower": rate / 2}
        return Stage(PROJECTIONS, 1, rates, 0.05), Stage(PARTS, 2, rates, 0.3)

    def steps(self) -> Iterator[tuple[int, dict[Part, float], list[int]]]:
        """(stage, rates, rows of the global batch)."""
        generator = torch.Generator().manual_seed(3)
        for index, stage in enumerate(self.stages()):
            orders = [torch.randperm(self.rows, generator=generator) for _ in range(stage.epochs)]
            global_batches = [batch.tolist() for order in orders for batch in order.split(self.global_batch_size)]
            for number, chosen in enumerate(global_batches):
                left = 1 - number / len(global_batches)
                yield index, {part: rate * left for part, rate in stage.rates.items()}, chosen


TRAININGS = [
    *(Training(optimizer, loss, many) for optimizer, loss, many in product(("sgd", "adamw"), LOSSES, (False, True))),
    *(Training(optimizer, loss, True, micro=1) for optimizer, loss in product(("sgd", "adamw"), LOSSES)),
    Training("sgd", "contrastive", duplicates=True, clip=0.3),
    Training("adamw", "contrastive", duplicates=True, micro=2, distillation=0.5),
]


def all_cases(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Everything that a world size is asked: by the name of the case, this rank's findings."""
    wrong = WRONG_CASES if world_size > 1 else []
    found = {case.name: one_step(case, rank, world_size) for case in [*GRADIENT_CASES, *wrong]}
    found |= {training.name: train(training, rank, world_size) for training in TRAININGS}
    found |= {f"dropout, {loss}": with_dropout(loss, rank, world_size) for loss in LOSSES}
    found |= {"leaving": leaving(rank, world_size)}
    return found | {"resume": resume(folder / "run", rank), "rebuilt buckets": _rebuilding(folder / "rebuilt", rank)}


def one_step(case: Case, rank: int, world_size: int) -> dict[str, Tensor]:
    """Loss, gradient norm, the number of synchronised backward passes, and the gradient of every parameter that has
    one, by name."""
    counts = SPLITS[case.split][world_size]
    rows, towers = make_rows(sum(counts), case.duplicates), TinyTowers()
    mine = list(range(sum(counts[:rank]), sum(counts[: rank + 1])))
    with ExitStack() as patches:
        if case.wrong in WRONG:
            patches.enter_context(WRONG[case.wrong]())
        if case.tile:
            patches.enter_context(mock.patch.dict(loss.TILE, cpu=case.tile))
        model = None
        if case.unfreezes:
            model, optimizer = open_stage(towers, case.loss, PROJECTIONS)
            _step(model, towers, optimizer, rows, mine, Case(case.loss))
        if case.wrong == "old wrapper":
            optimizer = make_optimizer(learning_parts(towers, case.parts), weight_decay=0.1, fused=False)
        else:  # the old wrapper stays alive
            _old, (model, optimizer) = model, open_stage(towers, case.loss, case.parts, case.distillation)
        synchronised = _count_synchronised(model)
        found = _step(model, towers, optimizer, rows, mine, case)
    scalars = {"loss": found.loss, "norm": found.gradient_norm, "synchronised": len(synchronised)}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()} | gradients(towers)


def gradients(towers: TinyTowers) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in towers.model.named_parameters() if p.grad is not None}


def _count_synchronised(model: nn.Module) -> list[nn.Module]:
    """Grows by one with every forward pass whose backward sums over the ranks."""
    seen: list[nn.Module] = []

    def see(model: Any, _: Any) -> None:
        if torch.is_grad_enabled() and getattr(model, "require_backward_grad_sync", False):
            seen.append(model)

    model.register_forward_pre_hook(see)
    return seen


def learning_parts(towers: TinyTowers, parts: tuple[Part, ...]) -> list[Learning]:
    return set_learning(towers, StageConfig(name="stage", learns=parts, epochs=1, learning_rate=1.0))


def open_stage(
    towers: TinyTowers, loss: str, parts: tuple[Part, ...], distillation: float = 0.0
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What the training loop does at the start of a stage."""
    optimizer = make_optimizer(learning_parts(towers, parts), weight_decay=0.1, fused=False)
    return collectives.wrap(step.GlobalLoss(towers, loss, distillation=distillation)), optimizer


def _step(
    model: nn.Module, towers: TinyTowers, optimizer: torch.optim.Optimizer, rows: Rows, mine: list[int], case: Case
) -> step.Stepped:
    """A step at rate 0: it leaves its gradients and changes nothing."""
    batch = local_batch(towers, rows, mine, len(rows), case.reused)
    rates = dict.fromkeys(PARTS, 0.0)
    return step.optimise(model, towers, optimizer, batch, rates, NO_CLIP, seed=5, micro_batch_size=case.micro)


def local_batch(
    towers: TinyTowers, rows: Rows, mine: list[int], global_rows: int, reused: tuple[str, ...] = ()
) -> step.Batch:
    """This rank's rows as the training loop makes them: a rank without rows runs one with `rows` 0."""
    run, own = rows.take(mine or [0]), rows.take(mine)
    images, texts = run.images, run.tokens
    with torch.no_grad():
        images = towers.image_tower_output(images) if "images" in reused else images
        texts = towers.text_tower_output(texts) if "texts" in reused else texts
    kinds = "images" in reused, "texts" in reused
    return step.Batch(images, texts, own.keys(), len(mine), global_rows, *kinds, teacher=own.taught)


def train(training: Training, rank: int, world_size: int) -> dict[str, Tensor]:
    """The loss of every step, all weights after the first stage ("frozen: ...") and at the end."""
    rows, towers, losses = make_rows(training.rows, training.duplicates), TinyTowers(), []
    found: dict[str, Tensor] = {}
    current, opened = None, []
    for number, (index, rates, chosen) in enumerate(training.steps()):
        stage = training.stages()[index]
        if index != current:
            current = index
            found |= {f"frozen: {name}": value for name, value in weights(towers).items()} if index else {}
            adamw = make_optimizer(learning_parts(towers, stage.parts), stage.decay, fused=False)
            optimizer = _optimizer(training.optimizer, adamw)
            opened.append(collectives.wrap(step.GlobalLoss(towers, training.loss, distillation=training.distillation)))
        mine = chosen[rank::world_size]
        batch = local_batch(towers, rows, mine, len(chosen), BOTH if index == 0 else ())
        stepped = step.optimise(
            opened[-1], towers, optimizer, batch, rates, training.clip, seed=number, micro_batch_size=training.micro
        )
        losses.append(stepped.loss)
    return found | {"losses": torch.tensor(losses, dtype=torch.float64)} | weights(towers)


def _optimizer(name: str, adamw: torch.optim.AdamW) -> torch.optim.Optimizer:
    if name == "adamw":
        return adamw
    return torch.optim.SGD([{key: group[key] for key in ("params", "part")} for group in adamw.param_groups], lr=0.0)


def weights(towers: TinyTowers) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in towers.model.named_parameters()}


def with_dropout(loss_name: str, rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    """Gradients of a step with dropout in micro-batches of two ("cached"); of the same micro-batches when the whole
    graph is kept, by plain autograd ("kept"); and with passes that draw anew ("not seeded")."""
    counts, found = SPLITS["uneven"][world_size], {}
    rows = make_rows(sum(counts), True)
    mine = list(range(sum(counts[:rank]), sum(counts[: rank + 1])))
    for name in ("cached", "not seeded", "kept"):
        towers = TinyTowers(dropout=0.4)
        model, optimizer = open_stage(towers, loss_name, PARTS)
        with WRONG["passes with their own dropout"]() if name == "not seeded" else ExitStack():
            if name == "kept":
                _keep_the_graph(step.GlobalLoss(towers, loss_name), local_batch(towers, rows, mine, len(rows)), 2)
            else:
                _step(model, towers, optimizer, rows, mine, Case(loss_name, micro=2))
        found[name] = gradients(towers)
    return found


def _keep_the_graph(objective: step.GlobalLoss, batch: step.Batch, micro: int) -> None:
    embedded = []
    for number, rows in enumerate(torch.arange(len(batch.images)).split(micro)):
        part = step.Batch(batch.images[rows], batch.texts[rows], batch.keys, len(rows), batch.global_rows)
        embedded.append(step._embed(objective, part, 5, number))
    images, texts = (torch.cat([one[tower] for one in embedded]) for tower in (0, 1))
    objective.value(step.Embedded(images, texts, *embedded[0][2:]), batch).backward()
    for parameter in objective.parameters():
        if parameter.grad is not None and collectives.world_size() > 1:
            dist.all_reduce(parameter.grad)
            parameter.grad /= collectives.world_size()


def leaving(rank: int, world_size: int) -> dict[str, bool]:
    """What this rank hears when nobody and when only the last rank asks to leave."""
    rows, towers = make_rows(world_size, False), TinyTowers()
    model, optimizer = open_stage(towers, "contrastive", PARTS)
    found = {}
    for name, asks in (("nobody", False), ("the last", rank == world_size - 1)):
        batch, rates = local_batch(towers, rows, [rank], len(rows)), dict.fromkeys(PARTS, 0.0)
        found[name] = step.optimise(model, towers, optimizer, batch, rates, NO_CLIP, seed=0, leave=asks).leave
    return found


def resume(run: Path, rank: int, micro: int | None = 3) -> dict[str, dict[str, Tensor]]:
    """Weights after six steps without a stop, after three and three more from a checkpoint, and the same from the
    checkpoint's weights alone."""
    rows, whole = make_rows(10, True), TinyTowers(dropout=0.2)
    _some_steps(whole, *open_stage(whole, "sigmoid", PARTS), rows, rank, range(6), micro)

    first = TinyTowers(dropout=0.2)
    model, optimizer = open_stage(first, "sigmoid", PARTS)
    _some_steps(first, model, optimizer, rows, rank, range(3), micro)
    if rank == 0:
        state = state_of(optimizer, learning_parts(first, PARTS))
        checkpoint.Writer(str(run), "none").save(first, state, checkpoint.Progress(0, "all", 3, 3))
    collectives.barrier()
    path, progress = checkpoint.complete(str(run))[-1]

    found = {"whole": weights(whole)}
    for name in ("resumed", "without moments"):
        towers = TinyTowers(dropout=0.2)
        towers.load(path)
        model, optimizer = open_stage(towers, "sigmoid", PARTS)
        if name == "resumed":
            carry_state(checkpoint.optimizer_state(path), optimizer, learning_parts(towers, PARTS))
        _some_steps(towers, model, optimizer, rows, rank, range(progress.step, 6), micro)
        found[name] = weights(towers)
    return found


def _some_steps(
    towers: TinyTowers,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Rows,
    rank: int,
    steps: range,
    micro: int | None,
) -> None:
    for number in steps:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(number)).tolist()
        batch = local_batch(towers, rows, order[rank :: collectives.world_size()], len(rows))
        rates = dict.fromkeys(PARTS, 0.3)
        step.optimise(model, towers, optimizer, batch, rates, NO_CLIP, seed=number, micro_batch_size=micro)


def _rebuilding(run: Path, rank: int) -> dict[str, dict[str, Tensor]]:
    """`resume` with DDP as it comes: it orders its buckets anew after the first step, all ranks in the same pass, so
    that ranks with other numbers of micro-batches would wait for ever."""
    if collectives.world_size() == 1:
        return {}
    with mock.patch.object(collectives, "wrap", partial(DistributedDataParallel, gradient_as_bucket_view=True)):
        return resume(run, rank, micro=None)
