"""The model that made embeddings, for queries: texts and pictures -> vectors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clipdist import images, models
from clipdist.config import UserError, differences
from clipdist.models import ModelConfig
from clipdist.schema import Stamp
from clipdist.towers import Towers


class QueryEncoder:
    """Embeds queries as the catalog was embedded."""

    def __init__(self, embeddings: str, stamp: Stamp, model: str | None = None, device: str = "cpu") -> None:
        """`model`: only when it is no longer where it was; UserError when its weights or preprocessing differ."""
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

    def text(self, text: str) -> NDArray[np.float32]:
        """L2-normalised float32 [dim]. UserError when the text is empty."""
        if not text.strip():
            raise UserError("the query text is empty")
        with torch.inference_mode():
            tokens = self.towers.tokenise([text]).to(self.device)
            return np.asarray(self.towers.text_embeddings(tokens)[0].float().cpu().numpy())

    def image(self, picture: Image.Image) -> NDArray[np.float32]:
        """L2-normalised float32 [dim] of a picture from `open_picture`."""
        pixels = self.towers.preprocess(picture)
        with torch.inference_mode():
            batch = torch.from_numpy(pixels)[None].to(self.device)
            return np.asarray(self.towers.image_embeddings(batch)[0].float().cpu().numpy())
