"""Embed jobs as processes on one long-lived Ray cluster, with faults, and what they leave behind."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from ray._common.utils import reset_ray_address
from ray._private.utils import read_ray_address
from ray.cluster_utils import Cluster

from clipdist import models, storage
from clipdist.manifest import Manifest, read_manifest
from clipdist.models import ModelConfig
from tests.faulty_store import FaultyStore, faulty_store

SITE = Path(__file__).with_name("faults_site")
ROOT = Path(__file__).parents[2]
UNIT_ROWS, SHARD_ROWS = 16, 64
TABLES = ("images", "texts", "rejects")


@dataclass(frozen=True)
class Outcome:
    """What a finished table holds: vectors by id, to the bit, and why rows are rejected, by (table, id)."""

    vectors: dict[str, bytes]
    rejects: dict[tuple[str, str], str]


class Driver:
    """A `clipdist embed` in a process of its own."""

    def __init__(self, process: Any, log: Path) -> None:
        self.process, self.log, self.started = process, log, time.monotonic()
        self.pid = int(process.pid)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def alive(self) -> bool:
        return bool(self.process.is_alive())

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.join()

    def wait(self, seconds: float = 180) -> int:
        self.process.join(seconds)
        if self.alive():
            self.kill()
            raise AssertionError(f"not done within {seconds} s; it said:\n{self.said()[-3000:]}")
        self.seconds = time.monotonic() - self.started
        return int(self.process.exitcode)


class Jobs:
    """Starts jobs on a cluster; `store` is the S3 that they and their workers see, `faults` what workers do."""

    def __init__(self, home: Path, store: FaultyStore, cluster: Cluster, environment: dict[str, str]) -> None:
        self.home, self.store, self.cluster, self.environment = home, store, cluster, environment
        self.model = str(home / "model")
        self.context = multiprocessing.get_context("forkserver")  # imports once: most of a start
        self.context.set_forkserver_preload(["clipdist.cli", "clipdist.embed", "torch", "ray.data", "moto", "s3fs"])
        self.count = 0

    def faults(self, **now: Any) -> None:
        Path(self.environment["EMBED_FAULTS"]).write_text(json.dumps(now))

    def forget(self) -> None:
        Path(self.environment["EMBED_FAULTS"] + ".log").write_text("")

    def work(self, what: str) -> list[tuple[int, int, int]]:
        """(rows, process, its raylet) of what was done since `forget`."""
        lines = Path(self.environment["EMBED_FAULTS"] + ".log").read_text().splitlines()
        split = [line.split() for line in lines]
        return [(int(rows), int(pid), int(raylet)) for kind, rows, pid, raylet in split if kind == what]

    @contextlib.contextmanager
    def second_node(self) -> Iterator[tuple[int, Callable[[], None]]]:
        """Another node of the cluster while the block lasts: its raylet's process, and what kills it and, as an
        autoscaler does, brings another."""
        nodes = []

        def add() -> None:
            with _environment(self.environment):  # workers get it from their raylet
                nodes.append(self.cluster.add_node(num_cpus=1))

        def replace() -> None:
            self.cluster.remove_node(nodes.pop(), allow_graceful=False)
            add()

        add()
        try:
            yield nodes[0].all_processes["raylet"][0].process.pid, replace
        finally:
            self.cluster.remove_node(nodes.pop(), allow_graceful=True)
            self.cluster.wait_for_nodes()  # until it is known to be gone: the next job counts cores

    def start(self, catalog: Path | str, output: Path | str, **settings: Any) -> Driver:
        values = {
            "model": {"name": self.model},
            "catalog": {"source": {"path": str(catalog)}, "captions": ["{caption}"]},
            "output": str(output),
            "unit_rows": UNIT_ROWS,
            "shard_rows": SHARD_ROWS,
            "encoders": 1,
        }
        environment = dict(os.environ) | self.environment | settings.pop("environment", {})
        words = [f"{name}={json.dumps(value)}" for name, value in (values | settings).items()]
        self.count += 1
        log = self.home / f"job-{self.count:03d}.log"
        process = self.context.Process(target=_job, args=(["embed", *words], environment, str(log)))
        log.touch()
        process.start()
        return Driver(process, log)

    def run(self, catalog: Path | str, output: Path | str, seconds: float = 180, **settings: Any) -> Driver:
        """A job that has to end well."""
        driver = self.start(catalog, output, **settings)
        code = driver.wait(seconds)
        assert code == 0, driver.said()[-4000:]
        return driver


def _job(words: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.clear()  # of the server that forked this: another test may have started it long before
    os.environ.update({name: value for name, value in environment.items() if value != ""})
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    from ray._raylet import Config

    from clipdist.cli import main

    Config.initialize("")  # Ray read the environment when it was imported, which was before the fork
    sys.exit(main(words))


@contextlib.contextmanager
def jobs(home: Path, s3: str) -> Iterator[Jobs]:
    """A model, a store that can fail, and a cluster of one node whose workers see both."""
    (home / "model").mkdir(parents=True)
    (home / "tiny.json").write_text(json.dumps(_tiny()))
    torch.manual_seed(0)
    towers = models.load(ModelConfig(name=str(home / "tiny.json")))
    towers.save(home / "model", final_path=str(home / "model"))
    (home / "faults.json").write_text("{}")
    (home / "faults.json.log").write_text("")
    before = dict(os.environ)
    with faulty_store(before["AWS_ENDPOINT_URL"]) as store:
        os.environ["AWS_ENDPOINT_URL"] = before["AWS_ENDPOINT_URL"]  # what the test itself asks for is not disturbed
        ours = {
            "AWS_ENDPOINT_URL": store.url,
            "EMBED_FAULTS": str(home / "faults.json"),
            "PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT), before.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "disabled",  # another Ray of the test session may ask for a token, in the environment
        }
        with _environment(ours):
            cluster = _start_cluster()
        try:
            yield Jobs(home, store, cluster, ours | {"RAY_ADDRESS": cluster.address})
        finally:
            cluster.shutdown()


def _start_cluster() -> Cluster:
    """One core, so that a job has few processes. Jobs that are not told its address do not find it."""
    for left in (2, 1, 0):
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: it holds sockets
        try:
            settings = {"num_cpus": 1, "include_dashboard": False, "temp_dir": folder}
            cluster = Cluster(initialize_head=True, head_node_args=settings)
            if read_ray_address() == cluster.address:
                reset_ray_address()
            return cluster
        except Exception:  # on a busy machine a node may come too late for Ray
            if not left:
                raise
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _tiny() -> dict[str, Any]:
    from tests.conftest import TINY_CLIP

    return TINY_CLIP


def picture(number: int, size: int = 24) -> Image.Image:
    """Noise that no other number has."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8), "RGB")


def write_catalog(place: str, rows: int, more: Sequence[tuple[str, str]] = ()) -> str:
    """A catalog of `rows` PNG pictures, and of `more` (id, picture) among them. Returns its path or URL."""
    lines = [{"id": f"r{number:04d}", "image": f"pictures/{number:04d}.png"} for number in range(rows)]
    for number in range(rows):
        storage.write_atomic(storage.join(place, f"pictures/{number:04d}.png"), encoded(picture(number)))
    for place_of, (row, uri) in enumerate(more, 1):
        lines.insert(place_of * rows // (len(more) + 1), {"id": row, "image": uri})
    lines = [line | {"caption": f"caption of {line['id']}"} for line in lines]
    path = storage.join(place, "catalog.jsonl")
    storage.write_atomic(path, "\n".join(map(json.dumps, lines)).encode())
    return path


def encoded(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def outcome(uri: Path | str) -> Outcome:
    """Everything that the finished table at `uri` holds. Asserts that each id is there once, that counts agree, and
    that no file lies in its folders that its manifest does not name."""
    uri = str(uri)
    manifest = read_manifest(uri, "embeddings")
    vectors: dict[str, bytes] = {}
    for file in manifest.files:
        table = pq.read_table(io.BytesIO(storage.read_bytes(manifest.path(file))))
        dim = table.schema.field("embedding").type.list_size
        matrix = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
        assert len(matrix) == file.rows == sum(file.row_groups)
        for row, vector in zip(table.column("id").to_pylist(), matrix, strict=True):
            assert row not in vectors, f"{row} is there twice"
            assert abs(np.linalg.norm(vector.astype(np.float32)) - 1) < 5e-3
            vectors[row] = vector.tobytes()
    rejects: dict[tuple[str, str], str] = {}
    for name in manifest.reject_files:
        for row in pq.read_table(io.BytesIO(storage.read_bytes(storage.join(uri, name)))).to_pylist():
            assert (row["table"], row["id"]) not in rejects
            rejects[row["table"], row["id"]] = row["reason"]
    for table, planned in manifest.planned.items():
        lost = Counter(reason for (of, _), reason in rejects.items() if of == table)
        assert lost == Counter(manifest.rejected.get(table, {}))
        assert planned == manifest.written(table) + sum(lost.values())
    there = {path.removeprefix(f"{uri}/") for path, _ in storage.walk_files(uri)}
    assert {name for name in there if name.startswith(("pieces/", "commits/", "running"))} == set()
    before = f"{uri}/manifests/{manifest.number - 1:08d}.json"  # its readers may still be at work
    named = Manifest.from_json(uri, json.loads(storage.read_bytes(before))).names() if storage.exists(before) else set()
    orphans = {name for name in there if name.startswith(TABLES)} - manifest.names() - named
    assert not orphans, "files that nobody names"
    return Outcome(vectors, rejects)


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.02)
