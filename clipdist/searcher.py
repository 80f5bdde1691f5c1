"""Text, a picture, a path or a URL -> hits with description, score and picture. The model is loaded once."""

from __future__ import annotations

import io
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from clipdist import images, models, storage
from clipdist.config import UserError, differences
from clipdist.hits import Hit, Hits
from clipdist.images import BadImage
from clipdist.manifest import read_manifest
from clipdist.models import ModelConfig
from clipdist.pictures import read_picture
from clipdist.search import Index, Where
from clipdist.towers import Towers

Picture = str | Path | Image.Image


class Searcher:
    """Searches one embeddings artefact with the model that made it."""

    def __init__(
        self,
        embeddings: str,
        model: str | None = None,
        *,
        device: str = "cpu",
        allow_private_hosts: bool = False,
    ) -> None:
        """`model`: only when it is no longer where it was; UserError when its weights or preprocessing differ."""
        self.uri, self.allow_private_hosts = embeddings, allow_private_hosts
        stamp = read_manifest(storage.absolute(embeddings), "embeddings").stamp
        record = stamp.recorded
        config = ModelConfig(
            name=model or record["model"],
            pretrained=None if model else record["pretrained"],
            image_size=None if model else record["image_size"],
        )
        self.device = torch.device(device)
        try:
            self.towers: Towers = models.load(config).to(self.device).requires_grad_(False)
        except UserError as error:
            hint = "" if model else f"\n  {embeddings} was made by this model; if it moved, say where: --model PATH"
            raise UserError(f"{error}{hint}") from None
        ours = {"weights_sha256": models.weights_sha256(config, self.towers), "dim": self.towers.dim}
        ours |= {"decode": images.DECODE_ID, **self.towers.identity()}
        found = differences(ours, {name: stamp.identity[name] for name in ours})
        if found:
            lines = [f"  {name}: {there} in the embeddings, {now} in the model" for name, now, there in found]
            raise UserError("\n".join([f"{embeddings}: made by another model than {config.name}:", *lines]))

    @cached_property
    def images(self) -> Index:
        return Index.open(self.uri, "images")

    @cached_property
    def texts(self) -> Index:
        return Index.open(self.uri, "texts")

    def find_image_from_text(self, text: str, k: int = 10, where: Where | None = None) -> Hits:
        """The k pictures nearest to a text; with `where`, of those rows that fit (see `Index.search`)."""
        return _hits(self.images, text, self.embed_text(text), k, where)

    def find_text_from_image(self, picture: Picture, k: int = 10, where: Where | None = None) -> Hits:
        """The k captions nearest to a picture: a path, an http(s) URL, or a PIL image."""
        return _hits(self.texts, _name(picture), self.embed_image(picture), k, where)

    def find_image_from_image(self, picture: Picture, k: int = 10, where: Where | None = None) -> Hits:
        """The k pictures nearest to a picture; a catalog picture finds itself first."""
        return _hits(self.images, _name(picture), self.embed_image(picture), k, where)

    def embed_text(self, text: str) -> NDArray[np.float32]:
        """L2-normalised float32 [dim]. UserError when the text is empty."""
        if not text.strip():
            raise UserError("the query text is empty")
        with torch.inference_mode():
            tokens = self.towers.tokenise([text]).to(self.device)
            return np.asarray(self.towers.text_embeddings(tokens)[0].float().cpu().numpy())

    def embed_image(self, picture: Picture) -> NDArray[np.float32]:
        """L2-normalised float32 [dim]. UserError with the reason when the picture cannot be read."""
        pixels = self.towers.preprocess(open_picture(picture, allow_private_hosts=self.allow_private_hosts))
        with torch.inference_mode():
            batch = torch.from_numpy(pixels)[None].to(self.device)
            return np.asarray(self.towers.image_embeddings(batch)[0].float().cpu().numpy())


def open_picture(picture: Picture, *, allow_private_hosts: bool = False) -> Image.Image:
    """A query picture, decoded as the catalog's are. UserError with the reason when that fails."""
    if isinstance(picture, Image.Image):
        upright, buffer = ImageOps.exif_transpose(picture), io.BytesIO()
        plain = upright.convert("RGB") if upright.mode in ("CMYK", "YCbCr", "HSV", "LAB", "F") else upright
        plain.save(buffer, "PNG")
        return images.decode(buffer.getvalue())  # transparency and 16 bits as in the catalog
    name = str(picture)
    uri = name if name.startswith(("http://", "https://")) else storage.absolute(name)
    try:
        return images.decode(read_picture(uri, allow_private_hosts=allow_private_hosts))
    except BadImage as error:
        raise UserError(f"{name}: {error.reason}: {error}") from None


def _name(picture: Picture) -> str:
    return "picture" if isinstance(picture, Image.Image) else str(picture)


def _hits(index: Index, name: str, query: NDArray[np.float32], k: int, where: Where | None) -> Hits:
    if k < 1:
        raise UserError(f"k: expected at least 1, got {k}")
    found = index.search(query, k, where)
    described = zip(index.describe(found.rows[0]), found.scores[0], strict=True)
    return Hits(name, tuple(_hit(row, score) for row, score in described))


def _hit(row: dict[str, Any], score: float) -> Hit:
    own = ("id", "caption", "image_uri")
    columns = {name: value for name, value in row.items() if name not in own and value is not None}
    return Hit(row["id"], row["caption"], float(score), row["image_uri"], columns)
