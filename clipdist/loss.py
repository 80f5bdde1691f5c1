"""Contrastive losses of this rank's rows against the columns of the whole global batch.

Each loss is a SUM over the local rows. The caller multiplies by world_size / global_rows: DDP averages the ranks'
gradients, and the gather behind the columns sums in its backward, so loss and gradients of every parameter,
`logit_scale` and `logit_bias` included, are those of one process on the joined batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def positives(row_keys: Tensor, column_keys: Tensor, first_row: int) -> Tensor:
    """Which columns are right answers for each row: the same pair, or one that shares any non-zero key with it.

    `row_keys` int64 [rows, kinds] and `column_keys` int64 [columns, kinds] hold one hash per kind (group, caption);
    0 means none. Row i is column `first_row + i`. Pairwise OR, not transitive. Returns bool [rows, columns].
    """
    same = (row_keys[:, None, :] == column_keys[None, :, :]) & (row_keys[:, None, :] != 0)
    mask = same.any(dim=2)
    rows = torch.arange(len(row_keys), device=mask.device)
    mask[rows, first_row + rows] = True
    return mask


def contrastive_loss(
    image_rows: Tensor,
    text_rows: Tensor,
    image_columns: Tensor,
    text_columns: Tensor,
    positive: Tensor,
    logit_scale: Tensor,
) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020, figure 3), summed over the local rows.

    Rows [b, dim], columns [B, dim], L2-normalised; `positive` bool [b, B]; `logit_scale` is the multiplier (exp of the
    parameter). The target of row i is 1/|P_i| on its positives (supervised contrastive, arXiv 2004.11362, eq. 2);
    without duplicates that is the plain cross entropy to the last bit.
    """
    image_to_text = _cross_entropy(logit_scale * image_rows @ text_columns.T, positive)
    text_to_image = _cross_entropy(logit_scale * text_rows @ image_columns.T, positive)
    return (image_to_text + text_to_image) / 2


def _cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    right = torch.where(positive, logits, torch.zeros_like(logits)).sum(dim=1) / positive.sum(dim=1)
    return (torch.logsumexp(logits, dim=1) - right).sum()


def sigmoid_loss(
    image_rows: Tensor,
    text_columns: Tensor,
    positive: Tensor,
    row_positives: Tensor,
    column_positives: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343, eq. 1), summed over the local image rows.

    `row_positives` [b] and `column_positives` [B] count the positives of each row and column; a positive pair weighs
    (1/|P_i| + 1/|P_j|) / 2, so that a product shown n times counts as often as n single ones.
    """
    logits = logit_scale * image_rows @ text_columns.T + logit_bias
    per_row, per_column = 1 / row_positives.to(logits.dtype), 1 / column_positives.to(logits.dtype)
    weight = (per_row[:, None] + per_column[None, :]) / 2
    right = torch.where(positive, -F.logsigmoid(logits) * weight, torch.zeros_like(logits))
    wrong = torch.where(positive, torch.zeros_like(logits), -F.logsigmoid(-logits))
    return (right + wrong).sum()
