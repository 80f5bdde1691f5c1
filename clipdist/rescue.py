"""A unit that killed its process: its rows are tried in halves, at last each alone, and one that kills is rejected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from clipdist import attempts, runtime
from clipdist.catalog import EmbedConfig
from clipdist.encoding import Encoder
from clipdist.images import Preprocess
from clipdist.ledger import Ledger
from clipdist.loading import Times, load_rows, rejects_of, stack, texts_of
from clipdist.unit_tables import KILLS, from_bytes, to_bytes
from clipdist.unit_tasks import write_unit

DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.WorkerCrashedError,
    MemoryError,
    torch.OutOfMemoryError,
)
"""What a row can do to the process that works on it."""
HOPELESS_DEATHS = 24
"""When this many processes in a row died over the parts of a unit, and no row of the job is done, it is not the rows: a
unit with a few rows that kill has parts that live long before."""


class _Rescuer:
    """A process that may die: it loads and encodes some rows of a unit."""

    def __init__(self, config: EmbedConfig, preprocess: Preprocess, device: str, threads: int) -> None:
        self.reading = config.reading(preprocess)
        self.encoder = Encoder(config, device=device, threads=threads)

    def attempt(self, plan: bytes) -> tuple[np.ndarray, np.ndarray, dict[str, list[str]]]:
        rows = from_bytes(plan).to_pylist()
        loaded = load_rows(rows, self.reading, Times())
        pixels = stack(loaded, self.reading.preprocess.size)
        return self.encoder.images(pixels), self.encoder.texts(texts_of(rows, self.reading)), rejects_of(loaded)


def rescue(ledger: Ledger, unit: int, config: EmbedConfig, preprocess: Preprocess) -> dict[str, Any]:
    """Commits a unit that killed its process: its rows are tried in halves, at last each alone."""
    plan, gpus = ledger.rows(unit), runtime.gpus_for(config.use_gpu, config.encoders)
    options = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_restarts": 0}
    actors: list[Any] = []
    dead = [0]
    pictures: list[np.ndarray] = []
    told: list[np.ndarray] = []
    rejects: dict[str, list[str]] = {}

    def attempt(part: Sequence[int]) -> Any:
        if not actors:
            how = (config, preprocess, "cuda" if gpus else "cpu", runtime.node_cpus())
            actors.append(ray.remote(_Rescuer).options(**options).remote(*how))
        try:
            return ray.get(actors[0].attempt.remote(to_bytes(plan.slice(part[0], len(part)))))
        except DEATHS:
            ray.kill(actors.pop())
            dead[0] += 1
            if dead[0] >= HOPELESS_DEATHS and not pictures and not ledger.records():
                raise attempts.all_died(
                    ledger, f"that tried rows of unit {unit} all died, {dead[0]} in a row"
                ) from None
            return None

    for part, found in attempts.halved(range(len(plan)), attempt):
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
    return write_unit(row | {"facts": json.dumps({"rows": len(plan)})}, ledger, config.towers, config.dtype, 1.0)
