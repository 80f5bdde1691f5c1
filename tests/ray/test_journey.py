"""Prepare -> train -> embed -> evaluate -> search on drawn shapes, through the real engines, on two workers."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch

from clipdist import checkpoint, cli, embed, evaluate, models, prepare, storage, train
from clipdist.config import UserError, load
from clipdist.embed import EmbedConfig
from clipdist.evaluate import EvaluateConfig
from clipdist.manifest import read_manifest
from clipdist.prepare import PrepareConfig
from clipdist.query import Query
from clipdist.recipe import TrainConfig
from clipdist.search import Index
from clipdist.searcher import Searcher
from tests.conftest import write_shapes

pytestmark = pytest.mark.usefixtures("local_ray")

STAGES = [
    {"name": "projections", "learns": ["projections", "logit_scale"], "epochs": 2, "learning_rate": 3e-3},
    {"name": "all", "learns": ["all"], "epochs": 8, "learning_rate": 2e-3},
]


def config(kind: Any, **values: Any) -> Any:
    return load(kind, None, [f"{name}={json.dumps(value)}" for name, value in values.items()]).config


def prepare_config(table: Path, output: Path | str, **more: Any) -> PrepareConfig:
    values = {
        "source": {"path": str(table)},
        "columns": {"group": "product", "keep": ["colour", "shape"]},
        "captions": ["a {colour} {shape}", "{shape}, {colour}"],
        "split": {"validation": 0.2},
        "unit_rows": 100,
        "output": str(output),
    }
    made: PrepareConfig = config(PrepareConfig, **(values | more))
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, local_ray: None, tiny_clip: str) -> Path:
    """One whole journey; the tests look at what it left."""
    home = tmp_path_factory.mktemp("journey")
    table = write_shapes(home / "raw", copies=10)
    prepare.run(prepare_config(table, home / "pairs"))
    train.run(train_config(home, tiny_clip))
    embed.run(
        config(
            EmbedConfig, model={"name": str(home / "run")}, pairs=str(home / "pairs"), output=str(home / "embeddings")
        )
    )
    return home


def train_config(home: Path, model: str, **more: Any) -> TrainConfig:
    values = {"pairs": str(home / "pairs"), "output": str(home / "run"), "model": {"name": model}, "stages": STAGES}
    values |= {"global_batch_size": 64, "workers": {"num_workers": 2}, "vocabulary": {"terms": ["cyan"]}}
    values |= {"validation": {"best": "text_to_image/mrr@10"}}  # the hit rate at 10 is soon 1
    made: TrainConfig = config(TrainConfig, **(values | more))
    return made


def test_pairs_hold_the_original_bytes_and_every_row_once(home: Path) -> None:
    manifest = read_manifest(str(home / "pairs"), "pairs")
    assert manifest.planned == {"pairs": 320}
    rows: dict[str, Any] = {}
    for file in manifest.files:
        assert max(file.row_groups) <= 256
        for row in pq.read_table(manifest.path(file)).to_pylist():
            assert row["id"] not in rows
            rows[row["id"]] = row
            assert row["split"] == file.split
    assert len(rows) == 320
    one = rows["red-circle-003"]
    assert one["image"] == (home / "raw" / "images" / "red-circle-003.png").read_bytes()
    assert one["captions"] == ["a red circle", "circle, red"]
    assert one["colour"] == "red"


def test_training_learns_and_keeps_the_best_and_the_last_checkpoint(home: Path) -> None:
    events = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    validated = [event for event in events if event["event"] == "validated"]
    assert [event["epoch"] for event in validated] == [0, 1, 2, *range(1, 9)]
    assert validated[-1]["text_to_image/hit_rate@10"] > 0.8 > 0.5 > validated[0]["text_to_image/hit_rate@10"]
    result = train.read_result(str(home / "run"))
    kept = {path.rpartition("/")[2] for path, _ in checkpoint.complete(str(home / "run"))}
    assert kept == {"00-start-000000", result["best"].rpartition("/")[2], result["last"].rpartition("/")[2]}
    steps = [event for event in events if event["event"] == "step"]
    assert {"loss", "gradient_norm", "logit_scale", "pairs_per_second", "data_wait"} <= steps[-1].keys()


def test_checkpoint_loads_in_plain_open_clip(home: Path) -> None:
    folder = home / "run" / train.read_result(str(home / "run"))["best"]
    plain, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    searcher = Searcher(str(home / "embeddings"))
    from PIL import Image

    picture = Image.open(home / "raw" / "images" / "blue-cross-001.png").convert("RGB")
    with torch.no_grad():
        expected = plain.eval().encode_image(transform(picture)[None], normalize=True)[0].numpy()
    np.testing.assert_allclose(searcher.embed_image(picture), expected, atol=1e-5)


def test_embeddings_are_normalised_complete_and_the_models(home: Path) -> None:
    manifest = read_manifest(str(home / "embeddings"), "embeddings")
    assert manifest.planned == {"images": 320, "texts": 640}
    index, searcher = Index.open(str(home / "embeddings")), Searcher(str(home / "embeddings"))
    matrix = index.shards.matrix().astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=2e-3)
    rows = index.describe(np.arange(len(index)))
    for row in (0, 100, 319):
        picture = home / "raw" / "images" / f"{rows[row]['id']}.png"
        np.testing.assert_allclose(matrix[row], searcher.embed_image(picture), atol=2e-3)
    texts = Index.open(str(home / "embeddings"), "texts")
    described = texts.describe(np.array([5]))[0]
    assert described["id"] == described["pair_id"] + "#1"
    np.testing.assert_allclose(
        texts.shards.matrix()[5].astype(np.float32), searcher.embed_text(described["caption"]), atol=2e-3
    )


def test_searching_finds_what_is_asked_for(home: Path) -> None:
    searcher = Searcher(str(home / "embeddings"))
    hits = searcher.find_image_from_text("a green square", 5)
    assert sum(hit.columns["colour"] == "green" and hit.columns["shape"] == "square" for hit in hits) >= 4
    assert hits[0].picture().size == (40, 40)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    picture = home / "raw" / "images" / "green-square-004.png"
    assert (
        searcher.find_image_from_image(picture, 1)[0].id == "green-square-004"
        or searcher.find_image_from_image(picture, 1)[0].score > 0.999
    )
    assert "green" in (searcher.find_text_from_image(str(picture), 1)[0].description or "")
    red = searcher.find_image_from_text("a green square", 5, where="colour = 'red' and shape in ('square', 'cross')")
    assert [hit.columns["colour"] for hit in red] == ["red"] * 5
    like = searcher.find_image_from_id("green-square-004", 5)
    assert "green-square-004" not in [hit.id for hit in like]
    assert sum(hit.columns["colour"] == "green" and hit.columns["shape"] == "square" for hit in like) >= 4
    other = searcher.find(Query(picture) + "a red square" - Query("a green square"), 5)
    assert sum(hit.columns["colour"] == "red" and hit.columns["shape"] == "square" for hit in other) >= 3


def test_the_command_finds_prints_and_saves(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["search", str(home / "embeddings"), "a green square", "--id", "red-circle-001", "--top", "3"]
    files = ["--html", str(tmp_path / "hits.html"), "--sheet", str(tmp_path / "hits.png")]
    assert cli.main([*command, *files, "--format", "paths"]) == 0
    places = capsys.readouterr().out.splitlines()
    assert len(places) == 6
    assert all(Path(place.partition("#row=")[0]).is_file() for place in places), "rows of the pairs"
    assert (tmp_path / "hits.html").read_text().count("data:image/jpeg") == 7, (
        "six hits, and the row that was asked with"
    )
    assert (tmp_path / "hits.png").stat().st_size > 1000


def test_evaluation_counts_equal_captions_as_right(home: Path) -> None:
    settings = config(
        EvaluateConfig, embeddings=str(home / "embeddings"), output=str(home / "metrics"), split="validation"
    )
    result = evaluate.run(settings)
    metrics = result["metrics"]
    assert metrics["text_to_image/hit_rate@1"] == metrics["text_to_image/top1_accuracy"]
    assert metrics["text_to_image/hit_rate@10"] > 0.8
    assert "same caption" in result["positives"]
    for name in ("metrics.json", "report.html", "heatmap.png", "examples.png"):
        assert (home / "metrics" / name).stat().st_size > 1000
    assert evaluate.run(settings) == json.loads((home / "metrics" / "metrics.json").read_text())


def test_evaluation_does_not_write_into_another_artefact(home: Path) -> None:
    before = (home / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match="already holds"):
        evaluate.run(config(EvaluateConfig, embeddings=str(home / "embeddings"), output=str(home / "run")))
    assert (home / "run" / "config.yaml").read_text() == before


def test_rerun_of_finished_jobs_changes_nothing(home: Path, tiny_clip: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    prepare.run(prepare_config(home / "raw" / "products.csv", home / "pairs"))
    train.run(train_config(home, tiny_clip))
    embed.run(
        config(
            EmbedConfig, model={"name": str(home / "run")}, pairs=str(home / "pairs"), output=str(home / "embeddings")
        )
    )
    after = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    assert before == after


def test_other_settings_model_or_input_are_refused_with_both_values(home: Path, tiny_clip: str) -> None:
    with pytest.raises(UserError, match=r"unit_rows: 100 there, 50 now"):
        prepare.run(prepare_config(home / "raw" / "products.csv", home / "pairs", unit_rows=50))
    with pytest.raises(UserError, match=r"seed: 0 there, 7 now"):
        train.run(train_config(home, tiny_clip, seed=7))
    with pytest.raises(UserError, match=r"weights_sha256: .* there, .* now"):
        embed.run(
            config(EmbedConfig, model={"name": tiny_clip}, pairs=str(home / "pairs"), output=str(home / "embeddings"))
        )
    with pytest.raises(UserError, match="made by another model"):
        Searcher(str(home / "embeddings"), model=tiny_clip).embed_text("a green square")


def test_saved_config_reruns_the_job(home: Path) -> None:
    for kind, folder in ((PrepareConfig, "pairs"), (TrainConfig, "run"), (EmbedConfig, "embeddings")):
        loaded = load(kind, str(home / folder / "config.yaml")).config
        assert storage.absolute(loaded.output) == str(home / folder)  # type: ignore[attr-defined]


def test_catalog_is_embedded_as_the_pairs_are(home: Path) -> None:
    catalog = {"source": {"path": str(home / "raw" / "products.csv")}, "captions": ["a {colour} {shape}"]}
    output = home / "catalog-embeddings"
    manifest = embed.run(config(EmbedConfig, model={"name": str(home / "run")}, catalog=catalog, output=str(output)))
    assert manifest.planned == {"images": 320, "texts": 320}
    ours, theirs = Index.open(str(output)), Index.open(str(home / "embeddings"))
    np.testing.assert_allclose(ours.vector("red-cross-002"), theirs.vector("red-cross-002"), atol=1e-3)


def test_frozen_stage_keeps_the_towers_to_the_bit(home: Path, tiny_clip: str) -> None:
    output = home / "frozen-only"
    train.run(train_config(home, tiny_clip, output=str(output), stages=STAGES[:1], vocabulary={}))
    torch.manual_seed(0)
    start = models.load(models.ModelConfig(name=tiny_clip))
    trained = models.load(models.ModelConfig(name=str(output))).model.state_dict()
    learning = {name for part in ("projections", "logit_scale") for name, _ in start.parts()[part]}  # type: ignore[index]
    changed = {name for name, tensor in start.model.state_dict().items() if not torch.equal(tensor, trained[name])}
    assert changed == learning == {"visual.proj", "text_projection", "logit_scale"}


def test_killed_worker_costs_at_most_an_epoch_and_the_result_is_the_same(home: Path, tiny_clip: str) -> None:
    output, events = home / "killed", []
    killer = threading.Thread(target=_kill_a_worker_after_a_checkpoint, args=(output, events), daemon=True)
    killer.start()
    train.run(train_config(home, tiny_clip, output=str(output)))
    killer.join(1)
    assert events, "no worker was killed"
    ours, theirs = train.read_result(str(output)), train.read_result(str(home / "run"))
    assert ours["last"] == theirs["last"]
    assert ours["last_metrics"] == theirs["last_metrics"]


def _kill_a_worker_after_a_checkpoint(output: Path, events: list[int]) -> None:
    for _ in range(1200):
        if (output / "checkpoints").exists() and checkpoint.complete(str(output)):
            for line in subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines():
                if "ray::RayTrainWorker" in line:
                    events.append(int(line.split()[0]))
                    os.kill(events[0], signal.SIGKILL)
                    return
        time.sleep(0.1)


def test_too_many_workers_and_too_few_pairs_are_told_at_once(home: Path, tiny_clip: str) -> None:
    wrong = train_config(
        home, tiny_clip, output=str(home / "wrong"), workers={"num_workers": 99}, global_batch_size=9999
    )
    with pytest.raises(UserError) as told:
        train.run(wrong)
    problems = "\n".join(told.value.problems)
    assert "99 workers need 99 CPU cores; the cluster has 2" in problems
    assert "a global batch of 9,999 pairs" in problems
    assert not (home / "wrong").exists()


def test_a_training_that_no_restart_would_mend_ends_with_its_reason(home: Path, tiny_clip: str) -> None:
    stages = [{"name": "all", "learns": ["all"], "steps": 8, "learning_rate": 1e30, "warmup": 0}]
    with pytest.raises(UserError, match="the gradient norm is nan: lower learning_rate"):
        train.run(train_config(home, tiny_clip, output=str(home / "diverged"), stages=stages))
    assert not (home / "diverged" / "result.json").exists()
