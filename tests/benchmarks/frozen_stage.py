"""An epoch of the frozen stage against open_clip_train with locked towers: python tests/benchmarks/frozen_stage.py

Both towers are frozen, the projections and logit_scale learn, batch and pairs are the same. Ours computes the towers'
outputs once, before its first epoch, and reuses them; open_clip_train computes them in every epoch. Compared are whole
epochs after the first: data, steps and the checkpoint of each epoch; ours also measures retrieval on the held-out pairs.
The cost of computing the outputs once is printed beside it, and the ratio over all epochs of the run.

What open_clip_train 3.3 locks: `--lock-image` and `--lock-text` freeze everything but logit_scale, of a native CLIP's
text tower too (`lock_text_tower` freezes the embeddings, the transformer, ln_final and text_projection).
`--lock-image-unlocked-groups 1` and `--lock-text-unlocked-layers 1` give back the last group of each, which is the
projection alone: so exactly the parameters learn that learn on our side. No activations of the frozen towers are kept.
`--lock-text-freeze-layer-norm` has to be given: without it `--lock-text` ends in an AssertionError.

The last line is JSON; epoch_time_ratio is theirs over ours, of the medians over all later epochs of all rounds.
"""

import argparse
import json
import tempfile
from pathlib import Path

import peers

LOCKED = ["--lock-image", "--lock-image-unlocked-groups", "1", "--lock-text", "--lock-text-unlocked-layers", "1"]
LOCKED += ["--lock-text-freeze-layer-norm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="folder with products.csv (image, title) and its pictures; else drawn ones")
    parser.add_argument("--model", help="an open_clip name; else a small CLIP")
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4, help="of ours; of theirs at most 3, which are alike")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loaders", type=int, default=max(2, peers.cores() - 2), help="open_clip_train's --workers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipdist-bench-") as folder:
        report(*measure(Path(folder), options), options)


def measure(home: Path, options: argparse.Namespace) -> tuple[list[peers.Times], list[peers.Times]]:
    """The runs of ours and of theirs, alternating."""
    model = peers.starting_point(home / "model", options.model)
    table, theirs_table = peers.write_tables(home / "tables", peers.pictures(options.data, home), options.pairs)
    pairs = peers.prepare(table, home / "pairs")
    stage = {"learns": ["projections", "logit_scale"], "epochs": options.epochs}
    ours, theirs = [], []
    for number in range(options.rounds):
        for side in ("ours", "theirs")[:: -1 if number % 2 else 1]:
            run = home / f"{side}-{number}"
            if side == "ours":
                ours.append(peers.train_ours(run, pairs, model, stage, options.batch, peers.cores()))
                seconds = ours[-1].epoch_seconds()
            else:
                epochs = min(options.epochs, 3)
                arguments = (run, theirs_table, model, options.batch, epochs, options.loaders, LOCKED)
                theirs.append(peers.train_theirs(*arguments))
                seconds = theirs[-1].epoch_seconds()
            print(f"  round {number + 1}  {side:<6}  epochs of {', '.join(f'{x:.3f}' for x in seconds)} s", flush=True)
    return ours, theirs


def steps_only(runs: list[peers.Times]) -> float:
    """Median seconds from an epoch's first step to its last, scaled to all its steps."""
    return peers.median(
        (epoch[-1][0] - epoch[0][0]) * len(epoch) / (len(epoch) - 1) for run in runs for epoch in run.steps[1:]
    )


def report(ours: list[peers.Times], theirs: list[peers.Times], options: argparse.Namespace) -> None:
    epoch = {
        name: peers.median(seconds for run in runs for seconds in run.epoch_seconds())
        for name, runs in (("ours", ours), ("theirs", theirs))
    }
    steps = {"ours": steps_only(ours), "theirs": steps_only(theirs)}
    once = peers.median(run.steps[0][0][0] - run.started for run in ours)
    whole = options.epochs * epoch["theirs"] / (once + options.epochs * epoch["ours"])
    print(f"\n{options.pairs} pairs, batch {options.batch}{'theirs':>20}{'ours':>12}{'theirs / ours':>16}")
    for name, values in (("seconds of an epoch", epoch), ("of its steps alone", steps)):
        print(f"{name:<28}{values['theirs']:>14.3f}{values['ours']:>12.3f}{values['theirs'] / values['ours']:>16.1f}")
    print(
        f"ours once, before the first epoch: {once:.1f} s; over all {options.epochs} epochs {whole:.2f} times as fast"
    )
    found = {"epoch_time_ratio": epoch["theirs"] / epoch["ours"], "steps_time_ratio": steps["theirs"] / steps["ours"]}
    found |= {"epoch_seconds_ours": epoch["ours"], "epoch_seconds_theirs": epoch["theirs"]}
    print(json.dumps({name: round(value, 4) for name, value in {**found, "features_seconds": once}.items()}))


if __name__ == "__main__":
    main()
