"""The global batch is a function of (seed, stage, step), whoever serves it; the loader keeps its order."""

import io
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from clipdist.batches import (
    Loader,
    LocalBatch,
    Pairs,
    caption_of,
    epoch_order,
    global_batch,
    key_hash,
    local_rows,
    read_pairs,
)
from clipdist.images import BadImage
from clipdist.ledger import File, Manifest
from clipdist.schema import Stamp
from clipdist.stages import steps_per_epoch


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def make_pairs(count: int) -> Pairs:
    """Pair n is a picture of value n with n % 3 + 1 captions."""
    rows = [
        {"id": str(n), "image": png(n), "captions": [f"{n}-{c}" for c in range(n % 3 + 1)], "group": None}
        for n in range(count)
    ]
    return Pairs(pa.Table.from_pylist(rows))


def pixels(picture: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(picture)


def test_an_epoch_shows_every_row_once_in_an_order_of_its_own() -> None:
    orders = [epoch_order(50, *key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert np.array_equal(orders[0], epoch_order(50, 0, 0, 0))


def test_the_order_is_the_same_on_every_machine() -> None:
    """A resumed run may find another numpy; its PCG64 and `permutation` keep their streams."""
    assert epoch_order(8, 3, 1, 2).tolist() == [5, 6, 3, 4, 7, 0, 2, 1]


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (8, 4), (3, 4), (1, 4), (9, 9)])
def test_batches_are_the_order_cut_and_the_last_ragged_one_is_kept(rows: int, size: int) -> None:
    order = epoch_order(rows, 0, 0, 0)
    cut = [global_batch(order, step, size) for step in range(steps_per_epoch(rows, size))]
    assert np.array_equal(np.concatenate(cut), order)
    assert [len(batch) for batch in cut[:-1]] == [size] * (len(cut) - 1)
    assert 0 < len(cut[-1]) <= size


@pytest.mark.parametrize("world_size", range(1, 8))
def test_the_ranks_rows_together_are_the_batch_in_its_order(world_size: int) -> None:
    for size in range(20):
        batch = epoch_order(size, 0, 0, 0)
        shares = [local_rows(batch, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(shares), batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_which_caption_is_shown_is_a_function_of_seed_epoch_and_row() -> None:
    shown = [[[caption_of(4, seed, epoch, row) for row in range(200)] for epoch in range(2)] for seed in range(2)]
    flat = [tuple(choices) for by_epoch in shown for choices in by_epoch]
    assert len(set(flat)) == 4, "seeds and epochs choose differently"
    for choices in flat:
        counts = np.bincount(choices, minlength=4)
        assert len(counts) == 4
        assert counts.min() > 25
    assert {caption_of(1, 0, epoch, 5) for epoch in range(9)} == {0}
    assert [caption_of(5, 0, epoch, 7) for epoch in range(8)] == [3, 4, 1, 2, 3, 4, 3, 0], "in every process"


def test_key_hashes_are_positive_int64_and_know_their_kind() -> None:
    hashes = [key_hash(kind, text) for kind in ("group", "caption") for text in ("", "a", "b", "größe", "7", "007")]
    assert len(set(hashes)) == len(hashes)
    assert all(0 < value < 2**63 for value in hashes)
    assert key_hash("group", "a") == 6902608911242341216


def run_epoch(loader: Loader, shares: list[list[int]], epoch: int = 0, decode: bool = True) -> list[LocalBatch]:
    cut = [(np.array(rows, np.int64), 10) for rows in shares]
    return list(loader.epoch(cut, seed=0, epoch=epoch, decode=decode))


@pytest.mark.parametrize("prefetch", [0, 1, 3, 9])
def test_the_loader_gives_its_rows_in_order_though_pictures_end_out_of_order(prefetch: int) -> None:
    def slow_at_first(picture: Image.Image) -> NDArray[np.uint8]:
        found = pixels(picture)
        time.sleep(0.01 if found[0, 0, 0] % 4 == 0 else 0)
        return found

    shares = [[4, 1, 7], [8, 0], [], [3, 5, 6]]
    loader = Loader(make_pairs(9), slow_at_first, threads=4, prefetch=prefetch)
    for rows, batch in zip(shares, run_epoch(loader, shares, epoch=2), strict=True):
        assert batch.rows.tolist() == rows
        assert batch.choices.tolist() == [caption_of(row % 3 + 1, 0, 2, row) for row in rows]
        assert batch.captions == [f"{row}-{choice}" for row, choice in zip(rows, batch.choices, strict=True)]
        assert batch.global_rows == 10
        assert (batch.pixels is None) if not rows else batch.pixels[:, 0, 0, 0].tolist() == rows
    loader.close()


def test_reused_features_need_no_pictures() -> None:
    pairs = Pairs(make_pairs(4).table.set_column(1, "image", pa.array([b"broken"] * 4)))
    loader = Loader(pairs, pixels, threads=1)
    assert [batch.pixels for batch in run_epoch(loader, [[0, 1], [2, 3]], decode=False)] == [None, None]
    with pytest.raises(BadImage):
        run_epoch(loader, [[0]])
    loader.close()


def test_the_loader_counts_the_time_that_training_waits() -> None:
    def slow(picture: Image.Image) -> NDArray[np.uint8]:
        time.sleep(0.1)
        return pixels(picture)

    loader = Loader(make_pairs(4), slow, threads=1, prefetch=1)
    run_epoch(loader, [[0], [1], [2]])
    loader.close()
    assert loader.wait_seconds >= 0.25


def test_the_loader_decodes_ahead_while_a_batch_is_used() -> None:
    """Not further than it was told: memory."""
    seen, done = [], threading.Semaphore(0)

    def note(picture: Image.Image) -> NDArray[np.uint8]:
        seen.append(int(pixels(picture)[0, 0, 0]))
        done.release()
        return pixels(picture)

    loader = Loader(make_pairs(9), note, threads=1, prefetch=2)
    stream = loader.epoch([(np.array([row]), 1) for row in range(9)], seed=0, epoch=0, decode=True)
    assert next(stream).rows.tolist() == [0]
    for _ in range(3):
        assert done.acquire(timeout=30)
    assert not done.acquire(timeout=0.1)
    assert seen == [0, 1, 2]
    before = loader.wait_seconds
    assert next(stream).rows.tolist() == [1]
    assert loader.wait_seconds - before < 0.1
    loader.close()


def write_pairs(folder: Path, splits: list[str]) -> Manifest:
    files = []
    for number, split in enumerate(splits):
        rows = [
            {"id": f"{number}-{n}", "image": b"", "captions": ["c"], "group": None, "split": split} for n in range(4)
        ]
        (folder / "pairs").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "pairs" / f"{number}.parquet")
        files.append(File(f"pairs/{number}.parquet", "pairs", 4, (4,), 0, split))
    (folder / "pairs" / "stray.parquet").write_bytes(b"a file that no manifest names")
    return Manifest(str(folder), Stamp("pairs", {}), tuple(files), (), {}, {}, {})


def test_pairs_of_a_split_come_in_the_manifest_s_order(tmp_path: Path) -> None:
    manifest = write_pairs(tmp_path, ["train", "validation", "train"])
    found = read_pairs(manifest, "train").table.column("id").to_pylist()
    assert found == [f"{file}-{n}" for file in (0, 2) for n in range(4)]
    assert len(read_pairs(manifest, "test")) == 0


@pytest.mark.parametrize(("most", "rows"), [(8, 8), (3, 3), (1, 1), (99, 8)])
def test_a_sample_of_pairs_is_even_and_the_same_each_time(tmp_path: Path, most: int, rows: int) -> None:
    manifest = write_pairs(tmp_path, ["train", "train"])
    samples = [read_pairs(manifest, "train", most).table.column("id").to_pylist() for _ in range(2)]
    assert samples[0] == samples[1]
    assert len(set(samples[0])) == rows
    if most == 3:
        assert samples[0] == ["0-0", "0-3", "1-3"]
