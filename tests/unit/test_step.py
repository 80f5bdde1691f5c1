"""What a stage sets learning, the optimizer's groups, and what a step refuses. Gradients: tests/distributed."""

import math
from typing import Any

import pytest
import torch

from clipdist import step
from clipdist.optimizer import Learning, make_optimizer, set_learning
from clipdist.stages import PARTS, Part, StageConfig
from tests.distributed.tiny_towers import TinyTowers, make_rows, part_of

RATES = dict.fromkeys(PARTS, 0.01)


def make_batch(**changes: Any) -> step.Batch:
    rows = make_rows(6, duplicates=False)
    return step.Batch(
        **{"images": rows.images, "texts": rows.tokens, "keys": rows.keys(), "rows": 6, "global_rows": 6, **changes}
    )


def learning_parts(towers: TinyTowers, parts: tuple[Part, ...], layer_decay: float = 1.0) -> list[Learning]:
    stage = StageConfig(name="stage", learns=parts, epochs=1, learning_rate=1.0, layer_decay=layer_decay)
    return set_learning(towers, stage)


def one_step(
    towers: TinyTowers,
    parts: tuple[Part, ...],
    batch: step.Batch,
    loss: step.LossName = "contrastive",
    distillation: float = 0.0,
    **changes: Any,
) -> step.Stepped:
    optimizer = make_optimizer(learning_parts(towers, parts), 0.1, fused=False)
    model = step.GlobalLoss(towers, loss, distillation=distillation)
    return step.optimise(model, towers, optimizer, batch, RATES, **{"clip": 1.0, "seed": 0, **changes})


def bits(towers: TinyTowers) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in towers.model.named_parameters()}


@pytest.mark.parametrize("parts", [("projections",), ("logit_scale", "text_tower"), PARTS])
def test_exactly_the_named_parts_learn(parts: tuple[Part, ...]) -> None:
    towers = TinyTowers()
    one_step(towers, PARTS, make_batch())
    learning = learning_parts(towers, parts)
    assert {part_of(name) for name, p in towers.model.named_parameters() if p.requires_grad} == set(parts) - {
        "new_tokens"
    }
    assert {one.name for one in learning} == {name for name in bits(towers) if part_of(name) in parts}
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
    groups = make_optimizer(learning_parts(towers, PARTS), 0.3, fused=False).param_groups
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
    norm = one_step(towers, PARTS, make_batch(images=10 * make_batch().images)).gradient_norm
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


def test_distillation_needs_a_teacher() -> None:
    with pytest.raises(ValueError, match="embeddings"):
        one_step(TinyTowers(), PARTS, make_batch(), distillation=0.5)


def test_distillation_pulls_to_the_teacher_and_to_nothing_else() -> None:
    """A model that is its own teacher has nothing to win by distillation: the gradients are those without it."""
    towers, batch = TinyTowers(), make_batch()
    with torch.no_grad():
        taught = step.GlobalLoss(towers, "contrastive")(batch)[:2]
    plain = one_step(TinyTowers(), PARTS, batch)
    distilled = one_step(TinyTowers(), PARTS, make_batch(teacher=taught), distillation=5.0)
    assert distilled.loss == pytest.approx(plain.loss, abs=1e-12)
    assert distilled.gradient_norm == pytest.approx(plain.gradient_norm, abs=1e-12)
    turned = one_step(TinyTowers(), PARTS, make_batch(teacher=(-taught[0], taught[1])), distillation=5.0)
    assert turned.loss == pytest.approx(plain.loss + 5.0, abs=1e-12), "an opposite image is 2 away, half of it counts"


def test_rates_are_those_of_the_part_times_the_share_of_the_block() -> None:
    towers = TinyTowers()
    optimizer = make_optimizer(learning_parts(towers, PARTS, layer_decay=0.5), 0.1, fused=False)
    rates: dict[Part, float] = {part: 0.001 * (number + 1) for number, part in enumerate(PARTS)}
    step.optimise(step.GlobalLoss(towers, "contrastive"), towers, optimizer, make_batch(), rates, clip=1.0, seed=0)
    found = {group["part"]: group["lr"] for group in optimizer.param_groups}
    share = {"image_tower": 0.5, "text_tower": 0.5}
    assert found == {part: rates[part] * share.get(part, 1.0) for part in found}
    assert len(found) == 4, "all parts but new tokens, of which there are none"


@pytest.mark.parametrize("size", [1, 4, 6, 100, None])
def test_no_more_rows_than_a_micro_batch_hold_activations(size: int | None) -> None:
    towers, held = TinyTowers(), []
    output = towers.image_tower_output

    def spy(images: torch.Tensor) -> torch.Tensor:
        held.append(len(images) if torch.is_grad_enabled() else 0)
        return output(images)

    towers.image_tower_output = spy  # type: ignore[method-assign]
    one_step(towers, PARTS, make_batch(), micro_batch_size=size)
    assert max(held) == min(size or 6, 6)
    assert sum(held) == 6, "every row once"


def test_dropout_repeats_with_the_step_s_seed() -> None:
    norms = [one_step(TinyTowers(dropout=0.5), PARTS, make_batch(), seed=seed).gradient_norm for seed in (4, 4, 5)]
    assert norms[0] == norms[1] != norms[2]


@pytest.mark.parametrize("leave", [False, True])
def test_a_wish_to_leave_is_told(leave: bool) -> None:
    assert one_step(TinyTowers(), PARTS, make_batch(), leave=leave).leave is leave


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_loss_is_at_least_float32(autocast: torch.dtype | None) -> None:
    """At scale 100 the scores of bfloat16 embeddings would be off by whole units."""
    towers = TinyTowers().float()
    towers.model.logit_scale.data.fill_(math.log(100))
    batch = make_batch(images=make_batch().images.float())
    model, seen, loss = step.GlobalLoss(towers, "contrastive", autocast), [], step.contrastive_loss

    def spy(images: torch.Tensor, texts: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.extend([images.dtype, texts.dtype])
        return loss(images, texts, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "contrastive_loss", spy)
        value = model.value(model(batch), batch)
    assert set(seen) == {torch.float32}
    assert value.dtype == torch.float32
