"""Images/s of `clipdist embed` beside a peer and what the machine can do: python tests/benchmarks/embedding_speed.py

One run measures, in every round, on the same photos and the same (random) weights:

encode    the image tower alone on ready pixels, in the job's batches and precision, on all cores (one process with all
          threads, and one per core: the better one counts) or on all GPUs;
decode    reading, decoding and resizing alone, one process per core;
job       `clipdist embed`, a CSV with paths in, images alone, output on disk; on CPUs that compute in bfloat16 also with
          precision=bf16 and batch_rows=128;
peer      `clip-retrieval inference` where --peer-python names an interpreter that has it; and always a DataLoader loop.

The ceiling is 1 / (1 / encode + 1 / decode) on CPUs, where both share the cores, and the smaller one on GPUs. Rates of
job and peer are steady ones, from when a quarter of the results were there to the last result (what was read ahead by
then counts for them). start_up_seconds is the rest of the job's whole time: Python, Ray, plan, models,
end.

Both peers are tried with several numbers of workers and rows per batch on --trial photos; the best one is measured.
Their vectors must be the job's: the worst cosine is printed, and how often a photo's nearest vector of the other side
is its own (random weights put all photos close together, so that a cosine alone would show little).

clip-retrieval 2.45 wants old packages, so an environment of its own:
    uv venv --python 3.10 PEER; uv pip install --python PEER/bin/python clip-retrieval "setuptools<70"

The last line is JSON; ratio_to_peer is the job over clip-retrieval, or over the loop where that did not run.
"""

import argparse
import contextlib
import csv
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import embedding_ceilings as ceilings
import numpy as np
import peers
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from clipdist import models
from clipdist.manifest import read_manifest
from clipdist.models import ModelConfig
from clipdist.outputs import ENCODE_ROWS

SAME_COSINE, SAME_NEAREST = 0.999, 0.98
"""Nearest: identical photos have no nearest one, and bf16 cannot tell some near ones apart."""
SAMPLE = 1000
HALF, HALF_SETTINGS = "job, bf16", ["precision=bf16", "batch_rows=128"]


@dataclass(frozen=True)
class Way:
    """A peer with its settings."""

    name: str
    python: str
    workers: int
    batch: int

    def __str__(self) -> str:
        return f"{self.name}, {self.workers} workers, batch {self.batch}"


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="clipdist-bench-") as folder:
        home = Path(folder)
        model = peers.starting_point(home / "model", options.model)
        config = json.loads((model / "open_clip_config.json").read_text())["model_cfg"]
        (model / "benchmarked.json").write_text(json.dumps(config))
        photos = link_photos(home, photo_paths(options.data, home), options.photos)
        trial = link_photos(home / "trial", photos, options.trial)
        ways = [best_way(home, tried, model, len(trial)) for tried in all_ways(options.peer_python)]
        report(options, *measure(home, model, photos, ways, options))


def arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="a CSV with the column image, or a folder with products.csv; else drawn ones")
    parser.add_argument("--photos", type=int, default=100_000 if gpu else 5120, help="more than there are come again")
    parser.add_argument("--model", default="ViT-B-32", help='an open_clip name; "": a small CLIP')
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10, help="of every measurement of a ceiling")
    parser.add_argument("--trial", type=int, default=20_000 if gpu else 768, help="photos to find a peer's settings")
    parser.add_argument("--peer-python", help="an interpreter that has clip-retrieval")
    parser.add_argument("--job", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the job, else its own")
    return parser.parse_args()


def photo_paths(data: str | None, home: Path) -> list[str]:
    """The pictures that a table names, in its order."""
    if data is None:
        return [path for path, _ in peers.pictures(None, home)]
    table = Path(data) / "products.csv" if Path(data).is_dir() else Path(data)
    with table.open(newline="") as file:
        return [str((table.parent / row["image"]).absolute()) for row in csv.DictReader(file)]


def link_photos(home: Path, paths: Sequence[str], count: int) -> list[str]:
    """`count` links in `home`/photos, named by number (clip-retrieval reads a folder), the same table for the job, and
    every photo read once, so that it is in the page cache."""
    folder = home / "photos"
    folder.mkdir(parents=True)
    links = []
    for number in range(count):
        links.append(str(folder / f"{number:07d}{Path(paths[number % len(paths)]).suffix.lower()}"))
        os.symlink(os.path.realpath(paths[number % len(paths)]), links[-1])
    for path in links[: len(paths)]:
        Path(path).read_bytes()
    with (home / "photos.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "image"], *([Path(path).stem, path] for path in links)])
    return links


def all_ways(peer_python: str | None) -> list[list[Way]]:
    """Each peer with its documented settings and those that may suit this machine better."""
    cores = peers.cores()
    batches = [256] if torch.cuda.is_available() else [32, 256]
    loops = [Way("DataLoader loop", sys.executable, cores, batch) for batch in batches]
    if peer_python is None:
        return [loops]
    documented = Way("clip-retrieval", peer_python, 4, 256)
    own = [Way("clip-retrieval", peer_python, cores, batch) for batch in batches]
    return [list(dict.fromkeys([documented, *own])), loops]


def best_way(home: Path, ways: Sequence[Way], model: Path, photos: int) -> Way:
    """The fastest one on the photos of the trial, from its first read to its last result."""
    rates = {}
    for number, way in enumerate(ways):
        name = f"{way.name.split()[-1]}-{number}"
        results, _ = run_peer(home / "trial" / name, home / "trial" / "photos", way, model)
        rates[way] = photos / (results[-1][0] - results[0][0])
        print(f"  trial    {way!s:<46}{rates[way]:10.2f} images/s", flush=True)
    return max(rates, key=lambda way: rates[way])


def measure(
    home: Path, model: Path, photos: list[str], ways: Sequence[Way], options: argparse.Namespace
) -> tuple[dict[str, list[float]], list[float], dict[str, tuple[float, float]]]:
    """Images/s of everything in every round; the job's whole times; by peer its agreement with the job."""
    preprocess = models.load(ModelConfig(name=str(model))).preprocess
    rows = ENCODE_ROWS["cuda" if torch.cuda.is_available() else "cpu"]
    rates: dict[str, list[float]] = {}
    walls: list[float] = []
    vectors: dict[str, NDArray[np.float32]] = {}
    jobs = {"job": options.job} | ({HALF: [*options.job, *HALF_SETTINGS]} if has_half() else {})

    def note(name: str, rate: float, number: int) -> None:
        rates.setdefault(name, []).append(rate)
        print(f"  round {number + 1}  {name:<46}{rate:10.2f} images/s", flush=True)

    for number in range(options.rounds):
        for name, rate in ceilings.encode(model, rows, options.seconds).items():
            note(f"encode, {name}", rate, number)
        note("decode", ceilings.decode(photos, preprocess, options.seconds), number)
        sides: list[Way | str] = [*ways, *jobs]
        for way in sides[:: -1 if number % 2 else 1]:
            run = home / f"{(way if isinstance(way, str) else way.name).split()[-1]}-{number}"
            if isinstance(way, str):
                wall, units = run_job(run, home / "photos.csv", model, jobs[way])
                walls += [wall] if way == "job" else []
                note(way, steady_rate(units, min(torch.cuda.device_count() or peers.cores(), 8)), number)
                vectors[way] = job_vectors(run)
            else:
                results, vectors[way.name] = run_peer(run, home / "photos", way, model)
                note(way.name, steady_rate(results[1:], way.workers), number)
    agreed = {name: agreement(vectors["job"], found) for name, found in vectors.items() if name != "job"}
    return rates, walls, agreed


def has_half() -> bool:
    """Whether this is a CPU with instructions for bfloat16."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return not torch.cuda.is_available() and ("avx512_bf16" in flags or "amx_bf16" in flags)


def steady_rate(results: Sequence[tuple[float, int]], workers: int) -> float:
    """Images/s from results (time, rows): those after the first quarter, which may have waited for a writer to start
    and then come all at once, and after one per worker, as workers finish together."""
    first = min(max(workers, len(results) // 4), len(results) // 2)
    assert first, "there are not enough results"
    return sum(rows for _, rows in results[first:]) / (results[-1][0] - results[first - 1][0])


def run_job(output: Path, table: Path, model: Path, settings: Sequence[str]) -> tuple[float, list[tuple[float, int]]]:
    """`clipdist embed` in a process of its own: its whole time, and (time, rows) of every unit in order."""
    config = {
        "model": {"name": str(model)},
        "catalog": {"source": {"path": str(table)}},
        "towers": ["images"],
        "output": str(output),
    }
    path = peers.write_config(output.with_name(output.name + ".yaml"), config)
    os.environ["RAY_ADDRESS"] = "local"  # not whatever cluster runs on this machine
    found: dict[str, tuple[float, int]] = {}
    ended = threading.Event()
    watch = threading.Thread(target=watch_commits, args=(output / "commits", found, ended))
    watch.start()
    started = time.monotonic()
    try:
        peers.clipdist("embed", path, *settings)
    finally:
        ended.set()
        watch.join()
    return time.monotonic() - started, sorted(found.values())


def watch_commits(folder: Path, found: dict[str, tuple[float, int]], ended: threading.Event) -> None:
    """Notes the commits as they come: when their shard is joined, they go."""
    while not ended.wait(0.1):
        for path in folder.glob("*.json") if folder.exists() else ():
            if path.name not in found:
                with contextlib.suppress(FileNotFoundError):
                    rows = sum(json.loads(path.read_text())["planned"].values())
                    found[path.name] = path.stat().st_mtime, rows


def job_vectors(output: Path) -> NDArray[np.float32]:
    """All vectors, in the order of the photos' numbers."""
    manifest = read_manifest(str(output))
    found: dict[str, NDArray[np.float16]] = {}
    for file in manifest.select("images"):
        table = pq.read_table(manifest.path(file), columns=["id", "embedding"])
        flat = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        found |= dict(zip(table.column("id").to_pylist(), flat.reshape(len(table), -1), strict=True))
    return np.stack([found[name] for name in sorted(found)]).astype(np.float32)


def run_peer(folder: Path, photos: Path, way: Way, model: Path) -> tuple[list[tuple[float, int]], NDArray[np.float32]]:
    """((when it began to read, 0), then (time, rows) of every batch), and the vectors in the order of the photos."""
    folder.mkdir(parents=True)
    spec: dict[str, Any] = {
        "folder": str(photos), "output": str(folder / "output"), "lines": str(folder / "lines.jsonl"),
        "facts": str(folder / "facts.json"), "config": str(model / "benchmarked.json"),
        "weights": str(model / "open_clip_model.safetensors"), "workers": way.workers, "batch": way.batch,
    }  # fmt: skip
    script = str(Path(__file__).with_name("embedding_peers.py"))
    env = {**peers.environment(OMP_NUM_THREADS=str(peers.cores())), "PYTHONPATH": ""}
    kind = "loop" if way.name == "DataLoader loop" else way.name
    peers.call([way.python, script, kind, peers.write_config(folder / "spec.json", spec)], env)
    facts = json.loads((folder / "facts.json").read_text())
    if (facts["device"] == "cuda") != torch.cuda.is_available():
        raise SystemExit(f"{way.name} ran on another device ({facts}): give it a PyTorch for this machine")
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    results = [(lines[0]["begin"], 0), *((line["end"], line["rows"]) for line in lines)]
    return results, peer_vectors(folder / "output")


def peer_vectors(output: Path) -> NDArray[np.float32]:
    """All vectors, in the order of the photos' numbers."""
    if (output / "vectors.npy").exists():
        found: NDArray[np.float32] = np.load(output / "vectors.npy").astype(np.float32)
        return found
    parts: list[tuple[str, NDArray[np.float16]]] = []
    for path in sorted((output / "img_emb").glob("*.npy")):
        metadata = output / "metadata" / f"{path.stem.replace('img_emb', 'metadata')}.parquet"
        names = pq.read_table(metadata, columns=["image_path"]).column("image_path").to_pylist()
        parts += zip(names, np.load(path), strict=True)
    return np.stack([vector for _, vector in sorted(parts, key=lambda part: part[0])]).astype(np.float32)


def agreement(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> tuple[float, float]:
    """The worst cosine of the same photo, and how often the nearest of a sample of theirs is the photo's own."""
    if ours.shape != theirs.shape:
        raise SystemExit(f"the job and the peer made different vectors: {ours.shape} and {theirs.shape}")
    ours, theirs = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (ours, theirs))  # float16 rounded
    worst = float((ours * theirs).sum(1).min())
    a, b = ours[:SAMPLE], theirs[:SAMPLE]
    scores = (a - a.mean(0)) @ (b - a.mean(0)).T - ((b - a.mean(0)) ** 2).sum(1) / 2
    own = np.take_along_axis(scores, np.arange(len(a))[:, None], 1)[:, 0]
    return worst, float((own >= scores.max(1) - 1e-6).mean())


def report(
    options: argparse.Namespace,
    rates: dict[str, list[float]],
    walls: list[float],
    agreed: dict[str, tuple[float, float]],
) -> None:
    gpu = torch.cuda.is_available()
    middle = {name: peers.median(values) for name, values in rates.items()}
    encode = max(rate for name, rate in middle.items() if name.startswith("encode"))
    decode, job = middle["decode"], middle["job"]
    ceiling = min(encode, decode) if gpu else 1 / (1 / encode + 1 / decode)
    peer = "clip-retrieval" if "clip-retrieval" in middle else "DataLoader loop"
    print(f"\n{'images/s of ' + str(options.photos):<38}{'median (range)':<34}job / this")
    for name, values in [*rates.items(), ("ceiling", [ceiling])]:
        print(f"{name:<38}{peers.spread(values):<34}{job / peers.median(values):.3f}")
    wall = peers.median(walls)
    start_up = peers.median(wall - options.photos / rate for wall, rate in zip(walls, rates["job"], strict=True))
    print(f"the job's whole time: {wall:.1f} s, of which {start_up:.1f} s are start and end")
    for name, (worst, nearest) in agreed.items():
        print(f"vectors of {name}: worst cosine {worst:.6f}, nearest is the same photo {nearest:.1%}")
    found: dict[str, Any] = {"encode_per_second": encode, "decode_per_second": decode, "ceiling_per_second": ceiling}
    found |= {"job_per_second": job, "share_of_ceiling": job / ceiling, "peer_per_second": middle[peer]}
    found |= {"ratio_to_peer": job / middle[peer], "loop_per_second": middle["DataLoader loop"]}
    found |= {"ratio_to_peer_bf16": middle[HALF] / middle[peer]} if HALF in middle else {}
    found |= {
        "start_up_seconds": start_up,
        "job_wall_seconds": wall,
        "worst_cosine": min(w for w, _ in agreed.values()),
    }
    found = {name: round(value, 6 if "cosine" in name else 4) for name, value in found.items()}
    found |= {"peer": peer, "photos": options.photos, "model": options.model or "small CLIP"}
    found |= {"device": torch.cuda.get_device_name() if gpu else f"CPU, {peers.cores()} cores"}
    found |= {"precision": "bfloat16 autocast" if gpu else "float32"}
    if any(worst < SAME_COSINE or nearest < SAME_NEAREST for worst, nearest in agreed.values()):
        raise SystemExit("the job and its peers do not make the same vectors")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
