"""Which checkpoints count, which is the best, which are kept, and what they hold. Exact resume: tests/distributed."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from clipdist import checkpoint, storage
from clipdist.checkpoint import COMPLETE, START, Progress, Writer
from clipdist.optimizer import Learning, carry_state, make_optimizer, state_of
from clipdist.storage import join
from tests.distributed.tiny_towers import TinyTowers

METRIC = "text_to_image/hit_rate@10"


def at(number: int, metric: float | None) -> Progress:
    return Progress(1, "all", number, 10 * number, metrics={} if metric is None else {METRIC: metric})


def learning(towers: TinyTowers) -> list[Learning]:
    return [Learning(name, part, one, 1.0) for part, members in towers.parts().items() for name, one in members]  # type: ignore[arg-type]


def trained(towers: TinyTowers, fused: bool = False) -> dict[str, torch.Tensor]:
    """The optimizer's state after two steps."""
    optimizer = make_optimizer(learning(towers), 0.1, fused)
    for number in range(2):
        for one in learning(towers):
            one.parameter.grad = torch.full_like(one.parameter, 0.1 + number) * one.parameter.detach()
        optimizer.step()
    return state_of(optimizer, learning(towers))


def save(run: str, progress: Progress) -> str:
    writer = Writer(run, METRIC)
    writer.save(TinyTowers(), {}, progress)  # type: ignore[arg-type]
    writer.wait()
    return join(run, "checkpoints", progress.name)


@pytest.mark.parametrize(
    ("metrics", "number"),
    [
        ([0.2, 0.4, 0.3], 2),
        ([0.4, 0.4, 0.3], 1),
        ([None, 0.1, None], 2),
        ([0.0, 0.0], 1),
        ([None, None, None], 3),
    ],
)
def test_the_best_is_the_highest_then_the_earliest_and_unmeasured_the_last(
    metrics: list[float | None], number: int
) -> None:
    """Without validation pairs, the first one would otherwise be taken for the result of all."""
    checkpoints = [(f"path-{index + 1}", at(index + 1, metric)) for index, metric in enumerate(metrics)]
    assert checkpoint.best(checkpoints, METRIC)[0] == f"path-{number}"


def test_a_checkpoint_holds_the_progress_to_the_last_field(place: str) -> None:
    progress = Progress(2, "all", 3, 30, 1, True, 16, 0.25, 2, {METRIC: 1 / 3})
    path = save(place, progress)
    assert checkpoint.complete(place) == [(path, progress)]
    assert checkpoint.complete(join(place, "nowhere")) == []
    record = json.loads(storage.read_bytes(join(path, COMPLETE)))
    assert record["step"] == 30
    assert len(record["weights_sha256"]) == 64


def test_only_complete_ones_count_in_the_order_of_their_steps_and_the_rest_is_removed(place: str) -> None:
    paths = [save(place, progress) for progress in (START, at(2, None), at(11, 0.1))]
    half = save(place, at(12, 0.1))
    storage.remove(join(half, COMPLETE))
    assert [path for path, _ in checkpoint.complete(place)] == [paths[0], paths[2]]
    assert checkpoint.remove_incomplete(place) == [at(12, None).name]
    assert storage.names(join(place, "checkpoints")) == [START.name, at(11, None).name]
    assert checkpoint.remove_incomplete(place) == []
    save(place, at(12, 0.1))
    assert checkpoint.complete(place)[-1][0] == half


def test_the_start_the_best_and_the_last_are_kept(place: str) -> None:
    save(place, START)
    for number, metric in [(1, 0.1), (2, 0.5), (3, 0.3), (4, None)]:
        save(place, at(number, metric))
        kept = {START.name, at(number, None).name, at(min(number, 2), None).name}
        assert set(storage.names(join(place, "checkpoints"))) == kept


@pytest.mark.parametrize("fused", [False, True])
def test_optimizer_state_comes_back_to_the_bit(place: str, fused: bool) -> None:
    towers = TinyTowers()
    state = trained(towers, fused)
    writer = Writer(place, METRIC)
    writer.save(towers, state, at(1, None))  # type: ignore[arg-type]
    writer.wait()
    found = checkpoint.optimizer_state(join(place, "checkpoints", at(1, None).name))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items())
    fresh = make_optimizer(learning(towers), 0.1, fused)
    assert set(carry_state(found, fresh, learning(towers))) == {one.name for one in learning(towers)}
    again = state_of(fresh, learning(towers))
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_an_upload_goes_on_beside_the_training_and_its_error_comes_with_the_next_call(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, released, real = Writer(bucket, METRIC), threading.Event(), storage.filesystem

    def slow_and_broken(path: str) -> Any:
        if threading.current_thread() is threading.main_thread():
            return real(path)
        released.wait(20)
        raise OSError("no space in the store")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "filesystem", slow_and_broken)
        writer.save(TinyTowers(), {}, at(1, None))  # type: ignore[arg-type]
        assert checkpoint.complete(bucket) == [], "the training is back while the upload waits"
        released.set()
        with pytest.raises(OSError, match="no space in the store"):
            writer.save(TinyTowers(), {}, at(2, None))  # type: ignore[arg-type]
    assert checkpoint.complete(bucket) == []


def test_what_is_saved_are_the_weights_at_that_step_though_the_training_goes_on(bucket: str) -> None:
    writer, towers = Writer(bucket, METRIC), TinyTowers()
    state = trained(towers)
    expected = {name: value.clone() for name, value in state.items()}
    writer.save(towers, state, at(1, None))  # type: ignore[arg-type]
    for value in state.values():
        value.add_(1)
    writer.wait()
    found = checkpoint.optimizer_state(join(bucket, "checkpoints", at(1, None).name))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_nothing_is_left_in_the_temporary_folder(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    save(bucket, at(1, None))
    assert list(tmp_path.iterdir()) == []
