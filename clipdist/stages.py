"""What is trained at step s: the stages of a run, their parts of the model, lengths and learning rates."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from clipdist.config import Section

Part = Literal["projections", "logit_scale", "new_tokens", "image_tower", "text_tower"]
PARTS: tuple[Part, ...] = ("projections", "logit_scale", "new_tokens", "image_tower", "text_tower")


class StageConfig(Section):
    """A part of the schedule in which one set of parameters learns."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Names the checkpoints and curves of the stage."""
    learns: tuple[Literal["projections", "logit_scale", "image_tower", "text_tower", "all"], ...] = Field(min_length=1)
    """projections, logit_scale (with logit_bias), image_tower, text_tower, or all. What is not named stays as it is, to
    the bit."""
    epochs: int = Field(ge=1)
    """Passes over the training pairs."""
    learning_rate: float = Field(gt=0)
    """The highest rate, reached after the warm-up, of every part without a rate of its own."""
    learning_rates: dict[Part, float] = Field({})
    """Rates of single parts, such as {text_tower: 1e-5}."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's decay of matrices; biases, norms and logit_scale never decay."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the stage's steps in which the rate rises."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to zero along a cosine, or constant."""

    def parts(self) -> tuple[Part, ...]:
        """What learns, in a fixed order."""
        return tuple(part for part in PARTS if part in self.learns or "all" in self.learns)

    def frozen_towers(self) -> bool:
        """Whether nothing below the projections learns, so that tower outputs can be computed once and reused."""
        return not {"image_tower", "text_tower"} & set(self.parts())

    @model_validator(mode="after")
    def _rates_fit(self) -> StageConfig:
        for part, rate in self.learning_rates.items():
            if part not in self.parts():
                raise ValueError(f"learning_rates names {part}, which does not learn in stage {self.name}")
            if rate <= 0:
                raise ValueError(f"learning_rates.{part}: expected a positive number, got {rate}")
        return self


DEFAULT_STAGES = (
    StageConfig(name="projections", learns=("projections", "logit_scale"), epochs=5, learning_rate=1e-3),
    StageConfig(name="all", learns=("all",), epochs=10, learning_rate=1e-5, learning_rates={"projections": 1e-4}),
)
"""First only the projections and logit_scale, then everything at rates that keep what the towers know."""


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """The last, smaller batch counts: every pair is seen once per epoch."""
    return math.ceil(rows / global_batch_size)


def rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """The share of the highest rate at `step` of `steps` (0-based): linear warm-up, then cosine to 0 or constant."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def learning_rates(stage: StageConfig, step: int, steps: int) -> dict[Part, float]:
    """The rate of every learning part at `step`."""
    factor = rate_factor(step, steps, stage.warmup, stage.schedule)
    return {part: factor * stage.learning_rates.get(part, stage.learning_rate) for part in stage.parts()}
