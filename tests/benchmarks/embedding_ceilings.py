"""What a machine can do at most, for embedding_speed.py: encoding alone and decoding alone, on all cores or GPUs.

Every rate is the sum over processes that start together and work for the same time, so none waits for the last one.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import peers
import torch

from clipdist import images, models
from clipdist.images import Preprocess
from clipdist.memory import keep_freed
from clipdist.models import ModelConfig

WAIT_SECONDS = 600
_together: Any = None


def encode(model: Path, rows: int, seconds: float) -> dict[str, float]:
    """Images/s of the image tower on `rows` pixels at a time that are on the device already, by way of using it."""
    gpus, cores = torch.cuda.device_count(), peers.cores()
    ways = {"one process per GPU": (gpus, cores)} if gpus else {"one process": (1, cores)}
    if not gpus and cores > 1:
        ways["one process per core"] = (cores, 1)
    return {
        name: at_once(_encode, [(str(model), rows, threads, index, seconds) for index in range(processes)])
        for name, (processes, threads) in ways.items()
    }


def decode(paths: Sequence[str], preprocess: Preprocess, seconds: float) -> float:
    """Images/s of reading, decoding and resizing, one process per core."""
    processes = min(peers.cores(), len(paths))
    return at_once(_decode, [(paths[index::processes], preprocess, seconds) for index in range(processes)])


def at_once(work: Callable[..., float], arguments: Sequence[tuple[Any, ...]]) -> float:
    """The sum of what `work` gives in a fresh process per tuple of arguments; all measure at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(arguments))
    with ProcessPoolExecutor(len(arguments), context, _join, (barrier,)) as pool:
        return sum(future.result() for future in [pool.submit(work, *each) for each in arguments])


def _join(barrier: Any) -> None:
    global _together
    _together = barrier


def _encode(model: str, rows: int, threads: int, index: int, seconds: float) -> float:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", index) if gpu else torch.device("cpu")
    if not gpu:
        torch.set_num_threads(threads)
        keep_freed()
    towers = models.load(ModelConfig(name=model)).to(device).requires_grad_(False)
    size = towers.preprocess.size
    pixels = torch.randint(0, 256, (rows, size, size, 3), dtype=torch.uint8, device=device)

    def passes() -> int:
        count = 10 if gpu else 1
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, gpu):
            for _ in range(count):
                towers.image_embeddings(pixels)
        if gpu:
            torch.cuda.synchronize(device)
        return count * rows

    return _rate(passes, seconds)


def _decode(paths: Sequence[str], preprocess: Preprocess, seconds: float) -> float:
    torch.set_num_threads(1)
    endless = cycle(paths)

    def some() -> int:
        for _ in range(16):
            preprocess(images.decode(Path(next(endless)).read_bytes()))
        return 16

    return _rate(some, seconds)


def _rate(work: Callable[[], int], seconds: float) -> float:
    """What `work` did per second, after a first time that is not counted."""
    work()
    _together.wait(WAIT_SECONDS)
    started, rows = time.perf_counter(), 0
    while time.perf_counter() < started + seconds:
        rows += work()
    return rows / (time.perf_counter() - started)
