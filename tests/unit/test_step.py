"""What a stage sets learning, the optimizer's groups, and what a step refuses. Gradients: tests/distributed."""

import math
from typing import Any

import pytest
import torch

from clipdist import step
from clipdist.stages import PARTS, Part
from tests.distributed.tiny_towers import TinyTowers, make_rows, part_of

RATES = dict.fromkeys(PARTS, 0.01)


def make_batch(**changes: Any) -> step.Batch:
    rows = make_rows(6, duplicates=False)
    return step.Batch(
        **{"images": rows.images, "texts": rows.tokens, "keys": rows.keys(), "rows": 6, "global_rows": 6, **changes}
    )


def one_step(
    towers: TinyTowers,
    parts: tuple[Part, ...],
    batch: step.Batch,
    loss: step.LossName = "contrastive",
    decay: float = 0.1,
) -> tuple[float, float]:
    step.set_learning(towers, parts)
    optimizer = step.make_optimizer(towers, parts, decay)
    return step.optimise(step.GlobalLoss(towers, loss), towers, optimizer, batch, RATES, clip=1.0)


def bits(towers: TinyTowers) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in towers.model.named_parameters()}


@pytest.mark.parametrize("parts", [("projections",), ("logit_scale", "text_tower"), PARTS])
def test_exactly_the_named_parts_learn(parts: tuple[Part, ...]) -> None:
    towers = TinyTowers()
    one_step(towers, PARTS, make_batch())
    count = step.set_learning(towers, parts)
    learning = [p for p in towers.parameters() if p.requires_grad]
    assert {part_of(name) for name, p in towers.model.named_parameters() if p.requires_grad} == set(parts)
    assert count == sum(p.numel() for p in learning)
    assert all(p.grad is None for p in towers.parameters()), "or clipping would still count the last stage's"


@pytest.mark.parametrize("parts", [("projections",), ("logit_scale", "image_tower"), ("text_tower",)])
def test_a_step_changes_what_learns_and_not_a_bit_of_what_is_frozen(parts: tuple[Part, ...]) -> None:
    towers = TinyTowers()
    before = bits(towers)
    one_step(towers, parts, make_batch(), loss="sigmoid")
    changed = {name for name, value in bits(towers).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if part_of(name) in parts}


def test_only_matrices_decay() -> None:
    towers = TinyTowers()
    names = {id(p): name for name, p in towers.model.named_parameters()}
    groups = step.make_optimizer(towers, PARTS, 0.3).param_groups
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    matrices = {"image_tower.weight", "text_tower.weight", "image_projection", "text_projection"}
    assert decays == {name: 0.3 if name in matrices else 0.0 for name in names.values()}
    assert all(part_of(names[id(p)]) == group["part"] for group in groups for p in group["params"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_spoils_no_weight(value: float) -> None:
    towers = TinyTowers()
    before, batch = bits(towers), make_batch()
    batch.images[2, 1] = value
    with pytest.raises(FloatingPointError, match="learning_rate"):
        one_step(towers, PARTS, batch)
    assert all(torch.equal(value, before[name]) for name, value in bits(towers).items())


def test_the_gradient_is_clipped_and_its_norm_before_that_is_told() -> None:
    towers = TinyTowers()
    _, norm = one_step(towers, PARTS, make_batch(images=10 * make_batch().images))
    left = torch.cat([p.grad.flatten() for p in towers.parameters() if p.grad is not None]).norm()
    assert norm > 1.0
    assert float(left) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(("start", "end"), [(6.0, math.log(100)), (-1.0, 0.0), (1.5, None)])
def test_a_learning_logit_scale_is_kept_between_1_and_100(start: float, end: float | None) -> None:
    towers = TinyTowers()
    towers.model.logit_scale.data.fill_(start)
    one_step(towers, PARTS, make_batch())
    found = towers.model.logit_scale.item()
    assert found == end if end is not None else found == pytest.approx(start, abs=0.02)


def test_a_frozen_logit_scale_keeps_its_bits_even_above_100() -> None:
    """SigLIP's published weights stand at 117."""
    towers = TinyTowers()
    towers.model.logit_scale.data.fill_(math.log(117))
    one_step(towers, ("projections",), make_batch(), loss="sigmoid")
    assert towers.model.logit_scale.item() == math.log(117)


def test_rows_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"\[6\] rows, together not 7"):
        one_step(TinyTowers(), PARTS, make_batch(global_rows=7))


def test_the_sigmoid_loss_needs_a_bias() -> None:
    towers = TinyTowers()
    towers.logit_bias = lambda: None  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ValueError, match="logit_bias"):
        one_step(towers, PARTS, make_batch(), loss="sigmoid")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_loss_is_at_least_float32(autocast: torch.dtype | None) -> None:
    """At scale 100 the scores of bfloat16 embeddings would be off by whole units."""
    towers = TinyTowers().float()
    towers.model.logit_scale.data.fill_(math.log(100))
    batch = make_batch(images=make_batch().images.float())
    seen: list[torch.dtype] = []
    loss = step.contrastive_loss

    def spy(*inputs: torch.Tensor) -> torch.Tensor:
        seen.extend(value.dtype for value in inputs if value.is_floating_point())
        return loss(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "contrastive_loss", spy)
        value = step.GlobalLoss(towers, "contrastive", autocast)(batch)
    assert set(seen) == {torch.float32}
    assert value.dtype == torch.float32
