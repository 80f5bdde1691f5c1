"""Small random models of every family that open_clip builds."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipdist import models
from clipdist.models import ModelConfig
from clipdist.towers import Towers
from tests.conftest import TINY_CLIP

TEXT: dict[str, Any] = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
POOLED = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}


def _vit(**changes: Any) -> dict[str, Any]:
    return {**TINY_CLIP, "vision_cfg": {**TINY_CLIP["vision_cfg"], **changes}}  # type: ignore[dict-item]


def _timm(name: str, size: int, proj: str | None, pool: str) -> dict[str, Any]:
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    return {"embed_dim": 64, "custom_text": True, "vision_cfg": vision, "text_cfg": TEXT}


CONFIGS: dict[str, dict[str, Any]] = {
    "vit": TINY_CLIP,
    "vit_custom_text": {**TINY_CLIP, "custom_text": True},
    "vit_average": _vit(pool_type="avg", final_ln_after_pool=True),
    "vit_attention_pool": _vit(**POOLED),
    "vit_sin_cos": _vit(pos_embed_type="sin_cos_2d"),
    "resnet": {"embed_dim": 32, "vision_cfg": {"layers": [1, 2, 1, 1], "width": 8, "image_size": 64}, "text_cfg": TEXT},
    "timm_convolutions": _timm("resnet10t", 64, "linear", "avg"),
    "timm_convnext": _timm("test_convnext", 64, "mlp", "avg"),
    "timm_vit": _timm("test_vit", 64, "linear", "token"),
    "timm_classifier": _timm("test_vit", 64, None, "token"),
    "siglip": {**_timm("test_vit3", 64, "none", "map"), "embed_dim": 96, "init_logit_bias": -10},
}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "red",
    "coat",
    "dress",
    "book",
    "c",
    "+",
    "and",
    ",",
    ".",
    "(",
    ")",
    "neck",
    "v",
    "-",
    "3",
    "5",
    "mm",
    "jack",
    "##et",
    "gore",
    "te",
    "##x",
    "knit",
    "##s",
    "of",
]
LETTERS = [letter for one in "abcdefghijklmnopqrstuvwxyz" for letter in (one, f"##{one}")]


def build(family: str, folder: Path) -> Towers:
    """The model of a family, with the same random weights every time."""
    if family == "hugging_face":
        return hugging_face(folder)
    path = folder / f"{family}.json"
    path.write_text(json.dumps(CONFIGS[family]))
    return _load(path)


def hugging_face(folder: Path, *, padded_rows: int = 7) -> Towers:
    """A BERT text tower, whose embedding has more rows than the tokenizer has tokens."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    place = folder / "bert"
    place.mkdir(exist_ok=True)
    words = list(dict.fromkeys([*WORDS, *LETTERS]))
    (place / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab={word: at for at, word in enumerate(words)}).save_pretrained(place)
    config = BertConfig(
        vocab_size=len(words) + padded_rows, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=24,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(place)
    text = {
        "hf_model_name": str(place), "hf_tokenizer_name": str(place), "context_length": 16,
        "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear",
    }  # fmt: skip
    path = folder / "hugging_face.json"
    path.write_text(json.dumps({**TINY_CLIP, "text_cfg": text}))
    return _load(path)


def _load(path: Path) -> Towers:
    torch.manual_seed(0)
    model = models.load(ModelConfig(name=str(path)))
    with torch.no_grad():  # fresh models have zeros in places; these are to matter in every comparison
        for name, parameter in sorted(model.model.named_parameters()):
            if parameter.requires_grad and parameter.ndim < 2 and not name.startswith("logit"):
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def pixels(model: Towers, rows: int = 3) -> torch.Tensor:
    size = model.preprocess.size
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8))


def gradients(model: Towers, texts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss over both towers, and its gradients."""
    model.zero_grad()
    images = model.image_embeddings(pixels(model, len(texts)))
    loss = ((images - model.text_embeddings(model.tokenise(texts)) * model.logit_scale()) ** 2).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    named = [item for parameters in model.parts().values() for item in parameters]
    return loss.detach(), {name: copy.deepcopy(one.grad) for name, one in named if one.grad is not None}
