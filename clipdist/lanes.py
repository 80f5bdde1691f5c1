"""Who sees which row when: the deterministic stream of an epoch, without random access to the data.

The row groups of all pairs are permuted by (seed, stage, epoch) and dealt to lanes; the rows of a group are shuffled
within it. The stream takes one row of every lane in turn, skipping lanes that ran out. Batch s of an epoch is rows
s * B .. (s + 1) * B of the stream, and rank r of W serves the lanes r, r + W, r + 2 W, ...: what a global batch holds
does not depend on how many workers share it, and a rank reads only its own lanes, front to back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clipdist import stages

Indices = NDArray[np.int64]

DEFAULT_LANES = 48
"""Divisible by 1, 2, 3, 4, 6, 8, 12, 16, 24 and 48 workers; a batch mixes rows of as many row groups."""


class EpochOrder:
    """One epoch over row groups of `sizes` rows [groups]. A row that is a group of its own is dealt alone."""

    def __init__(self, sizes: Indices, lanes: int, seed: int, stage: int, epoch: int) -> None:
        self.sizes, self.key = sizes, (seed, stage, epoch)
        order = np.random.default_rng(self.key).permutation(len(sizes)).astype(np.int64)
        self.groups = [order[lane::lanes] for lane in range(lanes)]
        self.lengths = np.array([int(sizes[groups].sum()) for groups in self.groups], np.int64)

    @property
    def rows(self) -> int:
        return int(self.lengths.sum())

    def consumed(self, position: int) -> Indices:
        """Rows taken from every lane [lanes] when the stream has given `position` rows."""
        low, high = 0, int(self.lengths.max(initial=0))  # the full rounds
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if np.minimum(self.lengths, middle).sum() <= position else (low, middle - 1)
        taken = np.minimum(self.lengths, low)
        unfinished = np.flatnonzero(self.lengths > low)[: position - int(taken.sum())]
        taken[unfinished] += 1
        return taken

    def shuffled(self, group: int) -> Indices:
        """The order of a group's rows in this epoch."""
        if self.sizes[group] == 1:
            return np.zeros(1, np.int64)
        return np.random.default_rng((*self.key, group)).permutation(int(self.sizes[group])).astype(np.int64)


def batch_bounds(step: int, rows: int, global_batch_size: int) -> tuple[int, int]:
    """Where batch `step` of an epoch starts and ends in the stream; the last one takes what is left."""
    last = step == stages.steps_per_epoch(rows, global_batch_size) - 1
    return step * global_batch_size, rows if last else (step + 1) * global_batch_size


def own_lanes(lanes: int, rank: int, world_size: int) -> range:
    return range(rank, lanes, world_size)
