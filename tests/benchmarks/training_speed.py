"""Pairs per second of full fine-tuning against open_clip_train: python tests/benchmarks/training_speed.py [--data FOLDER]

Same model and starting weights, same pairs, same global batch, same cores, float32 (bf16 on a GPU), all parameters
learn, AdamW with the same rates, gradients cut to norm 1, no augmentation. The runs alternate; a round is one run of
each; the figures are medians over the rounds. The rate of a run is pairs over the time from the end of step `--drop`
to the end of the last step of its epoch, for both sides.

How open_clip_train 3.3 runs here: it cannot run DistributedDataParallel on CPUs (it passes `device_ids`), so one
process has all cores; `--dataset-type csv`, as webdataset would bring tar reading on top; `--workers` two less than the
cores, at least 2 (on two cores 1 and 2 were alike, 0 and 4 slower, on a machine with other work; `--loaders` tries
others); `--precision fp32` on CPUs, as ours; `--aug-cfg scale=(1.0,1.0)`, so that a square picture is taken whole, as
ours does; `--grad-clip-norm 1.0`, which ours always does. Ours runs as one worker with all cores and as one worker per
core.
Both sides run out of the box: ours sets glibc's allocator to keep freed memory, theirs does not (to give it to both,
set MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=2147483647 in the environment).

That both do the same is checked first: one step on the same batch from the same weights must give the same loss.

On a GPU: ViT-B-32, bf16 (theirs amp_bf16), and the share of the matrix rate measured with a large bf16 product.
The last line is JSON; pairs_per_second_ratio is ours over theirs, the better of our two ways.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import peers
import torch

FLOPS_PER_PAIR = 3 * 14.78e9
"""ViT-B-32, forward and backward; the forward figure is of open_clip's docs/model_profile.csv."""
SAME_LOSS = 2e-3
"""open_clip_train logs five digits; bf16 rounds more than that."""


def main() -> None:
    gpu = torch.cuda.is_available()
    options = arguments(gpu)
    with tempfile.TemporaryDirectory(prefix="clipdist-bench-") as folder:
        home = Path(folder)
        known = peers.pictures(options.data, home)
        model = peers.starting_point(home / "model", options.model)
        losses = first_losses(home / "check", known, model, options)
        rates = measure(home, known, model, options)
    report(rates, losses, options, matrix_rate() if gpu else None)


def arguments(gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="folder with products.csv (image, title) and its pictures; else drawn ones")
    parser.add_argument("--model", default="ViT-B-32" if gpu else None, help="an open_clip name; else a small CLIP")
    parser.add_argument("--batch", type=int, default=1024 if gpu else 32, help="pairs per step, over all workers")
    parser.add_argument("--steps", type=int, default=60 if gpu else 16, help="steps of a run")
    parser.add_argument("--drop", type=int, default=10 if gpu else 4, help="first steps that are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loaders", type=int, default=max(2, peers.cores() - 2), help="open_clip_train's --workers")
    return parser.parse_args()


def first_losses(
    home: Path, known: list[tuple[str, str]], model: Path, options: argparse.Namespace
) -> dict[str, float]:
    """The loss of both before any step, on one batch that is all there is (so that its order does not matter)."""
    ours, theirs = peers.write_tables(home, known, options.batch)
    pairs = peers.prepare(ours, home / "pairs")
    stage = {"learns": ["all"], "epochs": 1}
    found = {
        "ours": peers.train_ours(home / "ours", pairs, model, stage, options.batch, 1).first_loss(),
        "theirs": peers.train_theirs(home / "theirs", theirs, model, options.batch, 1, 0).first_loss(),
    }
    if abs(found["ours"] - found["theirs"]) > SAME_LOSS * (10 if torch.cuda.is_available() else 1):
        raise SystemExit(f"the two sides do not train the same: first losses {found}")
    return found


def measure(
    home: Path, known: list[tuple[str, str]], model: Path, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Pairs per second of every run, by side."""
    ours, theirs = peers.write_tables(home / "tables", known, options.batch * options.steps)
    pairs = peers.prepare(ours, home / "pairs")
    ways = [1] if torch.cuda.is_available() else sorted({1, peers.cores()})
    rates: dict[str, list[float]] = {"theirs": [], **{f"ours_{workers}": [] for workers in ways}}
    for number in range(options.rounds):
        for side in list(rates)[:: -1 if number % 2 else 1]:
            run = home / f"{side}-{number}"
            if side == "theirs":
                times = peers.train_theirs(run, theirs, model, options.batch, 1, options.loaders)
            else:
                stage = {"learns": ["all"], "epochs": 1}
                times = peers.train_ours(run, pairs, model, stage, options.batch, int(side.removeprefix("ours_")))
            rates[side].append(times.pairs_per_second(options.batch, options.drop))
            print(f"  round {number + 1}  {side:<8}  {rates[side][-1]:8.2f} pairs/s", flush=True)
    return rates


def matrix_rate(size: int = 8192) -> float:
    """FLOP/s of a bf16 matrix product on this GPU, the best of several."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - started))
    return best


def report(
    rates: dict[str, list[float]], losses: dict[str, float], options: argparse.Namespace, peak: float | None
) -> None:
    theirs = peers.median(rates["theirs"])
    ratios = {side: peers.median(values) / theirs for side, values in rates.items() if side != "theirs"}
    shares = {}
    if peak is not None and options.model == "ViT-B-32":
        shares = {f"{side}_share_of_peak": peers.median(rate) * FLOPS_PER_PAIR / peak for side, rate in rates.items()}
    print(f"\n{'':<24}{'pairs/s: median (range)':<28}ours / theirs")
    for side, values in rates.items():
        name = "open_clip_train" if side == "theirs" else f"clipdist, {side.removeprefix('ours_')} worker(s)"
        ratio = f"{ratios[side]:.2f}" if side in ratios else ""
        print(f"{name:<24}{peers.spread(values):<28}{ratio}")
    for name, share in shares.items():
        print(f"{name:<24}{share:.1%}")
    print(f"first loss: ours {losses['ours']:.4f}, theirs {losses['theirs']:.4f}")
    found = {"pairs_per_second_ratio": max(ratios.values())}
    found |= {f"ratio_{side.removeprefix('ours_')}_workers": ratio for side, ratio in ratios.items()}
    found |= {f"pairs_per_second_{side}": peers.median(values) for side, values in rates.items()}
    found |= {f"first_loss_{side}": loss for side, loss in losses.items()} | shares
    if peak is not None:
        found["matrix_flops_per_second"] = peak
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
