"""The deterministic global batch: (seed, stage, step) -> rows, and (rank, world size) -> this rank's rows of it.

The rows of a global batch do not depend on how many workers share them; each worker decodes only its own.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipdist import images, storage
from clipdist.ledger import Manifest

Indices = NDArray[np.int64]
Preprocess = Callable[..., NDArray[np.uint8]]


def key_hash(kind: str, text: str) -> int:
    """A 63-bit hash that is never 0, for "same group" and "same caption"."""
    digest = hashlib.blake2b(f"{kind}:{text}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) or 1


@dataclass(frozen=True)
class Pairs:
    """The pairs of one split: the table (pictures still encoded) in manifest order."""

    table: pa.Table

    def __len__(self) -> int:
        return len(self.table)

    def captions(self, row: int) -> list[str]:
        return list(self.table.column("captions")[row].as_py())

    def image(self, row: int) -> bytes:
        return bytes(self.table.column("image")[row].as_py())


def read_pairs(manifest: Manifest, split: str, max_rows: int | None = None) -> Pairs:
    """The pairs of a split in memory. With `max_rows`, an even sample of them."""
    tables = []
    for file in manifest.select("pairs", split):
        with storage.open_read(manifest.path(file)) as opened:
            tables.append(pq.read_table(opened, columns=["id", "image", "captions", "group"]))
    table = (
        pa.concat_tables(tables) if tables else pa.table({name: [] for name in ("id", "image", "captions", "group")})
    )
    if max_rows is not None and len(table) > max_rows:
        table = table.take(pa.array(np.linspace(0, len(table) - 1, max_rows).astype(np.int64)))
    return Pairs(table.combine_chunks() if table.nbytes < 1 << 30 else table)


def epoch_order(rows: int, seed: int, stage: int, epoch: int) -> Indices:
    """All rows once, in the order of this epoch."""
    return np.random.default_rng([seed, stage, epoch]).permutation(rows).astype(np.int64)


def global_batch(order: Indices, step: int, global_batch_size: int) -> Indices:
    """Rows of one step of an epoch; the last batch may be smaller."""
    return order[step * global_batch_size : (step + 1) * global_batch_size]


def local_rows(batch: Indices, rank: int, world_size: int) -> Indices:
    """This rank's rows, a contiguous share: together the ranks' rows are the batch in its order."""
    bounds = np.linspace(0, len(batch), world_size + 1).round().astype(int)
    return batch[bounds[rank] : bounds[rank + 1]]


def caption_of(captions: int, seed: int, epoch: int, row: int) -> int:
    """Which of a pair's captions an epoch shows: a pure function, so that every rank agrees."""
    return key_hash("caption", f"{seed}:{epoch}:{row}") % captions


@dataclass(frozen=True)
class LocalBatch:
    """This rank's rows of one global batch. `pixels` uint8 [rows, size, size, 3]; None when features are reused."""

    rows: Indices
    choices: Indices
    captions: list[str]
    pixels: NDArray[np.uint8] | None
    global_rows: int


class Loader:
    """Decodes the batches to come in threads while the current one is used; counts the seconds spent waiting."""

    def __init__(self, pairs: Pairs, preprocess: Preprocess, *, threads: int, prefetch: int = 3) -> None:
        self.pairs, self.preprocess, self.prefetch = pairs, preprocess, prefetch
        self.wait_seconds = 0.0
        self._pool = ThreadPoolExecutor(max(threads, 1))

    def epoch(self, batches: list[tuple[Indices, int]], *, seed: int, epoch: int, decode: bool) -> Iterator[LocalBatch]:
        """`batches` are (this rank's rows, rows of the global batch)."""
        pending = [self._submit(*batch, seed, epoch, decode) for batch in batches[: self.prefetch]]
        for position in range(len(batches)):
            if position + self.prefetch < len(batches):
                pending.append(self._submit(*batches[position + self.prefetch], seed, epoch, decode))
            started = time.perf_counter()
            batch = pending.pop(0)()
            self.wait_seconds += time.perf_counter() - started
            yield batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, rows: Indices, global_rows: int, seed: int, epoch: int, decode: bool) -> Callable[[], LocalBatch]:
        captions = [self.pairs.captions(int(row)) for row in rows]
        choices = [caption_of(len(texts), seed, epoch, int(row)) for texts, row in zip(captions, rows, strict=True)]
        texts = [options[choice] for options, choice in zip(captions, choices, strict=True)]
        futures = [self._pool.submit(self._pixels, int(row)) for row in rows] if decode else []

        def result() -> LocalBatch:
            pixels = np.stack([future.result() for future in futures]) if futures else None
            return LocalBatch(rows, np.array(choices, np.int64), texts, pixels, global_rows)

        return result

    def _pixels(self, row: int) -> NDArray[np.uint8]:
        return self.preprocess(images.decode(self.pairs.image(row)))
