"""Runs one function on several ranks: processes of this machine in a gloo group over loopback."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Work = Callable[[int, int, Path], dict[str, Any]]
"""(rank, world size, a folder that all ranks share) -> tensors and plain data."""

PRELOADED = ["clipdist.step", "clipdist.checkpoint"]
"""Imported once, in the process that all ranks are forked from: importing costs more than all cases together."""


def run_ranks(world_size: int, work: Work, folder: Path, timeout_seconds: float = 300) -> list[dict[str, Any]]:
    """What `work` returns on every rank, in rank order. The first rank that fails ends the others and is shown."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True)
    ranks = range(world_size)
    processes = [
        context.Process(target=_one_rank, args=(rank, world_size, work, folder, dict(os.environ))) for rank in ranks
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_seconds
    try:
        while any(process.is_alive() for process in processes) and not any(p.exitcode for p in processes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{world_size} ranks did not end in {timeout_seconds} seconds")
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    if any(process.exitcode for process in processes):
        codes = [process.exitcode for process in processes]
        raise RuntimeError("\n".join([f"exit codes {codes}", *(p.read_text() for p in sorted(folder.glob("*.error")))]))
    return [torch.load(folder / f"{rank}.result") for rank in ranks]


def _one_rank(rank: int, world_size: int, work: Work, folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # the fork server has that of its own start
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    store, limit = f"file://{(folder / 'store').absolute()}", timedelta(seconds=120)
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=limit)
        torch.save(work(rank, world_size, folder), folder / f"{rank}.result")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # at once: the other ranks wait for this one, and so would its own threads
