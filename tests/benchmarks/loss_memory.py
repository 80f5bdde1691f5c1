"""Memory and time of the global loss, forward and backward, beside open_clip's: python tests/benchmarks/loss_memory.py

Two ranks (gloo, one thread each) share batches of float32 embeddings. Ours is the whole of `GlobalLoss.value` (counts,
keys and texts gathered, positives found, loss, backward); theirs is open_clip.loss.ClipLoss with local_loss and
gather_with_grad. Memory: the highest resident set of a fresh process above what its inputs take, one pass. Time: medians
of alternating rounds in one pair of processes. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from clipdist import collectives
from clipdist.step import Batch, Embedded, GlobalLoss
from tests.distributed.rank_processes import run_ranks

RANKS, DIM = 2, 512
MIB = 1 << 20
SIDES = ("ours", "ours, duplicates", "theirs")


def inputs(side: str, size: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's images, texts, logit_scale and keys; with duplicates, a fifth of the keys is another row's."""
    generator = torch.Generator().manual_seed(rank)
    rows = size // RANKS
    images, texts = (F.normalize(torch.randn(rows, DIM, generator=generator), dim=1).requires_grad_() for _ in "it")
    keys = torch.arange(2 * rows).reshape(rows, 2) + 1 + 2 * rows * rank
    if "duplicates" in side:
        again = torch.rand(rows, generator=generator) < 0.2
        keys[again] = torch.randint(1, 2 * size + 1, keys[again].shape, generator=generator)
    return images, texts, torch.tensor(1 / 0.07, requires_grad=True), keys


def one_pass(side: str, images: Tensor, texts: Tensor, scale: Tensor, keys: Tensor) -> float:
    """Loss of this rank; leaves gradients in the inputs."""
    for value in (images, texts, scale):
        value.grad = None
    if side == "theirs":
        from open_clip.loss import ClipLoss

        loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=collectives.rank(), world_size=RANKS)
        value = loss(images, texts, scale)
    else:
        batch = Batch(images, texts, keys, len(images), RANKS * len(images))
        value = GlobalLoss(nn.Identity(), "contrastive").value(Embedded(images, texts, scale, None), batch)  # type: ignore[arg-type]
    value.backward()
    return float(value.detach())


def resident(name: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (highest since reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure_memory(rank: int, world_size: int, folder: Path, *, side: str, size: int) -> dict[str, float]:
    """Bytes above the inputs, and the seconds of this first pass."""
    warnings.simplefilter("ignore", FutureWarning)
    one_pass(side, *inputs(side, 64, rank))  # libraries and buffers of the process group
    given = inputs(side, size, rank)
    collectives.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before, started = resident("VmRSS"), time.perf_counter()
    one_pass(side, *given)
    return {"bytes": resident("VmHWM") - before, "seconds": time.perf_counter() - started}


def measure_time(rank: int, world_size: int, folder: Path, *, size: int, rounds: int) -> dict[str, Any]:
    """Seconds of every side in every round, and how far the two losses and their gradients are apart."""
    warnings.simplefilter("ignore", FutureWarning)
    given = {side: inputs(side, size, rank) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    losses = {}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            collectives.barrier()
            started = time.perf_counter()
            losses[side] = one_pass(side, *given[side])
            collectives.barrier()
            seconds[side].append(time.perf_counter() - started)
    ours, theirs = given["ours"], given["theirs"]
    off = [abs(losses["ours"] - losses["theirs"]) / losses["theirs"]]
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        off.append(float((one.grad - other.grad).norm() / other.grad.norm()))  # type: ignore[operator, union-attr]
    scales = [collectives.gather_rows(given[2].grad[None], [1, 1]).mean() for given in (ours, theirs)]  # type: ignore[index]
    off.append(float(abs(scales[0] - scales[1]) / abs(scales[1])))
    return {"seconds": seconds, "off": off}


def on_ranks(work: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(RANKS, work, Path(folder) / "ranks", timeout_seconds=3600)


def compare(size: int, rounds: int) -> dict[str, Any]:
    """Everything about one global batch size, on both sides."""
    found: dict[str, Any] = {}
    for side in SIDES:
        found[f"{side}, MiB"] = max(r["bytes"] for r in on_ranks(partial(measure_memory, side=side, size=size))) / MIB
    timed = on_ranks(partial(measure_time, size=size, rounds=rounds))
    for side in SIDES:
        found[f"{side}, s"] = statistics.median(timed[0]["seconds"][side])
    found["off"] = [max(values) for values in zip(*(rank["off"] for rank in timed), strict=True)]
    found["peak_memory_ratio"] = found["ours, MiB"] / found["theirs, MiB"]
    found["time_ratio"] = found["ours, s"] / found["theirs, s"]
    found["time_ratio_duplicates"] = found["ours, duplicates, s"] / found["theirs, s"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[4096, 8192, 16384], help="global batches of both sides"
    )
    parser.add_argument("--alone", type=int, nargs="*", default=[32768, 65536], help="global batches of ours alone")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    found: dict[str, Any] = {}
    print(f"{'batch':>7} {'side':<18} {'peak MiB':>9} {'seconds':>8}   (per rank, above the inputs)")
    for size in chosen.sizes:
        one = found[str(size)] = compare(size, chosen.rounds)
        for side in SIDES:
            print(f"{size:>7} {side:<18} {one[f'{side}, MiB']:>9.1f} {one[f'{side}, s']:>8.3f}")
        ratios = ", ".join(f"{name} {one[name]:.3f}" for name in one if "ratio" in name)
        apart = ", ".join(
            f"{name} {v:.1e}" for name, v in zip(("loss", "images", "texts", "scale"), one["off"], strict=True)
        )
        print(f"{size:>7} {ratios}\n{size:>7} relative difference of loss and gradients: {apart}", flush=True)
        if max(one["off"]) > 1e-4:
            raise SystemExit("the two sides do not agree")
    for size in chosen.alone:
        ranks = on_ranks(partial(measure_memory, side="ours", size=size))
        alone = {"ours, MiB": max(r["bytes"] for r in ranks) / MIB, "ours, s": max(r["seconds"] for r in ranks)}
        found[str(size)] = alone
        print(f"{size:>7} {'ours':<18} {alone['ours, MiB']:>9.1f} {alone['ours, s']:>8.3f}", flush=True)
    largest = found[str(chosen.sizes[-1])] if chosen.sizes else {}
    print(json.dumps({"batches": found, **{name: value for name, value in largest.items() if "ratio" in name}}))


if __name__ == "__main__":
    main()
