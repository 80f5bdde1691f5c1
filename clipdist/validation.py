"""Exact retrieval on held-out pairs: every rank encodes its row groups and answers its share of the queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clipdist import collectives
from clipdist.lanes import Indices
from clipdist.metrics import Relevance
from clipdist.outputs import Encoder
from clipdist.reader import RowGroups
from clipdist.retrieval import Gallery, joined, mean_of, query_values


@dataclass
class HeldOut:
    """The held-out pairs of one split, at most `max_rows` of them, evenly drawn.

    `frozen`: the towers' outputs while neither tower learns; they are computed once and kept.
    """

    groups: RowGroups
    max_rows: int | None = None
    frozen: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def measure(self, encoder: Encoder, *, towers_frozen: bool) -> dict[str, float]:
        """`<direction>/<metric>` over the whole split, the same on every rank and for any number of ranks. Empty when
        there are no held-out pairs. Every rank calls it."""
        if not len(self):
            return {}
        outputs = (self.frozen if towers_frozen else None) or self._outputs(encoder)
        self.frozen = outputs if towers_frozen else None
        nothing = torch.zeros((0, encoder.towers.dim), device=encoder.device)
        images, texts = encoder.embeddings(*outputs) if len(outputs[0]) else (nothing, nothing)
        everything = self._gathered(images, self._image_order), self._gathered(texts, self._text_order)
        values = query_values(*everything, self._relevance, self._share)
        return mean_of(joined(collectives.gather_objects(values)))

    def _outputs(self, encoder: Encoder) -> tuple[Tensor, Tensor]:
        """Of this rank's row groups: images [rows, width], captions [captions, width]."""
        shown, told = [], []
        mine: Sequence[int] = range(collectives.rank(), len(self.groups), collectives.world_size())
        mine = [group for group in mine if len(self._kept(group))]
        for _, images, texts in encoder.encode(self.groups, mine, "validation", rows=self._kept):
            assert images is not None
            assert texts is not None
            shown.append(images)
            told.append(texts)
        return _joined(shown, encoder.device), _joined(told, encoder.device)

    def _gathered(self, local: Tensor, order: Indices) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """All ranks' rows in the order of the table, whatever the number of ranks."""
        counts = collectives.row_counts(len(local), local.device)
        whole = collectives.gather_rows(local, counts).cpu().numpy()
        result = np.empty_like(whole)
        result[order] = whole
        return result

    @cached_property
    def _rows(self) -> Indices:
        rows = sum(self.groups.rows)
        if self.max_rows is None or self.max_rows >= rows:
            return np.arange(rows)
        wanted: Indices = np.linspace(0, rows - 1, self.max_rows).astype(np.int64)
        return wanted

    @cached_property
    def _starts(self) -> Indices:
        return np.cumsum([0, *self.groups.rows]).astype(np.int64)

    def _kept(self, group: int) -> Indices:
        """Rows of the group that count."""
        first, last = np.searchsorted(self._rows, self._starts[group : group + 2])
        kept: Indices = self._rows[first:last] - self._starts[group]
        return kept

    @cached_property
    def _table(self) -> pa.Table:
        facts = replace(self.groups, columns=("captions", "group"))
        tables = [table for _, table in facts.read_ahead(range(len(facts)))]
        return pa.concat_tables(tables).take(pa.array(self._rows))

    @cached_property
    def _gallery(self) -> Gallery:
        captions = self._table.column("captions").to_pylist()
        pair_of_text = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
        return Gallery(
            self._table.column("group").to_pylist(), [text for texts in captions for text in texts], pair_of_text
        )

    @property
    def _share(self) -> slice:
        return slice(collectives.rank(), None, collectives.world_size())

    @cached_property
    def _relevance(self) -> dict[str, Relevance]:
        return self._gallery.relevance(self._share)

    @cached_property
    def _image_order(self) -> Indices:
        """Row of the table of every gathered picture: ranks in turn, each with every W-th row group."""
        counts = np.array([len(self._kept(group)) for group in range(len(self.groups))])
        return self._rank_order(counts)

    @cached_property
    def _text_order(self) -> Indices:
        texts = np.bincount(self._gallery.pair_of_text, minlength=len(self))
        ends = np.cumsum([0, *(len(self._kept(group)) for group in range(len(self.groups)))])
        return self._rank_order(np.array([texts[a:b].sum() for a, b in pairwise(ends)]))

    def _rank_order(self, counts: Indices) -> Indices:
        starts, world_size = np.cumsum([0, *counts]), collectives.world_size()
        order = [
            np.arange(starts[group], starts[group + 1])
            for rank in range(world_size)
            for group in range(rank, len(counts), world_size)
        ]
        return np.concatenate(order).astype(np.int64)


def _joined(parts: list[Tensor], device: torch.device) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros((0, 1), device=device)
