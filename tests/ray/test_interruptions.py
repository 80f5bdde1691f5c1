"""A training that is killed, told to leave, or loses its node ends as one that nobody disturbed, to the bit on CPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipdist import journal, prepare
from clipdist.config import load
from clipdist.prepare import PrepareConfig
from tests.conftest import write_shapes
from tests.ray.moving_nodes import step_of

STEPS = 60
RAY_WORKER = "ray::RayTrainWorker"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    home = tmp_path_factory.mktemp("interruptions")
    table = write_shapes(home / "raw", copies=8)
    values = {"source": {"path": str(table)}, "captions": ["a {colour} {shape}"], "split": {"validation": 0.25}}
    values["output"] = str(home / "pairs")
    prepare.run(load(PrepareConfig, None, [f"{name}={json.dumps(value)}" for name, value in values.items()]).config)
    return home


@pytest.fixture(scope="module")
def undisturbed(home: Path, tiny_clip: str) -> dict[str, Any]:
    config = write_config(home, tiny_clip, "undisturbed")
    assert start(config).wait(300) == 0
    return outcome(home / "undisturbed")


def write_config(home: Path, model: str, name: str) -> Path:
    settings = {
        "pairs": str(home / "pairs"),
        "output": str(home / name),
        "model": {"name": model},
        "global_batch_size": 32,
        "stages": [{"name": "all", "learns": ["all"], "steps": STEPS, "learning_rate": 1e-3}],
        "validation": {"best": "text_to_image/mrr@10", "every_steps": 30},
        "checkpoints": {"every_steps": 4},
        "log_every_steps": 1,
        "workers": {"num_workers": 2, "decoders": 0},
    }
    path = home / f"{name}.yaml"
    path.write_text(json.dumps(settings))
    return path


def start(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "clipdist.cli", "train", str(config)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.05)


def outcome(output: Path) -> dict[str, Any]:
    result = json.loads((output / "result.json").read_text())
    losses = [(line["step"], line["loss"]) for line in journal.read(str(output)) if line["event"] == "step"]
    return {"metrics": result["last_metrics"], "best": result["best"], "losses": losses}


def processes_of(text: str, under: int) -> list[int]:
    """Processes with this text in their command line that were started, directly or not, by a process."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    rows = [(int(pid), int(parent), command) for pid, parent, command in (line.split(None, 2) for line in listed)]
    family = {under}
    for _ in rows:
        family |= {pid for pid, parent, _ in rows if parent in family}
    return [pid for pid, _, command in rows if pid in family and text in command]


def test_an_undisturbed_run_is_whole(undisturbed: dict[str, Any]) -> None:
    assert [step for step, _ in undisturbed["losses"]] == list(range(1, STEPS + 1))


def test_sigkill_of_a_worker(home: Path, tiny_clip: str, undisturbed: dict[str, Any]) -> None:
    driver = start(write_config(home, tiny_clip, "worker"))
    wait_for(lambda: step_of(str(home / "worker")) >= 12)
    workers = processes_of(RAY_WORKER, driver.pid)
    os.kill(workers[-1], signal.SIGKILL)
    killed = time.time()
    assert driver.wait(300) == 0
    assert outcome(home / "worker") == undisturbed
    lines = journal.read(str(home / "worker"))
    back = min(line["time"] for line in lines if line["event"] == "step" and line["time"] > killed + 1)
    print(f"from SIGKILL of a worker to the next step: {back - killed:.1f} s")
    assert len([line for line in lines if line["event"] == "workers"]) == 2


def test_sigkill_of_the_driver_and_a_half_written_checkpoint(
    home: Path, tiny_clip: str, undisturbed: dict[str, Any]
) -> None:
    config = write_config(home, tiny_clip, "driver")
    driver = start(config)
    wait_for(lambda: step_of(str(home / "driver")) >= 12)
    workers = processes_of(RAY_WORKER, driver.pid)
    driver.kill()
    driver.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    half = home / "driver" / "checkpoints" / "00-all-999999"
    half.mkdir()
    (half / "progress.json").write_text("{}")
    assert start(config).wait(300) == 0
    assert outcome(home / "driver") == undisturbed
    assert not half.exists()


def test_a_signal_saves_and_leaves(home: Path, tiny_clip: str, undisturbed: dict[str, Any]) -> None:
    name = "signal"
    config = write_config(home, tiny_clip, name)
    driver = start(config)
    wait_for(lambda: step_of(str(home / name)) >= 12)
    driver.send_signal(signal.SIGTERM)
    _, said = driver.communicate(timeout=300)
    assert driver.returncode == 130
    assert "run the same command again" in said
    lines = journal.read(str(home / name))
    assert step_of(str(home / name)) == max(line["step"] for line in lines if line["event"] == "step")
    assert start(config).wait(300) == 0
    assert outcome(home / name) == undisturbed


@pytest.mark.parametrize("how", ["killed", "preempted"])
def test_a_node_that_goes(home: Path, tiny_clip: str, undisturbed: dict[str, Any], how: str) -> None:
    config = write_config(home, tiny_clip, how)
    script = Path(__file__).with_name("moving_nodes.py")
    done = subprocess.run([sys.executable, str(script), str(config), how], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["went"] >= 12
    assert outcome(home / how) == undisturbed
    if how == "preempted":
        assert facts["saved"] is not None, "the state was not saved at the notice"
