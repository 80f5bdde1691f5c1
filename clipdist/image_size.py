"""Another picture size for a built image tower: position embeddings are resized, everything else stays."""

from __future__ import annotations

import math
from typing import Any

import torch
from open_clip.pos_embed import get_2d_sincos_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from clipdist.config import UserError

FEW_PATCHES = 4


def check(visual: Any, size: int, current: int) -> tuple[list[str], list[str]]:
    """Problems and warnings of `size` pixels per side, in words."""
    stride = total_stride(visual)
    if size == current:
        return [], []
    if size < 1 or size % stride:
        near = max(stride, round(size / stride) * stride)
        return [f"image size {size}: not a multiple of this image tower's {stride} pixels; {near} would be"], []
    patches = size // stride
    if patches < FEW_PATCHES:
        return [], [f"image size {size}: only {patches} x {patches} patches of {stride} pixels; details get lost"]
    return [], []


def total_stride(visual: Any) -> int:
    """Pixels per side that one patch, or one position of the last feature map, stands for."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        return int(visual.patch_size[0]) if hasattr(visual, "patch_size") else 32  # ModifiedResNet
    reductions = [one["reduction"] for one in getattr(trunk, "feature_info", None) or [] if "reduction" in one]
    if reductions:
        return int(max(reductions))
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", 32)
    return int(patch if isinstance(patch, int) else patch[0])


def resize(visual: Any, size: int) -> None:
    """Makes the tower take pictures of `size` pixels per side. UserError when its kind cannot."""
    if hasattr(visual, "trunk"):
        _resize_trunk(visual, size)
    elif hasattr(visual, "attnpool"):  # ModifiedResNet
        pool, side = visual.attnpool, size // 32
        old = math.isqrt(len(pool.positional_embedding) - 1)
        pool.positional_embedding = _resized(pool.positional_embedding, (old, old), (side, side))
        visual.image_size = size
    elif hasattr(visual, "grid_size"):  # VisionTransformer
        grid = (size // visual.patch_size[0], size // visual.patch_size[1])
        table = visual.positional_embedding
        if table.requires_grad or not _is_sin_cos(table, visual.grid_size):
            visual.positional_embedding = _resized(table, visual.grid_size, grid)
        else:
            fresh = torch.from_numpy(get_2d_sincos_pos_embed(table.shape[1], grid[0], cls_token=True))
            visual.positional_embedding = nn.Parameter(fresh.to(table), requires_grad=False)
        visual.grid_size, visual.image_size = grid, (size, size)
    else:
        raise UserError(f"image size: {type(visual).__name__} cannot change it; use the size that the model has")


def match_trunk(visual: Any, size: int) -> None:
    """open_clip builds timm trunks at timm's size, whatever the config says: sets the size of a fresh one."""
    if hasattr(visual, "trunk"):
        found = getattr(getattr(visual.trunk, "patch_embed", None), "img_size", None)
        if found is not None and tuple(found) != (size, size):
            _resize_trunk(visual, size)


def _resize_trunk(visual: Any, size: int) -> None:
    trunk, before = visual.trunk, visual.image_size
    if getattr(getattr(trunk, "attn_pool", None), "pos_embed", None) is not None:
        raise UserError("image size: this trunk's attention pooling has positions of its own; its size cannot change")
    visual.set_input_size(size)
    if hasattr(trunk, "set_input_size"):
        return
    some = next(trunk.parameters())
    try:  # a convolutional trunk takes any size; let it show that
        with torch.no_grad():
            visual(torch.zeros(1, 3, size, size, dtype=some.dtype, device=some.device))
    except (RuntimeError, AssertionError, ValueError):
        visual.image_size = before
        raise UserError(f"image size: timm's {type(trunk).__name__} cannot change it to {size}") from None


def _is_sin_cos(table: Tensor, grid: tuple[int, int]) -> bool:
    expected = torch.from_numpy(get_2d_sincos_pos_embed(table.shape[1], grid[0], cls_token=True))
    return len(expected) == len(table) and torch.allclose(expected.to(table), table, atol=1e-3)


def _resized(table: nn.Parameter, old: tuple[int, int], new: tuple[int, int]) -> nn.Parameter:
    """[prefix + old rows x columns, width] -> the same for `new`, bicubic with antialiasing; prefix rows (the class
    token's) stay."""
    prefix = len(table) - old[0] * old[1]
    with torch.no_grad():
        grid = table[prefix:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
        rows = grid.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(table.dtype)
        return nn.Parameter(torch.cat([table[:prefix], rows]), requires_grad=table.requires_grad)
