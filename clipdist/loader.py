"""This rank's share of every global batch of a stage, read ahead and decoded in worker processes.

The position is the step: a loader that starts at step s gives what one that started at 0 gives from s on.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipdist import images
from clipdist.augment import AugmentConfig, augment
from clipdist.images import Preprocess
from clipdist.lanes import EpochOrder, Indices, batch_bounds, own_lanes
from clipdist.reader import Lane, Rows
from clipdist.retrieval import normal_caption
from clipdist.stages import steps_per_epoch

Picture = tuple[int, str, bytes]
"""Epoch, id, encoded bytes."""
Item = TypeVar("Item")

DECODE_ROWS = 32
"""Pictures that a worker process decodes at a time."""
CHUNKS_AHEAD = 4
"""Decoded chunks that wait per worker process."""


@dataclass(frozen=True)
class Shares:
    """Which share of which global batches: a stage's batches for one rank."""

    seed: int
    stage: int
    global_batch_size: int
    steps: int
    lanes: int
    rank: int
    world_size: int


@dataclass(frozen=True)
class LocalBatch:
    """This rank's rows of one global batch: a table, the caption of each row in this epoch, its tokens, the pictures.

    `tokens` int64 [rows, length] and `pixels` uint8 [rows, size, size, 3] are None when they are not needed; `keys`
    int64 [rows, 2] are the hashes of group and caption that tell positives (0: none).
    """

    table: pa.Table
    choices: Indices
    captions: list[str]
    keys: Tensor
    tokens: Tensor | None
    pixels: Tensor | None
    global_rows: int
    step: int
    epoch: int

    @property
    def rows(self) -> int:
        return len(self.captions)


def key_hash(kind: str, text: str) -> int:
    """A 63-bit hash that is never 0, for "same group" and "same caption"."""
    digest = hashlib.blake2b(f"{kind}:{text}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) or 1


def caption_of(captions: int, seed: int, epoch: int, row_id: str) -> int:
    """Which of a pair's captions an epoch shows: a pure function, so that every worker agrees."""
    return key_hash("choice", f"{seed}:{epoch}:{row_id}") % captions if captions > 1 else 0


def local_tables(rows: Rows, shares: Shares, first_step: int) -> Iterator[tuple[int, int, int, list[pa.Table]]]:
    """(step, epoch, rows of the global batch, this rank's rows) of every step of the stage from `first_step` on."""
    per_epoch, size = steps_per_epoch(len(rows), shares.global_batch_size), shares.global_batch_size
    mine = own_lanes(shares.lanes, shares.rank, shares.world_size)
    coming: tuple[EpochOrder, list[Lane]] | None = None
    for epoch in range(first_step // per_epoch, -(-shares.steps // per_epoch)):
        first = max(first_step - epoch * per_epoch, 0)
        order, lanes = coming or _open_epoch(rows, shares, mine, epoch, first)
        coming = None
        for number in range(first, min(per_epoch, shares.steps - epoch * per_epoch)):
            if number >= 0.9 * per_epoch and coming is None and shares.steps > (epoch + 1) * per_epoch:
                coming = _open_epoch(rows, shares, mine, epoch + 1, 0)
            start, stop = batch_bounds(number, len(rows), size)
            ends = order.consumed(stop)
            tables = [table for lane, index in zip(lanes, mine, strict=True) for table in lane.take(int(ends[index]))]
            yield epoch * per_epoch + number, epoch, stop - start, tables


def _open_epoch(rows: Rows, shares: Shares, mine: range, epoch: int, first: int) -> tuple[EpochOrder, list[Lane]]:
    order = EpochOrder(rows.sizes, shares.lanes, shares.seed, shares.stage, epoch)
    starts = order.consumed(batch_bounds(first, order.rows, shares.global_batch_size)[0])
    return order, [rows.lane(order, lane, int(starts[lane])) for lane in mine]


class Loader:
    """Local batches of a stage, and how long the training waited for them.

    `preprocess` None: no picture is needed; `tokenise` None: no text. `decoders` worker processes decode (0: this
    process does). A thread puts the next batch together while the training works on one; `pin` lays its pictures in
    page-locked memory, from which a GPU copies them while it computes.
    """

    def __init__(
        self,
        rows: Rows,
        shares: Shares,
        tokenise: Callable[[list[str]], Tensor] | None,
        preprocess: Preprocess | None,
        change: AugmentConfig,
        decoders: int,
        *,
        pin: bool = False,
    ) -> None:
        self.rows, self.shares, self.tokenise, self.pin = rows, shares, tokenise, pin
        self.preprocess, self.change, self.decoders = preprocess, change, decoders
        self._waited = 0.0

    def take_wait(self) -> float:
        """Seconds that the training waited for batches since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def batches(self, first_step: int = 0) -> Iterator[LocalBatch]:
        """From `first_step` of the stage to its end."""
        coming = self._planned(first_step)
        if self.preprocess is not None:
            decode = Decode(self.preprocess, self.change, self.shares.seed)
            decoded = decode_ahead(coming, _encoded, decode, self.decoders)
            coming = (replace(batch, pixels=pixels.pin_memory() if self.pin else pixels) for batch, pixels in decoded)
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(next, coming, None)
            while True:
                started = time.perf_counter()
                batch = ahead.result()
                self._waited += time.perf_counter() - started
                if batch is None:
                    return
                ahead = thread.submit(next, coming, None)
                yield batch

    def _planned(self, first_step: int) -> Iterator[LocalBatch]:
        seed = self.shares.seed
        for step, epoch, global_rows, tables in local_tables(self.rows, self.shares, first_step):
            table = pa.concat_tables(tables) if tables else self.rows.read(0).slice(0, 0)
            ids, captions, groups = (table.column(name).to_pylist() for name in ("id", "captions", "group"))
            choices = [caption_of(len(texts), seed, epoch, row) for texts, row in zip(captions, ids, strict=True)]
            texts = [options[choice] for options, choice in zip(captions, choices, strict=True)]
            keys = [
                [key_hash("group", group) if group else 0, key_hash("caption", normal_caption(text))]
                for group, text in zip(groups, texts, strict=True)
            ]
            key_tensor = torch.tensor(keys, dtype=torch.int64).reshape(len(keys), 2)
            tokens = self.tokenise(texts) if texts and self.tokenise is not None else None
            chosen = np.array(choices, np.int64)
            yield LocalBatch(table, chosen, texts, key_tensor, tokens, None, global_rows, step, epoch)


def _encoded(batch: LocalBatch) -> list[Picture]:
    ids, data = (batch.table.column(name).to_pylist() for name in ("id", "image"))
    return [(batch.epoch, row_id, encoded) for row_id, encoded in zip(ids, data, strict=True)]


class Decode(Dataset[Any]):
    """Encoded pictures -> uint8 [pictures, size, size, 3]; runs in the worker processes."""

    def __init__(self, preprocess: Preprocess, change: AugmentConfig | None = None, seed: int = 0) -> None:
        self.preprocess, self.change, self.seed = preprocess, change or AugmentConfig(), seed

    def __getitems__(self, pictures: list[Picture]) -> Tensor:
        return torch.from_numpy(np.stack([self._one(*picture) for picture in pictures]))

    def _one(self, epoch: int, row_id: str, data: bytes) -> NDArray[np.uint8]:
        try:
            decoded = images.decode(data) if data else Image.new("RGB", (32, 32))
        except images.BadImage as error:
            raise RuntimeError(f"{row_id}: {error}; the pairs have changed since they were prepared") from None
        return self.preprocess(augment(decoded, self.change, seed=self.seed, epoch=epoch, id=row_id))


def decode_ahead(
    items: Iterator[Item], pictures: Callable[[Item], list[Picture]], decode: Decode, decoders: int
) -> Iterator[tuple[Item, Tensor]]:
    """Every item with its pictures' pixels, in order, while worker processes decode those to come. An item without
    pictures gets an empty tensor."""
    waiting: deque[tuple[Item, int]] = deque()

    def chunks() -> Iterator[list[Picture]]:
        for item in items:
            encoded = pictures(item)
            waiting.append((item, len(encoded)))
            for start in range(0, max(len(encoded), 1), DECODE_ROWS):
                yield encoded[start : start + DECODE_ROWS] or [(0, "", b"")]  # one in place of none keeps the order

    options: dict[str, Any] = {"batch_sampler": chunks(), "collate_fn": _as_it_is}
    if decoders:
        # The fork server imports torch once, instead of every decoder in every stage and validation for seconds.
        multiprocessing.set_forkserver_preload([__name__])
        options |= {"num_workers": decoders, "prefetch_factor": CHUNKS_AHEAD, "multiprocessing_context": "forkserver"}
    decoded = iter(DataLoader(decode, **options))
    for first in decoded:
        item, count = waiting.popleft()
        parts = [first]
        while sum(len(part) for part in parts) < count:
            parts.append(next(decoded))
        yield item, torch.cat(parts)[:count]


def _as_it_is(value: Tensor) -> Tensor:
    return value
