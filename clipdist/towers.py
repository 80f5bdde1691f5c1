"""The two towers: build, encode, project, grow, resize, save.

A tower's output before its projection is `*_tower_output`, after it `*_features`, L2-normalised `*_embeddings`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clipdist import anatomy, image_size
from clipdist.config import UserError
from clipdist.images import Preprocess
from clipdist.stages import PARTS, Part
from clipdist.vocab import SplitEmbedding, Start, TermTokenizer, first_rows, key, pieces, unknown_id

CONFIG, WEIGHTS, OWN = "open_clip_config.json", "open_clip_model.safetensors", "clipdist.json"
TOKENISING = threading.Lock()
"""Hugging Face's tokenizers fail when two threads use one."""


class Towers(nn.Module):
    """An open_clip model with its preprocessing and tokenizer. In eval mode unless `dropout` is set, and batch-norm
    then too: statistics that depend on the batch would depend on how many workers share it."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, model_config: dict[str, Any], preprocess: Preprocess, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.model_config, self.preprocess, self.tokenizer = model, model_config, preprocess, tokenizer
        self.terms: tuple[str, ...] = ()
        self.dropout = False
        self._text_length = int(tokenizer.context_length)
        self._fixed = frozenset(name for name, one in model.named_parameters() if not one.requires_grad)
        shape = (1, 1, 1, 3)
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(shape) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(shape) * 255, persistent=False)
        self.channels_last(True)
        self.eval()

    def train(self, mode: bool = True) -> Towers:
        super().train(mode and self.dropout)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @property
    def visual(self) -> Any:
        return self.model.visual

    @property
    def text(self) -> Any:
        """The module that owns the text tower: open_clip's CLIP keeps it in itself."""
        return getattr(self.model, "text", self.model)

    @property
    def dim(self) -> int:
        return int(self.model_config["embed_dim"])

    @property
    def text_length(self) -> int:
        """Tokens per text. A shorter length uses the first rows of the positions' table; the table stays whole."""
        return self._text_length

    @text_length.setter
    def text_length(self, length: int) -> None:
        most = anatomy.positions(self.text)
        if length < 3 or (most is not None and length > most):
            raise UserError(f"text_length: expected 3 to {most or 'any number of'} tokens for this model, got {length}")
        self._text_length = length

    def logit_scale(self) -> Tensor:
        """The multiplier, exp of the parameter."""
        return cast(Tensor, self.model.logit_scale).exp()

    def logit_bias(self) -> Tensor | None:
        return cast("Tensor | None", self.model.logit_bias)

    def tokenise(self, texts: Sequence[str]) -> Tensor:
        """Texts -> int64 [texts, length]; what is too long loses its last words, never the end token. The length is
        text_length, or less where all texts are shorter and padding behind them changes nothing."""
        with TOKENISING:
            tokens = cast(Tensor, self.tokenizer(list(texts), context_length=self.text_length))
        return tokens[:, : anatomy.columns_that_count(self.text, tokens)]

    def image_tower_output(self, pixels: Tensor) -> Tensor:
        """uint8 [rows, size, size, 3] -> [rows, width], before the projection."""
        normalised = ((pixels.to(self.mean.dtype) - self.mean) / self.std).permute(0, 3, 1, 2)
        normalised = normalised.contiguous(memory_format=self._layout)
        return anatomy.image_output(self.visual, normalised)

    def project_image(self, output: Tensor) -> Tensor:
        """image_features of image_tower_output."""
        return anatomy.project(output, anatomy.image_projection(self.visual))

    def text_tower_output(self, tokens: Tensor) -> Tensor:
        """int64 [rows, length] -> [rows, width], before the projection."""
        return anatomy.text_output(self.text, tokens)

    def project_text(self, output: Tensor) -> Tensor:
        """text_features of text_tower_output."""
        return anatomy.project(output, anatomy.text_projection(self.text))

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        """uint8 [rows, size, size, 3] -> L2-normalised [rows, dim]."""
        return F.normalize(self.project_image(self.image_tower_output(pixels)), dim=-1)

    def text_embeddings(self, tokens: Tensor) -> Tensor:
        """int64 [rows, length] -> L2-normalised [rows, dim]."""
        return F.normalize(self.project_text(self.text_tower_output(tokens)), dim=-1)

    def parts(self) -> dict[Part, list[tuple[str, nn.Parameter]]]:
        """Every parameter that can learn, by the part of the model that it belongs to; each in one part. Names are
        those of the open_clip model, but new tokens are `...token_embedding.new` beside `.old`."""
        found: dict[Part, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
        last = anatomy.image_projection_parameters(self.visual) + anatomy.text_projection_parameters(self.text)
        projections = {id(parameter) for parameter in last}
        embedding = self._embedding()
        new = embedding.new if isinstance(embedding, SplitEmbedding) else None
        for name, parameter in self.model.named_parameters():
            if name in self._fixed:
                continue
            if name in ("logit_scale", "logit_bias"):
                part: Part = "logit_scale"
            elif id(parameter) in projections:
                part = "projections"
            elif parameter is new:
                part = "new_tokens"
            else:
                part = "image_tower" if name.startswith("visual.") else "text_tower"
            found[part].append((name, parameter))
        return found

    def levels(self) -> dict[str, int]:
        """How far each parameter of `parts` is from its tower's output, for layer-wise rates: 0 projections,
        logit_scale and what comes behind the last block, 1 the last block, ..., n + 1 before the first of n blocks."""
        visual = {f"visual.{name}": level for name, level in anatomy.image_levels(self.visual).items()}
        before = "" if self.text is self.model else "text."
        found = visual | {before + name: level for name, level in anatomy.text_levels(self.text).items()}
        return {
            name: 0 if part in ("projections", "logit_scale") else found.get(name, 0)
            for part, parameters in self.parts().items()
            for name, _ in parameters
        }

    @property
    def images_reusable(self) -> bool:
        """Whether the image tower ends before its projection, so that its output can be kept while that learns."""
        cut = anatomy.image_projection(self.visual) is not None
        return cut or not anatomy.image_projection_parameters(self.visual)

    @property
    def texts_reusable(self) -> bool:
        """As `images_reusable`; every text tower's projection can be taken off."""
        return True

    def check_image_size(self, size: int) -> tuple[list[str], list[str]]:
        """What makes a picture size impossible, and what makes it doubtful, in words."""
        return image_size.check(self.visual, size, self.preprocess.size)

    def set_image_size(self, size: int) -> list[str]:
        """Resizes the image tower in place. Returns the names (as in `parts`) of the parameters whose shape changed:
        they may be new objects, and what an optimizer keeps of them is void. UserError when the tower cannot."""
        if size == self.preprocess.size:
            return []
        if problems := self.check_image_size(size)[0]:
            raise UserError("; ".join(problems))
        shapes = {name: one.shape for name, one in self.model.named_parameters()}
        image_size.resize(self.visual, size)
        self.model_config["vision_cfg"]["image_size"] = self.visual.preprocess_cfg["size"] = size
        self.preprocess = replace(self.preprocess, size=size)
        learning = [item for parameters in self.parts().values() for item in parameters]
        return [name for name, one in learning if one.shape != shapes.get(name)]

    def add_terms(self, terms: Sequence[str], start: Start = "mean", seed: int = 0) -> dict[str, int]:
        """Makes each term one token. Terms that are one token already stay so. Returns the number of pieces that each
        new token replaces. UserError for a tokenizer that cannot grow."""
        base, known = self._base_tokenizer(), {key(term) for term in self.terms}
        found = {term: pieces(base, term) for term in terms if key(term) not in known}
        unknown = unknown_id(base)
        found = {term: ids for term, ids in found.items() if len(ids) > 1 or unknown in ids}
        if found:
            embedding = self._embedding()
            rows = first_rows(embedding.weight, list(found.values()), start, seed + len(self.terms))
            self._grow(SplitEmbedding.of(embedding, rows), [*self.terms, *found])
        return {term: len(ids) for term, ids in found.items()}

    def split_terms(self, terms: Sequence[str]) -> None:
        """Tells the towers that the last rows of their token embedding are these terms, as in a loaded checkpoint."""
        if terms:
            self._grow(SplitEmbedding.of(self._embedding(), terms=len(terms)), terms)

    def _grow(self, embedding: SplitEmbedding, terms: Sequence[str]) -> None:
        base, config = self._base_tokenizer(), self.model_config["text_cfg"]
        self.terms = tuple(terms)
        self.tokenizer = TermTokenizer(base, self.terms, len(embedding.old))
        rows = embedding.num_embeddings
        if hasattr(self.text, "config"):
            self.text.transformer.set_input_embeddings(embedding)
            self.text.transformer.config.vocab_size = self.text.config.vocab_size = rows
        else:
            self.text.token_embedding = embedding
            config["vocab_size"] = rows
            end = getattr(base, "eot_token_id", None) or base.tokenizer.eos_token_id
            anatomy.pool_at_end_of_text(self.text, config, end)

    def _embedding(self) -> Any:
        text = self.text
        return text.transformer.get_input_embeddings() if hasattr(text, "config") else text.token_embedding

    def _base_tokenizer(self) -> Any:
        """The tokenizer under the domain terms."""
        return self.tokenizer.base if isinstance(self.tokenizer, TermTokenizer) else self.tokenizer

    def gradient_checkpointing(self, on: bool) -> None:
        """Trades about a third more time for far less memory: blocks are computed again in the backward pass."""
        for tower in (self.visual, self.text):
            anatomy.set_gradient_checkpointing(tower, on)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile of both towers in place; takes nothing. Names in the state_dict stay."""
        for tower in (self.visual, self.text):
            anatomy.compile_tower(tower)

    def channels_last(self, on: bool) -> None:
        """The image tower's memory layout. Pixels arrive as NHWC; convolutions in that layout run twice as fast on
        CPUs, and faster on GPUs too."""
        self._layout = torch.channels_last if on else torch.contiguous_format
        self.visual.to(memory_format=self._layout)

    def save(self, folder: Path, *, final_path: str, facts: dict[str, Any] | None = None) -> str:
        """Writes open_clip's local-dir layout and clipdist.json; returns the weights' sha256. `final_path` is where the
        folder will be: open_clip looks for a Hugging Face tower's config under the path that the JSON names. Plain
        open_clip loads all but timm transformers at another image size than timm made them for."""
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads(json.dumps(self.model_config))
        if hasattr(self.text, "config"):
            config["text_cfg"] |= {"hf_model_name": final_path, "hf_tokenizer_name": final_path}
            config["text_cfg"]["context_length"] = self.text_length
            self.text.config.save_pretrained(folder)
            self._base_tokenizer().tokenizer.save_pretrained(folder)
        preprocess = {**asdict(self.preprocess), "mode": "RGB"}
        (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1))
        save_file({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}, folder / WEIGHTS)
        with (folder / WEIGHTS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        own = {"terms": self.terms, "text_length": self.text_length, "weights_sha256": digest, **(facts or {})}
        (folder / OWN).write_text(json.dumps(own, indent=1, ensure_ascii=False))
        return digest

    def identity(self) -> dict[str, Any]:
        """What the vectors depend on besides the weights, for stamps."""
        base = self._base_tokenizer()
        terms = hashlib.sha256("\n".join(self.terms).encode()).hexdigest()[:16]
        tokenizer = {
            "kind": type(getattr(base, "tokenizer", base)).__name__,
            "text_length": self.text_length,
            "terms": len(self.terms),
            "terms_sha256": terms,
        }
        return {"preprocess": json.loads(json.dumps(asdict(self.preprocess))), "tokenizer": tokenizer}
