"""Known wrong ways to compute a global contrastive loss under DDP. Each replaces one piece of the project, and the
tests of the gradients must see it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipdist import collectives, step
from clipdist.loss import contrastive_loss, sigmoid_loss
from clipdist.positives import Positives, find_positives
from tests.distributed.tiny_towers import TinyTowers


class FullMatrix(step.GlobalLoss):
    """Every rank computes the loss of all rows, from gathered copies of which its own slice is live (open_clip without
    --local-loss and --gather-with-grad)."""

    def value(self, embedded: step.Embedded, batch: step.Batch) -> Tensor:
        counts = collectives.row_counts(batch.rows, batch.images.device)
        images, texts = (self._all_rows(local[: batch.rows], counts) for local in embedded[:2])
        positives = find_positives(collectives.gather_rows(batch.keys, counts))
        if embedded.bias is None:
            return contrastive_loss(images, texts, positives, embedded.scale) / batch.global_rows
        return sigmoid_loss(images, texts, positives, embedded.scale, embedded.bias) / batch.global_rows

    def _all_rows(self, local: Tensor, counts: list[int]) -> Tensor:
        pieces = list(collectives.gather_rows(local.detach(), counts).split(counts))
        pieces[collectives.rank()] = local
        return torch.cat(pieces)


class FullMatrixTimesW(FullMatrix):
    """The usual repair of the above (GradCache's README, Inf-CLIP's ClipLoss)."""

    def value(self, embedded: step.Embedded, batch: step.Batch) -> Tensor:
        return super().value(embedded, batch) * collectives.world_size()


class LocalMean(step.GlobalLoss):
    """Each rank's mean over its own rows, instead of sum x W / B."""

    def value(self, embedded: step.Embedded, batch: step.Batch) -> Tensor:
        return super().value(embedded, batch) * (batch.global_rows / (collectives.world_size() * batch.rows))


class OwnPositives(step.GlobalLoss):
    """Pairs of other ranks are never right answers."""

    def value(self, embedded: step.Embedded, batch: step.Batch) -> Tensor:
        keys = torch.where(batch.keys == 0, 0, 100 * batch.keys + collectives.rank())
        return super().value(embedded, replace(batch, keys=keys))


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


def _positives_without_offset(keys: Tensor, first_row: int) -> Positives:
    return find_positives(torch.zeros_like(keys), 0)


def _scalars_always(outputs: step.Embedded, gradients: Any, rows: slice, *, with_scalars: bool) -> None:
    """open_clip's --accum-freq: every micro-batch carries the whole gradient of the scale."""
    _right_back_through(outputs, gradients, rows, with_scalars=True)


def _scalars_never(outputs: step.Embedded, gradients: Any, rows: slice, *, with_scalars: bool) -> None:
    """Cached embeddings without the term of the scale."""
    scalars = [None if one is None else torch.zeros_like(one) for one in gradients[2:]]
    _right_back_through(outputs, [*gradients[:2], *scalars], rows, with_scalars=with_scalars)


def _accumulated(model: nn.Module, batch: step.Batch, seed: int, micro_batch_size: int) -> Tensor:
    """Plain gradient accumulation: micro-batches see only each other's rows of the same number as negatives."""
    losses = []
    for start in range(0, batch.rows, micro_batch_size):
        rows = slice(start, min(start + micro_batch_size, batch.rows))
        count = sum(collectives.row_counts(rows.stop - rows.start, batch.images.device))
        part = replace(batch, images=batch.images[rows], texts=batch.texts[rows], keys=batch.keys[rows])
        part = replace(part, rows=rows.stop - rows.start, global_rows=count)
        with nullcontext() if rows.stop == batch.rows else collectives.no_sync(model):
            loss = collectives.unwrapped(model).value(model(part), part) * (count / batch.global_rows)
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _embed_without_seed(model: nn.Module, part: step.Batch, seed: int, number: int) -> step.Embedded:
    """Each pass draws its own dropout (open_clip's --accum-freq)."""
    return model(part)


_right_backward, _right_gather = collectives._GatherRows.backward, collectives.gather_rows
_right_back_through = step._back_through

WRONG: dict[str | None, Callable[[], AbstractContextManager[Any]]] = {
    "own slice live": partial(mock.patch.object, step, "GlobalLoss", FullMatrix),
    "own slice live x W": partial(mock.patch.object, step, "GlobalLoss", FullMatrixTimesW),
    "local mean": partial(mock.patch.object, step, "GlobalLoss", LocalMean),
    "no gradient gather": partial(mock.patch.object, collectives, "gather_rows", _detached_gather),
    "backward averages": partial(
        mock.patch.object, collectives._GatherRows, "backward", staticmethod(_averaging_backward)
    ),
    "scale all-reduced": partial(mock.patch.object, TinyTowers, "logit_scale", _all_reduced_scale),
    "positives of the own rank only": partial(mock.patch.object, step, "GlobalLoss", OwnPositives),
    "positives without the rank's offset": partial(
        mock.patch.object, step, "find_positives", _positives_without_offset
    ),
    "columns of the own rank only": partial(mock.patch.object, collectives, "merge_log_sums", lambda local: local),
    "scale in every micro-batch": partial(mock.patch.object, step, "_back_through", _scalars_always),
    "scale in no micro-batch": partial(mock.patch.object, step, "_back_through", _scalars_never),
    "every micro-batch synchronised": partial(mock.patch.object, collectives, "no_sync", lambda model: nullcontext()),
    "plain accumulation": partial(mock.patch.object, step, "_backward", _accumulated),
    "passes with their own dropout": partial(mock.patch.object, step, "_embed", _embed_without_seed),
}
"""The variant "old wrapper" stands in `cases.one_step`: it leaves a line out."""
