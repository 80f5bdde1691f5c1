"""The training job: what is checked before it starts, what it goes on with, and the record of what came out.

Contract: run again, a finished output is left alone, an unfinished one goes on from its last complete checkpoint, one
that was made with other settings is refused. A dead worker, node or driver costs the steps since the last checkpoint;
a signal or a preemption notice costs nothing, because the state is saved first.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import time
from typing import Any

from clipdist import checkpoint, history, journal, lease, models, recipe, runtime, stages, storage, workers
from clipdist.checkpoint import INTERPOLATED
from clipdist.config import UserError, about, dump, together
from clipdist.history import History
from clipdist.lanes import DEFAULT_LANES
from clipdist.loader import Loader, Shares
from clipdist.manifest import Manifest, read_manifest, refuse_other_stamp
from clipdist.opening import PAIR_COLUMNS
from clipdist.optimizer import make_optimizer, set_learning
from clipdist.outputs import row_groups
from clipdist.progress import Progress
from clipdist.reader import RowGroups, Rows
from clipdist.recipe import TrainConfig
from clipdist.schema import Stamp, recorded
from clipdist.step import Batch, GlobalLoss, optimise
from clipdist.towers import Towers
from clipdist.vocab import VocabularyConfig


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains at `config.output`, or goes on, or finds the run finished. Returns result.json's content."""
    manifest, absolute = together(lambda: _checked_pairs(config), lambda: _absolute(config))
    output, stamp = absolute.output, _stamp(absolute, manifest)
    _refuse_other_run(output, stamp)
    if storage.exists(storage.join(output, "result.json")):
        return read_result(output)
    runtime.connect()
    scale, towers = together(lambda: workers.plan(absolute), lambda: _checked_model(absolute, manifest))
    lanes = _lanes(absolute, scale.workers)
    with lease.held(output):
        storage.put_if_absent(storage.join(output, "stamp.json"), json.dumps(stamp.to_json()).encode())
        storage.put_if_absent(storage.join(output, "lanes.json"), json.dumps(lanes).encode())
        resolved = recipe.resolved(absolute, towers, lanes)
        del towers
        runtime.save_config(output, dump(absolute))
        with Progress("train", _pairs_in_all(resolved, manifest), "pairs") as bar:
            watched = History(resolved, _rows(manifest, "train"), bar)
            workers.train(resolved, manifest, scale, watched)
        return _finish(resolved)


def read_result(output: str) -> dict[str, Any]:
    """What a finished run says of itself."""
    result: dict[str, Any] = json.loads(storage.read_bytes(storage.join(output, "result.json")))
    return result


def summary(output: str, result: dict[str, Any]) -> str:
    return history.summary(output, result)


def dry_run(config: TrainConfig) -> list[tuple[str, str]]:
    """Opens the pairs, builds the model and runs one tiny step in this process; writes nothing."""
    manifest, absolute = together(lambda: _checked_pairs(config), lambda: _absolute(config))
    _refuse_other_run(absolute.output, _stamp(absolute, manifest))
    towers = _checked_model(absolute, manifest)
    stage = recipe.resolved(absolute, towers, 1).stages[-1]
    towers.set_image_size(stage.image_size or towers.preprocess.size)
    towers.text_length = stage.text_length or towers.text_length
    learning = set_learning(towers, stage)
    groups = row_groups(manifest, "train", (*PAIR_COLUMNS, "image"))
    first = RowGroups(groups.files[:1], groups.indices[:1], groups.rows[:1], groups.columns)
    shares = Shares(config.seed, 0, 8, 1, 1, 0, 1)
    rows = Rows([first], in_memory=True)
    local = next(Loader(rows, shares, towers.tokenise, towers.preprocess, stage.augment, decoders=0).batches())
    assert local.pixels is not None
    assert local.tokens is not None
    batch = Batch(local.pixels, local.tokens, local.keys, local.rows, local.global_rows)
    optimizer = make_optimizer(learning, stage.weight_decay, fused=True)
    loss, started = GlobalLoss(towers, config.loss_of(towers)), time.perf_counter()
    rates = dict.fromkeys(stage.parts(), 0.0)
    stepped = optimise(loss, towers, optimizer, batch, rates, config.gradient_clip, seed=0)
    seconds, learns = time.perf_counter() - started, sum(one.parameter.numel() for one in learning)
    values = sum(parameter.numel() for parameter in towers.parameters())
    return [
        ("pairs", f"{manifest.written('pairs'):,}"),
        ("model", f"{values:,} values, {learns:,} learn in {stage.name}"),
        ("input", f"{towers.preprocess.size} x {towers.preprocess.size} px, {towers.text_length} tokens"),
        ("new tokens", f"{len(towers.terms)}: {', '.join(towers.terms[:8])}"),
        ("one step", f"{local.rows} pairs, loss {stepped.loss:.4f}, {seconds:.2f} s"),
    ]


def derived(config: TrainConfig) -> list[tuple[str, str]]:
    """Numbers that follow from the config; those of the data only when the pairs are there."""
    try:
        rows = _rows(_checked_pairs(config), "train")
    except UserError:
        return [("steps", "unknown: the pairs are not there yet")]
    found, total = [("training pairs", f"{rows:,}")], 0
    for stage in config.stages:
        size = config.batch_size_of(stage)
        per_epoch = stages.steps_per_epoch(rows, size)
        steps = stages.total_steps(stage, per_epoch)
        total += steps
        found.append((f"stage {stage.name}", f"{steps:,} steps of {size:,} pairs, {steps / per_epoch:g} epochs"))
    return [*found, ("steps in all", f"{total:,}")]


def _absolute(config: TrainConfig) -> TrainConfig:
    """The same run with whole paths, every domain term, and the model's place."""
    pretrained, interpolate = config.model.pretrained, config.interpolate
    if pretrained is not None and storage.exists(pretrained):
        pretrained = storage.absolute(pretrained)
    if interpolate is not None and interpolate.general is not None:
        interpolate = interpolate.model_copy(update={"general": storage.absolute(interpolate.general)})
    terms, model = together(config.vocabulary.all_terms, lambda: models.locate(config.model.name))
    return config.model_copy(
        update={
            "output": storage.absolute(config.output),
            "pairs": storage.absolute(config.pairs),
            "vocabulary": VocabularyConfig(terms=terms, start=config.vocabulary.start),
            "model": config.model.model_copy(update={"name": model.name, "pretrained": pretrained}),
            "interpolate": interpolate,
        }
    )


def _rows(manifest: Manifest, split: str) -> int:
    return sum(file.rows for file in manifest.select("pairs", split))


def _pairs_in_all(config: TrainConfig, manifest: Manifest) -> int:
    rows = _rows(manifest, "train")
    return recipe.pairs_seen(config, rows, len(config.stages), 0)


def _checked_pairs(config: TrainConfig) -> Manifest:
    manifest: Manifest = about("pairs", lambda: read_manifest(storage.absolute(config.pairs), "pairs"))
    problems = []
    if not _rows(manifest, "train"):
        problems.append(f"pairs: {config.pairs} has no row in the split train")
    if not _rows(manifest, config.validation.split):
        splits = sorted({file.split or "" for file in manifest.select("pairs")})
        problems.append(f"validation.split: no row in {config.validation.split} (splits: {', '.join(splits)})")
    if problems:
        raise UserError(*problems)
    return manifest


def _checked_model(config: TrainConfig, manifest: Manifest) -> Towers:
    """The model as the run will start with it. UserError with everything that is wrong with the recipe."""
    towers = models.load(config.model)
    towers.add_terms(config.vocabulary.all_terms(), start=config.vocabulary.start)
    wrong, strange = recipe.problems(config, towers, _rows(manifest, "train"))
    held_out, best = _rows(manifest, config.validation.split), config.validation.best
    if "hit_rate@" in best and held_out <= int(best.rpartition("@")[2]):
        strange.append(f"validation.best: {best} of {held_out} held-out pairs is always 1; try text_to_image/mrr@10")
    if config.interpolate is not None and config.interpolate.general is not None:
        wrong += _problems_of_general(config.interpolate.general, config.validation.split)
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        wrong.append("tensorboard: needs the package tensorboardX; pip install tensorboardX")
    if wrong:
        raise UserError(*wrong)
    for remark in strange:
        print(f"note: {remark}", file=sys.stderr)
    return towers


def _problems_of_general(path: str, split: str) -> list[str]:
    try:
        rows = _rows(read_manifest(path, "pairs"), split)
    except UserError as error:
        return [f"interpolate.general: {problem}" for problem in error.problems]
    return [] if rows else [f"interpolate.general: no row in the split {split}"]


def _stamp(config: TrainConfig, manifest: Manifest) -> Stamp:
    settings, pairs = recipe.identity(config), json.dumps(manifest.stamp.identity, sort_keys=True)
    settings["model"]["weights_sha256"] = models.locate(config.model.name).weights_sha256()
    settings["pairs_sha256"] = hashlib.sha256(pairs.encode()).hexdigest()
    return Stamp("checkpoint", settings, recorded())


def _refuse_other_run(output: str, stamp: Stamp) -> None:
    path = storage.join(output, "stamp.json")
    if storage.exists(path):
        refuse_other_stamp(output, stamp, Stamp.from_json(json.loads(storage.read_bytes(path))))
    elif strange := [name for name in storage.names(output) if name not in ("config.yaml", "running.json")]:
        raise UserError(f"{output}: this folder already holds {strange[0]}; choose an empty or new output")


def _lanes(config: TrainConfig, count: int) -> int:
    """The run's lanes, chosen when it first starts: another number would be another order of the pairs."""
    path = storage.join(config.output, "lanes.json")
    started = storage.exists(path)
    lanes = int(json.loads(storage.read_bytes(path))) if started else config.lanes or max(DEFAULT_LANES, count)
    if lanes < count:
        mend = f"use at most {lanes} workers, or " + ("a new output" if started else "more lanes")
        raise UserError(f"lanes: {lanes} lanes, each read by one worker, for {count} workers; {mend}")
    if lanes % count:
        even = -(-lanes // count) * count
        print(f"note: {count} workers share {lanes} lanes unevenly; with lanes={even} none waits", file=sys.stderr)
    return lanes


def _finish(config: TrainConfig) -> dict[str, Any]:
    """Writes result.json: the run is finished."""
    found = checkpoint.complete(config.output)
    if not found:
        raise RuntimeError(f"{config.output}: training ended without a complete checkpoint")
    last_path, last = found[-1]
    mixed = last.stage_name == INTERPOLATED  # it was chosen on all validation sets, not only on the domain's
    best_path, best = found[-1] if mixed else checkpoint.best(found, config.validation.best)
    lines = journal.read(config.output)
    result = {
        "best": "checkpoints/" + best_path.rpartition("/")[2],
        "last": "checkpoints/" + last_path.rpartition("/")[2],
        "best_metric": config.validation.best,
        "metrics": best.metrics,
        "start_metrics": found[0][1].metrics,
        "last_metrics": last.metrics,
        "data_wait": history.data_wait(lines),
        "memory_bytes": max((line["memory_bytes"] for line in lines if line["event"] == "step"), default=None),
        "seconds": history.seconds_of(lines),
        "remarks": history.remarks(lines),
    }
    storage.write_atomic(storage.join(config.output, "result.json"), json.dumps(result, indent=1).encode())
    return result
