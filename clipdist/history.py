"""What a person sees of a training and what stays of it: the bar, a line per validation, metrics.jsonl, curves."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipdist import storage
from clipdist.config import UserError
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
    lines: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    curves: Any = None

    def __post_init__(self) -> None:
        if storage.exists(self._path):
            self.lines = [json.loads(line) for line in storage.read_bytes(self._path).splitlines()]
        if self.config.tensorboard:
            self.curves = open_curves(storage.join(self.config.output, "tensorboard"))

    @property
    def _path(self) -> str:
        return storage.join(self.config.output, "metrics.jsonl")

    def add(self, events: Sequence[dict[str, Any]]) -> None:
        for event in events:
            getattr(self, f"_{event['event']}")(event)

    def _workers(self, event: dict[str, Any]) -> None:
        """Training starts, or goes on from a checkpoint: later steps of a run that died will be seen again."""
        self.lines = [line for line in self.lines if line.get("step", 0) <= event["step"]]
        done = pairs_seen(self.config, self.train_rows, event["stage"], event["stage_step"])
        self.bar.advance(done - self.bar.done, workers=event["workers"])
        self.lines.append(event)

    def _step(self, event: dict[str, Any]) -> None:
        names = ("stage", "epoch", "loss", "pairs_per_second", "data_wait")
        shown = {name: event[name] for name in names if name in event}
        self.bar.advance(event["pairs"], **shown)
        if event["step"] % self.config.log_every_steps == 0 or event["step"] == 1:
            self.lines.append(event)
            self._draw(event, ("gradient_norm", "learning_rate", "logit_scale", *names[2:]))
        if "data_wait" in event:
            self.facts["data_wait"] = event["data_wait"]
        self.facts["memory_bytes"] = max(event["memory_bytes"], self.facts.get("memory_bytes", 0))

    def _validated(self, event: dict[str, Any]) -> None:
        best = self.config.validation.best
        self.bar.note(
            f"  {event['stage']:<12} epoch {event['epoch']:>3}  step {event['step']:>6}  "
            f"{best} {event.get(best, float('nan')):.4f}",
            **{name: value for name, value in event.items() if name not in ("event", "time")},
        )
        self.lines.append(event)
        self._draw(event, [name for name in event if "/" in name])
        self.write()

    def _epoch(self, event: dict[str, Any]) -> None:
        self.lines.append(event)
        self.facts.setdefault("epoch_seconds", {}).setdefault(event["stage"], []).append(event["seconds"])

    def _encoded(self, event: dict[str, Any]) -> None:
        share = percent(event["row_groups"] / event["of"])
        self.bar.advance(0, encoding=f"{event['split']} {share}")

    def _outputs(self, event: dict[str, Any]) -> None:
        self.lines.append(event)
        self.facts.setdefault("outputs_seconds", {})[event["stage"]] = event["seconds"]

    def _interpolated(self, event: dict[str, Any]) -> None:
        scores = "  ".join(f"{score:.4f}" for score in event["scores"])
        self.bar.note(f"  start x {1 - event['alpha']:.1f} + trained x {event['alpha']:.1f}  {scores}", **event)
        self.lines.append(event)

    def _failed(self, event: dict[str, Any]) -> None:
        self.problems += event["problems"]

    def _draw(self, event: dict[str, Any], names: Sequence[str]) -> None:
        if self.curves is not None:
            for name in names:
                if isinstance(event.get(name), int | float):
                    self.curves.add_scalar(f"{event['stage']}/{name}", event[name], event["step"])

    def write(self) -> None:
        storage.write_atomic(self._path, b"".join(json.dumps(line).encode() + b"\n" for line in self.lines))
        if self.curves is not None:
            self.curves.flush()
            _upload_curves(Path(self.curves.logdir), storage.join(self.config.output, "tensorboard"))

    def remarks(self) -> list[str]:
        """How time was spent, and what would help."""
        found = []
        for stage, seconds in self.facts.get("outputs_seconds", {}).items():
            epochs = self.facts.get("epoch_seconds", {}).get(stage, [])[1:]
            if epochs:
                mean = sum(epochs) / len(epochs)
                found.append(
                    f"{stage}: tower outputs were computed once in {duration(seconds)}; an epoch on them takes "
                    f"{mean:.2f} s, {seconds / max(mean, 1e-9):.0f} times less"
                )
        wait = self.facts.get("data_wait", 0.0)
        if wait > WAIT_ADVICE:
            found.append(
                f"{percent(wait)} of the time went into waiting for data: raise workers.decoders, store smaller "
                "pictures (prepare's max_side), or give the workers more cores"
            )
        return found


def open_curves(path: str) -> Any:
    """A TensorBoard writer; for a remote store it writes on this machine and is uploaded now and then."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("tensorboard: needs the package tensorboardX; pip install tensorboardX") from None
    return SummaryWriter(path if storage.is_local(path) else tempfile.mkdtemp(prefix="clipdist-tensorboard-"))


def _upload_curves(folder: Path, path: str) -> None:
    if not storage.is_local(path):
        for file in folder.iterdir():
            storage.write_atomic(storage.join(path, file.name), file.read_bytes())


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
        lines.append(f"took             {duration(result['seconds'])}")
    if result["best"].startswith("checkpoints/00-start"):
        lines.append("No step was better than the starting model: lower the learning rates, or look at the pairs.")
    return "\n".join([*lines, *result["remarks"]])
