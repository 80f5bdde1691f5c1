"""Where things are in an open_clip model: each architecture's cut before the projection, and its blocks.

A table per architecture, because they differ: VisionTransformer (`proj`), ModifiedResNet (attention pooling), timm
trunks (a head behind the trunk, the trunk's own classifier, or attention pooling), CLIP's text transformer,
Hugging Face encoders. Nothing here changes a module for a moment: one model may encode in several threads.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any, cast

import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipdist.config import UserError

Projection = nn.Parameter | nn.Module | None

BLOCK = re.compile(r"(?:^|\.)(?:resblocks|layers?|h|blocks?)\.(\d+)\.")
"""Block numbers in parameter names of open_clip's transformers and of Hugging Face encoders."""
RESNET_BLOCK = re.compile(r"^layer(\d+)\.(\d+)\.")
BEHIND_BLOCKS = re.compile(r"^(ln_post|ln_final|attn_?pool|proj|text_projection)")
HUGGING_FACE_START = re.compile(r"embed|wte|wpe|shared")


def image_projection(visual: Any) -> Projection:
    """The last map of the image tower, if the tower can end before it."""
    if isinstance(getattr(visual, "proj", None), nn.Parameter):  # VisionTransformer
        return cast(nn.Parameter, visual.proj)
    if not hasattr(visual, "trunk"):
        return None
    if {"proj", "mlp"} & visual.head._modules.keys():  # TimmModel; behind its own attention pooling it is not last
        return visual.head if "pool" not in visual.head._modules else None
    classifier = _classifier(visual)
    return classifier if isinstance(classifier, nn.Linear) else None


def text_projection(text: Any) -> Projection:
    """The last map of the text tower; None: it has none."""
    if hasattr(text, "config"):  # HFTextEncoder
        return None if isinstance(text.proj, nn.Identity) else cast(nn.Module, text.proj)
    return cast(Projection, text.text_projection)


def project(output: Tensor, projection: Projection) -> Tensor:
    if projection is None:
        return output
    return cast(Tensor, projection(output)) if isinstance(projection, nn.Module) else output @ projection


def image_projection_parameters(visual: Any) -> list[nn.Parameter]:
    """Of the projection, also where the tower cannot end before it: the last map of ModifiedResNet's attention pooling,
    and the attention pooling of timm's SigLIP towers."""
    places = (_at(visual, one) for one in ("head", "attnpool.c_proj", "trunk.attn_pool"))
    for place in (image_projection(visual), *places):
        if found := _parameters(place):
            return found
    return []


def text_projection_parameters(text: Any) -> list[nn.Parameter]:
    return _parameters(text_projection(text))


def _parameters(place: Any) -> list[nn.Parameter]:
    if isinstance(place, nn.Module):
        return list(place.parameters())
    return [place] if isinstance(place, nn.Parameter) else []


def image_output(visual: Any, pixels: Tensor) -> Tensor:
    """Normalised [rows, 3, size, size] -> [rows, width], before `image_projection`."""
    projection = image_projection(visual)
    if projection is None:
        return cast(Tensor, visual(pixels))
    if isinstance(projection, nn.Parameter):
        return cast(Tensor, visual._pool(visual.transformer(visual._embeds(pixels)))[0])
    if projection is visual.head:
        return cast(Tensor, visual.trunk(pixels))
    return cast(Tensor, visual.trunk.forward_head(visual.trunk.forward_features(pixels), pre_logits=True))


def text_output(text: Any, tokens: Tensor) -> Tensor:
    """int64 [rows, length] -> [rows, width], before `text_projection`. Fewer tokens than the model has positions use
    the first ones."""
    if hasattr(text, "config"):
        mask = (tokens != text.config.pad_token_id).long()
        return cast(Tensor, text.pooler(text.transformer(input_ids=tokens, attention_mask=mask), mask))
    if hasattr(text, "_embeds"):  # TextTransformer
        x, mask = text._embeds(tokens)
        kind, end = text.pool_type, text.eos_id
    else:  # CLIP keeps the parts of its text tower in itself
        dtype, mask = text.transformer.get_cast_dtype(), text.attn_mask
        x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[: tokens.shape[1]].to(dtype)
        kind, end = text.text_pool_type, text.text_eos_id
    length = x.shape[1]
    if mask is not None:
        mask = mask[..., :length, :length]
    x = text.transformer(x, attn_mask=mask)
    if getattr(text, "cls_emb", None) is not None:  # CoCa pools at a token of its own behind the text
        return cast(Tensor, text.ln_final(text_global_pool(x, pool_type="last")))
    return cast(Tensor, text_global_pool(text.ln_final(x), tokens, pool_type=kind, eos_token_id=end))


def columns_that_count(text: Any, tokens: Tensor) -> int:
    """How many columns of int64 [rows, length] can change the output, rounded up to a multiple of 8. Behind the end of
    a text nothing does where attention is causal and pooling is at the end token, or where padding is masked; elsewhere
    (SigLIP) every column counts. CLIP's 77 tokens are some 16 for titles: a fifth of the text tower's work."""
    length = tokens.shape[1]
    if hasattr(text, "config"):
        counts = tokens.ne(text.config.pad_token_id)
    else:
        owned = hasattr(text, "_embeds")  # TextTransformer
        kind = text.pool_type if owned else text.text_pool_type
        end = text.eos_id if owned else text.text_eos_id
        if text.attn_mask is None or kind not in ("argmax", "eos") or getattr(text, "cls_emb", None) is not None:
            return length
        ends = tokens.eq(end).int().argmax(dim=1) if kind == "eos" else tokens.argmax(dim=1)
        counts = torch.arange(length) <= ends[:, None]
    used = counts.any(dim=0).nonzero()
    most = int(used.max()) + 1 if len(used) else 1
    return min(length, -(-most // 8) * 8)


def positions(text: Any) -> int | None:
    """The most tokens that a text tower can read; None: any number."""
    if not hasattr(text, "config"):
        return len(text.positional_embedding) - (getattr(text, "cls_emb", None) is not None)
    table = [m for n, m in text.transformer.named_modules() if n.endswith("position_embeddings")]
    rows = [len(one.weight) - (one.padding_idx + 1 if one.padding_idx is not None else 0) for one in table]
    return min(rows) if rows else cast("int | None", getattr(text.config, "max_position_embeddings", None))


def image_levels(visual: Any) -> dict[str, int]:
    """Each parameter's distance from the output: 0 behind the last block, 1 the last block, ..., n + 1 before the
    first of n blocks."""
    names = [name for name, _ in visual.named_parameters()]
    if hasattr(visual, "trunk"):
        inner = _timm_levels(visual.trunk)
        return {name: inner.get(name.removeprefix("trunk."), 0) for name in names}
    pattern = RESNET_BLOCK if hasattr(visual, "layer4") else BLOCK
    return _levels(names, pattern, {name for name in names if BEHIND_BLOCKS.match(name)})


def text_levels(text: Any) -> dict[str, int]:
    """`image_levels` of a text tower."""
    names = [name for name, _ in text.named_parameters() if not name.startswith(("visual.", "logit_", "text_decoder."))]
    if hasattr(text, "config"):
        return _levels(names, BLOCK, {name for name in names if not HUGGING_FACE_START.search(name)})
    return _levels(names, BLOCK, {name for name in names if BEHIND_BLOCKS.match(name)})


def _levels(names: Iterable[str], block: re.Pattern[str], behind: set[str]) -> dict[str, int]:
    matches = {name: block.search(name) for name in names}
    places = {name: tuple(int(one) for one in match.groups()) for name, match in matches.items() if match}
    level = {place: at + 1 for at, place in enumerate(sorted(set(places.values()), reverse=True))}
    first = len(level) + 1
    return {name: level[places[name]] if name in places else 0 if name in behind else first for name in matches}


def _timm_levels(trunk: Any) -> dict[str, int]:
    """By timm's own groups. Norms behind the last block, which timm counts to it, are level 0 as everywhere."""
    from timm.models import group_parameters

    matcher = trunk.group_matcher(coarse=False)
    groups: dict[str, int] = group_parameters(trunk, matcher, reverse=True)
    behind = {name for name in groups if isinstance(matcher, dict) and _is_behind(name, matcher)}
    if hasattr(trunk, "blocks"):  # a transformer's norm_pre stands before them
        behind = {name for name in behind if not name.startswith("norm_pre.")}
        groups |= {name: 0 for name in groups if name.startswith("norm_pre.")}
    order = sorted({group for name, group in groups.items() if name not in behind}, reverse=True)
    return {name: 0 if name in behind else order.index(group) + 1 for name, group in groups.items()}


def _is_behind(name: str, matcher: dict[str, Any]) -> bool:
    for spec in matcher.values():
        for pattern, suffix in [(spec, None)] if isinstance(spec, str) else spec or []:
            if found := re.match(pattern, name):
                return suffix == (99999,) and not found.groups()  # timm's "as the group before"
    return True


def set_gradient_checkpointing(tower: Any, on: bool) -> None:
    """Recomputes activations in the backward pass instead of keeping them. UserError where the tower cannot."""
    if hasattr(tower, "trunk"):
        try:
            tower.trunk.set_grad_checkpointing(on)
        except (AssertionError, AttributeError, NotImplementedError):  # timm's models refuse in one of these ways
            kind = type(tower.trunk).__name__
            raise UserError(f"gradient checkpointing: timm's {kind} does not offer it; switch it off") from None
    elif hasattr(tower, "layer4") or hasattr(tower, "config"):
        # Hugging Face's own switch does nothing in eval mode, in which the towers stay.
        for block in _blocks(tower):
            block.__dict__.pop("forward", None)
            if on:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    else:
        tower.transformer.grad_checkpointing = on


def compile_tower(tower: Any) -> None:
    """torch.compile in place: names in the state_dict stay."""
    if hasattr(tower, "trunk"):
        projection = image_projection(tower)
        whole = projection is None or projection is tower.head
        for module in [tower.trunk] if whole else tower.trunk.children():  # else the trunk's forward is not called
            module.compile()
    else:
        (tower.transformer if hasattr(tower, "transformer") else tower).compile()


def _blocks(tower: nn.Module) -> list[nn.Module]:
    pattern = re.compile((RESNET_BLOCK if hasattr(tower, "layer4") else BLOCK).pattern.removesuffix(r"\.") + "$")
    found = {name: module for name, module in tower.named_modules() if pattern.search(name)}
    return [module for name, module in found.items() if not any(name.startswith(f"{outer}.") for outer in found)]


def _classifier(visual: Any) -> nn.Module | None:
    """A timm trunk's own classifier, which open_clip uses as projection when the config names none."""
    return cast(nn.Module, visual.trunk.get_classifier()) if visual.trunk.num_classes else None


def _at(tower: Any, place: str) -> Any:
    for step in place.split("."):
        tower = getattr(tower, step, None)
    return tower


def pool_at_end_of_text(text: Any, config: dict[str, Any], end: int) -> None:
    """open_clip may pool at the highest id, which was the end of the text and would now be a new token."""
    for kind, eos in (("text_pool_type", "text_eos_id"), ("pool_type", "eos_id")):
        if getattr(text, kind, None) == "argmax":
            setattr(text, kind, "eos")
            setattr(text, eos, end)
            config |= {"pool_type": "eos", "eos_id": end}
