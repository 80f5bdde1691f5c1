"""A million rows through `clipdist embed`: python tests/benchmarks/embedding_scale.py

A catalog of small pictures (32 px JPEGs, every one another, their bytes in Parquet files) is embedded with a tiny CLIP,
image and text tower, into a store on loopback that counts requests. Printed: rows/s of planning and of the job in the
second and the last quarter of its time, memory that is not shared (RssAnon) of the driver and of all processes below it
in both quarters, requests by kind, objects and bytes per row.

The last line is JSON. memory_growth and rate_growth are last quarter over second quarter: 1 is flat, and linear.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pyarrow as pa
import pyarrow.parquet as pq

from clipdist import storage
from clipdist.manifest import read_manifest
from tests.conftest import TINY_CLIP
from tests.faulty_store import FaultyStore, faulty_store

FILE_ROWS, GROUP_ROWS = 16_384, 512
SAMPLE_SECONDS = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--keep", help="folder of the catalog: stays there, and is taken when it is there")
    parser.add_argument("--job", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the job")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="clipdist-bench-"))
    try:
        catalog = make_catalog(Path(options.keep or home / "catalog").absolute(), options.rows)
        with counting_store() as store:
            lines, samples = embed(home, catalog, options.job)
            report(options.rows, store, lines, samples)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def make_catalog(folder: Path, rows: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    starts = [first for first in range(0, rows, FILE_ROWS) if not (folder / f"{first:09d}.parquet").exists()]
    with ProcessPoolExecutor(peers.cores()) as pool:
        list(pool.map(make_file, [folder] * len(starts), starts, [min(FILE_ROWS, rows - first) for first in starts]))
    return folder


def make_file(folder: Path, first: int, rows: int) -> None:
    """Patches of any colour: every picture is another one."""
    import io

    from PIL import Image

    patches = np.random.default_rng(first).integers(0, 256, (rows, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    pictures = []
    for pixels in patches:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        pictures.append(buffer.getvalue())
    ids = range(first, first + rows)
    columns = {"id": pa.array(ids), "image": pa.array(pictures, pa.binary())}
    columns |= {"title": pa.array([f"patches number {number}" for number in ids])}
    temporary = folder / f".{first}.tmp"
    pq.write_table(pa.table(columns), temporary, row_group_size=GROUP_ROWS, use_dictionary=False)
    temporary.rename(folder / f"{first:09d}.parquet")


@contextmanager
def counting_store() -> Iterator[FaultyStore]:
    """An S3 on loopback with the bucket `clipdist`; its address and keys stand in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address, port = server.get_host_and_port()
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    os.environ.update(dict.fromkeys(names, "test") | {"AWS_DEFAULT_REGION": "us-east-1"})
    boto3.client("s3", endpoint_url=f"http://{address}:{port}").create_bucket(Bucket="clipdist")
    with faulty_store(f"http://{address}:{port}") as store:
        yield store
    server.stop()


def embed(home: Path, catalog: Path, settings: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """The job's JSON lines, each with the time at which it came, and samples of memory."""
    config = {
        "model": {"name": str(peers.starting_point(home / "model", TINY_CLIP))},
        "catalog": {"source": {"path": str(catalog)}, "captions": ["{title}"]},
        "output": "s3://clipdist/embeddings",
    }
    path = peers.write_config(home / "embed.yaml", config)
    command = [sys.executable, "-c", "from clipdist.cli import main; raise SystemExit(main())", "embed", path]
    process = subprocess.Popen(
        [*command, *settings], stderr=subprocess.PIPE, text=True, env=peers.environment(RAY_ADDRESS="local")
    )
    samples: list[dict[str, float]] = []
    stop = threading.Event()
    watch = threading.Thread(target=watch_memory, args=(process.pid, samples, stop))
    watch.start()
    lines: list[dict[str, Any]] = [{"started": True, "time": time.time()}]
    assert process.stderr is not None
    for text in process.stderr:
        print(text, end="", flush=True)
        if text.startswith("{"):
            lines.append(json.loads(text) | {"time": time.time()})
    stop.set()
    watch.join()
    if process.wait():
        raise SystemExit("the job failed")
    return lines, samples


def watch_memory(driver: int, samples: list[dict[str, float]], stop: threading.Event) -> None:
    while not stop.wait(SAMPLE_SECONDS):
        sizes = dict(anonymous_bytes(driver))
        samples.append({"time": time.time(), "driver": sizes.get(driver, 0), "all": sum(sizes.values())})


def anonymous_bytes(root: int) -> Iterator[tuple[int, int]]:
    """Of a process and all below it: memory of its own, without files and what is shared."""
    facts: dict[int, tuple[int, int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            lines = dict(line.split(":", 1) for line in (path / "status").read_text().splitlines() if ":" in line)
        except OSError:  # it has ended
            continue
        facts[int(path.name)] = (int(lines["PPid"]), 1024 * int(lines.get("RssAnon", "0").split()[0]))
    found, queue = set(), [root]
    while queue:
        one = queue.pop()
        found.add(one)
        queue += [pid for pid, (parent, _) in facts.items() if parent == one and pid not in found]
    yield from ((pid, facts[pid][1]) for pid in found if pid in facts)


def report(rows: int, store: FaultyStore, lines: list[dict[str, Any]], samples: list[dict[str, float]]) -> None:
    progress = [line for line in lines if line.get("done")]
    first, last = progress[0]["time"], progress[-1]["time"]
    quarter = (last - first) / 4

    def rate(start: float, end: float) -> float:
        times, done = [line["time"] for line in progress], [line["done"] for line in progress]
        return float(np.interp(end, times, done) - np.interp(start, times, done)) / (end - start)

    def memory(name: str, start: float) -> float:
        return statistics.median(one[name] for one in samples if start <= one["time"] <= start + quarter)

    early, late = first + quarter, last - quarter
    manifest = read_manifest("s3://clipdist/embeddings")
    objects = list(storage.walk_files("s3://clipdist/embeddings"))
    rates = rate(early, early + quarter), rate(late, last)
    print(f"\n{'':<28}{'2nd quarter':>14}{'last quarter':>14}")
    print(f"{'rows/s':<28}{rates[0]:>14.0f}{rates[1]:>14.0f}")
    for name in ("driver", "all"):
        sizes = [memory(name, start) / 2**20 for start in (early, late)]
        print(f"{'MiB of ' + name:<28}{sizes[0]:>14.0f}{sizes[1]:>14.0f}")
    requests = dict(store.requests)
    print(f"requests: {requests}, {sum(requests.values()) / rows:.4f} per row")
    print(
        f"objects left: {len(objects)}, of them {len(manifest.files)} shards; {sum(s for _, s in objects) / rows:.0f} bytes/row"
    )
    found = {
        "rows": rows,
        "written": {table: manifest.written(table) for table in manifest.planned},
        "seconds": round(last - lines[0]["time"], 1),
        "seconds_to_first_unit": round(first - lines[0]["time"], 1),
        "rows_per_second": round(rate(first, last), 1),
        "rate_growth": round(rates[1] / rates[0], 4),
        "memory_growth": round(memory("all", late) / memory("all", early), 4),
        "driver_growth": round(memory("driver", late) / memory("driver", early), 4),
        "peak_bytes": int(max(one["all"] for one in samples)),
        "requests_per_row": {name: round(count / rows, 6) for name, count in requests.items()},
        "objects": len(objects),
        "shards": len(manifest.files),
        "sent_bytes_per_row": round(store.bytes_in / rows, 1),
        "received_bytes_per_row": round(store.bytes_out / rows, 1),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
