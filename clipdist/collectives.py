"""What ranks do together: differentiable gathers of uneven rows, DDP wrapping. For one process all is the identity."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def row_counts(rows: int, device: torch.device) -> list[int]:
    """How many rows each rank has."""
    if world_size() == 1:
        return [rows]
    counts = torch.empty(world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([rows], dtype=torch.int64, device=device))
    return [int(count) for count in counts]


def gather_rows(local: Tensor, counts: list[int]) -> Tensor:
    """All ranks' rows, in rank order: [n, ...] -> [sum(counts), ...]. The gradient of a row is the SUM of what all
    ranks' losses say of it."""
    if world_size() == 1:
        return local
    return _GatherRows.apply(local, counts) if local.requires_grad else _gather(local, counts)


def merge_log_sums(local: Tensor) -> Tensor:
    """log sum exp over all ranks, element by element: [n] -> [n]; -inf where a rank has nothing. No gradient."""
    return torch.logsumexp(gather_rows(local[None], [1] * world_size()), dim=0)


def wrap(module: nn.Module) -> nn.Module:
    """DDP around `module`; build it anew whenever another set of parameters learns. `find_unused_parameters` also
    keeps the bucket order of the first step, so that a resumed run sums in the same order. Buffers do not change in
    training, so they travel once, with the weights: ranks may run different numbers of forward passes."""
    if world_size() == 1:
        return module
    wrapped = DistributedDataParallel(module, find_unused_parameters=True, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # as an argument it is deprecated, and its successor is unknown to older torch
    return wrapped


def unwrapped(module: nn.Module) -> nn.Module:
    """What `wrap` was given."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Forward and backward passes in here add to this rank's gradients; the next pass outside sums over the ranks."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """All ranks' values, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _gather(local, counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        most = max(ctx.counts)
        if min(ctx.counts) < most:
            gradient = torch.cat([_pad(piece, most) for piece in gradient.split(ctx.counts)])
        summed = gradient.new_empty((most, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(summed, gradient.contiguous(), op=dist.ReduceOp.SUM)
        return summed[: ctx.counts[rank()]], None


def _gather(local: Tensor, counts: list[int]) -> Tensor:
    most = max(counts)
    if most == 0:
        return local
    gathered = local.new_empty((len(counts) * most, *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, _pad(local.detach(), most).contiguous())
    if min(counts) == most:
        return gathered
    blocks = gathered.unflatten(0, (len(counts), most))
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def _pad(rows: Tensor, most: int) -> Tensor:
    missing = most - len(rows)
    return torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))]) if missing else rows
