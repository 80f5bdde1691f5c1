"""Every shipped YAML loads as the config of its job, and every entry point is the same code as the command."""

import subprocess
import sys
from pathlib import Path

import pytest

from clipdist.cli import JOBS, load_job
from clipdist.config import UserError, dump, explain, flatten, load
from clipdist.stages import DEFAULT_STAGES

ROOT = Path(__file__).parents[1]
RECIPES = {"train-reclip": "train"}
"""Further YAMLs of a job."""


@pytest.mark.parametrize("name", [*JOBS, *RECIPES])
def test_shipped_yaml_loads_and_its_dump_reruns_it(name: str, tmp_path: Path) -> None:
    loaded = load_job(RECIPES.get(name, name), str(ROOT / "jobs" / f"{name}.yaml"), [])
    again = tmp_path / "config.yaml"
    again.write_text(dump(loaded.config))
    assert load(type(loaded.config), str(again)).config == loaded.config


def test_a_config_without_stages_trains_as_the_shipped_yaml_does() -> None:
    assert load_job("train", str(ROOT / "jobs" / "train.yaml"), []).config.stages == DEFAULT_STAGES


@pytest.mark.parametrize("job", JOBS)
def test_every_value_has_a_meaning_and_an_origin(job: str) -> None:
    loaded = load_job(job, str(ROOT / "jobs" / f"{job}.yaml"), [])
    shown = explain(loaded)
    for key, _, meaning in flatten(loaded.config):
        assert meaning, f"{job}: {key} has no docstring"
        assert key in shown


def test_every_job_has_an_entry_point_and_a_yaml_and_nothing_else_is_there() -> None:
    expected = {f"{job}{suffix}" for job in JOBS for suffix in (".py", ".yaml")} | {f"{name}.yaml" for name in RECIPES}
    assert {path.name for path in (ROOT / "jobs").iterdir() if path.name != "__pycache__"} == expected


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_entry_point_reports_a_mistake_with_exit_code_2(job: str) -> None:
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), str(ROOT / "jobs" / f"{job}.yaml"), "outptu=x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert 'did you mean "output"?' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_yaml_is_seen(tmp_path: Path) -> None:
    broken = tmp_path / "train.yaml"
    broken.write_text((ROOT / "jobs" / "train.yaml").read_text().replace("epochs: 5", "epochs: five"))
    with pytest.raises(UserError, match=r"train\.yaml:\d+: stages\.0\.epochs"):
        load_job("train", str(broken), [])
