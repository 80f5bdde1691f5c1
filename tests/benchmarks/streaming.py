"""Training on a million pairs: how soon it starts, and whether its memory stays flat: python tests/benchmarks/streaming.py

The pairs are drawn (32 px JPEGs, every picture and caption is another one) and written as `clipdist prepare` writes
them, through the ledger, without the detour over a million files. Then `clipdist train` takes some steps of a tiny CLIP
on two workers. Printed are the seconds from the workers' start to the end of the first step, the memory of every worker
with the processes it started (sampled from outside, from /proc, and as the step events say), and the share of the time
that the steps waited for data.

The last line is JSON; memory_growth is the median of the last quarter of the steps' time over that of the second
quarter, of all workers together.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipdist import images, ledger, manifest, schema
from tests.conftest import TINY_CLIP

PX, PATCH = 32, 8
UNIT_ROWS, HELD_OUT_ROWS = 4096, 256
COLOURS = ("red", "green", "blue", "yellow", "purple", "black", "orange", "cyan")
SAMPLE_SECONDS = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=600, help="0: one epoch of all pairs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", help="folder of the pairs: stays there, and is taken when it is there")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="clipdist-bench-"))
    try:
        started = time.monotonic()
        pairs = make_pairs(Path(options.keep or home / "pairs").absolute(), options.pairs)
        print(f"{options.pairs:,} pairs are there after {time.monotonic() - started:.0f} s", flush=True)
        memory = Memory()
        events = train(home, pairs, options, memory)
        report(events, memory, options)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def make_pairs(folder: Path, rows: int) -> Path:
    """A finished pairs artefact of `rows` training pairs, made by all cores."""
    units = [("train", start, min(UNIT_ROWS, rows - start)) for start in range(0, rows, UNIT_ROWS)]
    units.append(("validation", rows, HELD_OUT_ROWS))
    identity = {
        "source": "drawn",
        "rows": rows,
        "decode": {"id": images.DECODE_ID, "max_side": 640, "max_pixels": 100_000_000},
    }
    plan = (pa.table({"id": [str(n) for n in range(first, first + count)]}) for _, first, count in units)
    book = ledger.begin(str(folder), schema.Stamp("pairs", identity, schema.recorded()), lambda: plan)
    todo = book.missing()
    with ProcessPoolExecutor(peers.cores()) as pool:
        for _ in pool.map(make_unit, *zip(*((book, unit, *units[unit]) for unit in todo), strict=True)) if todo else ():
            pass
    book.finished() or book.publish()
    return folder


def make_unit(book: ledger.Ledger, unit: int, split: str, first: int, rows: int) -> None:
    """Draws and commits the rows of one unit: patches of any colour, in the middle a square of the caption's colour."""
    generator = np.random.default_rng(first)
    patches = generator.integers(0, 256, (rows, PX // PATCH, PX // PATCH, 3), dtype=np.uint8)
    pixels = patches.repeat(PATCH, 1).repeat(PATCH, 2)
    table: dict[str, list[Any]] = {"id": [], "image": [], "captions": [], "group": [None] * rows, "split": []}
    for number, values in enumerate(pixels, first):
        picture, buffer, colour = Image.fromarray(values), io.BytesIO(), COLOURS[number % len(COLOURS)]
        picture.paste(colour, (8, 8, 24, 24))
        picture.save(buffer, "JPEG", quality=85)
        table["id"].append(str(number))
        table["image"].append(buffer.getvalue())
        table["captions"].append([f"a {colour} square on patches, number {number}"])
        table["split"].append(split)
    data = io.BytesIO()
    compression = {"id": "zstd", "image": "none", "captions.list.element": "zstd", "group": "zstd", "split": "zstd"}
    arrow = pa.table(table, schema.pairs_schema([]))
    pq.write_table(arrow, data, row_group_size=schema.ROW_GROUP_ROWS, compression=compression, use_dictionary=["split"])
    groups = [min(schema.ROW_GROUP_ROWS, rows - start) for start in range(0, rows, schema.ROW_GROUP_ROWS)]
    file = manifest.File("", "pairs", rows, tuple(groups), data.tell(), split)
    book.commit(unit, {("pairs", split): (data.getvalue(), file)}, {"pairs": rows}, [])


def train(home: Path, pairs: Path, options: argparse.Namespace, memory: "Memory") -> list[dict[str, Any]]:
    """The events of `clipdist train`; one named "command" stands for its start."""
    (home / "tiny.json").write_text(json.dumps(TINY_CLIP))
    length = {"steps": options.steps} if options.steps else {"epochs": 1}
    config = {
        "pairs": str(pairs), "output": str(home / "run"), "model": {"name": str(home / "tiny.json")},
        "global_batch_size": options.batch, "workers": {"num_workers": options.workers}, "log_every_steps": 1,
        "stages": [{"name": "all", "learns": ["all"], "learning_rate": 1e-3, **length}],
    }  # fmt: skip
    started = time.time()
    watch = threading.Thread(target=memory.watch)
    watch.start()
    try:
        peers.clipdist("train", peers.write_config(home / "train.yaml", config))
    finally:
        memory.stop.set()
        watch.join()
    lines = (home / "run" / "metrics.jsonl").read_text().splitlines()
    return [{"event": "command", "time": started}, *map(json.loads, lines)]


@dataclass
class Memory:
    """Resident bytes of the training workers below this process, each with the processes that it started.

    `samples[worker's process id]`: (seconds since 1970, bytes). Pages that processes share count for each of them.
    """

    samples: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self.stop.wait(SAMPLE_SECONDS):
            found = processes()
            mine = below(found, {os.getpid()})
            for worker in (pid for pid in mine if found[pid][1].startswith("ray::RayTrain")):
                size = sum(found[pid][2] for pid in below(found, {worker}) | {worker})
                self.samples.setdefault(worker, []).append((time.time(), size))


def processes() -> dict[int, tuple[int, str, int]]:
    """Of every process of this machine: its parent, its title, its resident bytes."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            facts = dict(line.split(":", 1) for line in (path / "status").read_text().splitlines() if ":" in line)
            title = (path / "cmdline").read_text(errors="replace")
        except OSError:  # it has ended
            continue
        found[int(path.name)] = (int(facts["PPid"]), title, 1024 * int(facts.get("VmRSS", "0").split()[0]))
    return found


def below(found: dict[int, tuple[int, str, int]], roots: set[int]) -> set[int]:
    """All descendants of `roots`."""
    children = {pid for pid, (parent, _, _) in found.items() if parent in roots} - roots
    return children | below(found, children) if children else children


def quarters(samples: list[tuple[float, int]], first: float, last: float) -> tuple[float, float]:
    """Median bytes in the second and in the last quarter of the time from `first` to `last`."""
    quarter = (last - first) / 4
    parts = [
        [size for at, size in samples if start <= at <= start + quarter] for start in (first + quarter, last - quarter)
    ]
    return tuple(statistics.median(part) if part else float("nan") for part in parts)  # type: ignore[return-value]


def report(events: list[dict[str, Any]], memory: Memory, options: argparse.Namespace) -> None:
    steps = [event for event in events if event["event"] == "step"]
    start = next((event for event in events if event["event"] == "workers"), events[0])
    first, last = steps[0]["time"], steps[-1]["time"]
    early, late = 0.0, 0.0
    print(f"\n{'worker':<12}{'peak MiB':>12}{'2nd quarter':>14}{'last quarter':>14}{'MiB per 1000 steps':>20}")
    for worker, samples in memory.samples.items():
        before, after = quarters(samples, first, last)
        early, late = early + before, late + after
        slope = (after - before) / (len(steps) * 5 / 8) * 1000
        sizes = [max(size for _, size in samples), before, after]
        print(
            f"{worker:<12}{sizes[0] / 2**20:>12.0f}{before / 2**20:>14.1f}{after / 2**20:>14.1f}{slope / 2**20:>20.1f}"
        )
    told = quarters([(event["time"], event.get("memory_bytes", 0)) for event in steps], first, last)
    print(f"{'as rank 0 says':<24}{told[0] / 2**20:>14.1f}{told[1] / 2**20:>14.1f}")
    seconds = first - start["time"]
    rate = sum(event["pairs"] for event in steps[1:]) / (last - first)
    print(f"first step {seconds:.1f} s after the start of the {start['event']}, then {rate:.0f} pairs/s")
    found = {"first_step_seconds": seconds, "memory_growth": late / early, "data_wait": steps[-1]["data_wait"]}
    found["seconds_from_command"] = first - events[0]["time"]
    found |= {"pairs": options.pairs, "pairs_per_second": rate, "steps": len(steps)}
    found["peak_bytes"] = max((size for samples in memory.samples.values() for _, size in samples), default=0)
    if told[0]:
        found["memory_growth_told"] = told[1] / told[0]
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
