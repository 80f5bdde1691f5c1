"""Loss, gradients and weights on one to four ranks are those of a textbook in one process; wrong variants of
the pieces are seen, each by the parameters that it spoils."""

import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.cases import GRADIENT_CASES, LOSSES, SPLITS, TRAININGS, Case, Training, all_cases, weights
from tests.distributed.rank_processes import run_ranks
from tests.distributed.tiny_towers import TinyTowers, make_rows, part_of, textbook_loss

WORLD_SIZES = (1, 2, 3, 4)
PARAMETERS = frozenset(weights(TinyTowers()))
SCALE, BIAS = "logit_scale", "logit_bias"
ENCODERS = PARAMETERS - {SCALE, BIAS}
TEXTS = {name for name in ENCODERS if name.startswith("text")}
FACTS = {"loss", "norm", "synchronised"}
TOWERS = {name for name in PARAMETERS if part_of(name).endswith("tower")}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of ten rows are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def found(world_size: int) -> list[dict[str, Any]]:
    """Every case of a world size, run by one set of processes."""
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(world_size, all_cases, Path(folder) / "ranks")


def expected(case: Case, world_size: int) -> dict[str, Tensor]:
    """Loss, gradient norm and gradients of one process on the joined batch; one synchronised pass of several."""
    count = sum(SPLITS[case.split][world_size])
    values = _expected(case.loss, case.duplicates, case.parts, count, case.distillation)
    return values | {"synchronised": torch.tensor(min(world_size - 1.0, 1.0))}


@cache
def _expected(loss: str, many: bool, parts: tuple[str, ...], count: int, distillation: float) -> dict[str, Tensor]:
    towers = TinyTowers()
    for name, parameter in towers.model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
    value = textbook_loss(towers, make_rows(count, many), loss, distillation)
    value.backward()
    gradients = {name: p.grad for name, p in towers.model.named_parameters() if p.grad is not None}
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    return {"loss": value.detach(), "norm": norm} | gradients


def off(right: dict[str, Tensor], wrong: dict[str, Tensor], tolerance: float) -> set[str]:
    """Names of what differs; a gradient that is missing is one of zeros."""

    def same(name: str) -> bool:
        if name not in right or name not in wrong:
            return not (right | wrong)[name].any()
        bound = tolerance * max(1.0, float(right[name].abs().max()))
        return bool((right[name] - wrong[name]).abs().max() <= bound)

    return {name for name in right.keys() | wrong.keys() if not same(name)}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: case.name)
def test_loss_and_gradients_are_those_of_one_process(case: Case, world_size: int) -> None:
    for ranks in found(world_size):
        assert off(expected(case, world_size), ranks[case.name], 1e-10) == set()
        assert ranks[case.name].keys() - FACTS <= {p for p in PARAMETERS if part_of(p) in case.parts}


@cache
def textbook_training(training: Training) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, weights after the first stage and weights at the end, with torch's own optimizers in one process."""
    rows, towers, losses = make_rows(training.rows, training.duplicates), TinyTowers(), []
    named = dict(towers.model.named_parameters())
    after: list[dict[str, Tensor]] = [{}, {}]
    current = None
    for index, rates, chosen in training.steps():
        stage = training.stages()[index]
        learning = {name: p for name, p in named.items() if part_of(name) in stage.parts}
        if index != current:
            current = index
            groups = [
                {"params": [p], "weight_decay": stage.decay if p.ndim == 2 else 0.0, "name": name}
                for name, p in learning.items()
            ]
            if training.optimizer == "adamw":
                optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
            else:
                optimizer = torch.optim.SGD([{**group, "weight_decay": 0.0} for group in groups])
        for group in optimizer.param_groups:
            group["lr"] = rates[part_of(group["name"])]
        towers.zero_grad()
        loss = textbook_loss(towers, rows.take(chosen), training.loss, training.distillation)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(learning.values()), training.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
        after[index] = weights(towers)
    return losses, after[0], after[1]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)
def test_a_run_of_two_stages_is_that_of_one_process(training: Training, world_size: int) -> None:
    losses, after_first, at_end = textbook_training(training)
    everywhere = [ranks[training.name] for ranks in found(world_size)]
    for one in everywhere:
        first = {name.removeprefix("frozen: "): value for name, value in one.items() if name.startswith("frozen: ")}
        assert one["losses"].tolist() == pytest.approx(losses, abs=1e-9, rel=0)
        assert off(after_first, first, 1e-9) == set()
        assert off(at_end, {name: one[name] for name in PARAMETERS}, 1e-9) == set()
        assert off(weights(TinyTowers()), first, 0.0) == PARAMETERS - TOWERS - (
            {BIAS} if training.loss == "contrastive" else set()
        )
        assert all(torch.equal(one[name], everywhere[0][name]) for name in one)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(world_size: int) -> None:
    for ranks in found(world_size):
        runs = ranks["resume"]
        assert off(runs["whole"], runs["resumed"], 0.0) == set()
        assert off(runs["whole"], runs["without moments"], 1e-6) == PARAMETERS


def test_buckets_that_are_ordered_anew_would_change_the_bits_of_a_resumed_run() -> None:
    """On three ranks; a sum of two is the same in any order, so two ranks do not show it."""
    two, three = (found(world_size)[0]["rebuilt buckets"] for world_size in (2, 3))
    assert off(two["whole"], two["resumed"], 0.0) == set()
    assert off(three["whole"], three["resumed"], 0.0)
    assert off(three["whole"], three["resumed"], 1e-9) == set()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_repeat_their_dropout(loss: str, world_size: int) -> None:
    for ranks in found(world_size):
        gradients = ranks[f"dropout, {loss}"]
        assert off(gradients["kept"], gradients["cached"], 1e-10) == set()
        assert off(gradients["kept"], gradients["not seeded"], 1e-3)
        plain = expected(Case(loss, True), world_size)
        assert off({name: plain[name] for name in gradients["kept"]}, gradients["kept"], 1e-3), "dropout was on"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_hears_that_one_asks_to_leave(world_size: int) -> None:
    assert [ranks["leaving"] for ranks in found(world_size)] == [{"nobody": False, "the last": True}] * world_size


def wrong_step(case: Case, world_size: int) -> tuple[set[str], list[dict[str, Tensor]], dict[str, Tensor]]:
    """What a wrong variant spoils on any rank, its findings by rank, and the right ones."""
    right, everywhere = expected(case, world_size), [ranks[case.name] for ranks in found(world_size)]
    return set().union(*(off(right, one, 1e-10) for one in everywhere)) - {"norm"}, everywhere, right


both = pytest.mark.parametrize(("loss", "world_size"), list(product(LOSSES, (2, 3, 4))))
splits = pytest.mark.parametrize("split", ["uneven", "even"])


@both
@splits
def test_own_slice_live_is_seen_in_the_encoders(loss: str, world_size: int, split: str) -> None:
    """Only they shrink, to 1 / world size: with clipping, SGD or a rate for the scale that is another training."""
    spoilt, everywhere, right = wrong_step(Case(loss, split=split, wrong="own slice live"), world_size)
    assert spoilt == ENCODERS
    for name in ENCODERS:
        torch.testing.assert_close(everywhere[0][name], right[name] / world_size, rtol=1e-9, atol=1e-12)


@both
@splits
def test_own_slice_live_times_world_size_is_seen_in_the_scale(loss: str, world_size: int, split: str) -> None:
    spoilt, everywhere, right = wrong_step(Case(loss, split=split, wrong="own slice live x W"), world_size)
    scalars = {SCALE} if loss == "contrastive" else {SCALE, BIAS}
    assert spoilt == scalars | {"loss"}
    for name in scalars:
        torch.testing.assert_close(everywhere[0][name], right[name] * world_size, rtol=1e-9, atol=1e-12)


@both
@splits
def test_a_gather_without_gradient_is_seen_in_the_text_tower(loss: str, world_size: int, split: str) -> None:
    spoilt, _, _ = wrong_step(Case(loss, split=split, wrong="no gradient gather"), world_size)
    assert spoilt == TEXTS


@both
@splits
def test_an_averaging_gather_is_seen_in_the_text_tower(loss: str, world_size: int, split: str) -> None:
    spoilt, _, _ = wrong_step(Case(loss, split=split, wrong="backward averages"), world_size)
    assert spoilt == TEXTS


@both
@splits
def test_an_all_reduced_scale_is_seen_in_the_scale(loss: str, world_size: int, split: str) -> None:
    spoilt, everywhere, right = wrong_step(Case(loss, split=split, wrong="scale all-reduced"), world_size)
    assert spoilt == {SCALE}
    torch.testing.assert_close(everywhere[0][SCALE], right[SCALE] * world_size, rtol=1e-9, atol=1e-12)


@both
def test_a_local_mean_is_seen_when_rows_are_uneven(loss: str, world_size: int) -> None:
    spoilt, _, right = wrong_step(Case(loss, wrong="local mean"), world_size)
    assert spoilt == right.keys() - {"norm", "synchronised"}
    hidden, _, _ = wrong_step(Case(loss, split="even", wrong="local mean"), world_size)
    assert hidden == set(), "on even rows it is right, so even rows would not show it"


@both
def test_the_old_wrapper_after_unfreezing_is_seen_in_the_towers(loss: str, world_size: int) -> None:
    spoilt, everywhere, _ = wrong_step(Case(loss, unfreezes=True, wrong="old wrapper"), world_size)
    assert spoilt == TOWERS
    assert all(off(everywhere[0], one, 1e-3) for one in everywhere[1:]), "and the ranks drift apart"


@both
def test_positives_of_the_own_rank_only_are_seen(loss: str, world_size: int) -> None:
    spoilt, _, right = wrong_step(Case(loss, True, wrong="positives of the own rank only"), world_size)
    assert spoilt == right.keys() - {"norm", "synchronised"}


@both
def test_positives_without_the_rank_s_offset_are_seen(loss: str, world_size: int) -> None:
    """Not in the bias: its gradient counts the positives, wherever they are."""
    spoilt, _, right = wrong_step(Case(loss, wrong="positives without the rank's offset"), world_size)
    assert spoilt == right.keys() - {"norm", "synchronised", BIAS}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_columns_of_the_own_rank_only_are_seen(world_size: int) -> None:
    spoilt, _, _ = wrong_step(Case("contrastive", wrong="columns of the own rank only"), world_size)
    assert spoilt == {"loss", SCALE} | ENCODERS


@both
def test_a_scale_in_every_micro_batch_is_seen_in_the_scale(loss: str, world_size: int) -> None:
    spoilt, everywhere, right = wrong_step(
        Case(loss, split="even", micro=2, wrong="scale in every micro-batch"), world_size
    )
    scalars, times = ({SCALE} if loss == "contrastive" else {SCALE, BIAS}), {2: 3, 3: 2, 4: 2}[world_size]
    assert spoilt == scalars
    for name in scalars:
        torch.testing.assert_close(everywhere[0][name], right[name] * times, rtol=1e-9, atol=1e-12)


@both
def test_a_scale_in_no_micro_batch_is_seen_in_the_scale(loss: str, world_size: int) -> None:
    case = Case(loss, split="even", micro=2, wrong="scale in no micro-batch")
    assert wrong_step(case, world_size)[0] == ({SCALE} if loss == "contrastive" else {SCALE, BIAS})


@both
def test_micro_batches_that_all_synchronise_are_seen(loss: str, world_size: int) -> None:
    """The gradients are right where all ranks have as many; ranks with others would wait for ever."""
    case = Case(loss, split="even", micro=2, wrong="every micro-batch synchronised")
    assert wrong_step(case, world_size)[0] == {"synchronised"}


@both
def test_plain_accumulation_is_seen_everywhere(loss: str, world_size: int) -> None:
    spoilt, _, right = wrong_step(Case(loss, split="even", micro=2, wrong="plain accumulation"), world_size)
    assert spoilt == right.keys() - {"norm", "synchronised"}
