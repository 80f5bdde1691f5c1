"""One optimisation step: the model that DDP wraps, micro-batches with cached embeddings, and the step itself."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipdist import collectives
from clipdist.loss import contrastive_loss, sigmoid_loss
from clipdist.positives import find_positives
from clipdist.stages import Part
from clipdist.towers import Towers

MAX_LOGIT_SCALE = 100.0
"""CLIP's clamp (arXiv 2103.00020, section 2.5)."""

LossName = Literal["contrastive", "sigmoid"]


@dataclass(frozen=True)
class Batch:
    """This rank's rows on the device. `images` are pixels and `texts` tokens, or tower outputs that are `*_reused`.

    A rank without rows of its own brings one row to run and `rows` 0, so that all ranks take part in every collective.
    `keys` int64 [rows, kinds] as for `find_positives`. `teacher`: the starting model's embeddings [rows, dim] of the
    same images and texts.
    """

    images: Tensor
    texts: Tensor
    keys: Tensor
    rows: int
    global_rows: int
    images_reused: bool = False
    texts_reused: bool = False
    teacher: tuple[Tensor, Tensor] | None = None


class Embedded(NamedTuple):
    """L2-normalised embeddings [rows, dim], at least float32, and what turns their products into scores."""

    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor | None


class GlobalLoss(nn.Module):
    """`forward`, which DDP wraps, embeds rows; `value` is their loss against the whole global batch, scaled so that
    DDP's mean over the ranks is the exact gradient.

    `distillation` weighs a pull to the starting model's embeddings, which keeps its other skills (distance in feature
    space to the pretrained model: LDIFS, arXiv 2308.13320).
    """

    def __init__(
        self, towers: Towers, loss: LossName, autocast: torch.dtype | None = None, distillation: float = 0.0
    ) -> None:
        super().__init__()
        self.towers, self.loss, self.autocast, self.distillation = towers, loss, autocast, distillation

    def forward(self, batch: Batch) -> Embedded:
        towers, device = self.towers, batch.images.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            images = batch.images if batch.images_reused else towers.image_tower_output(batch.images)
            texts = batch.texts if batch.texts_reused else towers.text_tower_output(batch.texts)
            features = towers.project_image(images), towers.project_text(texts)
        shown, written = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in features)
        bias = towers.logit_bias() if self.loss == "sigmoid" else None
        if self.loss == "sigmoid" and bias is None:
            raise ValueError("the sigmoid loss needs a model with a logit_bias")
        # A copy of the bias: DDP follows outputs to their parameters, and does not see an output that is one.
        scalars = towers.logit_scale(), None if bias is None else bias.clone()
        return Embedded(F.normalize(shown, dim=-1), F.normalize(written, dim=-1), *scalars)

    def value(self, embedded: Embedded, batch: Batch) -> Tensor:
        """This rank's share of the global loss x world size, of the first `batch.rows` rows. Their mean over the ranks
        is the loss of the global batch. Every rank calls it, once per step; `backward` of it is a collective too."""
        counts = collectives.row_counts(batch.rows, embedded.images.device)
        if sum(counts) != batch.global_rows:
            raise RuntimeError(f"the ranks have {counts} rows, together not {batch.global_rows}")
        keys = collectives.gather_rows(batch.keys[: batch.rows], counts)
        positives = find_positives(keys, sum(counts[: collectives.rank()]))
        images, texts = embedded.images[: batch.rows], embedded.texts[: batch.rows]
        all_texts = collectives.gather_rows(texts, counts)
        if embedded.bias is None:
            summed = contrastive_loss(images, all_texts, positives, embedded.scale, collectives.merge_log_sums)
        else:
            summed = sigmoid_loss(images, all_texts, positives, embedded.scale, embedded.bias)
        if self.distillation:
            summed = summed + self.distillation * _distance_to_teacher(images, texts, batch)
        return summed * (collectives.world_size() / batch.global_rows)


def _distance_to_teacher(images: Tensor, texts: Tensor, batch: Batch) -> Tensor:
    """Sum over rows of 1 - cosine, the mean of both towers."""
    if batch.teacher is None:
        raise ValueError("distillation needs the starting model's embeddings of the batch")
    pairs = zip((images, texts), batch.teacher, strict=True)
    cosines = [(rows * F.normalize(taught[: batch.rows].to(rows.dtype), dim=-1)).sum(dim=-1) for rows, taught in pairs]
    return ((1 - cosines[0]) + (1 - cosines[1])).sum() / 2


@dataclass(frozen=True)
class Stepped:
    """What a step found: the global loss, the gradient's norm before clipping, whether any rank asks to leave, and the
    longest time in seconds that a rank waited for its data: the others wait for that rank."""

    loss: float
    gradient_norm: float
    leave: bool
    waited: float


def optimise(
    model: nn.Module,
    towers: Towers,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    rates: Mapping[Part, float],
    clip: float,
    *,
    seed: int,
    micro_batch_size: int | None = None,
    leave: bool = False,
    waited: float = 0.0,
) -> Stepped:
    """One step on one global batch; every rank calls it. `model` is `collectives.wrap(GlobalLoss(...))`.

    `seed` is this step's own number for dropout. With `micro_batch_size`, at most so many rows of this rank hold
    activations at a time; the step is the same. Any rank may ask to `leave`; all hear it at the same step. Raises
    FloatingPointError when the gradient is not finite, before it can spoil the weights.
    """
    for group in optimizer.param_groups:
        group["lr"] = rates[group["part"]] * group.get("rate_share", 1.0)
    optimizer.zero_grad(set_to_none=True)
    loss = _backward(model, batch, seed, micro_batch_size or len(batch.images))
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(learning, clip))
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}: lower learning_rate, or look for broken pairs")
    optimizer.step()
    with torch.no_grad():
        scale = towers.model.logit_scale
        if scale.requires_grad:  # a frozen one stays as it is, to the bit
            scale.clamp_(0.0, math.log(MAX_LOGIT_SCALE))
    said = torch.cat([loss[None], loss.new_tensor([float(leave), waited])])[None]
    shares, leaving, waits = collectives.gather_rows(said, [1] * collectives.world_size()).T
    return Stepped(float(shares.mean()), norm, bool(leaving.any()), float(waits.max()))


def _backward(model: nn.Module, batch: Batch, seed: int, micro_batch_size: int) -> Tensor:
    """Gradients of one global batch, summed over the ranks. Returns this rank's loss.

    The loss is computed on detached embeddings, whose gradients then go back through the towers. In micro-batches, the
    embeddings come from a first pass that keeps no activations (GradCache, arXiv 2101.06983). Only the last one sums
    over the ranks and carries the gradients of logit_scale and logit_bias, so these count once, and ranks may have
    different numbers of them.
    """
    parts = [
        replace(batch, images=images, texts=texts)
        for images, texts in zip(batch.images.split(micro_batch_size), batch.texts.split(micro_batch_size), strict=True)
    ]
    whole = len(parts) == 1
    with torch.set_grad_enabled(whole):
        embedded = [_embed(model, part, seed, number) for number, part in enumerate(parts)]
        images, texts = torch.cat([one.images for one in embedded]), torch.cat([one.texts for one in embedded])
    joined = Embedded(images, texts, *embedded[0][2:])
    # All ask for their gradient, frozen or not: the backward of the gather needs every rank.
    detached = [x if x is None else x.detach().requires_grad_() for x in joined]
    leaves = Embedded(*cast(list[Tensor], detached))
    loss = cast(GlobalLoss, collectives.unwrapped(model)).value(leaves, batch)
    loss.backward()
    gradients = [None if leaf is None else leaf.grad for leaf in leaves]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with nullcontext() if last else collectives.no_sync(model):
            outputs = embedded[0] if whole else _embed(model, part, seed, number)
            rows = slice(number * micro_batch_size, (number + 1) * micro_batch_size)
            _back_through(outputs, gradients, rows, with_scalars=last)
    return loss.detach()


def _embed(model: nn.Module, part: Batch, seed: int, number: int) -> Embedded:
    """A micro-batch draws its own dropout, the same in both passes and in a resumed run."""
    digest = hashlib.blake2b(f"{seed}:{collectives.rank()}:{number}".encode(), digest_size=8).digest()
    own_seed = int.from_bytes(digest, "big") >> 1
    torch.default_generator.manual_seed(own_seed)  # torch.manual_seed takes 2 ms where CUDA is there but not in use
    if part.images.is_cuda:
        torch.cuda.manual_seed(own_seed)
    return cast(Embedded, model(part))


def _back_through(outputs: Embedded, gradients: list[Tensor | None], rows: slice, *, with_scalars: bool) -> None:
    """Adds to the parameters' gradients those of sum(outputs x gradients), by the chain rule the loss's own."""
    chosen = []
    for index, (output, gradient) in enumerate(zip(outputs, gradients, strict=True)):
        if output is not None and gradient is not None and output.requires_grad:
            if index < 2:
                chosen.append((output, gradient[rows]))
            elif with_scalars:
                chosen.append((output, gradient))
    if chosen:
        torch.autograd.backward([output for output, _ in chosen], [gradient for _, gradient in chosen])
