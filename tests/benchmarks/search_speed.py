"""Search beside faiss IndexFlatIP, both warm, on the same vectors: python tests/benchmarks/search_speed.py

Needs `faiss-cpu`. Embeddings of synthetic float16 vectors are written as `embed` writes them and opened with `Index.open`; faiss
gets them in float32 in memory. Both use all cores, take turns, and every round asks new queries. faiss is timed as
it comes and with its matrix product from the first query on (`distance_compute_blas_threshold=1`), which is faster
for some batches; the ratios are to faiss as it comes, `..._tuned` to the faster of both.

Two kinds of vectors: random ones, and clusters in a cone with queries from another cone (the gap between texts and
pictures) where each tenth row is a near copy of another. Answers are compared with all exact scores of a sample of the queries.

With --rows 10_000_000 --no-faiss nothing but one block is ever in memory beside what is measured.

The last line is JSON: faiss time / ours for 1, 32 and 256 queries (the lower of the two kinds), `exact`, and
`share_of_bandwidth`: bytes of the first pass over its time, as a share of the rate at which torch sums the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clipdist import ledger
from clipdist.cache import DiskCache
from clipdist.schema import Stamp, embeddings_schema
from clipdist.scores import exact_scores
from clipdist.search import Index
from clipdist.shard_writer import encode_shard

Array = np.ndarray[Any, Any]
SHARD_ROWS, CLUSTERS, K = 131_072, 2000, 10
BATCHES = (1, 32, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--checked", type=int, default=8, help="queries per kind that are answered by brute force")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--no-faiss", action="store_true")
    parser.add_argument(
        "--folder", help="where the vectors go, beside a free space of 3 bytes a value (a temporary folder)"
    )
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found: dict[str, dict[str, Any]] = {}
    for kind in options.kinds:
        home = Path(tempfile.mkdtemp(prefix="clipdist-bench-", dir=options.folder))
        try:
            found[kind] = measure(kind, home, options)
        finally:
            shutil.rmtree(home, ignore_errors=True)
    print(json.dumps(summary(found, options)))


def random_block(first: int, rows: int, dim: int) -> Array:
    return np.random.default_rng(first).standard_normal((rows, dim), dtype=np.float32)


def clustered_block(first: int, rows: int, dim: int) -> Array:
    """Rows of `CLUSTERS` clusters in one cone: their cosines are 0.53 and more. Each tenth is a near copy of the one
    before it."""
    random, centres = np.random.default_rng(first), centres_of(dim)
    noise = random.standard_normal((rows, dim), dtype=np.float32) / np.sqrt(dim, dtype=np.float32)
    block = centres[0] * 0.73 + centres[1 + random.integers(0, CLUSTERS, rows)] * 0.6 + noise * 0.32
    copies = np.arange(9, rows, 10)
    block[copies] = block[copies - 1] + noise[copies] * 0.002
    return np.asarray(block, np.float32)


def random_queries(count: int, seed: int, dim: int) -> Array:
    return unit(np.random.default_rng([seed, 1]).standard_normal((count, dim)))


def clustered_queries(count: int, seed: int, dim: int) -> Array:
    """Texts: a cone of their own, and something of a cluster."""
    random, centres = np.random.default_rng([seed, 1]), centres_of(dim)
    noise = random.standard_normal((count, dim)) / np.sqrt(dim)
    return unit(centres[-1] * 0.8 + centres[1 + random.integers(0, CLUSTERS, count)] * 0.5 + noise * 0.3)


KINDS = {"random": (random_block, random_queries), "clustered": (clustered_block, clustered_queries)}


def centres_of(dim: int) -> Array:
    return unit(np.random.default_rng(7).standard_normal((CLUSTERS + 2, dim)))


def unit(vectors: Array) -> Array:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def blocks(kind: str, rows: int, dim: int) -> Iterator[Array]:
    for first in range(0, rows, SHARD_ROWS):
        yield unit(KINDS[kind][0](first, min(SHARD_ROWS, rows - first), dim)).astype(np.float16)


def write(kind: str, folder: Path, rows: int, dim: int) -> None:
    """An embeddings artefact of images, one shard per unit."""
    stamp = Stamp("embeddings", {"dim": dim}, {"model": "synthetic"})
    schema = embeddings_schema("images", dim, [])
    units = -(-rows // SHARD_ROWS)
    book = ledger.begin(str(folder), stamp, lambda: (pa.table({"unit": [number]}) for number in range(units)))
    first = 0
    for number, block in enumerate(blocks(kind, rows, dim)):
        ids = pa.array([f"{row:09d}" for row in range(first, first + len(block))])
        values = {name: pa.nulls(len(block), schema.field(name).type) for name in schema.names}
        values |= {"id": ids, "caption": ids, "image_uri": ids}
        values["embedding"] = pa.FixedSizeListArray.from_arrays(
            pa.array(block.reshape(-1)), type=schema.field("embedding").type
        )
        table = pa.table([values[name] for name in schema.names], schema=schema)
        book.commit(number, {("images", None): encode_shard(table, "images", stamp)}, {"images": len(block)}, [])
        first += len(block)
    book.publish()


def measure(kind: str, home: Path, options: argparse.Namespace) -> dict[str, Any]:
    rows, dim = options.rows, options.dim
    write(kind, home / "embeddings", rows, dim)
    cache = DiskCache(home / "cache", 1 << 40)
    before = resident()
    opening = [seconds(lambda: Index.open(str(home / "embeddings"), cache=cache)) for _ in range(5)]
    index = Index.open(str(home / "embeddings"), cache=cache)
    queries = KINDS[kind][1]
    preparing = seconds(lambda: index.search(queries(1, 0, dim), K))
    ways: dict[str, Callable[[Array], Any]] = {"clipdist": lambda asked: index.search(asked, K)}
    if not options.no_faiss:
        ways |= faiss_ways(kind, rows, dim)
    times = race(ways, lambda count, seed: queries(count, seed, dim), options.rounds)
    found: dict[str, Any] = {"opening_ms": statistics.median(opening) * 1e3, "preparing_seconds": preparing}
    found["anonymous_mib"], found["mapped_mib"] = (
        value - start for value, start in zip(resident(), before, strict=True)
    )
    found |= {f"{way} {count}": statistics.median(times[way, count]) for way, count in times}
    found["share_of_bandwidth"] = share_of_bandwidth(index, found["clipdist 1"])
    asked = queries(options.checked, 999, dim)
    found["exact"] = same(index.search(asked, K), brute_force(kind, asked, rows, dim))
    found["command_seconds"] = command_seconds(home)
    show(kind, found, list(ways))
    return found


def faiss_ways(kind: str, rows: int, dim: int) -> dict[str, Callable[[Array], Any]]:
    import faiss

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    flat = faiss.IndexFlatIP(dim)
    for block in blocks(kind, rows, dim):
        flat.add(block.astype(np.float32))
    normal = faiss.cvar.distance_compute_blas_threshold

    def with_threshold(threshold: int, asked: Array) -> Any:
        faiss.cvar.distance_compute_blas_threshold = threshold
        return flat.search(asked, K)

    return {
        "faiss": lambda asked: with_threshold(normal, asked),
        "faiss tuned": lambda asked: with_threshold(1, asked),
    }


def race(
    ways: dict[str, Callable[[Array], Any]], queries: Callable[[int, int], Array], rounds: int
) -> dict[tuple[str, int], list[float]]:
    """Seconds of every way and batch; the ways take turns, after one round that warms them."""
    times: dict[tuple[str, int], list[float]] = {(way, count): [] for count in BATCHES for way in ways}
    for count in BATCHES:
        for turn in range(-1, rounds * (3 if count == 1 else 1)):
            asked = queries(count, 10 + turn)
            for way, work in ways.items():
                took = seconds(lambda work=work, asked=asked: work(asked))
                times[way, count] += [took] if turn >= 0 else []
    return times


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def share_of_bandwidth(index: Index, took: float) -> float:
    """How fast one query goes through the codes, beside a sum over the same memory by all cores."""
    parts = index._store._parts
    if parts is None:
        return float("nan")
    placed = [part.placed.flatten() for part in parts]
    words = [flat[: flat.numel() // 8 * 8].view(torch.int64) for flat in placed]
    summing = statistics.median(seconds(lambda: [word.sum() for word in words]) for _ in range(7))
    return summing / took


def brute_force(kind: str, asked: Array, rows: int, dim: int) -> list[tuple[list[str], list[float]]]:
    """The definition: all exact scores, by (-score, id)."""
    best: list[list[tuple[float, str]]] = [[] for _ in asked]
    first = 0
    for block in blocks(kind, rows, dim):
        for query, kept in zip(asked, best, strict=True):
            scores = exact_scores(block, query.astype(np.float64))
            places = np.flatnonzero(scores >= np.partition(scores, -K)[-K])
            kept.extend((-float(scores[place]), f"{first + place:09d}") for place in places)
            kept.sort()
            del kept[K:]
        first += len(block)
    return [([row for _, row in kept], [-score for score, _ in kept]) for kept in best]


def same(found: Any, expected: list[tuple[list[str], list[float]]]) -> bool:
    ours = [(list(ids), scores.tolist()) for ids, scores in zip(found.ids, found.scores, strict=True)]
    return ours == expected


def command_seconds(home: Path) -> float:
    """From typed to the hits on the screen: more like a row, which needs no model."""
    command = [sys.executable, "-m", "clipdist.cli", "search", str(home / "embeddings"), "--id", "000000007"]
    environment = os.environ | {"XDG_CACHE_HOME": str(home / "command-cache")}

    def run() -> None:
        subprocess.run(command, env=environment, check=True, capture_output=True)

    run()
    return statistics.median(seconds(run) for _ in range(3))


def resident() -> tuple[float, float]:
    """MiB of this process's own memory and of files that it maps."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024, int(lines["RssFile"].split()[0]) / 1024


def show(kind: str, found: dict[str, Any], ways: list[str]) -> None:
    print(f"\n{kind}: milliseconds (medians)")
    print(f"{'':14}" + "".join(f"{count:>12}" for count in BATCHES) + "  queries")
    for way in ways:
        print(f"{way:14}" + "".join(f"{found[f'{way} {count}'] * 1e3:12.1f}" for count in BATCHES))
    for way in ways[1:]:
        ratios = (found[f"{way} {count}"] / found[f"clipdist {count}"] for count in BATCHES)
        print(f"{way + ' / ours':14}" + "".join(f"{ratio:12.2f}" for ratio in ratios))
    print(
        f"exact {found['exact']}; share of bandwidth {found['share_of_bandwidth']:.2f}; opened in "
        f"{found['opening_ms']:.1f} ms; codes made, once, in {found['preparing_seconds']:.1f} s\n"
        f"memory {found['anonymous_mib']:.0f} MiB of its own (faiss's included), {found['mapped_mib']:.0f} MiB of files; "
        f"`clipdist search --id` to the hits: {found['command_seconds']:.2f} s"
    )


def summary(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The lower ratio of the kinds of vectors."""
    names = {1: "one_query_ratio", 32: "batch_32_ratio", 256: "batch_256_ratio"}
    result: dict[str, Any] = {"rows": options.rows, "dim": options.dim, "cores": len(os.sched_getaffinity(0))}
    for count, name in names.items():
        ours = {kind: values[f"clipdist {count}"] for kind, values in found.items()}
        result[name.replace("_ratio", "_ms")] = round(max(ours.values()) * 1e3, 2)
        if options.no_faiss:
            continue
        plain = [values[f"faiss {count}"] / ours[kind] for kind, values in found.items()]
        tuned = [min(v[f"faiss {count}"], v[f"faiss tuned {count}"]) / ours[kind] for kind, v in found.items()]
        result |= {name: round(min(plain), 2), f"{name}_tuned": round(min(tuned), 2)}
    result["exact"] = all(values["exact"] for values in found.values())
    result["share_of_bandwidth"] = round(min(values["share_of_bandwidth"] for values in found.values()), 3)
    result |= {
        name: round(max(values[name] for values in found.values()), 2)
        for name in ("opening_ms", "preparing_seconds", "command_seconds", "mapped_mib")
    }
    return result


if __name__ == "__main__":
    main()
