"""What a person sees of a training: the bar, a line per validation, curves, a summary and remarks that help."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from clipdist import storage
from clipdist.journal import is_line
from clipdist.progress import Progress
from clipdist.recipe import TrainConfig, pairs_seen
from clipdist.report import duration, percent, table

WAIT_ADVICE = 0.05
"""Above this share of the time spent waiting for data, more decoders help."""


@dataclass
class History:
    """Takes the workers' events."""

    config: TrainConfig
    train_rows: int
    bar: Progress
    problems: list[str] = field(default_factory=list)
    unsaved: bool = False
    """Steps were taken since the last checkpoint."""
    finished: bool = False
    curves: Any = None

    def __post_init__(self) -> None:
        if self.config.tensorboard:
            self.curves = open_curves(storage.join(self.config.output, "tensorboard"))

    def add(self, events: Sequence[dict[str, Any]]) -> None:
        for event in events:
            getattr(self, f"_{event['event']}")(event)

    def _workers(self, event: dict[str, Any]) -> None:
        """Training starts, or goes on from a checkpoint: later steps of a run that died will be seen again."""
        self.unsaved = False
        done = pairs_seen(self.config, self.train_rows, event["stage"], event["stage_step"])
        self.bar.advance(done - self.bar.done, workers=event["workers"])

    def _step(self, event: dict[str, Any]) -> None:
        self.unsaved = True
        self.bar.facts.pop("encoding", None)
        names = ("stage", "epoch", "loss", "pairs_per_second", "data_wait")
        self.bar.advance(event["pairs"], **{name: event[name] for name in names if name in event})
        if is_line(event, self.config.log_every_steps):
            self._draw(event, ("gradient_norm", "learning_rate", "logit_scale", *names[2:]))

    def _validated(self, event: dict[str, Any]) -> None:
        best = self.config.validation.best
        self.bar.note(
            f"  {event['stage']:<12} epoch {event['epoch']:>3}  step {event['step']:>6}  "
            f"{best} {event.get(best, float('nan')):.4f}",
            **{name: value for name, value in event.items() if name not in ("event", "time")},
        )
        self._draw(event, [name for name in event if "/" in name])
        self.upload_curves()

    def _encoded(self, event: dict[str, Any]) -> None:
        self.bar.advance(0, encoding=f"{event['split']} {percent(event['row_groups'] / event['of'])}")

    def _interpolated(self, event: dict[str, Any]) -> None:
        scores = "  ".join(f"{score:.4f}" for score in event["scores"])
        self.bar.note(
            f"  interpolated  start x {1 - event['alpha']:.1f} + trained x {event['alpha']:.1f}  {scores}",
            **{name: value for name, value in event.items() if name not in ("event", "time")},
        )

    def _epoch(self, event: dict[str, Any]) -> None:
        """Stands in the journal."""

    _outputs = _epoch

    def _saved(self, event: dict[str, Any]) -> None:
        self.unsaved = False

    def _finished(self, event: dict[str, Any]) -> None:
        self.finished = True

    def _failed(self, event: dict[str, Any]) -> None:
        self.problems += event["problems"]

    def _draw(self, event: dict[str, Any], names: Sequence[str]) -> None:
        if self.curves is not None:
            for name in names:
                if isinstance(event.get(name), int | float):
                    self.curves.add_scalar(f"{event['stage']}/{name}", event[name], event["step"])

    def upload_curves(self) -> None:
        """What was drawn so far goes to the store, when the output is on one."""
        if self.curves is not None:
            self.curves.flush()
            folder, path = Path(self.curves.logdir), storage.join(self.config.output, "tensorboard")
            for file in folder.iterdir() if not storage.is_local(path) else ():
                storage.write_atomic(storage.join(path, file.name), file.read_bytes())


def open_curves(path: str) -> Any:
    """A TensorBoard writer; for a remote store it writes on this machine and is uploaded now and then."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(path if storage.is_local(path) else tempfile.mkdtemp(prefix="clipdist-tensorboard-"))


def seconds_of(lines: Sequence[dict[str, Any]]) -> float:
    """How long the workers were at it, without the time between two starts."""
    starts = [number for number, line in enumerate(lines) if line["event"] == "workers"]
    runs = pairwise([*starts, len(lines)])
    return float(sum(lines[after - 1]["time"] - lines[first]["time"] for first, after in runs))


def remarks(lines: Sequence[dict[str, Any]]) -> list[str]:
    """How time was spent, and what would help."""
    found = []
    outputs = {
        line["stage"]: line for line in reversed(lines) if line["event"] == "outputs"
    }  # a resumed run finds them
    for once in outputs.values():
        epochs = [line["seconds"] for line in lines if line["event"] == "epoch" and line["stage"] == once["stage"]][1:]
        if epochs:
            mean = sum(epochs) / len(epochs)
            found.append(
                f"{once['stage']}: tower outputs were computed once in {duration(once['seconds'])}; an epoch on them "
                f"takes {mean:.2f} s, {once['seconds'] / max(mean, 1e-9):.0f} times less"
            )
    wait = data_wait(lines)
    if wait is not None and wait > WAIT_ADVICE:
        found.append(
            f"{percent(wait)} of the time went into waiting for data: raise workers.decoders, store smaller "
            "pictures (prepare's max_side), or give the workers more cores"
        )
    return found


def data_wait(lines: Sequence[dict[str, Any]]) -> float | None:
    """Share of the time that the last steps waited for data."""
    return next((line["data_wait"] for line in reversed(lines) if "data_wait" in line), None)


def summary(output: str, result: dict[str, Any]) -> str:
    """What a person sees at the end."""
    names = ("hit_rate@1", "hit_rate@5", "hit_rate@10", "mrr@10", "median_rank")
    rows = []
    for which in ("start", "best"):
        metrics = result["start_metrics"] if which == "start" else result["metrics"]
        for direction in ("text_to_image", "image_to_text"):
            values = [metrics.get(f"{direction}/{name}") for name in names]
            cells = [f"{value:.3f}" if value is not None else "-" for value in values]
            rows.append([which, direction.replace("_", " "), *cells])
    path = storage.join(output, result["best"])
    lines = [table(["validation", "", *names], rows), "", f"best checkpoint  {path}"]
    lines.append(f"in open_clip     open_clip.create_model_and_transforms({'local-dir:' + path!r})")
    if result["seconds"]:
        lines.append(f"training took    {duration(result['seconds'])}")
    if result["best"].startswith("checkpoints/00-start"):
        lines.append("No step was better than the starting model: lower the learning rates, or look at the pairs.")
    return "\n".join([*lines, *result["remarks"]])
