"""The towers' outputs of many pairs: every row group is encoded by one rank, none by two, and kept where all find it.

Reused outputs are a table in the run's storage, float16, with the same row groups as the pairs, so that the lanes of a
stage read them exactly as they read pictures. A killed run finds what was finished.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clipdist import collectives, storage
from clipdist.config import UserError
from clipdist.journal import Report
from clipdist.lanes import Indices
from clipdist.loader import Decode, Picture, decode_ahead
from clipdist.manifest import Manifest
from clipdist.reader import RowGroups
from clipdist.towers import Towers

ENCODE_ROWS = {"cpu": 32, "cuda": 256}
"""Rows per forward pass where no gradient is needed. Larger ones cost CPUs a third: their activations are too large
for the allocator to keep, so every pass faults its pages in anew."""
GROUPS_PER_PIECE = 8


@dataclass(frozen=True)
class Encoder:
    """Towers on a device, and how their inputs are decoded."""

    towers: Towers
    device: torch.device
    autocast: torch.dtype | None
    decoders: int
    report: Report

    def encode(
        self,
        groups: RowGroups,
        mine: Sequence[int],
        split: str,
        *,
        images: bool = True,
        texts: bool = True,
        rows: Callable[[int], Indices] | None = None,
    ) -> Iterator[tuple[pa.Table, Tensor | None, Tensor | None]]:
        """(table, outputs of its images [rows, width], of all its captions [captions, width]) of the row groups
        `mine`, in order; None for a tower that is not asked for. `rows`: which rows of a row group; else all."""
        columns = ("id", "captions", "image") if images else ("id", "captions")
        read = replace(groups, columns=columns).read_ahead(mine)
        tables = (table if rows is None else table.take(pa.array(rows(group))) for group, table in read)
        decode = Decode(self.towers.preprocess)
        decoded = (
            decode_ahead(tables, _encoded, decode, self.decoders) if images else ((table, None) for table in tables)
        )
        for done, (table, pixels) in enumerate(decoded):
            shown = self._batched(self.towers.image_tower_output, pixels) if pixels is not None else None
            tokens = self.towers.tokenise([*chain(*table.column("captions").to_pylist())]) if texts else None
            told = self._batched(self.towers.text_tower_output, tokens) if tokens is not None else None
            self.report({"event": "encoded", "split": split, "row_groups": done + 1, "of": len(mine)})
            yield table, shown, told

    @torch.no_grad()
    def embeddings(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """L2-normalised float32 embeddings of the towers' outputs."""
        projected = self.towers.project_image(images.to(self.device)), self.towers.project_text(texts.to(self.device))
        shown, told = (F.normalize(features.float(), dim=-1) for features in projected)
        return shown, told

    @torch.no_grad()
    def _batched(self, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            parts = [forward(part.to(self.device)).float() for part in inputs.split(ENCODE_ROWS[self.device.type])]
        return torch.cat(parts)


def row_groups(manifest: Manifest, split: str, columns: Sequence[str]) -> RowGroups:
    """The row groups of a split of the pairs."""
    files = manifest.select("pairs", split)
    return RowGroups(
        tuple(manifest.path(file) for file in files for _ in file.row_groups),
        tuple(index for file in files for index in range(len(file.row_groups))),
        tuple(rows for file in files for rows in file.row_groups),
        tuple(columns),
    )


def write_outputs(
    encoder: Encoder, groups: RowGroups, folder: str, *, images: bool, texts: bool, teacher: bool = False
) -> RowGroups:
    """The towers' outputs of all row groups as a table in `folder`: columns `image_output` and `text_outputs` (of all
    captions of a row, one after the other). With `teacher`, their embeddings as `image_teacher` and `text_teachers`.
    Every rank writes its pieces and waits for the others."""
    size = max(1, min(GROUPS_PER_PIECE, len(groups) // 64))
    pieces = [range(start, min(start + size, len(groups))) for start in range(0, len(groups), size)]
    paths = [storage.join(folder, f"{number:06d}.parquet") for number in range(len(pieces))]
    there = set(storage.names(folder))
    mine = range(collectives.rank(), len(pieces), collectives.world_size())
    missing = [number for number in mine if paths[number].rpartition("/")[2] not in there]
    wanted = [group for number in missing for group in pieces[number]]
    found = encoder.encode(groups, wanted, "train", images=images, texts=texts)
    for number in missing:
        tables = [_table(encoder, *next(found), teacher) for _ in pieces[number]]
        storage.write_atomic(paths[number], _parquet(tables))
    collectives.barrier()
    columns = ("image_teacher", "text_teachers") if teacher else ("image_output",) * images + ("text_outputs",) * texts
    files = tuple(path for path, piece in zip(paths, pieces, strict=True) for _ in piece)
    indices = tuple(index for piece in pieces for index in range(len(piece)))
    return RowGroups(files, indices, groups.rows, columns)


def digest(towers: Towers, *, images: bool, texts: bool) -> str:
    """Names outputs by all that they depend on in the model: weights, size, text length, terms."""
    found = hashlib.sha256(json.dumps([asdict(towers.preprocess), towers.identity(), images, texts]).encode())
    for part, members in towers.parts().items():
        if (images and part == "image_tower") or (texts and part in ("text_tower", "new_tokens")):
            for name, parameter in members:
                found.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def matrix(column: pa.ChunkedArray) -> Tensor:
    """A column of rows as float32 [rows, width]; every row holds the same number of float16 values."""
    rows = column.to_pylist()
    values = np.frombuffer(b"".join(rows), np.float16).reshape(len(rows), -1)
    return torch.from_numpy(values.astype(np.float32))


def chosen(column: pa.ChunkedArray, counts: Sequence[int], choices: NDArray[np.int64]) -> Tensor:
    """Of rows that hold `counts` outputs each, the one that was chosen: float32 [rows, width]."""
    parts = []
    for row, count, choice in zip(column.to_pylist(), counts, choices, strict=True):
        width = len(row) // count
        parts.append(row[choice * width : (choice + 1) * width])
    values = np.frombuffer(b"".join(parts), np.float16).reshape(len(parts), -1)
    return torch.from_numpy(values.astype(np.float32))


def _table(encoder: Encoder, pairs: pa.Table, images: Tensor | None, texts: Tensor | None, teacher: bool) -> pa.Table:
    names = ("image_output", "text_outputs")
    if teacher:
        assert images is not None
        assert texts is not None
        names, (images, texts) = ("image_teacher", "text_teachers"), encoder.embeddings(images, texts)
    columns = {}
    if images is not None:
        columns[names[0]] = _binary(images, [1] * len(pairs))
    if texts is not None:
        columns[names[1]] = _binary(texts, [len(captions) for captions in pairs.column("captions").to_pylist()])
    return pa.table(columns)


def _binary(values: Tensor, counts: Sequence[int]) -> pa.Array:
    """Rows of `counts` vectors each, as float16 bytes."""
    half = values.half().cpu().numpy()
    if not np.isfinite(half).all():
        raise UserError("reuse_frozen_features: a tower's outputs are too large for float16; set it to false")
    bounds = np.cumsum([0, *counts])
    return pa.array([half[a:b].tobytes() for a, b in pairwise(bounds)], pa.large_binary())


def _encoded(table: pa.Table) -> list[Picture]:
    ids, data = (table.column(name).to_pylist() for name in ("id", "image"))
    return [(0, row_id, encoded) for row_id, encoded in zip(ids, data, strict=True)]


def _parquet(tables: list[pa.Table]) -> bytes:
    """One row group per table, so that they are read like those of the pairs."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, tables[0].schema, compression="none", use_dictionary=False) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(len(table), 1))
    return buffer.getvalue()
