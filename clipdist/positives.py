"""Which pairs of a global batch are right answers of each other."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positives:
    """The right answers of some rows of a global batch, tile by tile; made by `find_positives`.

    `classes` int32 [kinds, B]: equal numbers are equal keys, -1 is none. `weights` float64 [B]:
    1 / |P_i|. `shared` bool [B]: rows with more than one right answer; None when there are none.
    """

    classes: Tensor
    weights: Tensor
    shared: Tensor | None
    first_row: int

    def inside(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The positives among local `rows` and `columns`: row and column within the tile, and the pair's weight
        (1/|P_i| + 1/|P_j|) / 2: what InfoNCE of both directions and the sigmoid loss give it."""
        first, last = rows.start + self.first_row, rows.stop + self.first_row
        start = max(first, columns.start)
        own = torch.arange(start, max(start, min(last, columns.stop)), device=self.weights.device)
        if self.shared is None:
            return own - first, own - columns.start, self.weights[own]
        own = own[~self.shared[own]]
        i = self.shared[first:last].nonzero().flatten()
        j = self.shared[columns].nonzero().flatten()
        same = torch.zeros(len(i), len(j), dtype=torch.bool, device=own.device)
        for kind in self.classes:
            row, column = kind[first:last][i], kind[columns][j]
            same |= row.masked_fill(row < 0, -2)[:, None] == column
        more = same.nonzero()
        i = torch.cat([own - first, i[more[:, 0]]])
        j = torch.cat([own - columns.start, j[more[:, 1]]])
        return i, j, (self.weights[i + first] + self.weights[j + columns.start]) / 2


def find_positives(keys: Tensor, first_row: int = 0) -> Positives:
    """A pair is positive for itself and for those that share any non-zero key with it. Pairwise OR, not transitive.

    `keys` int64 [B, kinds] hold one hash per kind (group, caption); 0 means none. Local row i is column
    `first_row + i`. Finds the rows with duplicates by sorting: O(B log B) time, O(B) memory.
    """
    count = len(keys)
    sorted_keys = [torch.unique(column, return_inverse=True, return_counts=True) for column in keys.T]
    classes = [inverse.masked_fill(key == 0, -1) for (_, inverse, _), key in zip(sorted_keys, keys.T, strict=True)]
    answers = torch.zeros(count, dtype=torch.int64, device=keys.device)
    for size in range(1, len(classes) + 1):  # inclusion and exclusion: |A or B| = |A| + |B| - |A and B|
        for chosen in combinations(classes, size):
            answers += (-1) ** (size + 1) * _equal_rows(chosen)
    answers.clamp_(min=1)
    shared = answers > 1
    numbers = torch.stack(classes) if classes else keys.new_empty(0, count)
    return Positives(numbers.int(), 1 / answers.double(), shared if bool(shared.any()) else None, first_row)


def _equal_rows(classes: tuple[Tensor, ...]) -> Tensor:
    """How many rows are equal to each in all of these classes, itself included; 0 where one is missing (-1)."""
    joint, missing = classes[0], classes[0] < 0
    for more in classes[1:]:
        missing = missing | (more < 0)
        joint = torch.unique(joint * (len(joint) + 1) + more, return_inverse=True)[1]
    _, inverse, counts = torch.unique(joint, return_inverse=True, return_counts=True)
    found: Tensor = counts[inverse].masked_fill(missing, 0)
    return found
