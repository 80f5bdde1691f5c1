"""Pixels and texts -> unit vectors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipdist import models
from clipdist.catalog import EmbedConfig
from clipdist.loading import Pixels
from clipdist.memory import keep_freed
from clipdist.outputs import ENCODE_ROWS
from clipdist.towers import Towers


class Encoder:
    """A model on its device, loaded once: units of pixels and texts become unit vectors [rows, dim]."""

    def __init__(
        self,
        config: EmbedConfig,
        model: Towers | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        """`device`: "cuda" or "cpu"; None: what this machine has."""
        gpu = torch.cuda.is_available() and config.use_gpu is not False
        self.device = torch.device(device or ("cuda" if gpu else "cpu"))
        if self.device.type == "cpu" and threads is not None:
            torch.set_num_threads(threads)
            keep_freed()
        self.model = (model or models.load(config.model)).to(self.device).requires_grad_(False)
        self.batch_rows = config.batch_rows or ENCODE_ROWS[self.device.type]
        self.low = config.precision == "bf16" or (config.precision is None and self.device.type == "cuda")
        self.dtype = np.dtype(config.dtype)

    def images(self, pixels: Pixels) -> NDArray[Any]:
        """uint8 [pictures, size, size, 3] -> [pictures, dim]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a block of the object store is read-only
            rows = torch.from_numpy(pixels)
        return self._batches(rows, self.model.image_embeddings)

    def texts(self, texts: Sequence[str]) -> NDArray[Any]:
        """Texts -> [texts, dim]."""
        tokens = self.model.tokenise(list(texts)) if texts else torch.zeros((0, 1), dtype=torch.int64)
        return self._batches(tokens, self.model.text_embeddings)

    def _batches(self, rows: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> NDArray[Any]:
        """Smaller batches from now on where a GPU has too little memory for them."""
        while True:
            try:
                return self._in_batches_of(self.batch_rows, rows, encode)
            except torch.OutOfMemoryError:
                if self.batch_rows == 1:
                    raise
                self.batch_rows //= 2

    def _in_batches_of(
        self, size: int, rows: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]
    ) -> NDArray[Any]:
        """Batches are padded to one size and never cross a unit, so vectors do not depend on what else ran."""
        found = [np.zeros((0, self.model.dim), self.dtype)]
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, self.low):
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                if len(batch) < size:
                    batch = torch.cat([batch, batch[:1].expand(size - len(batch), *batch.shape[1:])])
                vectors = encode(batch.to(self.device))[: len(rows) - start]
                normal = torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
                found.append(normal.astype(self.dtype))
        return np.concatenate(found)
