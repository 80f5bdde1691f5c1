"""The order of an epoch: every row once, the same global batches for any number of workers, from any step on."""

from collections.abc import Iterator

import numpy as np
import pytest

from clipdist.lanes import DEFAULT_LANES, EpochOrder, batch_bounds, own_lanes
from clipdist.stages import steps_per_epoch

SIZES = np.array([5, 1, 7, 3, 3, 9, 2, 4, 6, 1, 8], np.int64)
ROWS, LANES = int(SIZES.sum()), 4
Row = tuple[int, int]


def lane_rows(order: EpochOrder, lane: int) -> list[Row]:
    """The rows of a lane, front to back, as (row group, row in it)."""
    return [(int(group), int(row)) for group in order.groups[lane] for row in order.shuffled(int(group))]


def round_robin(order: EpochOrder) -> Iterator[tuple[int, Row]]:
    """The stream as its definition says it: one row of every lane in turn, skipping those that ran out."""
    waiting = {lane: lane_rows(order, lane) for lane in range(len(order.groups))}
    while any(waiting.values()):
        for lane, rows in waiting.items():
            if rows:
                yield lane, rows.pop(0)


def shares(order: EpochOrder, size: int, world_size: int, first: int = 0) -> list[list[list[Row]]]:
    """For every step from `first` on, the rows of every rank, each of which knows only its own lanes."""
    rows = [lane_rows(order, lane) for lane in range(len(order.groups))]
    found = []
    for step in range(first, steps_per_epoch(order.rows, size)):
        low, high = (order.consumed(at) for at in batch_bounds(step, order.rows, size))
        of_rank = [own_lanes(len(rows), rank, world_size) for rank in range(world_size)]
        found.append([[row for lane in mine for row in rows[lane][low[lane] : high[lane]]] for mine in of_rank])
    return found


@pytest.mark.parametrize("lanes", [1, 3, LANES, 40])
@pytest.mark.parametrize("sizes", [SIZES, np.ones(17, np.int64), np.array([4]), np.array([100, 1, 1])], ids=len)
def test_consumed_is_what_a_slow_round_robin_has_taken(sizes: np.ndarray, lanes: int) -> None:
    order = EpochOrder(sizes, lanes, seed=1, stage=0, epoch=0)
    taken = np.zeros(lanes, np.int64)
    assert (order.consumed(0) == taken).all()
    for position, (lane, _) in enumerate(round_robin(order)):
        taken[lane] += 1
        assert (order.consumed(position + 1) == taken).all()
    assert (order.consumed(order.rows) == order.lengths).all()


def test_on_uneven_lanes_plain_division_is_wrong() -> None:
    """The control of the test above."""
    order = EpochOrder(SIZES, LANES, seed=1, stage=0, epoch=0)
    divided = [[position // LANES + (lane < position % LANES) for lane in range(LANES)] for position in range(ROWS)]
    assert any(order.consumed(position).tolist() != taken for position, taken in enumerate(divided))


@pytest.mark.parametrize("size", [4, 7, 16, 48, ROWS, 1000])
def test_every_row_once_per_epoch_and_the_same_global_batches_on_1_to_4_workers(size: int) -> None:
    order = EpochOrder(SIZES, LANES, seed=3, stage=1, epoch=2)
    alone = [set(batch[0]) for batch in shares(order, size, 1)]
    everything = sorted(row for batch in shares(order, size, 1) for row in batch[0])
    assert everything == [(group, row) for group, rows in enumerate(SIZES) for row in range(rows)]
    for world_size in (2, 3, 4):
        split = shares(order, size, world_size)
        assert [set().union(*map(set, ranks)) for ranks in split] == alone
        assert [sum(map(len, ranks)) for ranks in split] == [len(batch) for batch in alone]


def test_batches_are_slices_of_the_stream() -> None:
    order = EpochOrder(SIZES, LANES, seed=3, stage=1, epoch=2)
    stream = [row for _, row in round_robin(order)]
    for step, (batch,) in enumerate(shares(order, 8, 1)):
        start, stop = batch_bounds(step, ROWS, 8)
        assert set(batch) == set(stream[start:stop])


def test_a_start_at_step_s_gives_what_a_start_at_0_gives_from_s_on() -> None:
    order = EpochOrder(SIZES, LANES, seed=0, stage=0, epoch=0)
    whole = shares(order, 6, 3)
    for first in range(len(whole)):
        assert shares(EpochOrder(SIZES, LANES, seed=0, stage=0, epoch=0), 6, 3, first) == whole[first:]


@pytest.mark.parametrize(
    ("rows", "size", "bounds"),
    [
        (8, 4, [(0, 4), (4, 8)]),
        (10, 4, [(0, 4), (4, 8), (8, 10)]),
        (9, 4, [(0, 4), (4, 9)]),  # a single pair would have no contrast
        (3, 4, [(0, 3)]),
        (5, 4, [(0, 5)]),
        (1, 4, [(0, 1)]),
    ],
)
def test_the_last_batch_takes_what_is_left_and_a_single_pair_joins_the_one_before(
    rows: int, size: int, bounds: list[tuple[int, int]]
) -> None:
    assert [batch_bounds(step, rows, size) for step in range(steps_per_epoch(rows, size))] == bounds


def test_epoch_stage_and_seed_each_change_the_order_of_groups_and_of_rows_in_them() -> None:
    sizes = np.full(24, 16, np.int64)
    orders = [EpochOrder(sizes, 6, *key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({tuple(np.concatenate(order.groups)) for order in orders}) == 4
    assert len({tuple(order.shuffled(5)) for order in orders}) == 4
    assert not (orders[0].shuffled(5) == orders[0].shuffled(6)).all()
    same = EpochOrder(sizes, 6, 0, 0, 0)
    assert all((one == other).all() for one, other in zip(same.groups, orders[0].groups, strict=True))


def test_a_batch_mixes_rows_of_many_groups() -> None:
    order = EpochOrder(np.full(100, 50, np.int64), DEFAULT_LANES, 0, 0, 0)
    (batch,) = shares(order, 96, 1)[3]
    assert len({group for group, _ in batch}) == DEFAULT_LANES


def test_the_order_never_changes_by_accident() -> None:
    """Golden: another order would make resumed runs see pairs twice, and others never."""
    order = EpochOrder(SIZES, LANES, seed=7, stage=1, epoch=2)
    assert [groups.tolist() for groups in order.groups] == [[1, 4, 9], [8, 7, 10], [2, 3, 0], [5, 6]]
    assert order.shuffled(5).tolist() == [8, 0, 6, 7, 2, 4, 5, 3, 1]
    assert order.consumed(30).tolist() == [5, 9, 8, 8]
