"""A unit of planned rows -> pixels and texts, with what each step took. Needs neither torch nor open_clip, which every
process would import for itself."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdist import images
from clipdist.images import BadImage, Preprocess
from clipdist.pictures import read_picture

READERS = 16
"""Threads that read and decode the pictures of a unit: most of the time they wait for a store or a server."""
SECOND_ATTEMPT_SECONDS = 2.0
PROBES = 8
"""When this many second attempts have all failed, the rest of a unit is not tried again: the whole store is down."""

Pixels = NDArray[np.uint8]
Loaded = Pixels | BadImage | None


@dataclass(frozen=True)
class Reading:
    """Which towers are wanted, what is read at all, and how pictures become pixels."""

    towers: tuple[str, ...]
    max_image_bytes: int
    max_pixels: int
    allow_private_hosts: bool
    preprocess: Preprocess


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


def texts_of(rows: Sequence[dict[str, Any]], reading: Reading) -> list[str]:
    """The captions that are embedded, row by row."""
    if "texts" not in reading.towers:
        return []
    wanted = (row for row in rows if row["reason"] is None and row.get("only") in (None, "texts"))
    return [text for row in wanted for text in row["captions"] or []]


def load_rows(rows: Sequence[dict[str, Any]], reading: Reading, times: Times) -> list[Loaded]:
    """Per row: pixels uint8 [size, size, 3], why there are none, or None for a row that needs none. Passing faults get
    a second attempt when all others are done."""

    def load(row: dict[str, Any]) -> Loaded:
        if row["reason"] is not None or "images" not in reading.towers or row.get("only") not in (None, "images"):
            return None
        try:
            started = time.monotonic()
            try:
                data = read_picture(
                    row["image_uri"],
                    max_image_bytes=reading.max_image_bytes,
                    allow_private_hosts=reading.allow_private_hosts,
                )
            finally:  # what waited in vain has taken its time too
                times.fetch.append(time.monotonic() - started)
            times.bytes.append(len(data))
            busy = time.thread_time()
            picture = images.decode(data, max_image_bytes=reading.max_image_bytes, max_pixels=reading.max_pixels)
            pixels = reading.preprocess(picture)
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
