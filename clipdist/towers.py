"""The two towers: build, encode, project, save, load. The only module that knows open_clip.

A tower's output before its projection is `*_tower_output`, after it `*_features`, L2-normalised `*_embeddings`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.factory import get_model_config
from PIL import Image
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clipdist import images, storage
from clipdist.config import Section, UserError
from clipdist.stages import Part
from clipdist.vocab import BpeTokenizer, grown_embedding

CONFIG, WEIGHTS, OWN = "open_clip_config.json", "open_clip_model.safetensors", "clipdist.json"


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
class Preprocess:
    """How a decoded picture becomes the image tower's input; stands in every stamp."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear", "nearest"]
    resize_mode: Literal["shortest", "longest", "squash"]
    fill_color: int

    def __call__(self, picture: Image.Image) -> NDArray[np.uint8]:
        """RGB picture -> uint8 [size, size, 3]; the towers normalise on their device."""
        return images.fit(picture, self.size, self.resize_mode, self.interpolation, self.fill_color)


class Towers(nn.Module):
    """An open_clip model with its preprocessing and tokenizer. Always in eval mode: batch-norm statistics that depend
    on the batch would depend on how many workers share it, and dropout is off."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, model_config: dict[str, Any], preprocess: Preprocess, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.model_config, self.preprocess, self.tokenizer = (
            model,
            model_config,
            preprocess,
            tokenizer,
        )
        self.terms: tuple[str, ...] = ()
        shape = (1, 1, 1, 3)
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(shape) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(shape) * 255, persistent=False)
        # Pixels arrive as NHWC; on CPUs convolutions in that layout run twice as fast, on GPUs faster too.
        self.visual.to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> Towers:
        return super().train(False)

    @property
    def text(self) -> Any:
        """The module that owns the text tower: open_clip's CLIP keeps it in itself."""
        return getattr(self.model, "text", self.model)

    @property
    def dim(self) -> int:
        return int(self.model_config["embed_dim"])

    @property
    def text_length(self) -> int:
        return int(self.tokenizer.context_length)

    def logit_scale(self) -> Tensor:
        """The multiplier, exp of the parameter."""
        return cast(Tensor, self.model.logit_scale).exp()

    def logit_bias(self) -> Tensor | None:
        return cast("Tensor | None", self.model.logit_bias)

    def tokenise(self, texts: Sequence[str]) -> Tensor:
        """Texts -> int64 [texts, text_length]."""
        return cast(Tensor, self.tokenizer(list(texts)))

    def image_tower_output(self, pixels: Tensor) -> Tensor:
        """uint8 [rows, size, size, 3] -> [rows, width], before the projection."""
        owner, name = _image_projection(self.visual)
        normalised = ((pixels.to(self.mean.dtype) - self.mean) / self.std).permute(0, 3, 1, 2)
        with _without(owner, name):
            return cast(Tensor, self.visual(normalised))

    def project_image(self, output: Tensor) -> Tensor:
        """image_features of image_tower_output."""
        return _project(output, *_image_projection(self.visual))

    def text_tower_output(self, tokens: Tensor) -> Tensor:
        """int64 [rows, text_length] -> [rows, width], before the projection."""
        owner, name = _text_projection(self.text)
        with _without(owner, name):
            if self.text is self.model:
                return cast(Tensor, self.model.encode_text(tokens))
            if hasattr(self.text, "config"):  # Hugging Face towers mask padding, so whole columns of it can go
                tokens = tokens[:, : max(1, int((tokens != self.text.config.pad_token_id).sum(1).max()))]
            return cast(Tensor, self.text(tokens))

    def project_text(self, output: Tensor) -> Tensor:
        """text_features of text_tower_output."""
        return _project(output, *_text_projection(self.text))

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        """uint8 [rows, size, size, 3] -> L2-normalised [rows, dim]."""
        return F.normalize(self.project_image(self.image_tower_output(pixels)), dim=-1)

    def text_embeddings(self, tokens: Tensor) -> Tensor:
        """int64 [rows, text_length] -> L2-normalised [rows, dim]."""
        return F.normalize(self.project_text(self.text_tower_output(tokens)), dim=-1)

    @property
    def visual(self) -> Any:
        return self.model.visual

    def parts(self) -> dict[Part, list[tuple[str, nn.Parameter]]]:
        """Every parameter, by the part of the model that it belongs to; each in one part."""
        found: dict[Part, list[tuple[str, nn.Parameter]]] = {
            "projections": [], "logit_scale": [], "image_tower": [], "text_tower": [],
        }  # fmt: skip
        projections = {id(p) for p in [*_projection_parameters(self.visual), *_projection_parameters(self.text)]}
        for name, parameter in self.model.named_parameters():
            if name in ("logit_scale", "logit_bias"):
                found["logit_scale"].append((name, parameter))
            elif id(parameter) in projections:
                found["projections"].append((name, parameter))
            else:
                found["image_tower" if name.startswith("visual.") else "text_tower"].append((name, parameter))
        return found

    def reusable(self) -> bool:
        """Whether both towers end before their projection, so that frozen outputs can be kept."""
        return _image_projection(self.visual)[1] is not None and _text_projection(self.text)[1] is not None

    def add_terms(self, terms: Sequence[str]) -> dict[str, int]:
        """Makes each term one token whose row starts as the mean of its sub-word rows. Terms that are one token already
        stay so. Returns the number of pieces that each new token replaces."""
        pieces = {term: self._pieces(term) for term in terms if term not in self.terms}
        pieces = {term: ids for term, ids in pieces.items() if len(ids) > 1}
        new = list(pieces)
        if not new:
            return {}
        config = self.model_config["text_cfg"]
        if hasattr(self.text, "config"):
            inner = self.text.transformer
            self._add_to_hugging_face(new)
            inner.set_input_embeddings(grown_embedding(inner.get_input_embeddings(), list(pieces.values())))
            inner.config.vocab_size = self.text.config.vocab_size = inner.get_input_embeddings().num_embeddings
        else:
            self.tokenizer = BpeTokenizer(self._base_tokenizer(), (*self.terms, *new))
            self.text.token_embedding = grown_embedding(self.text.token_embedding, list(pieces.values()))
            # open_clip pools at the highest id, which was the end of the text and would now be the new token.
            config |= {"pool_type": "eos", "eos_id": self.tokenizer.base.eot_token_id}
            config["vocab_size"] = self.text.token_embedding.num_embeddings
            _pool_at_end_of_text(self.text, self.tokenizer.base.eot_token_id)
        self.terms = (*self.terms, *new)
        return {term: len(ids) for term, ids in pieces.items()}

    def _pieces(self, term: str) -> list[int]:
        if hasattr(self.text, "config"):
            return list(self.tokenizer.tokenizer.encode(term, add_special_tokens=False))
        return list(self._base_tokenizer().encode(term))

    def _base_tokenizer(self) -> Any:
        """CLIP's own BPE tokenizer under the domain terms. UserError for a tokenizer that cannot grow."""
        base = getattr(self.tokenizer, "base", self.tokenizer)
        if not all(hasattr(base, name) for name in ("encode", "vocab_size", "eot_token_id")):
            raise UserError(f"vocabulary: the tokenizer of this model ({type(base).__name__}) cannot take new tokens")
        return base

    def _add_to_hugging_face(self, terms: Sequence[str]) -> None:
        from transformers import AddedToken

        tokens = [AddedToken(term, single_word=True, normalized=True) for term in terms]
        self.tokenizer.tokenizer.add_tokens(tokens)

    def save(self, folder: Path, *, final_path: str, facts: dict[str, Any] | None = None) -> str:
        """Writes open_clip's local-dir layout and clipdist.json; returns the weights' sha256. `final_path` is where the
        folder will be: open_clip looks for a Hugging Face tower's config under the path that the JSON names."""
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads(json.dumps(self.model_config))
        if hasattr(self.text, "config"):
            config["text_cfg"] |= {"hf_model_name": final_path, "hf_tokenizer_name": final_path}
            self.text.config.save_pretrained(folder)
            self.tokenizer.tokenizer.save_pretrained(folder)
        preprocess = {**asdict(self.preprocess), "mode": "RGB"}
        (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1))
        save_file({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}, folder / WEIGHTS)
        digest = _sha256(folder / WEIGHTS)
        own = {"terms": self.terms, "weights_sha256": digest, **(facts or {})}
        (folder / OWN).write_text(json.dumps(own, indent=1, ensure_ascii=False))
        return digest

    def identity(self) -> dict[str, Any]:
        """What the vectors depend on besides the weights, for stamps."""
        kind = type(getattr(self.tokenizer, "tokenizer", self.tokenizer)).__name__
        terms = hashlib.sha256("\n".join(self.terms).encode()).hexdigest()[:16]
        tokenizer = {
            "kind": kind,
            "text_length": self.text_length,
            "terms": len(self.terms),
            "terms_sha256": terms,
        }
        return {"preprocess": json.loads(json.dumps(asdict(self.preprocess))), "tokenizer": tokenizer}


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
    if storage.exists(storage.join(path, "plan.json")) or storage.exists(storage.join(path, "stamp.json")):
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
    place = locate(config.name)
    with tempfile.TemporaryDirectory() as temporary, _quiet():
        source, preprocess = place.name, None
        if place.folder is not None:
            source = _local_copy(place.folder, Path(temporary) / "model")
        elif place.name.endswith(".json"):
            source, preprocess = _register(place.name, Path(temporary))
        try:
            model = open_clip.create_model(
                source,
                config.pretrained,
                force_image_size=config.image_size,
                force_preprocess_cfg=preprocess,
            )
            tokenizer = open_clip.get_tokenizer(source)
            model_config = get_model_config(source)
        except (RuntimeError, OSError, ValueError, TypeError, KeyError, AssertionError) as error:
            raise UserError(f"model: {config.name}: cannot be loaded: {_first_lines(error)}") from None
        return _assemble(model, model_config, tokenizer, config, _own_facts(place))


def _assemble(
    model: Any, model_config: dict[str, Any], tokenizer: Any, config: ModelConfig, own: dict[str, Any]
) -> Towers:
    facts = dict(model.visual.preprocess_cfg)
    size = facts["size"] if isinstance(facts["size"], int) else facts["size"][0]
    if config.image_size is not None:
        size = model_config["vision_cfg"]["image_size"] = config.image_size
    preprocess = Preprocess(
        size,
        tuple(facts["mean"]),
        tuple(facts["std"]),
        facts["interpolation"],
        facts["resize_mode"],
        facts["fill_color"],
    )
    towers = Towers(model, model_config, preprocess, tokenizer)
    terms = tuple(own.get("terms", ()))
    if terms and not hasattr(towers.text, "config"):
        towers.tokenizer = BpeTokenizer(tokenizer, terms)
    towers.terms = terms
    return towers


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


def _image_projection(visual: nn.Module) -> tuple[nn.Module, str | None]:
    """Who owns the image projection and under which name; None when it cannot be taken off."""
    if isinstance(getattr(visual, "proj", None), nn.Parameter):  # VisionTransformer
        return visual, "proj"
    head = getattr(visual, "head", None)  # TimmModel
    if isinstance(head, nn.Sequential) and ("proj" in head._modules or "mlp" in head._modules):
        return visual, "head" if "pool" not in head._modules else None
    return visual, None


def _text_projection(text: nn.Module) -> tuple[nn.Module, str | None]:
    if getattr(text, "text_projection", None) is not None:  # CLIP, TextTransformer
        return text, "text_projection"
    return (text, "proj") if hasattr(text, "proj") else (text, None)  # HFTextEncoder


def _projection_parameters(tower: nn.Module) -> list[nn.Parameter]:
    """Parameters of the tower's projection, those that cannot be taken off included: attention pooling of
    ModifiedResNet (its last linear map) and of timm's SigLIP towers."""
    for name in ("proj", "text_projection", "head", "attnpool.c_proj", "trunk.attn_pool"):
        found: Any = tower
        for step in name.split("."):
            found = getattr(found, step, None)
        if isinstance(found, nn.Parameter):
            return [found]
        if isinstance(found, nn.Module) and any(True for _ in found.parameters()):
            return list(found.parameters())
    return []


@contextlib.contextmanager
def _without(owner: nn.Module, name: str | None) -> Iterator[None]:
    """The tower with its projection taken off."""
    if name is None:
        yield
        return
    store: dict[str, Any] = owner._parameters if name in owner._parameters else owner._modules
    saved = store[name]
    store[name] = nn.Identity() if name in ("head", "proj") and isinstance(saved, nn.Module) else None
    try:
        yield
    finally:
        store[name] = saved


def _project(output: Tensor, owner: nn.Module, name: str | None) -> Tensor:
    projection = getattr(owner, name) if name is not None else None
    if projection is None:
        return output
    return cast(Tensor, projection(output) if isinstance(projection, nn.Module) else output @ projection)


def _pool_at_end_of_text(text: Any, eos_id: int) -> None:
    for kind, eos in (("text_pool_type", "text_eos_id"), ("pool_type", "eos_id")):
        if hasattr(text, kind):
            setattr(text, kind, "eos")
            setattr(text, eos, eos_id)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_lines(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[:3])[:600]
