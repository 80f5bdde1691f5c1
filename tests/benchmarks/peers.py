"""Both sides of a benchmark: the same pairs, the same starting weights, `clipdist train` and `open_clip_train`.

Times are those of the machine's clock when a step ended: ours from metrics.jsonl, theirs from their log.
`open_clip_train` is the one of the installed open_clip_torch wheel (extra `open_clip_torch[training]`).
"""

import csv
import json
import logging
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import get_model_config
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the checkout that this file lies in is measured, for its subprocesses too

SMALL_CLIP = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 384, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}
"""Half of a ViT-S/32 with a small text tower: a step on 32 pairs takes about a second on two cores."""

VALIDATION_ROWS = 16
"""Ours holds some pairs out and measures on them after every epoch; these few."""


@dataclass
class Times:
    """One training run, in seconds since 1970. `steps[e]`: (time, loss) at the end of every step of epoch e; `epochs`: a
    mark per epoch, the same point of each (theirs: its checkpoint is written; ours: it is validated, its checkpoint
    comes next); `started`: ours, before the first stage."""

    steps: list[list[tuple[float, float]]] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    started: float = float("nan")

    def first_loss(self) -> float:
        return self.steps[0][0][1]

    def pairs_per_second(self, batch: int, drop: int) -> float:
        """From the end of step `drop` to the end of the last one, of the first epoch."""
        times = [time for time, _ in self.steps[0]]
        assert len(times) > drop > 0, "there are not more steps than are dropped"
        return batch * (len(times) - drop) / (times[-1] - times[drop - 1])

    def epoch_seconds(self) -> list[float]:
        """Whole epochs after the first, with all that belongs to them: data, steps, checkpoint, ours also validation."""
        return [after - before for before, after in zip(self.epochs, self.epochs[1:], strict=False)]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def environment(**values: str) -> dict[str, str]:
    """Of the subprocesses. Ray's workers would run at nice 15, next to a peer that does not."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"PYTHONPATH": path, "RAY_worker_niceness": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    return {**os.environ, **fixed, "TOKENIZERS_PARALLELISM": "false", **values}


def clipdist(*arguments: str) -> None:
    """A command of this project in a process of its own, as a person runs it."""
    call([sys.executable, "-c", "from clipdist.cli import main; raise SystemExit(main())", *arguments], environment())


def call(command: Sequence[str], env: dict[str, str]) -> None:
    """Runs it; what it said is shown only when it fails."""
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
        raise SystemExit(f"exit code {done.returncode}: {' '.join(command)[:300]}")


def pictures(data: str | None, folder: Path) -> list[tuple[str, str]]:
    """(path, caption) of real square pictures, every caption once; without `data` they are drawn.

    `data`: a folder with products.csv (columns image, title). A caption that comes twice would be one more right answer
    for our loss and a wrong one for theirs.
    """
    if data is None:
        from tests.conftest import write_shapes

        table, template = write_shapes(folder / "shapes", 32), "a {colour} {shape}, {id}"
    else:
        table, template = Path(data) / "products.csv", "{title}"
    found: dict[str, str] = {}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(template.format(**row), str((table.parent / row["image"]).absolute()))
    return [(path, caption) for caption, path in found.items()]


def write_tables(folder: Path, known: Sequence[tuple[str, str]], rows: int) -> tuple[Path, Path]:
    """The same `rows` training pairs for both: (products.csv for ours, pairs.tsv for theirs). More pairs than pictures:
    they come again, their captions numbered. Ours gets VALIDATION_ROWS more, held out."""
    folder.mkdir(parents=True)
    chosen = []
    for number in range(rows + VALIDATION_ROWS):
        path, caption = known[number % len(known)]
        chosen.append((path, caption if number < len(known) else f"{caption} {number // len(known) + 1}"))
    splits = ["train"] * rows + ["validation"] * VALIDATION_ROWS
    ours, theirs = folder / "products.csv", folder / "pairs.tsv"
    with ours.open("w", newline="") as file:
        table = [[number, *pair, split] for number, (pair, split) in enumerate(zip(chosen, splits, strict=True))]
        csv.writer(file).writerows([["id", "image", "title", "split"], *table])
    with theirs.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["filepath", "title"], *chosen[:rows]])
    return ours, theirs


def prepare(table: Path, output: Path) -> Path:
    """Our pairs artefact of a table."""
    config = {
        "source": {"path": str(table)},
        "columns": {"split": "split"},
        "captions": ["{title}"],
        "output": str(output),
    }
    clipdist("prepare", write_config(output.with_name(output.name + "-prepare.yaml"), config))
    return output


def write_config(path: Path, config: dict[str, Any]) -> str:
    path.write_text(json.dumps(config, indent=1))  # JSON is YAML
    return str(path)


def starting_point(folder: Path, model: str | dict[str, Any] | None) -> Path:
    """Random weights in open_clip's local-dir layout, from which both sides start. `model`: an open_clip name, or a
    config."""
    folder.mkdir(parents=True)
    config = model if isinstance(model, dict) else get_model_config(model) if model else SMALL_CLIP
    if config is None:
        raise SystemExit(f'--model: "{model}" is no open_clip model')
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    logging.getLogger().setLevel(logging.ERROR)  # that there are no weights yet is on purpose
    state = open_clip.create_model(f"local-dir:{folder}", load_weights=False).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    return folder


def train_ours(folder: Path, pairs: Path, model: Path, stage: dict[str, Any], batch: int, workers: int) -> Times:
    """`clipdist train` of one stage into `folder`."""
    config = {
        "pairs": str(pairs), "output": str(folder), "model": {"name": str(model)}, "global_batch_size": batch,
        "log_every_steps": 1,
        "stages": [{"name": "measured", "learning_rate": 1e-5, "weight_decay": 0.05, "schedule": "constant", **stage}],
    }  # fmt: skip
    path = write_config(folder.with_name(folder.name + "-train.yaml"), config)
    clipdist(
        "train", path, f"workers.num_workers={workers}", *(["precision=bf16"] if torch.cuda.is_available() else [])
    )
    return read_events(folder / "metrics.jsonl")


def read_events(path: Path) -> Times:
    """The steps and epochs of our metrics.jsonl."""
    times = Times()
    for event in map(json.loads, path.read_text().splitlines()):
        if event["event"] == "step":
            while len(times.steps) < event["epoch"]:
                times.steps.append([])
            times.steps[-1].append((event["time"], event["loss"]))
        elif event["event"] == "validated" and event["stage"] == "start":
            times.started = event["time"]
        elif event["event"] == "validated":
            times.epochs.append(event["time"])
    return times


def train_theirs(
    folder: Path, table: Path, model: Path, batch: int, epochs: int, loaders: int, extra: Iterable[str] = ()
) -> Times:
    """`open_clip_train` in one process with all cores, without augmentation (a square picture is taken whole)."""
    folder.mkdir(parents=True)
    gpu = torch.cuda.is_available()
    options = {
        "model": f"local-dir:{model}", "train-data": table, "dataset-type": "csv", "batch-size": batch,
        "epochs": epochs, "workers": loaders, "device": "cuda" if gpu else "cpu",
        "precision": "amp_bf16" if gpu else "fp32", "lr": 1e-5, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6,
        "wd": 0.05, "warmup": 1, "lr-scheduler": "const", "grad-clip-norm": 1.0, "aug-cfg": "scale=(1.0,1.0)",
        "log-every-n-steps": 1, "logs": folder, "name": "run",
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    script, lines = str(Path(__file__).with_name("open_clip_times.py")), folder / "lines.jsonl"
    env = environment(OMP_NUM_THREADS=str(cores()))
    call([sys.executable, script, str(cores()), str(lines), *words, *extra], env)
    return read_log(lines)


def read_log(path: Path) -> Times:
    """The steps and epochs of what open_clip_train logged. An epoch is over, its checkpoint written, when the next one
    starts or when the program ends."""
    times = Times()
    for line in map(json.loads, path.read_text().splitlines()):
        if line["message"].startswith(("Start epoch", "End of main")):
            if times.steps:
                times.epochs.append(line["time"])
            times.steps.append([])
        elif found := re.search(r"Train Epoch: .* Loss: (\S+) \(", line["message"]):
            times.steps[-1].append((line["time"], float(found[1])))
    return Times([epoch for epoch in times.steps if epoch], times.epochs)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Median and range of the rounds."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
