"""A job on an object store, killed before and after every call that changes the store, and run again."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec.asyn
import numpy as np
import pyarrow as pa
from s3fs import S3FileSystem

from clipdist import ledger, storage
from clipdist.joining import join_shards
from clipdist.ledger import begin
from clipdist.manifest import Manifest, read_manifest
from clipdist.retry import planned_row, retry_plan
from clipdist.schema import Stamp, embeddings_schema
from clipdist.shard_writer import encode_shard
from tests.ray.embed_jobs import outcome

ROOT = Path(__file__).parents[2]
DIM = 8
STAMP = Stamp("embeddings", {"dim": DIM, "dtype": "float16", "input": "in"})
UNITS, UNIT_ROWS, SHARD_UNITS = 2, 2, 2


def plan() -> Iterator[pa.Table]:
    return (pa.table({"id": [f"{unit}-{row}" for row in range(UNIT_ROWS)]}) for unit in range(UNITS))


def vector(row_id: str) -> np.ndarray:
    made = np.random.default_rng(abs(hash(tuple(map(ord, row_id))))).standard_normal(DIM)
    return (made / np.linalg.norm(made)).astype(np.float16)


def commit(book: ledger.Ledger, unit: int, bad: str) -> None:
    """The rows of a unit with their vectors; the row `bad` is a reject."""
    planned = book.rows(unit)
    ids = planned.column("id").to_pylist()
    good = [row for row in ids if row != bad]
    schema = embeddings_schema("images", DIM, [], "float16")
    columns = {name: pa.nulls(len(good), schema.field(name).type) for name in schema.names}
    columns["id"] = pa.array(good)
    flat = pa.array(np.concatenate([vector(row) for row in good]))
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type)
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    rejects = [
        {"id": bad, "table": "images", "uri": None, "reason": "missing", "message": "no such file"}
        | {"row": planned_row(planned, index)}
        for index, row in enumerate(ids)
        if row == bad
    ]
    book.commit(unit, {("images", None): encode_shard(table, "images", STAMP)}, {"images": len(ids)}, rejects)


def work(book: ledger.Ledger, bad: str) -> Manifest:
    for unit in book.missing():
        commit(book, unit, bad)
    for shard in set(book.shards) - book.closed():
        book.join(shard, join_shards)
    return book.publish()


def run_job(uri: str) -> None:
    """The table, and then its rejects once more."""
    book = begin(uri, STAMP, plan, shard_units=SHARD_UNITS)
    if book.purpose == "make":
        manifest = book.finished() or work(book, "1-1")
        book.sweep(manifest)
        again = retry_plan(book)
        assert again is not None
        book = again
    manifest = book.finished() or work(book, "")
    book.sweep(manifest)


def run_killed_at(uri: str, step: int) -> None:
    """Runs the job and ends the process, as SIGKILL does, before the n-th call that changes the store: that is also
    after the one before, as nothing is changed in between."""
    fsspec.asyn.iothread[0], fsspec.asyn.loop[0] = None, None  # the parent's thread is not in a forked process
    S3FileSystem.clear_instance_cache()
    left = [step]

    def tick() -> None:
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            tick()
            return real(*args)

        return call

    for name in ("write_atomic", "put_if_absent", "remove", "remove_tree"):
        setattr(storage, name, counted(getattr(storage, name)))
    run_job(uri)
    os._exit(0)


KILL_AT_EVERY_STEP = """
import itertools, os, sys, tempfile
from tests.unit.test_ledger_on_s3 import run_job, run_killed_at
with tempfile.TemporaryDirectory() as local:
    run_job(local)  # so that the children import nothing
for step in itertools.count():
    child = os.fork()
    if child == 0:
        run_killed_at(f"{sys.argv[1]}/{step:03d}", step)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_job_killed_at_any_step_on_s3_and_run_again_gives_every_row_once(s3_bucket: str) -> None:
    root = f"{s3_bucket}/killed-ledger"
    subprocess.run([sys.executable, "-c", KILL_AT_EVERY_STEP, root], cwd=ROOT, check=True, timeout=300)
    folders = storage.names(root)
    undisturbed = outcome(f"{root}/{folders[-1]}")
    assert len(undisturbed.vectors) == UNITS * UNIT_ROWS
    assert not undisturbed.rejects
    unfinished = 0
    for name in folders[:-1]:
        uri = f"{root}/{name}"
        unfinished += not storage.names(f"{uri}/manifests")
        run_job(uri)
        assert outcome(uri) == undisturbed, name
        manifest = read_manifest(uri)
        assert manifest.number == 2
        expected = {row: vector(row).tobytes() for row in itertools.chain(undisturbed.vectors)}
        assert undisturbed.vectors == expected
    print(f"{len(folders)} moments, {unfinished} of them before the first manifest")
    assert len(folders) > 25
    assert 10 < unfinished < len(folders) - 10
