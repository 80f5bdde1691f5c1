"""Known wrong ways to compute a global contrastive loss under DDP. Each replaces one piece of the project, and the
tests of the gradients must see it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from clipdist import collectives, step
from clipdist.loss import contrastive_loss, positives, sigmoid_loss
from tests.distributed.tiny_towers import TinyTowers


class FullMatrix(step.GlobalLoss):
    """Every rank computes the loss of all rows, from gathered copies of which its own slice is live (open_clip without
    --local-loss and --gather-with-grad)."""

    def forward(self, batch: step.Batch) -> Tensor:
        counts = collectives.row_counts(batch.rows, batch.images.device)
        images, texts = (self._all_rows(local, counts) for local in self._embeddings(batch))
        keys = collectives.gather_rows(batch.keys, counts)
        mask, scale = positives(keys, keys, 0), self.towers.logit_scale()
        if self.loss == "contrastive":
            return contrastive_loss(images, texts, images, texts, mask, scale) / batch.global_rows
        many, bias = mask.sum(dim=1), self.towers.logit_bias()
        return sigmoid_loss(images, texts, mask, many, many, scale, bias) / batch.global_rows

    def _all_rows(self, local: Tensor, counts: list[int]) -> Tensor:
        pieces = list(collectives.gather_rows(local.detach(), counts).split(counts))
        pieces[collectives.rank()] = local
        return torch.cat(pieces)


class FullMatrixTimesW(FullMatrix):
    """The usual repair of the above (GradCache's README, Inf-CLIP's ClipLoss)."""

    def forward(self, batch: step.Batch) -> Tensor:
        return super().forward(batch) * collectives.world_size()


class LocalMean(step.GlobalLoss):
    """Each rank's mean over its own rows, instead of sum x W / B."""

    def forward(self, batch: step.Batch) -> Tensor:
        return super().forward(batch) * (batch.global_rows / (collectives.world_size() * batch.rows))


class _AllReduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def _all_reduced_scale(towers: TinyTowers) -> Tensor:
    """Inf-CL's GradientGather."""
    return _AllReduced.apply(towers.model.logit_scale.exp())


def _averaging_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    """DisCo-CLIP's gather."""
    return _right_backward(ctx, gradient)[0] / collectives.world_size(), None


def _detached_gather(local: Tensor, counts: list[int]) -> Tensor:
    """open_clip's --local-loss alone."""
    return _right_gather(local.detach(), counts)


def _own_positives(row_keys: Tensor, column_keys: Tensor, first_row: int) -> Tensor:
    mask = positives(row_keys, column_keys, first_row)
    mask[:, :first_row] = False
    mask[:, first_row + len(row_keys) :] = False
    return mask


def _positives_without_offset(row_keys: Tensor, column_keys: Tensor, first_row: int) -> Tensor:
    return positives(torch.zeros_like(row_keys), column_keys, 0)


_right_backward, _right_gather = collectives._GatherRows.backward, collectives.gather_rows

WRONG: dict[str | None, Callable[[], AbstractContextManager[Any]]] = {
    "own slice live": partial(mock.patch.object, step, "GlobalLoss", FullMatrix),
    "own slice live x W": partial(mock.patch.object, step, "GlobalLoss", FullMatrixTimesW),
    "local mean": partial(mock.patch.object, step, "GlobalLoss", LocalMean),
    "no gradient gather": partial(mock.patch.object, collectives, "gather_rows", _detached_gather),
    "backward averages": partial(
        mock.patch.object, collectives._GatherRows, "backward", staticmethod(_averaging_backward)
    ),
    "scale all-reduced": partial(mock.patch.object, TinyTowers, "logit_scale", _all_reduced_scale),
    "positives of the own rank only": partial(mock.patch.object, step, "positives", _own_positives),
    "positives without the rank's offset": partial(mock.patch.object, step, "positives", _positives_without_offset),
}
"""The variant "old wrapper" stands in `cases.one_step`: it leaves a line out."""
