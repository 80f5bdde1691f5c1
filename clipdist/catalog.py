"""What `embed` is told, and the planned rows of a catalog or of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from clipdist import images, models, planning, storage
from clipdist.captions import checked_templates
from clipdist.config import Section, UserError
from clipdist.images import Preprocess
from clipdist.loading import Reading
from clipdist.manifest import Manifest, read_manifest
from clipdist.models import ModelConfig
from clipdist.planning import ColumnsConfig, SplitConfig
from clipdist.schema import Stamp, recorded
from clipdist.sources import Source, SourceConfig, estimate_rows, open_source, refuse_inside
from clipdist.towers import Towers

Tower = Literal["images", "texts"]
Precision = Literal["bf16", "fp32"]


class CatalogConfig(Section):
    """A raw catalog, read as `prepare` reads its input."""

    source: SourceConfig
    """The raw rows."""
    captions: tuple[str, ...] = ()
    """Templates of the descriptions; a row without any is embedded all the same, as a picture only."""
    columns: ColumnsConfig = ColumnsConfig()
    """Which column is what."""

    def absolute(self) -> CatalogConfig:
        """The same catalog, named so that the config can be run from anywhere."""
        return self.model_copy(update={"source": self.source.absolute()})

    @field_validator("captions")
    @classmethod
    def _templates(cls, captions: tuple[str, ...]) -> tuple[str, ...]:
        return checked_templates(captions)


class EmbedConfig(Section):
    """A catalog or pairs + a model -> embeddings."""

    model: ModelConfig
    """The CLIP that embeds: a training run, a checkpoint, or any open_clip model."""
    output: str
    """Where the embeddings go: a new folder or prefix."""
    pairs: str | None = None
    """What to embed: pairs that `prepare` made,"""
    catalog: CatalogConfig | None = None
    """or a raw catalog. Give one of the two."""
    splits: tuple[str, ...] = ()
    """Only these splits of the pairs; empty: all."""
    towers: tuple[Tower, ...] = Field(("images", "texts"), min_length=1)
    """images, texts, or both."""
    update: Literal["add", "mirror"] | None = None
    """Bring finished embeddings up to another input: add embeds its new and changed rows; mirror also deletes the rows
    that are no longer in it. null: refuse another input."""
    retry_rejected: bool = False
    """Try the rows once more that an earlier run rejected; nothing else is done again."""
    unit_rows: int = Field(512, ge=1, le=4096)
    """Rows per unit of work: what is committed at once, and at most lost by a kill."""
    shard_rows: int = Field(131_072, ge=1, le=1 << 20)
    """Rows per file; units are joined into such shards as soon as these are full."""
    dtype: Literal["float16", "float32"] = "float16"
    """How vectors are stored."""
    precision: Precision | None = None
    """What the towers compute in; null: as the output was begun, and for a new one bf16 on GPUs, fp32 on CPUs."""
    batch_rows: int | None = Field(None, ge=1)
    """Rows per forward pass; null: 256 on GPUs, 32 on CPUs."""
    max_rejected_fraction: float = Field(0.05, ge=0, le=1)
    """The job fails when a larger share of the rows is rejected."""
    max_image_bytes: int = Field(50 << 20, ge=1)
    """Larger pictures are rejected unread."""
    max_pixels: int = Field(100_000_000, ge=1)
    """Pictures with more pixels are rejected undecoded."""
    allow_private_hosts: bool = False
    """Whether http(s) pictures may come from addresses inside your network."""
    use_gpu: bool | None = None
    """null: if the cluster has GPUs now; true: also when it only gets them once they are asked for."""
    encoders: int | None = Field(None, ge=1)
    """Encoding actors; null: one per GPU of the cluster; on CPUs one per core, at most 8 a node, fewer for a small
    input."""

    @model_validator(mode="after")
    def _one_input(self) -> EmbedConfig:
        if len(set(self.towers)) != len(self.towers):
            raise ValueError("towers: name each tower once")
        if (self.pairs is None) == (self.catalog is None):
            raise ValueError("give either pairs or catalog" + ("" if self.pairs is None else ", not both"))
        if self.catalog is not None and self.towers == ("texts",) and not self.catalog.captions:
            raise ValueError("catalog.captions: give templates; without any there is no text to embed")
        if self.update and self.retry_rejected:
            raise ValueError("give either update or retry_rejected; an update tries the rejected rows of its input too")
        return self

    def reading(self, preprocess: Preprocess) -> Reading:
        """How rows are read: the part of this config that goes to the processes that load."""
        limits = (self.max_image_bytes, self.max_pixels, self.allow_private_hosts)
        return Reading(self.towers, *limits, preprocess)

    @property
    def shard_units(self) -> int:
        """Units per shard."""
        return -(-self.shard_rows // self.unit_rows)


@dataclass(frozen=True)
class Input:
    """What is to be embedded, found once: the files of a catalog, or pairs."""

    config: EmbedConfig
    source: Source | None
    pairs: Manifest | None

    def plan(self, first_rows: int | None = None) -> Iterable[pa.Table]:
        """The planned rows, one table per unit; with `first_rows`, just so many."""
        size = first_rows or self.config.unit_rows
        if self.pairs is not None:
            return _plan_pairs(self.pairs, self.config.splits, size)
        assert self.source is not None
        assert self.config.catalog is not None
        columns, captions = self.config.catalog.columns, self.config.catalog.captions
        # Without a caption a row is a picture only, and where there are no pictures nothing: a reject.
        how = {"need_caption": "images" not in self.config.towers, "first_only": first_rows is not None}
        nothing_held_out = SplitConfig(validation=0.0)
        return planning.plan_units(self.source, columns, captions, nothing_held_out, size, **how)

    def rows(self) -> tuple[int, bool]:
        """How many rows there are, and whether that is exact."""
        if self.source is not None:
            return estimate_rows(self.source)
        assert self.pairs is not None
        splits = self.config.splits
        return sum(file.rows for file in self.pairs.select("pairs") if not splits or file.split in splits), True

    def identity(self) -> dict[str, Any]:
        """What changes when the input does."""
        if self.pairs is not None:
            later = {"manifest": self.pairs.number} if self.pairs.number > 1 else {}
            return {"pairs": self.pairs.stamp.identity, "splits": list(self.config.splits), **later}
        assert self.source is not None
        assert self.config.catalog is not None
        read = planning.columns_read(self.config.catalog.columns, self.config.catalog.captions)
        how = self.config.catalog.model_dump(mode="json", exclude={"source"})
        return {"source": self.source.fingerprint(read), **how}


def open_input(config: EmbedConfig) -> Input:
    """Finds the input. UserError when it, a column or a split is not there."""
    if config.catalog is not None:
        refuse_inside(config.catalog.source, config.output)
        source = open_source(config.catalog.source)
        need_picture = "images" in config.towers
        planning.check_columns(source, config.catalog.columns, config.catalog.captions, need_picture=need_picture)
        return Input(config, source, None)
    assert config.pairs is not None
    manifest = read_manifest(storage.absolute(config.pairs), "pairs")
    there = {file.split or "" for file in manifest.select("pairs")}
    if missing := [split for split in config.splits if split not in there]:
        raise UserError(
            f"splits: {config.pairs} has no {' and no '.join(missing)} (splits: {', '.join(sorted(there))})"
        )
    return Input(config, None, manifest)


def _plan_pairs(manifest: Manifest, splits: tuple[str, ...], size: int) -> Iterator[pa.Table]:
    """Pairs as planned rows; a picture is named by shard, row group and row. Units end with their shard."""
    for file in manifest.select("pairs"):
        if splits and file.split not in splits:
            continue
        path = manifest.path(file)
        with storage.open_read(path) as opened:
            names = [name for name in pq.read_schema(opened).names if name != "image"]
            opened.seek(0)
            table = pq.read_table(opened, columns=names)
        uris = [f"{path}#row={group}:{row}:image" for group, rows in enumerate(file.row_groups) for row in range(rows)]
        own = {
            "image_uri": pa.array(uris),
            "reason": pa.nulls(len(table), pa.string()),
            "message": pa.nulls(len(table), pa.string()),
        }
        for name, column in own.items():
            table = table.append_column(name, column)
        yield from (table.slice(start, size).combine_chunks() for start in range(0, len(table), size))


def stamp(config: EmbedConfig, model: Towers, made_from: dict[str, Any]) -> Stamp:
    """What makes these embeddings: `input` is what they are made of, all else how. `config`: resolved."""
    identity = {
        "weights_sha256": models.weights_sha256(config.model, model),
        "dim": model.dim,
        "dtype": config.dtype,
        "precision": config.precision,
        "normalised": True,
        "towers": list(config.towers),
        "decode": images.DECODE_ID,
        **model.identity(),
        "unit_rows": config.unit_rows,
        "shard_rows": config.shard_rows,
        "input": made_from,
    }
    limits = {name: getattr(config, name) for name in ("max_image_bytes", "max_pixels", "allow_private_hosts")}
    resolved = config.model
    return Stamp(
        "embeddings",
        identity,
        recorded(model=resolved.name, pretrained=resolved.pretrained, image_size=resolved.image_size, limits=limits),
    )
