"""What is trained at step s: the stages of a run, their parts of the model, sizes, lengths and learning rates."""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from clipdist.augment import AugmentConfig
from clipdist.config import Section

Part = Literal["projections", "logit_scale", "new_tokens", "image_tower", "text_tower"]
PARTS: tuple[Part, ...] = ("projections", "logit_scale", "new_tokens", "image_tower", "text_tower")

LAST_BLOCKS = re.compile(r"last_([1-9]\d*)_(image|text)_blocks")


class StageConfig(Section):
    """A part of the schedule in which one set of parameters learns."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Names the checkpoints and curves of the stage."""
    learns: tuple[str, ...] = Field(min_length=1)
    """projections, logit_scale (with logit_bias), new_tokens, image_tower, text_tower (with its new tokens),
    last_4_image_blocks, last_4_text_blocks (any number), or all. What is not named stays as it is, to the bit."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the training pairs; or say `steps`."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps, instead of epochs."""
    learning_rate: float = Field(gt=0)
    """The highest rate, reached after the warm-up, of every part without a rate of its own."""
    learning_rates: dict[Part, float] = Field({})
    """Rates of single parts, such as {text_tower: 1e-5}."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each block of a tower learns at this share of the rate of the block above it; 1: all at the same rate."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's decay of matrices; biases, norms and logit_scale never decay."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the stage's steps in which the rate rises."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to zero along a cosine, or constant."""
    global_batch_size: int | None = Field(None, ge=2)
    """Pairs per optimizer step in this stage; null: the run's."""
    image_size: int | None = Field(None, ge=16)
    """Pixels per side in this stage; null: the model's own. Position embeddings are resized at the switch."""
    text_length: int | None = Field(None, ge=3)
    """Tokens per text in this stage; null: the model's own, which is the longest."""
    augment: AugmentConfig = AugmentConfig()
    """Changes to the pictures that leave the product recognisable; off by default."""
    dropout: bool = False
    """Whether the model's own dropout, drop-path and patch dropout are on."""
    distillation: float = Field(0.0, ge=0)
    """Weight of the pull towards the starting model's embeddings, which keeps general skill; 0: none."""

    def level_learns(self, part: Part, level: int) -> bool:
        """Whether a parameter learns: its part, and its level (1 = the tower's last block, 0 = after it)."""
        if "all" in self.learns or part in self.learns:
            return True
        if part == "new_tokens":
            return "text_tower" in self.learns
        return level <= self._last_blocks(part)

    def tower_learns(self, tower: Literal["image", "text"]) -> bool:
        """Whether anything below the projection of this tower learns, so that its outputs change."""
        part: Part = "image_tower" if tower == "image" else "text_tower"
        whole = {"all", part} | ({"new_tokens"} if tower == "text" else set())
        return bool(whole & set(self.learns)) or self._last_blocks(part) > 0

    def parts(self) -> tuple[Part, ...]:
        """The parts of which at least something learns, in a fixed order."""
        return tuple(part for part in PARTS if self.level_learns(part, 0))

    def _last_blocks(self, part: Part) -> int:
        found = [LAST_BLOCKS.fullmatch(name) for name in self.learns]
        return max((int(match[1]) for match in found if match and part == f"{match[2]}_tower"), default=-1)

    @field_validator("learns")
    @classmethod
    def _known(cls, learns: tuple[str, ...]) -> tuple[str, ...]:
        for name in learns:
            if name != "all" and name not in PARTS and not LAST_BLOCKS.fullmatch(name):
                raise ValueError(f'expected {", ".join(PARTS)}, all, or such as last_4_image_blocks; got "{name}"')
        return learns

    @model_validator(mode="after")
    def _fits(self) -> StageConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"stage {self.name}: give either epochs or steps")
        for part, rate in self.learning_rates.items():
            if part not in self.parts():
                raise ValueError(f"learning_rates names {part}, which does not learn in stage {self.name}")
            if rate <= 0:
                raise ValueError(f"learning_rates.{part}: expected a positive number, got {rate}")
        return self


DEFAULT_STAGES = (
    StageConfig(name="projections", learns=("projections", "logit_scale"), epochs=5, learning_rate=1e-3),
    StageConfig(
        name="all",
        learns=("all",),
        epochs=10,
        learning_rate=1e-5,
        learning_rates={"projections": 1e-4},
        layer_decay=0.85,
        augment=AugmentConfig(crop_scale=0.9),
    ),
)
"""First only the projections and logit_scale, then everything at rates that keep what the towers know."""


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """The last, smaller batch counts, so every pair is seen once per epoch. A single pair that is left over joins the
    batch before: alone it would have no contrast."""
    whole, rest = divmod(rows, global_batch_size)
    return max(1, whole + (rest > 1))


def total_steps(stage: StageConfig, per_epoch: int) -> int:
    """Optimizer steps of a stage."""
    return stage.steps if stage.steps is not None else (stage.epochs or 0) * per_epoch


def rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """The share of the highest rate at `step` of `steps` (0-based): linear warm-up, then cosine to 0 or constant."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def learning_rates(stage: StageConfig, step: int, steps: int) -> dict[Part, float]:
    """The rate of every learning part at `step`; blocks below the top take `layer_decay` of it per block."""
    factor = rate_factor(step, steps, stage.warmup, stage.schedule)
    return {part: factor * stage.learning_rates.get(part, stage.learning_rate) for part in stage.parts()}
