"""Which checkpoints count, which is the best, which are kept. Exact resume: tests/distributed."""

from pathlib import Path

import pytest

from clipdist import checkpoint, step
from clipdist.checkpoint import COMPLETE, Progress
from clipdist.stages import PARTS
from tests.distributed.tiny_towers import TinyTowers

METRIC = "text_to_image/hit_rate@10"


def at(number: int, metric: float | None) -> tuple[str, Progress]:
    return f"path-{number}", Progress(0, "all", number, 10 * number, {} if metric is None else {METRIC: metric})


def save(run: Path, number: int, metric: float) -> str:
    towers = TinyTowers()
    return checkpoint.save(str(run), towers, step.make_optimizer(towers, PARTS, 0.1), at(number, metric)[1])


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
    """Without validation pairs, the first epoch would otherwise be taken for the result of all."""
    checkpoints = [at(position + 1, metric) for position, metric in enumerate(metrics)]
    assert checkpoint.best(checkpoints, METRIC)[0] == f"path-{number}"


def test_checkpoints_come_in_the_order_of_their_steps_and_only_complete_ones(tmp_path: Path) -> None:
    paths = [save(tmp_path, number, 0.1) for number in (2, 11, 1)]
    (Path(save(tmp_path, 12, 0.1)) / COMPLETE).unlink()
    assert [path for path, _ in checkpoint.complete(str(tmp_path))] == [paths[2], paths[0], paths[1]]
    assert checkpoint.complete(str(tmp_path))[0][1] == at(1, 0.1)[1]
    assert checkpoint.complete(str(tmp_path / "nowhere")) == []


def test_a_checkpoint_cut_short_is_written_again(tmp_path: Path) -> None:
    path = Path(save(tmp_path, 1, 0.1))
    (path / COMPLETE).unlink()
    (path / checkpoint.OPTIMIZER).write_bytes(b"half")
    assert save(tmp_path, 1, 0.1) == str(path)
    assert [found for found, _ in checkpoint.complete(str(tmp_path))] == [str(path)]
    checkpoint.restore_optimizer(str(path), step.make_optimizer(TinyTowers(), PARTS, 0.1))


def test_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    paths = [save(tmp_path, number, metric) for number, metric in [(1, 0.1), (2, 0.5), (3, 0.3), (4, 0.2)]]
    checkpoint.prune(str(tmp_path), METRIC)
    assert [path for path, _ in checkpoint.complete(str(tmp_path))] == [paths[1], paths[3]]
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == [
        "00-all-000020",
        "00-all-000040",
    ]
