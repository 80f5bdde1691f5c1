"""Models by name: the CLIP that a config means, found, loaded with its domain terms, and its weights' identity."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import get_model_config, load_checkpoint
from pydantic import Field
from safetensors import SafetensorError

from clipdist import image_size, storage
from clipdist.config import Section, UserError
from clipdist.images import Preprocess
from clipdist.towers import CONFIG, OWN, WEIGHTS, Towers

CANNOT_LOAD = (RuntimeError, OSError, ValueError, TypeError, KeyError, AssertionError, ImportError, SafetensorError)


class ModelConfig(Section):
    """The CLIP to start from, or to use."""

    name: str
    """An open_clip name ("ViT-B-32"), hf-hub:ORG/REPO, an open_clip JSON config, or a folder: a training run (its best
    checkpoint), a checkpoint, or anything else in open_clip's local-dir layout."""
    pretrained: str | None = None
    """With an open_clip name: the tag of its weights ("laion2b_s34b_b79k") or a weights file; null: random weights."""
    image_size: int | None = Field(None, ge=16)
    """Pixels per side; null: as the model was made."""


@dataclass(frozen=True)
class ModelPlace:
    """Where a model lies: `folder` when it is a checkpoint, else open_clip knows it by name."""

    name: str
    folder: str | None

    def weights_sha256(self) -> str | None:
        """Of a clipdist checkpoint; None when it has to be computed after loading."""
        path = storage.join(self.folder, OWN) if self.folder else ""
        return json.loads(storage.read_bytes(path)).get("weights_sha256") if path and storage.exists(path) else None


def locate(name: str) -> ModelPlace:
    """Finds a model without loading it. UserError when there is no such model."""
    if name.startswith("hf-hub:"):
        return ModelPlace(name, None)
    path = storage.absolute(name.removeprefix("local-dir:"))
    if storage.exists(storage.join(path, CONFIG)):
        return ModelPlace(path, path)
    if storage.exists(storage.join(path, "result.json")):
        best = json.loads(storage.read_bytes(storage.join(path, "result.json")))["best"]
        return ModelPlace(path, storage.join(path, best))
    if path.endswith(".json") and storage.exists(path):
        return ModelPlace(path, None)
    if storage.exists(storage.join(path, "plans")):
        raise UserError(f"model.name: {name}: what prepare or embed made; give a training run or a checkpoint")
    if storage.exists(storage.join(path, "stamp.json")):
        raise UserError(f"model.name: {name}: this training run is not finished, or no checkpoint is there")
    if name.replace("/", "-") not in open_clip.list_models():
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(
            f'model.name: "{name}" is neither a folder with {CONFIG}, nor a training run, nor an open_clip model{hint}'
        )
    return ModelPlace(name, None)


def load(config: ModelConfig) -> Towers:
    """The towers of a name, a checkpoint, a run or a JSON config. UserError with the reason when that fails."""
    with _source(config.name) as (place, source, shown):
        try:
            model = _create(place, source, config.pretrained, shown)
            tokenizer, model_config = open_clip.get_tokenizer(source), get_model_config(source)
        except CANNOT_LOAD as error:
            raise UserError(f"model: {config.name}: cannot be loaded: {_first_lines(error)}") from None
        own = _own_facts(place)
    facts = model.visual.preprocess_cfg
    preprocess = Preprocess(
        facts["size"] if isinstance(facts["size"], int) else facts["size"][0],
        tuple(facts["mean"]),
        tuple(facts["std"]),
        facts["interpolation"],
        facts["resize_mode"],
        facts["fill_color"],
    )
    towers = Towers(model, model_config, preprocess, tokenizer)
    towers.split_terms(own.get("terms", ()))
    if "text_length" in own:
        towers.text_length = own["text_length"]
    if config.image_size is not None:
        towers.set_image_size(config.image_size)
    return towers


def load_tokenizer(name: str) -> tuple[Any, tuple[str, ...]]:
    """The tokenizer of a model, without its domain terms, and these; the model itself is not built."""
    with _source(name) as (place, source, _):
        try:
            return open_clip.get_tokenizer(source), tuple(_own_facts(place).get("terms", ()))
        except CANNOT_LOAD as error:
            raise UserError(f"model: {name}: its tokenizer cannot be loaded: {_first_lines(error)}") from None


@contextlib.contextmanager
def _source(name: str) -> Iterator[tuple[ModelPlace, str, dict[str, Any] | None]]:
    """Where a model lies, its name for open_clip while the block lasts, and its preprocessing if a JSON config has
    one."""
    place = locate(name)
    with tempfile.TemporaryDirectory() as temporary, _quiet():
        if place.folder is not None:
            yield place, _local_copy(place.folder, Path(temporary) / "model"), None
        elif place.name.endswith(".json"):
            yield place, *_register(place.name, Path(temporary))
        else:
            yield place, place.name, None


def _create(place: ModelPlace, source: str, pretrained: str | None, preprocess: dict[str, Any] | None) -> Any:
    """open_clip's model. A timm trunk gets the config's image size, and before a checkpoint's weights come in."""
    folder = source.removeprefix("local-dir:") if place.folder is not None else None
    model = open_clip.create_model(
        source,
        pretrained,
        load_weights=folder is None,
        pretrained_text=folder is None,
        force_preprocess_cfg=preprocess,
    )
    size = model.visual.image_size
    image_size.match_trunk(model.visual, size if isinstance(size, int) else size[0])
    if folder is not None:
        load_checkpoint(model, f"{folder}/{WEIGHTS}")
    return model


def weights_sha256(config: ModelConfig, towers: Towers) -> str:
    """Names the weights: of a checkpoint as it was saved, of another model over its state."""
    known = locate(config.name).weights_sha256()
    if known is not None:
        return known
    digest = hashlib.sha256()
    for name, tensor in sorted(towers.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _local_copy(checkpoint: str, folder: Path) -> str:
    """A folder whose open_clip config points at its own files, wherever the checkpoint was moved to."""
    folder.mkdir()
    for name in storage.names(checkpoint):
        if name.endswith((".json", ".txt", ".model")) or name == WEIGHTS:
            _link_or_download(storage.join(checkpoint, name), folder / name)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).unlink()
    if "hf_model_name" in config["model_cfg"]["text_cfg"] and (folder / "config.json").exists():
        config["model_cfg"]["text_cfg"] |= {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    (folder / CONFIG).write_text(json.dumps(config))
    return f"local-dir:{folder}"


def _register(path: str, folder: Path) -> tuple[str, dict[str, Any] | None]:
    """Makes a JSON config known to open_clip; returns its name and its preprocessing."""
    try:
        config = json.loads(storage.read_bytes(path))
        model_config = config.get("model_cfg", config)
        if missing := [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model_config]:
            raise UserError(f"model.name: {path}: an open_clip config needs {' and '.join(missing)}")
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise UserError(f"model.name: {path}: not an open_clip JSON config: {error}") from None
    name = f"clipdist-{hashlib.sha256(json.dumps(model_config).encode()).hexdigest()[:12]}"
    (folder / f"{name}.json").write_text(json.dumps(model_config))
    open_clip.add_model_config(folder / f"{name}.json")
    return name, config.get("preprocess_cfg")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip and transformers report on loading through the root logger and bars; errors still come through."""
    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as hugging_face

        hugging_face.set_verbosity_error()
        hugging_face.disable_progress_bar()
    try:
        yield
    finally:
        root.setLevel(level)


def _link_or_download(path: str, target: Path) -> None:
    if storage.is_local(path):
        target.symlink_to(path)
        return
    with storage.open_read(path) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def _own_facts(place: ModelPlace) -> dict[str, Any]:
    path = storage.join(place.folder, OWN) if place.folder else None
    return json.loads(storage.read_bytes(path)) if path and storage.exists(path) else {}


def _first_lines(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[:3])[:600]
