"""What a person sees when something is wrong: the place, what was expected, what to do; no traceback; exit code 2."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipdist.cli import main
from clipdist.manifest import read_manifest
from tests.conftest import draw_shape, write_shapes

ROOT = Path(__file__).parents[2]


def messages(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must end with exit code 2; returns what it says."""
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "raw", copies=1)


def settings(tmp_path: Path, table: Path, **more: object) -> list[str]:
    values: dict[str, object] = {
        "source.path": str(table),
        "output": str(tmp_path / "pairs"),
        "captions": ["{colour} {shape}"],
    }
    return [f"{name}={json.dumps(value)}" for name, value in (values | more).items()]


def test_every_problem_of_a_config_at_once_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(
        "pairs: p\noutputs: o\nmodel: {nam: x}\nstages:\n"
        "  - {name: a, learns: [projektions], epochs: two, learning_rate: 1e-3}\n"
    )
    shown = messages(capsys, "train", str(path), "sed=3")
    for part in (
        'train.yaml:2: outputs: unknown key; did you mean "output"?',
        "output: required, but not given",
        'train.yaml:3: model.nam: unknown key; did you mean "name"?',
        "train.yaml:5: stages.0.learns: expected projections, logit_scale",
        'or such as last_4_image_blocks; got "projektions"',
        'train.yaml:5: stages.0.epochs: expected a valid integer, got "two"',
        'command line: sed: unknown key; did you mean "seed"?',
    ):
        assert part in shown, shown


def test_paths_that_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_clip: str) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert "no such file or folder" in messages(capsys, "prepare", *settings(tmp_path, tmp_path / "no.csv"))
    assert "no such folder" in messages(
        capsys, "train", f"pairs={nowhere}", f"output={nowhere}2", f"model.name={tiny_clip}"
    )
    assert "no such folder" in messages(capsys, "evaluate", f"embeddings={nowhere}", f"output={nowhere}2")
    assert "no such folder" in messages(capsys, "search", nowhere, "--text", "a dress")
    assert "no such folder" in messages(capsys, "info", nowhere)
    assert "cannot read this config" in messages(capsys, "embed", nowhere + ".yaml")
    assert not (tmp_path / "nowhere2").exists()


def test_wrong_columns_are_all_named(tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"captions": ["{color} {shape}"], "columns.group": "produkt", "columns.keep": ["size"]}
    shown = messages(capsys, "prepare", *settings(tmp_path, shapes, **more))
    assert "captions.0: " in shown
    assert 'no column "color"; did you mean "colour"?' in shown
    assert 'no column "produkt"; did you mean "product"?' in shown
    assert 'no column "size"' in shown
    assert not (tmp_path / "pairs").exists()


def test_a_table_needs_captions(tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "templates over its columns" in messages(
        capsys, "prepare", f"source.path={shapes}", f"output={tmp_path / 'p'}"
    )


def test_an_output_that_holds_something_else_is_not_touched(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "thesis.doc").write_text("mine")
    assert "already holds thesis.doc" in messages(capsys, "prepare", *settings(tmp_path, shapes))
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["thesis.doc"]


@pytest.mark.usefixtures("local_ray")
def test_bad_rows_become_rejects_with_reasons(tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, rows = shapes.parent / "images", list(csv.reader(shapes.open()))
    draw_shape("red", "circle", 0, 400).save(images / "whole.jpg")
    (images / "truncated.jpg").write_bytes((images / "whole.jpg").read_bytes()[:3000])
    (images / "text.jpg").write_text("this is no picture")
    (images / "empty.jpg").write_bytes(b"")
    rows += [["gone", "images/gone.png", "red", "circle", "a"], ["cut", "images/truncated.jpg", "red", "circle", "b"]]
    rows += [["text", "images/text.jpg", "red", "circle", "c"], ["empty", "images/empty.jpg", "red", "circle", "d"]]
    rows += [
        ["no-caption", "images/whole.jpg", "", " ", "e"],
        ["red-cross-000", "images/whole.jpg", "red", "cross", "f"],
    ]
    rows += [
        ["", "images/whole.jpg", "red", "cross", "g"],
        ["nothing", "", "red", "cross", "h"],
        ["whole", "images/whole.jpg", "red", "circle", "i"],
    ]
    with shapes.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
        file.write("ragged,row\n")
    assert main(["prepare", *settings(tmp_path, shapes, max_rejected_fraction=0.4)]) == 0
    shown = capsys.readouterr().out
    for reason, count in {
        "missing": 2,
        "truncated": 1,
        "not_an_image": 1,
        "empty": 1,
        "empty_caption": 1,
        "duplicate_id": 1,
        "empty_id": 1,
        "malformed_row": 1,
    }.items():
        assert any(line.split() == ["pairs", reason, str(count)] for line in shown.splitlines()), (reason, shown)
    assert "33" in shown.splitlines()[0]  # 32 shapes and "whole"


@pytest.mark.usefixtures("local_ray")
def test_too_many_rejects_fail_publish_nothing_and_can_be_mended(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = shapes.parent / "elsewhere"
    (shapes.parent / "images").rename(hidden)
    shown = messages(capsys, "prepare", *settings(tmp_path, shapes))
    assert "32 of 32 pairs were rejected (100.0 %)" in shown
    assert "missing" in shown
    assert "no such file" in shown
    assert not (tmp_path / "pairs" / "manifests").exists()
    hidden.rename(shapes.parent / "images")
    shown = messages(capsys, "prepare", *settings(tmp_path, shapes))
    assert "32 of 32 pairs were rejected" in shown, "no picture is read again unless that is asked for"
    assert main(["prepare", *settings(tmp_path, shapes), "retry_rejected=true"]) == 0
    assert read_manifest(str(tmp_path / "pairs"), "pairs").written("pairs") == 32


@pytest.mark.usefixtures("local_ray")
def test_interrupted_and_killed_jobs_go_on(tmp_path: Path) -> None:
    """Ctrl-C, then SIGKILL, then to the end: every row once."""
    table = write_shapes(tmp_path / "many", copies=40)
    command = [sys.executable, "-m", "clipdist.cli", "prepare", *settings(tmp_path, table, unit_rows=16)]
    commits = tmp_path / "pairs" / "commits"
    for number, how in enumerate((signal.SIGINT, signal.SIGKILL)):
        job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not commits.exists() or len(list(commits.iterdir())) < 5 * (number + 1)):
            time.sleep(0.02)
        job.send_signal(how)
        _, shown = job.communicate(timeout=60)
        if how == signal.SIGINT:
            assert job.returncode == 130, shown
            assert "run the same command again to go on" in shown
            assert "Traceback" not in shown
        assert not (tmp_path / "pairs" / "manifests").exists(), "it had finished before the signal"
    done = len(list(commits.iterdir()))
    assert main(command[3:]) == 0
    assert done >= 10
    manifest = read_manifest(str(tmp_path / "pairs"), "pairs")
    assert manifest.written("pairs") == manifest.planned["pairs"] == 1280


def test_options_may_stand_before_settings(tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *rest = settings(tmp_path, shapes)
    assert main(["prepare", first, "--explain", *rest]) == 0
    assert str(tmp_path / "pairs") in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", first, "--no-such-option"])


def test_places_that_cannot_be_used(tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    messages(capsys, "prepare", *settings(tmp_path, shapes, output=str(tmp_path / "file")))
    assert "cannot be read here" in messages(capsys, "info", "nosuch://bucket/x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "plan.json").write_text('{"a": 1}')
    messages(capsys, "info", str(tmp_path / "foreign"))
    (tmp_path / "empty.csv").write_text("id,image,colour,shape\n")
    assert "no row" in messages(capsys, "prepare", *settings(tmp_path, tmp_path / "empty.csv"))


def test_a_changed_image_root_is_not_ignored(tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", *settings(tmp_path, shapes), "--dry-run"]) == 0
    from clipdist.sources import SourceConfig, open_source

    marks = [
        open_source(SourceConfig(path=str(shapes), image_root=root)).fingerprint() for root in (None, str(tmp_path))
    ]
    assert marks[0] != marks[1]
