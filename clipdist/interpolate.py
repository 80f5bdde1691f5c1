"""WiSE-FT (arXiv 2109.01903): weights between the start and the end of training, chosen on validation data.

Fine-tuned weights know the domain, the weights they started from know the rest; on the straight line between them there
often lies a model that is better than both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor

from clipdist.config import Section, UserError


class InterpolateConfig(Section):
    """Weights between the start (0) and the end (1) of training; the best on validation is kept."""

    alphas: tuple[float, ...] = Field(tuple(tenth / 10 for tenth in range(11)), min_length=1)
    """Shares of the trained weights to try, each from 0 (the start) to 1 (the end of training)."""
    general: str | None = None
    """Pairs of a general domain whose validation split also counts, so that the model stays good outside its own;
    null: only the domain's own validation counts."""

    @field_validator("alphas")
    @classmethod
    def _shares(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [alpha for alpha in alphas if not 0 <= alpha <= 1]:
            raise ValueError(f"{wrong[0]:g} is no share of the trained weights; expected values from 0 to 1")
        return tuple(sorted(set(alphas)))


def interpolated(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * start + alpha * end, tensor by tensor (WiSE-FT, section 3), with `end`'s dtypes and devices.

    Numbers that are equal in both come out as they are, at any alpha; 0 and 1 give `start` and `end` exactly. What is
    not floating point (counters), and tensors that did not change, are `end`'s own; tensors are not copied needlessly,
    so the result may share memory with both.
    ValueError for an alpha outside 0..1; UserError naming every tensor that only one has, or of another shape.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is the share of the trained weights, 0 to 1, not {alpha}")
    _check_same_tensors(start, end)
    with torch.no_grad():
        return {name: _between(start[name], last, alpha) for name, last in end.items()}


def _between(first: Tensor, last: Tensor, alpha: float) -> Tensor:
    last = last.detach()
    if alpha == 1 or not last.is_floating_point():
        return last
    first = first.detach().to(last)
    if torch.equal(first, last):
        return last
    if alpha == 0:
        return first
    # lerp, because first * (1 - alpha) + last * alpha would move numbers that are equal in both. Halves are widened.
    wide = last.dtype if last.dtype == torch.float64 else torch.float32
    return torch.lerp(first.to(wide), last.to(wide), alpha).to(last.dtype)


def _check_same_tensors(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
    problems = [f"{name}: only in the weights at the start" for name in start if name not in end]
    for name, last in end.items():
        if name not in start:
            problems.append(f"{name}: only in the trained weights")
        elif start[name].shape != last.shape:
            shapes = f"{list(start[name].shape)} at the start, {list(last.shape)} after training"
            problems.append(f"{name}: {shapes}; the start must be the model after it was grown and resized")
    if problems:
        raise UserError(*problems)


def best_alpha(scores: Mapping[float, Sequence[float]]) -> float:
    """The alpha with the highest mean of its scores, of equal ones the larger (the more trained).

    scores[alpha]: the metric on each validation set, in the same order for every alpha; higher is better.
    ValueError when there is none, the numbers of sets differ, or a score is not finite.
    """
    sets = {len(values) for values in scores.values()}
    if len(sets) != 1 or sets == {0}:
        raise ValueError(f"every alpha needs a score on the same sets, at least one; got {dict(scores)}")
    for alpha, values in scores.items():
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"the scores of alpha {alpha:g} are {list(values)}; expected finite numbers")
    return max(scores, key=lambda alpha: (math.fsum(scores[alpha]), alpha))
