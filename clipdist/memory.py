"""How much memory there is, how much is in use, and how many rows fit through the towers at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARE_FOR_ACTIVATIONS, SHARE_WHEN_RECOMPUTED = 0.6, 0.3
"""Of what is free; the rest is for gathered columns, pictures to come and fragmentation. With gradient checkpointing a
forward pass does not show what a block keeps while its backward pass computes it again: as much again in a ViT-B/32."""


def used_bytes(device: torch.device) -> int:
    """What this process holds of the machine's memory; on a GPU the most that it has held of the device's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device, sharers: int) -> int:
    """What is free for this process, when `sharers` processes of this machine share it (each GPU has one)."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    with open("/proc/meminfo") as file:
        facts = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    free = facts["MemAvailable"]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # a container may have less than its machine
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        kept = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        reclaimable = next(int(value) for name, value in kept if name == "inactive_file")  # the page cache
        free = min(free, limit - used + reclaimable)
    return max(free, 0) // sharers


def saved_bytes(forward: Callable[[], Any]) -> int:
    """What autograd keeps of a forward pass for the backward pass, parameters aside; the same on every device."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base  # a Linear keeps its weight's transpose
        if not whole.is_leaf or not whole.requires_grad:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(seen.values())


def rows_that_fit(forward: Callable[[int], Any], optimizer_bytes: int, free: int, *, recomputed: bool = False) -> int:
    """Rows whose activations fit into the free memory, once gradients and optimizer state have taken their part.
    `recomputed`: gradient checkpointing is on.

    `forward(n)` runs n rows. UserError is left to the caller: 0 means that not even one row fits.
    """
    per_row = max(saved_bytes(lambda: forward(4)) - saved_bytes(lambda: forward(2)), 2) // 2
    share = SHARE_WHEN_RECOMPUTED if recomputed else SHARE_FOR_ACTIVATIONS
    return max(int((free - optimizer_bytes) * share), 0) // per_row


def keep_freed() -> None:
    """On a CPU, glibc hands the activations of a pass back to the kernel, which zeroes every page for the next pass: a
    third of the time of a small model. This process keeps them instead. Does nothing where there is no glibc."""
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
