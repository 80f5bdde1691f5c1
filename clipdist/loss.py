"""Contrastive losses of this rank's images against the texts of the whole global batch, in tiles.

Each loss is a SUM over this rank's share of the global one. The caller multiplies by world_size / global_rows: DDP
averages the ranks' gradients, and the gather behind the text columns sums in its backward, so loss and gradients of
every parameter, `logit_scale` and `logit_bias` included, are those of one process on the joined batch.

The forward pass forms the gradients and the backward pass only rescales them. Rank r holds the block [b, B] of the
score matrix of its images, and of that only one tile at a time: memory O(tile^2 + (b + B) x dim). InfoNCE walks over
the tiles twice, first for the log-sums of rows and columns, then for the gradients: four matrix products. Two blocks
per rank (its images against all texts, its texts against all images) would need six, and gather the images too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clipdist.positives import Positives

TILE = {"cpu": 512, "cuda": 4096}
"""Rows and columns of a tile: on CPUs one that its second-level cache holds, on GPUs one that fills the device."""

Columns = Callable[[Tensor], Tensor]


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    positives: Positives,
    logit_scale: Tensor,
    merge_columns: Columns = lambda log_sums: log_sums,
    tile: int | None = None,
) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020, figure 3): the share of the local rows.

    `images` [b, dim] and `texts` [B, dim], L2-normalised; `logit_scale` is the multiplier (exp of the parameter). The
    target of row i is 1/|P_i| on its positives (supervised contrastive, arXiv 2004.11362, eq. 2). `merge_columns`
    makes of the columns' log-sums over the local rows [B] those over all ranks' rows.
    """
    inputs = _inputs(images, texts, logit_scale)
    value: Tensor = _Contrastive.apply(*inputs, positives, merge_columns, tile or TILE.get(images.device.type, 512))
    return value


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    positives: Positives,
    logit_scale: Tensor,
    logit_bias: Tensor,
    tile: int | None = None,
) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343, eq. 1), summed over the local images.

    Inputs as in `contrastive_loss`. A positive pair weighs (1/|P_i| + 1/|P_j|) / 2, so that a product shown n times
    counts as often as n single ones.
    """
    inputs = _inputs(images, texts, logit_scale, logit_bias)
    value: Tensor = _Sigmoid.apply(*inputs, positives, tile or TILE.get(images.device.type, 512))
    return value


def _inputs(*values: Tensor) -> list[Tensor]:
    """At least float32, all in one dtype (at scale 100, bfloat16 scores are 2 % off in their gradients); detached where
    nobody will ask for gradients, so that none are formed."""
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    return [(value if torch.is_grad_enabled() else value.detach()).to(dtype) for value in values]


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, positives: Positives, merge: Columns, tile: int
    ) -> Tensor:
        with _exact_products(images.device.type):
            row_sums, column_sums, right = _log_sums(images, texts, scale, positives, tile)
            column_sums = merge(column_sums)
            own = column_sums[positives.first_row : positives.first_row + len(images)]
            gradients = _Gradients(images, texts, ctx.needs_input_grad[:3])
            if gradients.wanted:
                for rows, columns, scores, spare in _tiles(images, texts, scale, tile):
                    torch.sub(scores, row_sums[rows, None], out=spare).exp_()
                    by_both = scores.sub_(column_sums[columns]).exp_().add_(spare).mul_(0.5)
                    i, j, weight = positives.inside(rows, columns)
                    by_both[i, j] -= weight.to(by_both.dtype)
                    gradients.add(by_both, rows, columns)
        ctx.save_for_backward(*gradients.of_inputs(scale))
        return (row_sums.sum() + own.sum()) / 2 - right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if one is None else gradient * one for one in ctx.saved_tensors), None, None, None


def _log_sums(
    images: Tensor, texts: Tensor, scale: Tensor, positives: Positives, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    """log sum exp of every row [b] and, over the local rows, of every column [B]; the weighted sum of right scores."""
    row_sums, column_sums = (values.new_full((len(values),), -torch.inf) for values in (images, texts))
    right = images.new_zeros(())
    for rows, columns, scores, spare in _tiles(images, texts, scale, tile):
        i, j, weight = positives.inside(rows, columns)
        right += (scores[i, j] * weight.to(scores.dtype)).sum()
        for sums, dim in ((row_sums[rows], 1), (column_sums[columns], 0)):
            highest = scores.amax(dim, keepdim=True)
            one = torch.sub(scores, highest, out=spare).exp_().sum(dim).log_().add_(highest.squeeze(dim))
            torch.logaddexp(sums, one, out=sums)
    return row_sums, column_sums, right


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, positives: Positives, tile: int
    ) -> Tensor:
        gradients, value, of_bias = _Gradients(images, texts, ctx.needs_input_grad[:3]), *images.new_zeros(2)
        with _exact_products(images.device.type):
            for rows, columns, scores, spare in _tiles(images, texts, scale, tile):
                i, j, weight = positives.inside(rows, columns)
                right, weight = scores.add_(bias)[i, j], weight.to(scores.dtype)
                terms = F.logsigmoid(torch.neg(scores, out=spare))
                terms[i, j] = weight * F.logsigmoid(right)
                value -= terms.sum()
                if not any(ctx.needs_input_grad):
                    continue
                slopes = scores.sigmoid_()
                slopes[i, j] = -weight * torch.sigmoid(-right)
                of_bias += slopes.sum()
                gradients.add(slopes, rows, columns)
        ctx.save_for_backward(*gradients.of_inputs(scale), of_bias)
        return cast(Tensor, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if one is None else gradient * one for one in ctx.saved_tensors), None, None


class _Gradients:
    """Gradients of images, texts and scale, only those needed, from the loss's slopes by the scores, tile by tile."""

    def __init__(self, images: Tensor, texts: Tensor, needed: tuple[bool, ...]) -> None:
        self.images, self.texts, self.wanted = images, texts, any(needed)
        _, by_texts, self.by_scale = needed
        # The scale's follows from either of the others, so that it costs no pass of its own.
        by_images = needed[0] or (self.by_scale and not by_texts)
        self.of_images = torch.zeros_like(images) if by_images else None
        self.of_texts = torch.zeros_like(texts) if by_texts else None

    def add(self, slopes: Tensor, rows: slice, columns: slice) -> None:
        if self.of_images is not None:
            self.of_images[rows].addmm_(slopes, self.texts[columns])
        if self.of_texts is not None:
            self.of_texts[columns].addmm_(slopes.T, self.images[rows])

    def of_inputs(self, scale: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        of_scale = None
        if self.by_scale and self.of_images is not None:  # sum of slope x cosine over all pairs
            of_scale = _product(self.images, self.of_images)
        elif self.by_scale and self.of_texts is not None:
            of_scale = _product(self.texts, self.of_texts)
        for one in (self.of_images, self.of_texts):
            if one is not None:
                one.mul_(scale)
        return self.of_images, self.of_texts, of_scale


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Sum of all products, without a third matrix."""
    return torch.stack([(a * b).sum() for a, b in zip(one.split(512), other.split(512), strict=True)]).sum()


def _tiles(images: Tensor, texts: Tensor, scale: Tensor, tile: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(rows, columns, their scores, a spare tensor of the same shape); both are overwritten by the next tile."""
    size = min(tile, len(images)) * min(tile, len(texts))
    buffers = images.new_empty(2, size)
    for first_row in range(0, len(images), tile):
        rows = slice(first_row, min(first_row + tile, len(images)))
        scaled = images[rows] * scale
        for first in range(0, len(texts), tile):
            columns = slice(first, min(first + tile, len(texts)))
            shape = rows.stop - rows.start, columns.stop - columns.start
            scores, spare = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
            torch.mm(scaled, texts[columns].T, out=scores)
            yield rows, columns, scores, spare


@contextmanager
def _exact_products(device: str) -> Iterator[None]:
    """Full float32 in matrix products, whatever the process has set: no autocast, no TF32, no bfloat16 parts."""
    cuda, cpu = torch.backends.cuda, cast(Any, torch.backends.mkldnn)
    backends: list[Any] = [cuda.matmul, cpu.matmul]
    changed = [(one, one.fp32_precision) for one in backends if one.fp32_precision not in ("none", "ieee")]
    try:
        for backend, _ in changed:
            backend.fp32_precision = "ieee"
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for backend, before in changed:
            backend.fp32_precision = before
