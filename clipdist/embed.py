"""Ray Data: a catalog, or pairs, -> embedding shards through the ledger.

    units -> load (read, decode, resize: CPU tasks) -> encode (one actor per GPU or core) -> write, commit

A unit is a range of planned rows. Encode batches are padded and never cross a unit, so vectors do not depend on what
else ran. Contract: planned == written + rejected per tower; a unit is committed once; a rerun does what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from pydantic import Field, field_validator, model_validator

from clipdist import images, models, planning, runtime, storage
from clipdist.config import Section, UserError, dump
from clipdist.images import BadImage, Preprocess
from clipdist.ledger import File, Ledger, Manifest, begin, read_manifest
from clipdist.memory import keep_freed
from clipdist.models import ModelConfig
from clipdist.outputs import ENCODE_ROWS
from clipdist.pictures import read_picture
from clipdist.planning import ColumnsConfig, SplitConfig
from clipdist.schema import Stamp, embeddings_schema, recorded
from clipdist.shards import encode_shard
from clipdist.sources import SourceConfig, open_source
from clipdist.towers import Towers

READERS_PER_TASK = 8
UNITS_PER_ENCODER = 4
Tower = Literal["images", "texts"]


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
        return self.model_copy(update={"source": open_source(self.source).absolute_config()})

    @field_validator("captions")
    @classmethod
    def _templates(cls, captions: tuple[str, ...]) -> tuple[str, ...]:
        for template in captions:
            planning.template_columns(template)
        return captions


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
    unit_rows: int = Field(512, ge=1, le=4096)
    """Rows per unit of work: what is committed at once, and at most lost by a kill."""
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
    encoders: int | None = Field(None, ge=1)
    """Encoding actors; null: one per GPU of the cluster; on CPUs one per core, at most 8, fewer for a small input."""

    @model_validator(mode="after")
    def _one_input(self) -> EmbedConfig:
        if len(set(self.towers)) != len(self.towers):
            raise ValueError("towers: name each tower once")
        if (self.pairs is None) == (self.catalog is None):
            raise ValueError("give either pairs or catalog" + ("" if self.pairs is None else ", not both"))
        return self


def run(config: EmbedConfig) -> Manifest:
    """Makes the embeddings at `config.output`, or goes on with them, or finds them finished."""
    output = storage.absolute(config.output)
    model = models.load(config.model)
    place = models.locate(config.model.name)
    resolved = config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": place.folder or place.name}),
            "output": output,
            "pairs": config.pairs and storage.absolute(config.pairs),
            "catalog": config.catalog and config.catalog.absolute(),
        }
    )
    stamp = _stamp(config, model, resolved.model)
    ledger = begin(output, stamp, lambda: (planning.not_empty(_plan(config), config.pairs or "catalog"), {}))
    if storage.names(storage.join(output, "manifests")):
        return read_manifest(output)
    runtime.save_config(output, dump(resolved))

    def pipeline(units: ray.data.Dataset) -> ray.data.Dataset:
        return _pipeline(units, ledger, resolved, model.preprocess)

    return runtime.run_units(ledger, "embed", pipeline, config.max_rejected_fraction)


def dry_run(config: EmbedConfig) -> list[tuple[str, str]]:
    """Opens the input, builds the model and encodes a few rows; writes nothing."""
    model = models.load(config.model)
    unit = next(iter(_plan(config, rows=4)), None)
    rows = unit.to_pylist() if unit is not None else []
    loaded = _load_rows(rows, config, model.preprocess)
    vectors = Encoder.of(config, model).images(
        np.stack([x for x in loaded if isinstance(x, np.ndarray)] or [_blank(model)])
    )
    bad = [f"{row['id']}: {x}" for row, x in zip(rows, loaded, strict=True) if not isinstance(x, np.ndarray)]
    return [
        ("model", f"{model.dim} dimensions, {model.preprocess.size} px, {len(model.terms)} domain terms"),
        ("first rows", f"{len(rows)} read, {len(bad)} rejected"),
        ("vector length", f"{float(np.linalg.norm(vectors[0].astype(np.float32))):.4f}"),
        *(("reject", text) for text in bad),
    ]


def derived(config: EmbedConfig) -> list[tuple[str, str]]:
    return [
        ("units in flight per encoder", "2"),
        ("rows at most lost by a kill", f"{config.unit_rows} per unit in flight"),
    ]


def summary(manifest: Manifest) -> list[tuple[str, str]]:
    """What came out, for the end of the job and for `clipdist info`."""
    identity = manifest.stamp.identity
    counts = [(table, f"{manifest.written(table):,} vectors") for table in manifest.planned]
    return [
        *counts,
        ("dimensions", f"{identity['dim']} x float16"),
        ("model", manifest.stamp.recorded.get("model", "?")),
    ]


class Encoder:
    """A Ray Data actor: the model is loaded once, then units of pixels and texts become float16 unit vectors."""

    def __init__(self, config: EmbedConfig, threads: int) -> None:
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
            keep_freed()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = models.load(config.model).to(self.device).requires_grad_(False)
        self.config = config

    @staticmethod
    def of(config: EmbedConfig, model: Towers) -> Encoder:
        """An encoder around a model that is loaded already."""
        encoder = Encoder.__new__(Encoder)
        encoder.device, encoder.model, encoder.config = torch.device("cpu"), model, config
        return encoder

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        texts = json.loads(row["texts"])
        return {
            "unit": row["unit"],
            "rejects": row["rejects"],
            "images": self.images(row["pixels"]),
            "texts": self.texts(texts),
        }

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [rows, size, size, 3] -> float16 [rows, dim]."""
        return self._batches(torch.from_numpy(np.array(pixels)), self.model.image_embeddings)

    def texts(self, texts: list[str]) -> np.ndarray:
        """Texts -> float16 [texts, dim]."""
        tokens = self.model.tokenise(texts) if texts else torch.zeros((0, 1), dtype=torch.int64)
        return self._batches(tokens, self.model.text_embeddings)

    def _batches(self, rows: torch.Tensor, encode: Any) -> np.ndarray:
        size = self.config.batch_rows or ENCODE_ROWS[self.device.type]
        found = [np.zeros((0, self.model.dim), np.float16)]
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"),
        ):
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                padded = torch.cat([batch, batch[:1].expand(size - len(batch), *batch.shape[1:])])
                vectors = encode(padded.to(self.device))[: len(batch)]
                found.append(torch.nn.functional.normalize(vectors.float(), dim=-1).half().cpu().numpy())
        return np.concatenate(found)


def load_unit(row: dict[str, Any], ledger: Ledger, config: EmbedConfig, preprocess: Preprocess) -> dict[str, Any]:
    """A unit's pictures as pixels, and its texts; a row that fails is carried as a reject."""
    unit = int(row["unit"])
    rows = ledger.rows(unit).to_pylist()
    texts = (
        [text for one in rows if one["reason"] is None for text in one["captions"]] if "texts" in config.towers else []
    )
    if "images" not in config.towers:
        return {
            "unit": unit,
            "pixels": np.zeros((0, 1, 1, 3), np.uint8),
            "texts": json.dumps(texts),
            "rejects": "{}",
        }
    loaded = _load_rows(rows, config, preprocess)
    rejects = {str(index): [x.reason, str(x)] for index, x in enumerate(loaded) if isinstance(x, BadImage)}
    size = preprocess.size
    pixels = [x for x in loaded if isinstance(x, np.ndarray)]
    stacked = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
    return {"unit": unit, "pixels": stacked, "texts": json.dumps(texts), "rejects": json.dumps(rejects)}


def write_unit(row: dict[str, Any], ledger: Ledger, config: EmbedConfig) -> dict[str, Any]:
    """Joins a unit's vectors with its rows again, writes its shards, commits."""
    unit, failed = int(row["unit"]), json.loads(row["rejects"])
    plan = ledger.rows(unit)
    rows = plan.to_pylist()
    names = ("id", "image_uri", "captions", "group", "split", "reason", "message")
    kept = [field for field in plan.schema if field.name not in names]
    tables: dict[tuple[str, str | None], tuple[bytes, File]] = {}
    planned: dict[str, int] = {}
    rejects: list[dict[str, Any]] = []
    for table in config.towers:
        records = list(_records(table, rows, failed, [field.name for field in kept]))
        good = [record for record in records if "reason" not in record]
        rejects += [record for record in records if "reason" in record]
        planned[table] = len(records)
        if good:
            tables[table, None] = encode_shard(_vector_table(table, good, row[table], kept), table)
    ledger.commit(unit, tables, planned, rejects)
    return runtime.unit_report(unit, planned, rejects)


def _records(
    table: str, rows: list[dict[str, Any]], failed: dict[str, list[str]], kept: list[str]
) -> Iterator[dict[str, Any]]:
    """The planned rows of one table, in order, each good or with its reason."""
    for index, row in enumerate(rows):
        reason, message = (row["reason"], row["message"]) if row["reason"] is not None else (None, None)
        if reason is None and table == "images" and str(index) in failed:
            reason, message = failed[str(index)]
        captions = row["captions"] or []
        if reason is not None:
            yield {
                "id": row["id"],
                "table": table,
                "uri": row["image_uri"],
                "reason": reason,
                "message": message,
            }
            continue
        common = {name: row[name] for name in ("image_uri", "group", "split", *kept)}
        if table == "images":
            yield {"id": row["id"], "caption": captions[0] if captions else None, **common}
        else:
            for number, caption in enumerate(captions):
                yield {"id": f"{row['id']}#{number}", "pair_id": row["id"], "caption": caption, **common}


def _vector_table(table: str, records: list[dict[str, Any]], vectors: np.ndarray, kept: list[pa.Field]) -> pa.Table:
    vectors = np.ascontiguousarray(vectors)
    if len(vectors) != len(records):
        raise RuntimeError(f"{len(records)} {table} to write, but {len(vectors)} vectors")
    schema = embeddings_schema(table, vectors.shape[1], kept)
    flat = pa.array(vectors.reshape(-1), pa.float16())
    columns = {
        name: pa.array([r[name] for r in records], schema.field(name).type)
        for name in schema.names
        if name != "embedding"
    }
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _load_rows(
    rows: list[dict[str, Any]], config: EmbedConfig, preprocess: Preprocess
) -> list[np.ndarray | BadImage | None]:
    """Per row: pixels, why there are none, or None for a row that is rejected already."""

    def load(row: dict[str, Any]) -> np.ndarray | BadImage | None:
        if row["reason"] is not None:
            return None
        try:
            data = read_picture(
                row["image_uri"],
                max_image_bytes=config.max_image_bytes,
                allow_private_hosts=config.allow_private_hosts,
            )
            return preprocess(images.decode(data, max_image_bytes=config.max_image_bytes, max_pixels=config.max_pixels))
        except BadImage as error:
            return error

    with ThreadPoolExecutor(READERS_PER_TASK) as pool:
        return list(pool.map(load, rows))


def _pipeline(units: ray.data.Dataset, ledger: Ledger, config: EmbedConfig, preprocess: Preprocess) -> ray.data.Dataset:
    """On GPUs an actor owns one; on CPUs actors ask for half of their cores, so that loading finds a slot."""
    cpus, gpus = runtime.cpus(), runtime.gpus()
    few = max(1, len(ledger.units) // UNITS_PER_ENCODER)  # each actor loads the model: not worth it for a small input
    encoders = config.encoders or (gpus if gpus else min(cpus, 8, few))
    threads = max(1, cpus // encoders)
    cores = 1.0 if gpus else 0.5 * min(threads, cpus / encoders)
    loaded = units.map(
        partial(load_unit, ledger=ledger, config=config, preprocess=preprocess),
        num_cpus=1 if gpus else 0.5,
    )
    encoded = loaded.map(
        Encoder,  # type: ignore[arg-type]
        fn_constructor_kwargs={"config": config, "threads": threads},
        compute=ray.data.ActorPoolStrategy(size=encoders, max_tasks_in_flight_per_actor=2),
        num_cpus=cores,
        num_gpus=1 if gpus else 0,
    )
    return encoded.map(partial(write_unit, ledger=ledger, config=config), num_cpus=0.5)


def _plan(config: EmbedConfig, rows: int | None = None) -> Iterable[pa.Table]:
    size = rows or config.unit_rows
    if config.catalog is not None:
        source = open_source(config.catalog.source)
        planning.check_columns(source, config.catalog.columns, config.catalog.captions)
        nothing_held_out = SplitConfig(validation=0.0)
        captions = config.catalog.captions
        how = {"need_caption": False, "first_only": rows is not None}
        return planning.plan_units(source, config.catalog.columns, captions, nothing_held_out, size, **how)
    return _plan_pairs(_pairs(config), config.splits, size)


def _pairs(config: EmbedConfig) -> Manifest:
    assert config.pairs is not None
    manifest = read_manifest(storage.absolute(config.pairs), "pairs")
    there = {file.split or "" for file in manifest.select("pairs")}
    if missing := [split for split in config.splits if split not in there]:
        raise UserError(
            f"splits: {config.pairs} has no {' and no '.join(missing)} (splits: {', '.join(sorted(there))})"
        )
    return manifest


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


def _stamp(config: EmbedConfig, model: Towers, resolved: ModelConfig) -> Stamp:
    if config.catalog is not None:
        read = planning.columns_read(config.catalog.columns, config.catalog.captions)
        made_from: dict[str, Any] = {"source": open_source(config.catalog.source).fingerprint(read)}
        made_from |= config.catalog.model_dump(mode="json", exclude={"source"})
    else:
        manifest = _pairs(config)
        made_from = {"pairs": manifest.stamp.identity, "splits": list(config.splits)}
    identity = {
        "weights_sha256": models.weights_sha256(config.model, model),
        "dim": model.dim,
        "normalised": True,
        "towers": list(config.towers),
        "decode": images.DECODE_ID,
        **model.identity(),
        "limits": {name: getattr(config, name) for name in ("max_image_bytes", "max_pixels", "allow_private_hosts")},
        "unit_rows": config.unit_rows,
        "input": made_from,
    }
    return Stamp(
        "embeddings",
        identity,
        recorded(model=resolved.name, pretrained=resolved.pretrained, image_size=resolved.image_size),
    )


def _blank(model: Towers) -> np.ndarray:
    return np.zeros((model.preprocess.size, model.preprocess.size, 3), np.uint8)
