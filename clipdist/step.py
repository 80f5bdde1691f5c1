"""One optimisation step: the model that DDP wraps, the optimizer's groups, and the step itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipdist import collectives
from clipdist.loss import contrastive_loss, positives, sigmoid_loss
from clipdist.stages import Part
from clipdist.towers import Towers

MAX_LOGIT_SCALE = 100.0
"""CLIP's clamp (arXiv 2103.00020, section 2.5)."""

LossName = Literal["contrastive", "sigmoid"]


@dataclass(frozen=True)
class Batch:
    """This rank's rows on the device. `images` are pixels, or reused tower outputs when `reused`; so are `texts`.

    A rank without rows of its own brings one row to run and `rows` 0, so that all ranks take part in every collective.
    """

    images: Tensor
    texts: Tensor
    keys: Tensor
    rows: int
    global_rows: int
    reused: bool = False


class GlobalLoss(nn.Module):
    """The loss of this rank's rows against the whole global batch, scaled so that DDP's mean is the exact gradient."""

    def __init__(self, towers: Towers, loss: LossName, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.towers, self.loss, self.autocast = towers, loss, autocast

    def forward(self, batch: Batch) -> Tensor:
        images, texts = self._embeddings(batch)
        unused = 0.0 * (images.sum() + texts.sum()) if batch.rows == 0 else 0.0
        images, texts, keys = images[: batch.rows], texts[: batch.rows], batch.keys[: batch.rows]
        counts = collectives.row_counts(batch.rows, images.device)
        if sum(counts) != batch.global_rows:
            raise RuntimeError(f"the ranks have {counts} rows, together not {batch.global_rows}")
        image_columns, text_columns = (
            collectives.gather_rows(images, counts),
            collectives.gather_rows(texts, counts),
        )
        mask = positives(keys, collectives.gather_rows(keys, counts), sum(counts[: collectives.rank()]))
        if self.loss == "contrastive":
            scale = self.towers.logit_scale().to(images.dtype)
            summed = contrastive_loss(images, texts, image_columns, text_columns, mask, scale)
        else:
            summed = self._sigmoid(images, text_columns, mask, counts)
        return summed * (collectives.world_size() / batch.global_rows) + unused

    def _embeddings(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """L2-normalised and at least float32: at scale 100, bfloat16 logits would be 2 % off in their gradients."""
        towers, device = self.towers, batch.images.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            images = batch.images if batch.reused else towers.image_tower_output(batch.images)
            texts = batch.texts if batch.reused else towers.text_tower_output(batch.texts)
            features = towers.project_image(images), towers.project_text(texts)
        image_features, text_features = (x if x.dtype == torch.float64 else x.float() for x in features)
        return F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)

    def _sigmoid(self, images: Tensor, text_columns: Tensor, mask: Tensor, counts: list[int]) -> Tensor:
        bias = self.towers.logit_bias()
        if bias is None:
            raise ValueError("the sigmoid loss needs a model with a logit_bias")
        row_positives = mask.sum(dim=1)
        column_positives = collectives.gather_rows(row_positives, counts)
        scale = self.towers.logit_scale().to(images.dtype)
        return sigmoid_loss(images, text_columns, mask, row_positives, column_positives, scale, bias)


def set_learning(towers: Towers, parts: Sequence[Part]) -> int:
    """Exactly these parts learn; the others are frozen. Returns the number of learning values."""
    count = 0
    for part, parameters in towers.parts().items():
        for _, parameter in parameters:
            parameter.requires_grad_(part in parts)
            parameter.grad = None
            count += parameter.numel() if part in parts else 0
    return count


def make_optimizer(towers: Towers, parts: Sequence[Part], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with one group per part and per decay: matrices decay; biases, norms and logit_scale do not."""
    groups = []
    for part, parameters in towers.parts().items():
        if part not in parts:
            continue
        for decays in (True, False):
            chosen = [p for _, p in parameters if (p.ndim >= 2 and part != "logit_scale") is decays]
            if chosen:
                groups.append({"params": chosen, "weight_decay": weight_decay if decays else 0.0, "part": part})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=False)


def optimise(
    model: nn.Module,
    towers: Towers,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    rates: Mapping[Part, float],
    clip: float,
) -> tuple[float, float]:
    """One step on one global batch. Returns the global loss and the gradient norm before clipping.

    Raises FloatingPointError when the gradient is not finite, before it can spoil the weights.
    """
    for group in optimizer.param_groups:
        group["lr"] = rates[group["part"]]
    optimizer.zero_grad(set_to_none=True)
    loss = model(batch)
    loss.backward()
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(learning, clip))
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}: lower learning_rate, or look for broken pairs")
    optimizer.step()
    with torch.no_grad():
        scale = towers.model.logit_scale
        if scale.requires_grad:  # a frozen one stays as it is, to the bit
            scale.clamp_(0.0, math.log(MAX_LOGIT_SCALE))
    shares = collectives.gather_rows(loss.detach().reshape(1), [1] * collectives.world_size())
    return float(shares.mean()), norm
