"""Ray Data: a catalog, or pairs, -> embedding shards through the ledger.

    units -> load (read, decode, resize: CPU tasks) -> encode (one actor per GPU or core) -> write, commit -> join

Contract: planned == written + rejected per table; a unit is committed once; a rerun does what is missing; a row that
kills its process is rejected, and its neighbours are not.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from clipdist import attempts, catalog, models, planning, runtime, storage, units
from clipdist.catalog import EmbedConfig as EmbedConfig
from clipdist.catalog import Input, open_input
from clipdist.config import UserError, dump
from clipdist.encoding import Encoder
from clipdist.estimate import Sample, estimate
from clipdist.images import Preprocess
from clipdist.joining import join_shards
from clipdist.ledger import Ledger, open_ledger
from clipdist.loading import READERS, Times, load_rows, rejects_of, stack, texts_of
from clipdist.making import make_table
from clipdist.manifest import Manifest
from clipdist.rescue import rescue
from clipdist.schema import Stamp, stored_dtype
from clipdist.towers import Towers
from clipdist.unit_tasks import load_unit, write_unit
from clipdist.update import is_outdated
from clipdist.upkeep import under_way

UNITS_PER_ENCODER = 4
ENCODERS_PER_NODE = 8
SAMPLE_ROWS = 32
INIT_DEATHS = 3
"""How often in a row each encoder may die while it loads its model. Ray would start it again for ever."""


@dataclass(frozen=True)
class _Opened:
    """A job whose input, model and output were looked at. `config`: with places that hold anywhere, and the precision
    with which the output was begun."""

    config: EmbedConfig
    model: Towers
    given: Input
    there: Ledger | None

    def stamp(self) -> Stamp:
        return catalog.stamp(self.config, self.model, self.given.identity())


def run(config: EmbedConfig) -> Manifest:
    """Makes the embeddings at `config.output`, or goes on with them, or finds them finished."""
    opened = _open(config)
    if opened.config.precision is None:
        runtime.connect()
        precision = "bf16" if runtime.gpus_for(config.use_gpu, config.encoders) else "fp32"
        opened = replace(opened, config=opened.config.model_copy(update={"precision": precision}))
    resolved, preprocess = opened.config, opened.model.preprocess
    return make_table(
        resolved.output,
        opened.stamp(),
        lambda: planning.not_empty(opened.given.plan(), config.pairs or "catalog"),
        units.Work(
            "embed",
            partial(_pipeline, config=resolved, preprocess=preprocess),
            join_shards,
            partial(rescue, config=resolved, preprocess=preprocess),
        ),
        max_rejected_fraction=config.max_rejected_fraction,
        retry_rejected=config.retry_rejected,
        config=dump(resolved.model_copy(update={"update": None, "retry_rejected": False})),  # they were for once
        shard_units=config.shard_units,
        update=config.update,
    )


def _open(config: EmbedConfig) -> _Opened:
    """UserError for what can be seen before any work."""
    output = storage.absolute(config.output)
    storage.check_writable(output)
    there, given = open_ledger(output), open_input(config)
    model, place = models.load(config.model), models.locate(config.model.name)
    if there is None:
        _refuse_random_weights(config, place)
    resolved = {
        "model": config.model.model_copy(update={"name": place.folder or place.name}),
        "output": output,
        "pairs": config.pairs and storage.absolute(config.pairs),
        "catalog": config.catalog and config.catalog.absolute(),
        # As the output was begun, so that no table mixes two.
        "precision": config.precision or (there.stamp.identity.get("precision") if there is not None else None),
    }
    return _Opened(config.model_copy(update=resolved), model, given, there)


def _refuse_random_weights(config: EmbedConfig, place: models.ModelPlace) -> None:
    """UserError: each encoder would draw its own."""
    if place.folder is None and config.model.pretrained is None and not place.name.startswith("hf-hub:"):
        raise UserError(
            f"model: {config.model.name} has random weights; give model.pretrained, a training run or a checkpoint"
        )


def dry_run(config: EmbedConfig) -> list[tuple[str, str]]:
    """Opens the input, builds the model, embeds a few rows, and says what all of them will take; writes nothing."""
    opened = _open(config)
    given, model = opened.given, opened.model
    plan = next(planning.not_empty(given.plan(first_rows=SAMPLE_ROWS), config.pairs or "catalog"))
    rows, times, encoder = plan.to_pylist(), Times(), Encoder(config, model)
    reading = config.reading(model.preprocess)
    encoder.images(np.zeros((1, model.preprocess.size, model.preprocess.size, 3), np.uint8))  # so that it is warm
    started = time.monotonic()
    loaded = load_rows(rows, reading, times)
    vectors = encoder.images(stack(loaded, model.preprocess.size))
    texts = texts_of(rows, reading)
    told = encoder.texts(texts)
    seconds, rejects = time.monotonic() - started, rejects_of(loaded)
    lengths = np.linalg.norm(np.concatenate([vectors, told]).astype(np.float32), axis=1)
    pictures = sum(times.bytes) / max(len(times.bytes), 1)
    sample = Sample(len(rows), len(texts), plan.nbytes / max(len(rows), 1), pictures, seconds)
    return [
        ("output", _state(opened)),
        ("model", f"{model.dim} dimensions, {model.preprocess.size} px, {len(model.terms)} domain terms"),
        ("first rows", f"{len(rows)} read, {len(rejects)} rejected"),
        ("vector length", f"{lengths.mean():.4f}" if len(lengths) else "none"),
        *estimate(given, model.dim, sample),
        *(("reject", f"{rows[int(index)]['id']}: {message}") for index, (_, message) in list(rejects.items())[:5]),
    ]


def _state(opened: _Opened) -> str:
    """What is there of the output. UserError for what the run would refuse."""
    there, config = opened.there, opened.config
    if there is None:
        return "new"
    if is_outdated(there, opened.stamp(), config.update):
        return "another input is brought in: only what differs is embedded; the figures below are for all rows"
    if (manifest := there.finished()) is None:
        return under_way(there)
    again = sum(map(manifest.lost, manifest.planned)) if config.retry_rejected else 0
    return f"finished; {again:,} rejected rows are tried again" if again else "finished: nothing is left to do"


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


class EncodeUnit:
    """A Ray Data actor: the model is loaded once, then units of pixels and texts become vectors."""

    def __init__(self, config: EmbedConfig, device: str, threads: int, slots: float, watch: Any, deaths: int) -> None:
        self.encoder: Encoder | None = None  # an error here would be shown with all of Ray's stack
        if ray.get(watch.may_load.remote(deaths)):
            self.encoder = Encoder(config, device=device, threads=threads)
            watch.loaded.remote()
        self.slots, self.watch = slots, watch
        self.idle_since: float | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.encoder is None:
            raise attempts.model_dies()
        carried = {name: row[name] for name in ("unit", "plan", "rejects", "facts")}
        none = self.encoder.images(np.zeros((0, 1, 1, 3), np.uint8))
        if not row["plan"] or not attempts.may_begin(self.watch, int(row["unit"]), "encode"):
            return {**carried, "plan": b"", "images": none, "texts": none}
        started, busy = time.monotonic(), _clock(self.encoder)
        try:
            shown, told = self.encoder.images(row["pixels"]), self.encoder.texts(json.loads(row["texts"]))
        except (MemoryError, torch.OutOfMemoryError):  # even in batches of one row: these are tried apart
            return {**carried, "plan": b"", "images": none, "texts": none}
        ended = time.monotonic()
        facts = json.loads(row["facts"])
        facts["seconds"]["encode"] = _clock(self.encoder) - busy
        facts["slots"]["encode"] = self.slots
        facts |= {"wait": started - self.idle_since if self.idle_since else 0.0, "busy": ended - started}
        self.idle_since = ended
        return {**carried, "facts": json.dumps(facts), "images": shown, "texts": told}


def _clock(encoder: Encoder) -> float:
    """On a GPU the time it is held; on CPUs, which loading shares, the cores' own."""
    return time.process_time() if encoder.device.type == "cpu" else time.monotonic()


def _pipeline(
    todo: ray.data.Dataset, ledger: Ledger, watch: Any, config: EmbedConfig, preprocess: Preprocess
) -> ray.data.Dataset:
    """On GPUs an actor owns one; on CPUs actors ask for half of their cores, so that loading finds a slot."""
    cpus, gpus = runtime.cpus(), runtime.gpus_for(config.use_gpu, config.encoders)
    few = max(1, len(ledger.units) // UNITS_PER_ENCODER)  # each actor loads the model: not worth it for a small input
    node = runtime.node_cpus()
    encoders = config.encoders or (gpus if gpus else min(few, cpus // max(1, node // ENCODERS_PER_NODE)))
    threads = max(1, min(node, cpus // encoders))
    cores = 1.0 if gpus else 0.5 * min(threads, cpus / encoders)
    ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = INIT_DEATHS
    load = partial(
        load_unit, ledger=ledger, reading=config.reading(preprocess), watch=watch, slots=(READERS * cpus, cpus)
    )
    write = partial(write_unit, ledger=ledger, towers=config.towers, dtype=config.dtype, cores=cpus)
    # Another number than an encoder's, or Ray makes one process of the two.
    loaded = todo.map(load, num_cpus=1 if gpus else 0.4)
    encoded = loaded.map(
        EncodeUnit,  # type: ignore[arg-type]
        fn_constructor_kwargs={
            "config": config,
            "device": "cuda" if gpus else "cpu",
            "threads": threads,
            "slots": encoders if gpus else cpus,
            "watch": watch,
            "deaths": INIT_DEATHS * encoders,
        },
        # Beside a GPU the next unit is fetched, and the last one handed on, while one is encoded.
        compute=ray.data.ActorPoolStrategy(
            size=encoders,
            max_tasks_in_flight_per_actor=4 if gpus else 2,
            max_concurrent_calls_per_actor=2 if gpus else 1,
        ),
        num_cpus=cores,
        num_gpus=1 if gpus else 0,
    )
    return encoded.map(write, num_cpus=0.3)
