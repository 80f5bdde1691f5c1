"""Which parameters learn in a stage, AdamW's groups for them, and its state by name, so that it outlives a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipdist.stages import Part, StageConfig
from clipdist.towers import Towers

BETAS, EPSILON = (0.9, 0.98), 1e-6
"""Of CLIP (arXiv 2103.00020, table 18)."""


@dataclass(frozen=True)
class Learning:
    """A parameter that learns. `rate_share`: layer-wise decay's share of its part's learning rate."""

    name: str
    part: Part
    parameter: nn.Parameter
    rate_share: float


def set_learning(towers: Towers, stage: StageConfig) -> list[Learning]:
    """Makes exactly the stage's parameters learn; the others are frozen."""
    found, levels = [], towers.levels()
    for part, parameters in towers.parts().items():
        for name, parameter in parameters:
            learns = stage.level_learns(part, levels[name])
            parameter.requires_grad_(learns)
            parameter.grad = None
            if learns:
                share = stage.layer_decay ** levels[name] if part in ("image_tower", "text_tower") else 1.0
                found.append(Learning(name, part, parameter, share))
    return found


def make_optimizer(learning: list[Learning], weight_decay: float, fused: bool) -> torch.optim.AdamW:
    """AdamW with one group per part, share of the rate and decay: matrices decay; biases, norms and logit_scale do
    not. The order follows the model, so that it is the same in every process."""
    groups: dict[tuple[Part, float, bool], list[nn.Parameter]] = {}
    for one in learning:
        decays = one.parameter.ndim >= 2 and one.part != "logit_scale"
        groups.setdefault((one.part, one.rate_share, decays), []).append(one.parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "part": part, "rate_share": share, "weight_decay": weight_decay if decays else 0.0}
            for (part, share, decays), members in groups.items()
        ],
        lr=0.0,
        betas=BETAS,
        eps=EPSILON,
        fused=fused,
    )


def state_of(optimizer: torch.optim.Optimizer, learning: list[Learning]) -> dict[str, Tensor]:
    """Moments and step counts as `<parameter>|<key>`: a flat table of tensors, as a checkpoint keeps it."""
    return {
        f"{one.name}|{key}": value
        for one in learning
        for key, value in optimizer.state.get(one.parameter, {}).items()
        if isinstance(value, Tensor)
    }


def carry_state(state: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, learning: list[Learning]) -> list[str]:
    """Gives parameters that stay in training their earlier moments; a parameter that is new or was resized starts
    anew. Returns the names that were carried over."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for path, value in state.items():
        name, _, key = path.rpartition("|")
        by_name.setdefault(name, {})[key] = value
    carried, fused = [], bool(optimizer.defaults.get("fused"))
    for one in learning:
        earlier = by_name.get(one.name, {})
        moments = [value for key, value in earlier.items() if key != "step"]
        if not moments or any(value.shape != one.parameter.shape for value in moments):
            continue
        # Moments take the parameter's memory layout (channels_last!): a fused update pairs values by address.
        optimizer.state[one.parameter] = {
            key: value.to(one.parameter.device if fused else "cpu", copy=True)
            if key == "step"
            else torch.empty_like(one.parameter, requires_grad=False).copy_(value)
            for key, value in earlier.items()
        }
        carried.append(one.name)
    return carried
