"""A unit of planned rows -> pixels and texts -> unit vectors, with what each step took."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from clipdist import images, models
from clipdist.catalog import EmbedConfig
from clipdist.images import BadImage, Preprocess
from clipdist.memory import keep_freed
from clipdist.outputs import ENCODE_ROWS
from clipdist.pictures import read_picture
from clipdist.towers import Towers

READERS = 16
"""Threads that read and decode the pictures of a unit: most of the time they wait for a store or a server."""
SECOND_ATTEMPT_SECONDS = 2.0
PROBES = 8
"""When this many second attempts have all failed, the rest of a unit is not tried again: the whole store is down."""

Pixels = NDArray[np.uint8]
Loaded = Pixels | BadImage | None


@dataclass
class Times:
    """Seconds of reading (waiting included) and of decoding (a core's own), and bytes read, summed over threads."""

    fetch: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def facts(self, readers: float, cores: float) -> dict[str, Any]:
        return {
            "bytes": sum(self.bytes),
            "seconds": {"fetch": sum(self.fetch), "decode": sum(self.decode)},
            "slots": {"fetch": readers, "decode": cores},
        }


def texts_of(rows: Sequence[dict[str, Any]], config: EmbedConfig) -> list[str]:
    """The captions that are embedded, row by row."""
    if "texts" not in config.towers:
        return []
    wanted = (row for row in rows if row["reason"] is None and row.get("only") in (None, "texts"))
    return [text for row in wanted for text in row["captions"] or []]


def load_rows(
    rows: Sequence[dict[str, Any]], config: EmbedConfig, preprocess: Preprocess, times: Times
) -> list[Loaded]:
    """Per row: pixels uint8 [size, size, 3], why there are none, or None for a row that needs none. Passing faults get
    a second attempt when all others are done."""

    def load(row: dict[str, Any]) -> Loaded:
        if row["reason"] is not None or "images" not in config.towers or row.get("only") not in (None, "images"):
            return None
        try:
            started = time.monotonic()
            try:
                data = read_picture(
                    row["image_uri"],
                    max_image_bytes=config.max_image_bytes,
                    allow_private_hosts=config.allow_private_hosts,
                )
            finally:  # what waited in vain has taken its time too
                times.fetch.append(time.monotonic() - started)
            times.bytes.append(len(data))
            busy = time.thread_time()
            picture = images.decode(data, max_image_bytes=config.max_image_bytes, max_pixels=config.max_pixels)
            pixels = preprocess(picture)
            times.decode.append(time.thread_time() - busy)
            return pixels
        except BadImage as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(load, rows))
        again = [index for index, one in enumerate(found) if isinstance(one, BadImage) and one.transient]
        if again:
            time.sleep(SECOND_ATTEMPT_SECONDS * random.uniform(0.5, 1.5))
        for part in (again[:PROBES], again[PROBES:]):
            for index, one in zip(part, pool.map(load, [rows[index] for index in part]), strict=True):
                found[index] = one
            if part and not any(isinstance(found[index], np.ndarray) for index in part):
                break
    return found


def stack(loaded: Sequence[Loaded], size: int) -> Pixels:
    """The pictures that could be read, uint8 [pictures, size, size, 3]."""
    pixels = [one for one in loaded if isinstance(one, np.ndarray)]
    return np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)


def rejects_of(loaded: Sequence[Loaded]) -> dict[str, list[str]]:
    """Row -> reason and message of the pictures that could not be read."""
    return {str(index): [one.reason, str(one)] for index, one in enumerate(loaded) if isinstance(one, BadImage)}


class Encoder:
    """A model on its device, loaded once: units of pixels and texts become unit vectors [rows, dim]."""

    def __init__(self, config: EmbedConfig, model: Towers | None = None, threads: int | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() and config.use_gpu is not False else "cpu")
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


def to_bytes(table: pa.Table) -> bytes:
    """A table as an Arrow stream, to travel inside a row of Ray Data."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
