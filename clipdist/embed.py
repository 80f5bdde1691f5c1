"""Ray Data: a catalog, or pairs, -> embedding shards through the ledger.

    units -> load (read, decode, resize: CPU tasks) -> encode (one actor per GPU or core) -> write, commit -> join

Contract: planned == written + rejected per table; a unit is committed once; a rerun does what is missing; a row that
kills its process is rejected, and its neighbours are not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from clipdist import catalog, models, planning, runtime, storage, units
from clipdist.catalog import EmbedConfig as EmbedConfig
from clipdist.config import UserError, dump
from clipdist.encoding import (
    READERS,
    Encoder,
    Times,
    from_bytes,
    load_rows,
    rejects_of,
    stack,
    texts_of,
    to_bytes,
)
from clipdist.images import Preprocess
from clipdist.joining import join_shards
from clipdist.ledger import Ledger
from clipdist.manifest import File, Manifest
from clipdist.retry import planned_row
from clipdist.schema import Dtype, embeddings_schema, stored_dtype
from clipdist.shards import encode_shard

UNITS_PER_ENCODER = 4
INIT_DEATHS = 3
"""How often in a row each encoder may die while it loads its model. Ray would start it again for ever."""
HOPELESS_DEATHS = 24
"""When this many processes in a row died over the parts of a unit, and no row of the job is done, it is not the rows: a
unit with a few rows that kill has parts that live long before."""
KILLS = ["kills_worker", "its process died twice over this row alone (out of memory, or a crash)"]
PLAN_COLUMNS = ("id", "image_uri", "captions", "group", "split", "reason", "message", "only")


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
    stamp = catalog.stamp(config, model, resolved.model)
    return units.make_table(
        output,
        stamp,
        lambda: planning.not_empty(_plan(config, place), config.pairs or "catalog"),
        units.Work(
            "embed",
            partial(_pipeline, config=resolved, preprocess=model.preprocess),
            partial(join_shards, stamp=stamp),
            partial(_rescue, config=resolved, preprocess=model.preprocess),
        ),
        max_rejected_fraction=config.max_rejected_fraction,
        retry_rejected=config.retry_rejected,
        config=dump(resolved),
        shard_units=config.shard_units,
    )


def _plan(config: EmbedConfig, place: models.ModelPlace) -> Iterable[pa.Table]:
    """UserError for random weights: each encoder would draw its own."""
    if place.folder is None and config.model.pretrained is None and not place.name.startswith("hf-hub:"):
        raise UserError(
            f"model: {config.model.name} has random weights; give model.pretrained, a training run or a checkpoint"
        )
    return catalog.plan(config)


def dry_run(config: EmbedConfig) -> list[tuple[str, str]]:
    """Opens the input, builds the model and encodes a few rows; writes nothing."""
    model = models.load(config.model)
    unit = next(iter(catalog.plan(config, rows=4)), None)
    rows = unit.to_pylist() if unit is not None else []
    loaded = load_rows(rows, config, model.preprocess, Times())
    pixels = stack(loaded, model.preprocess.size)
    some = pixels if len(pixels) else np.zeros_like(pixels, shape=(1, *pixels.shape[1:]))
    vectors = Encoder(config, model).images(some)
    rejects = rejects_of(loaded)
    return [
        ("model", f"{model.dim} dimensions, {model.preprocess.size} px, {len(model.terms)} domain terms"),
        ("first rows", f"{len(rows)} read, {len(rejects)} rejected"),
        ("vector length", f"{float(np.linalg.norm(vectors[0].astype(np.float32))):.4f}"),
        *(("reject", f"{rows[int(index)]['id']}: {message}") for index, (_, message) in rejects.items()),
    ]


def derived(config: EmbedConfig) -> list[tuple[str, str]]:
    return [
        ("units per shard", str(config.shard_units)),
        ("rows at most lost by a kill", f"{config.unit_rows} per unit in flight"),
    ]


def summary(manifest: Manifest) -> list[tuple[str, str]]:
    """What came out, for the end of the job and for `clipdist info`."""
    identity = manifest.stamp.identity
    counts = [(table, f"{manifest.written(table):,} vectors") for table in manifest.planned]
    return [
        *counts,
        ("dimensions", f"{identity['dim']} x {stored_dtype(manifest.stamp)}"),
        ("model", manifest.stamp.recorded.get("model", "?")),
    ]


def load_unit(
    row: dict[str, Any],
    ledger: Ledger,
    config: EmbedConfig,
    preprocess: Preprocess,
    watch: Any,
    slots: tuple[float, float],
) -> dict[str, Any]:
    """A unit's pictures as pixels, and its texts; a row that fails is carried as a reject."""
    unit = int(row["unit"])
    empty = {"pixels": np.zeros((0, 1, 1, 3), np.uint8), "texts": "[]", "rejects": "{}", "facts": "{}", "plan": b""}
    if not units.may_begin(watch, unit, "load"):
        return {"unit": unit, **empty}
    plan = ledger.rows(unit)
    rows, times = plan.to_pylist(), Times()
    loaded = load_rows(rows, config, preprocess, times)
    return {
        "unit": unit,
        "pixels": stack(loaded, preprocess.size),
        "texts": json.dumps(texts_of(rows, config)),
        "rejects": json.dumps(rejects_of(loaded)),
        "facts": json.dumps({"rows": len(rows), **times.facts(*slots)}),
        "plan": to_bytes(plan),
    }


class EncodeUnit:
    """A Ray Data actor: the model is loaded once, then units of pixels and texts become vectors."""

    def __init__(self, config: EmbedConfig, threads: int, slots: float, watch: Any, deaths: int) -> None:
        self.encoder: Encoder | None = None  # an error here would be shown with all of Ray's stack
        if ray.get(watch.may_load.remote(deaths)):
            self.encoder = Encoder(config, threads=threads)
            watch.loaded.remote()
        self.slots, self.watch = slots, watch
        self.idle_since: float | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.encoder is None:
            raise units.model_dies()
        carried = {name: row[name] for name in ("unit", "plan", "rejects", "facts")}
        none = self.encoder.images(np.zeros((0, 1, 1, 3), np.uint8))
        if not row["plan"] or not units.may_begin(self.watch, int(row["unit"]), "encode"):
            return {**carried, "plan": b"", "images": none, "texts": none}
        started, busy = time.monotonic(), _clock(self.encoder)
        found = {"images": self.encoder.images(row["pixels"]), "texts": self.encoder.texts(json.loads(row["texts"]))}
        ended = time.monotonic()
        facts = json.loads(row["facts"])
        facts["seconds"]["encode"] = _clock(self.encoder) - busy
        facts["slots"]["encode"] = self.slots
        facts |= {"wait": started - self.idle_since if self.idle_since else 0.0, "busy": ended - started}
        self.idle_since = ended
        return {**carried, "facts": json.dumps(facts), **found}


def _clock(encoder: Encoder) -> float:
    """On a GPU the time it is held; on CPUs, which loading shares, the cores' own."""
    return time.process_time() if encoder.device.type == "cpu" else time.monotonic()


def write_unit(row: dict[str, Any], ledger: Ledger, config: EmbedConfig, cores: float) -> dict[str, Any]:
    """Joins a unit's vectors with its rows again, writes its pieces, commits."""
    unit = int(row["unit"])
    if not row["plan"]:
        return units.suspect(unit)
    started = time.monotonic()
    plan, failed, facts = from_bytes(row["plan"]), json.loads(row["rejects"]), json.loads(row["facts"])
    rows = plan.to_pylist()
    kept = [field for field in plan.schema if field.name not in PLAN_COLUMNS]
    tables: dict[tuple[str, str | None], tuple[bytes, File]] = {}
    planned: dict[str, int] = {}
    rejects: list[dict[str, Any]] = []
    for table in config.towers:
        records = list(_records(table, rows, failed, [field.name for field in kept]))
        good = [record for record in records if "reason" not in record]
        for record in (record for record in records if "reason" in record):
            index = record.pop("index")
            again = rows[index]["reason"] is None
            rejects.append(record | {"row": planned_row(plan, index) if again else None})
        planned[table] = len(records)
        if good:
            tables[table, None] = encode_shard(
                _vector_table(table, good, row[table], kept, config.dtype), table, ledger.stamp
            )
    ledger.commit(unit, tables, planned, rejects)
    facts.setdefault("seconds", {})["write"] = time.monotonic() - started
    facts.setdefault("slots", {})["write"] = cores
    return dict(units.report(unit, planned, rejects, facts))


def _records(
    table: str, rows: list[dict[str, Any]], failed: dict[str, list[str]], kept: list[str]
) -> Iterator[dict[str, Any]]:
    """The planned rows of one table, in order, each good or with its reason."""
    for index, row in enumerate(rows):
        if row.get("only") not in (None, table):
            continue
        reason, message = row["reason"], row["message"]
        if reason is None and str(index) in failed and (table == "images" or failed[str(index)] == KILLS):
            reason, message = failed[str(index)]
        common = {name: row[name] for name in ("image_uri", "group", "split", *kept)}
        captions = row["captions"] or []
        if reason is not None:
            reject = {"id": row["id"], "table": table, "uri": row["image_uri"], "reason": reason, "message": message}
            yield reject | {"index": index}
        elif table == "images":
            yield {"id": row["id"], "caption": captions[0] if captions else None, **common}
        else:
            for number, caption in enumerate(captions):
                yield {"id": f"{row['id']}#{number}", "pair_id": row["id"], "caption": caption, **common}


def _vector_table(
    table: str, records: list[dict[str, Any]], vectors: np.ndarray, kept: list[pa.Field], dtype: Dtype
) -> pa.Table:
    vectors = np.ascontiguousarray(vectors)
    if len(vectors) != len(records):
        raise RuntimeError(f"{len(records)} {table} to write, but {len(vectors)} vectors")
    schema = embeddings_schema(table, vectors.shape[1], kept, dtype)
    flat = pa.array(vectors.reshape(-1))
    columns = {
        name: pa.array([r[name] for r in records], schema.field(name).type)
        for name in schema.names
        if name != "embedding"
    }
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _pipeline(
    todo: ray.data.Dataset, ledger: Ledger, watch: Any, config: EmbedConfig, preprocess: Preprocess
) -> ray.data.Dataset:
    """On GPUs an actor owns one; on CPUs actors ask for half of their cores, so that loading finds a slot."""
    cpus, gpus = runtime.cpus(), runtime.gpus()
    few = max(1, len(ledger.units) // UNITS_PER_ENCODER)  # each actor loads the model: not worth it for a small input
    encoders = config.encoders or (gpus if gpus else min(cpus, 8, few))
    threads = max(1, cpus // encoders)
    cores = 1.0 if gpus else 0.5 * min(threads, cpus / encoders)
    ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = INIT_DEATHS
    load = partial(
        load_unit, ledger=ledger, config=config, preprocess=preprocess, watch=watch, slots=(READERS * cpus, cpus)
    )
    # Another number than an encoder's, or Ray makes one process of the two.
    loaded = todo.map(load, num_cpus=1 if gpus else 0.4)
    encoded = loaded.map(
        EncodeUnit,  # type: ignore[arg-type]
        fn_constructor_kwargs={
            "config": config,
            "threads": threads,
            "slots": encoders if gpus else cpus,
            "watch": watch,
            "deaths": INIT_DEATHS * encoders,
        },
        compute=ray.data.ActorPoolStrategy(size=encoders, max_tasks_in_flight_per_actor=2),
        num_cpus=cores,
        num_gpus=1 if gpus else 0,
    )
    return encoded.map(partial(write_unit, ledger=ledger, config=config, cores=cpus), num_cpus=0.3)


class _Rescuer:
    """A process that may die: it loads and encodes some rows of a unit."""

    def __init__(self, config: EmbedConfig, preprocess: Preprocess) -> None:
        self.config, self.preprocess = config, preprocess
        self.encoder = Encoder(config, threads=runtime.cpus())

    def attempt(self, plan: bytes) -> tuple[np.ndarray, np.ndarray, dict[str, list[str]]]:
        rows = from_bytes(plan).to_pylist()
        loaded = load_rows(rows, self.config, self.preprocess, Times())
        pixels = stack(loaded, self.preprocess.size)
        return self.encoder.images(pixels), self.encoder.texts(texts_of(rows, self.config)), rejects_of(loaded)


def _rescue(ledger: Ledger, unit: int, config: EmbedConfig, preprocess: Preprocess) -> dict[str, Any]:
    """Commits a unit that killed its process: its rows are tried in halves, at last each alone."""
    plan, gpus = ledger.rows(unit), runtime.gpus()
    options = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_restarts": 0}
    actors: list[Any] = []
    dead = [0]
    pictures: list[np.ndarray] = []
    told: list[np.ndarray] = []
    rejects: dict[str, list[str]] = {}

    def attempt(part: Sequence[int]) -> Any:
        if not actors:
            actors.append(ray.remote(_Rescuer).options(**options).remote(config, preprocess))
        try:
            return ray.get(actors[0].attempt.remote(to_bytes(plan.slice(part[0], len(part)))))
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError):
            actors.clear()
            dead[0] += 1
            if dead[0] >= HOPELESS_DEATHS and not pictures and not ledger.records():
                raise units.all_died(ledger, f"that tried rows of unit {unit} all died, {dead[0]} in a row") from None
            return None

    for part, found in units.halved(range(len(plan)), attempt):
        if found is None:
            rejects[str(part[0])] = KILLS
            continue
        pictures.append(found[0])
        told.append(found[1])
        rejects |= {str(part[int(index)]): reason for index, reason in found[2].items()}
    for actor in actors:
        ray.kill(actor)
    none = np.zeros((0, int(ledger.stamp.identity["dim"])), config.dtype)
    row = {"unit": unit, "plan": to_bytes(plan), "rejects": json.dumps(rejects)}
    row |= {"images": np.concatenate([none, *pictures]), "texts": np.concatenate([none, *told])}
    return write_unit(row | {"facts": json.dumps({"rows": len(plan)})}, ledger, config, 1.0)
