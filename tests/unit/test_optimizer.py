"""What a stage sets learning, AdamW's groups for it, and moments that outlive a stage."""

from pathlib import Path
from typing import Any

import pytest
import torch

from clipdist.optimizer import Learning, carry_state, make_optimizer, set_learning, state_of
from clipdist.stages import PARTS, StageConfig
from clipdist.towers import Towers
from tests.unit import zoo


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    found = zoo.build("vit", tmp_path_factory.mktemp("model"))
    found.add_terms(["fairisle"])
    return found


def stage(*learns: str, **changes: Any) -> StageConfig:
    return StageConfig(**{"name": "one", "learns": learns, "epochs": 1, "learning_rate": 1e-3, **changes})


def part_names(towers: Towers, *parts: str) -> set[str]:
    return {name for part, members in towers.parts().items() if part in parts for name, _ in members}


def learning_names(towers: Towers) -> set[str]:
    return {name for name, parameter in towers.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("learns", "parts"),
    [
        (["projections"], ["projections"]),
        (["logit_scale", "image_tower"], ["logit_scale", "image_tower"]),
        (["new_tokens"], ["new_tokens"]),
        (["text_tower"], ["text_tower", "new_tokens"]),
        (["all"], PARTS),
    ],
)
def test_exactly_the_named_parts_learn(towers: Towers, learns: list[str], parts: list[str]) -> None:
    set_learning(towers, stage("all"))
    towers.model.logit_scale.grad = torch.ones(())
    found = set_learning(towers, stage(*learns))
    assert {one.name for one in found} == learning_names(towers) == part_names(towers, *parts)
    assert {one.part for one in found} == set(parts)
    assert all(one.parameter.grad is None for one in found), "or clipping would count the last stage's"
    assert towers.model.logit_scale.grad is None


def test_the_last_blocks_learn_with_what_stands_behind_them(towers: Towers) -> None:
    found = {one.name for one in set_learning(towers, stage("last_1_image_blocks", "last_2_text_blocks"))}
    assert found == learning_names(towers)
    image = {name for name in found if name.startswith("visual.")}
    assert image == {
        name
        for name in part_names(towers, "image_tower")
        if "resblocks.1." in name or name in ("visual.ln_post.weight", "visual.ln_post.bias")
    }
    text = {name for name in part_names(towers, "text_tower") if "resblocks" in name or "ln_final" in name}
    assert found - image == text
    assert text


def test_matrices_decay_and_nothing_else(towers: Towers) -> None:
    learning = set_learning(towers, stage("all"))
    groups = make_optimizer(learning, 0.3, fused=False).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(decays) == len(learning) == sum(len(group["params"]) for group in groups)
    for one in learning:
        expected = 0.3 if one.parameter.ndim >= 2 and one.part != "logit_scale" else 0.0
        assert decays[id(one.parameter)] == expected, one.name
    parts = {id(parameter): group["part"] for group in groups for parameter in group["params"]}
    assert all(parts[id(one.parameter)] == one.part for one in learning)


def test_layer_decay_takes_its_share_per_block_in_the_towers_alone(towers: Towers) -> None:
    learning = set_learning(towers, stage("all", layer_decay=0.5))
    shares = {one.name: one.rate_share for one in learning}
    assert shares["visual.conv1.weight"] == 0.5**3
    assert shares["visual.transformer.resblocks.0.ln_1.weight"] == 0.5**2
    assert shares["visual.transformer.resblocks.1.ln_1.weight"] == 0.5
    assert shares["visual.ln_post.weight"] == 1
    assert shares["positional_embedding"] == 0.5**3
    assert all(one.rate_share == 1 for one in learning if one.part in ("projections", "logit_scale", "new_tokens"))
    groups = make_optimizer(learning, 0.1, fused=False).param_groups
    found = {id(parameter): group["rate_share"] for group in groups for parameter in group["params"]}
    assert all(found[id(one.parameter)] == one.rate_share for one in learning)
    assert {one.rate_share for one in set_learning(towers, stage("all"))} == {1.0}


def step(optimizer: torch.optim.Optimizer, learning: list[Learning]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for one in learning:
        one.parameter.grad = torch.full_like(one.parameter, 0.25) + one.parameter.detach()
    optimizer.step()


def tiny(**shapes: tuple[int, ...]) -> list[Learning]:
    return [Learning(name, "image_tower", torch.nn.Parameter(torch.ones(shape)), 1.0) for name, shape in shapes.items()]


@pytest.mark.parametrize("fused", [False, True])
def test_carried_moments_go_on_to_the_bit(fused: bool) -> None:
    whole, parted = tiny(a=(3, 2), b=(4,)), tiny(a=(3, 2), b=(4,))
    optimizer = make_optimizer(whole, 0.1, fused)
    for _ in range(4):
        step(optimizer, whole)
    first, second = make_optimizer(parted, 0.1, fused), make_optimizer(parted[::-1], 0.1, not fused)
    step(first, parted)
    step(first, parted)
    state = {name: value.clone() for name, value in state_of(first, parted).items()}
    assert {name.rpartition("|")[2] for name in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert carry_state(state, second, parted) == ["a", "b"]
    third = make_optimizer(parted, 0.1, fused)
    carry_state(state_of(second, parted), third, parted)
    for _ in range(2):
        step(third, parted)
    assert all(torch.equal(one.parameter, other.parameter) for one, other in zip(whole, parted, strict=True))


def test_without_its_moments_the_run_would_be_another() -> None:
    """The control of the test above."""
    whole, anew = tiny(a=(3, 2)), tiny(a=(3, 2))
    optimizer = make_optimizer(whole, 0.1, fused=False)
    for _ in range(3):
        step(optimizer, whole)
        step(make_optimizer(anew, 0.1, fused=False), anew)
    assert not torch.equal(whole[0].parameter, anew[0].parameter)


def test_a_resized_or_new_parameter_starts_anew_and_the_others_stay() -> None:
    earlier = tiny(positions=(4, 2), kept=(3,), gone=(2,))
    optimizer = make_optimizer(earlier, 0.1, fused=False)
    step(optimizer, earlier)
    state = state_of(optimizer, earlier)
    now = tiny(positions=(9, 2), kept=(3,), thawed=(2,))
    fresh = make_optimizer(now, 0.1, fused=False)
    assert carry_state(state, fresh, now) == ["kept"]
    assert {name.rpartition("|")[0] for name in state_of(fresh, now)} == {"kept"}
    step(fresh, now)
    counts = {name: value.item() for name, value in state_of(fresh, now).items() if name.endswith("|step")}
    assert counts == {"positions|step": 1, "kept|step": 2, "thawed|step": 1}
    assert state["kept|step"] == 1, "the state that was carried is not changed by going on"


def test_no_state_carries_nothing() -> None:
    learning = tiny(a=(2,))
    optimizer = make_optimizer(learning, 0.1, fused=False)
    assert carry_state({}, optimizer, learning) == []
    assert state_of(optimizer, learning) == {}


def test_names_and_groups_have_the_same_order_in_every_process(towers: Towers, tmp_path: Path) -> None:
    other = zoo.build("vit", tmp_path)
    other.add_terms(["fairisle"])
    one, two = set_learning(towers, stage("all")), set_learning(other, stage("all"))
    assert [each.name for each in one] == [each.name for each in two]
    shapes = [
        [
            [tuple(parameter.shape) for parameter in group["params"]]
            for group in make_optimizer(each, 0.1, False).param_groups
        ]
        for each in (one, two)
    ]
    assert shapes[0] == shapes[1]
