"""Local batches: which rows, which captions, which pixels, the same from any step, process and number of workers."""

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clipdist import images
from clipdist.augment import AugmentConfig, augment
from clipdist.images import Preprocess
from clipdist.loader import Decode, Loader, LocalBatch, Picture, Shares, caption_of, decode_ahead, key_hash
from clipdist.reader import RowGroups, Rows
from tests.conftest import COLOURS, draw_shape

SIZES = (7, 3, 9, 6, 1, 5, 8)
ROWS = sum(SIZES)
PREPROCESS = Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest", 0)
SHARES = Shares(seed=3, stage=0, global_batch_size=8, steps=12, lanes=4, rank=0, world_size=1)
NO_CHANGE = AugmentConfig()
PAIRS = {
    f"p{number:02d}": {
        "captions": [f"{COLOURS[number % 8]} shape", f"shape in {COLOURS[number % 8]}", f"Shape {number}"],
        "group": f"g{number // 2}" if number % 3 else None,
        "image": draw_shape(COLOURS[number % 8], "circle", number),
    }
    for number in range(ROWS)
}


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", params=["streamed", "in_memory"])
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    path = str(tmp_path_factory.mktemp("pairs") / "pairs.parquet")
    table = pa.Table.from_pylist([{"id": name, **pair, "image": png(pair["image"])} for name, pair in PAIRS.items()])
    bounds = np.cumsum([0, *SIZES])
    with pq.ParquetWriter(path, table.schema) as writer:
        for start, size in zip(bounds, SIZES, strict=False):
            writer.write_table(table.slice(start, size), row_group_size=size)
    columns = tuple(table.column_names)
    groups = RowGroups((path,) * len(SIZES), tuple(range(len(SIZES))), SIZES, columns)
    found = Rows([groups], in_memory=request.param == "in_memory")
    yield found
    found.close()


def run(rows: Rows, first: int = 0, change: AugmentConfig = NO_CHANGE, **changes: Any) -> list[LocalBatch]:
    return list(Loader(rows, replace(SHARES, **changes), None, PREPROCESS, change, decoders=0).batches(first))


def ids(batch: LocalBatch) -> list[str]:
    found: list[str] = batch.table.column("id").to_pylist()
    return found


def same(one: LocalBatch, other: LocalBatch) -> bool:
    facts = [(ids(b), b.captions, b.choices.tolist(), b.global_rows, b.step, b.epoch) for b in (one, other)]
    assert one.pixels is not None
    assert other.pixels is not None
    return facts[0] == facts[1] and torch.equal(one.keys, other.keys) and torch.equal(one.pixels, other.pixels)


def test_every_pair_once_per_epoch_in_another_order_each_time(rows: Rows) -> None:
    batches = run(rows)
    assert [batch.step for batch in batches] == list(range(12))
    assert [batch.epoch for batch in batches] == [0] * 5 + [1] * 5 + [2] * 2
    assert [batch.rows for batch in batches] == [batch.global_rows for batch in batches] == [8, 8, 8, 8, 7] * 2 + [8, 8]
    epochs = [list(chain.from_iterable(ids(batch) for batch in batches if batch.epoch == epoch)) for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(PAIRS)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_same_global_batches_on_any_number_of_workers(rows: Rows, world_size: int) -> None:
    ranks = [run(rows, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *shares in zip(run(rows), *ranks, strict=True):
        assert sorted(chain.from_iterable(map(ids, shares))) == sorted(ids(whole))
        assert {share.global_rows for share in shares} == {whole.global_rows}
        captions = dict(zip(ids(whole), whole.captions, strict=True))
        assert all(captions[name] == text for one in shares for name, text in zip(ids(one), one.captions, strict=True))


@pytest.mark.parametrize("first", [1, 4, 5, 7, 11])
def test_a_run_that_goes_on_in_the_middle_sees_what_the_whole_one_saw(rows: Rows, first: int) -> None:
    change = AugmentConfig(crop_scale=0.5, flip=0.5)
    whole, rest = run(rows, change=change), run(rows, first, change=change)
    assert len(rest) == 12 - first
    assert all(same(one, other) for one, other in zip(rest, whole[first:], strict=True))
    assert not same(whole[first], whole[first - 1])


def test_each_row_comes_with_its_own_caption_and_picture(rows: Rows) -> None:
    for batch in run(rows):
        assert batch.pixels is not None
        for name, choice, caption, shown in zip(ids(batch), batch.choices, batch.captions, batch.pixels, strict=True):
            assert choice == caption_of(3, SHARES.seed, batch.epoch, name)
            assert caption == PAIRS[name]["captions"][choice]
            assert (shown.numpy() == PREPROCESS(PAIRS[name]["image"])).all()


def test_the_caption_is_a_function_of_seed_epoch_and_id_and_all_have_their_turn() -> None:
    found = [[[caption_of(3, seed, epoch, f"p{n}") for n in range(300)] for epoch in (0, 1)] for seed in (0, 1)]
    assert found[0][0] == [caption_of(3, 0, 0, f"p{n}") for n in range(300)]
    assert len({tuple(one) for seeds in found for one in seeds}) == 4
    assert all(70 < found[0][0].count(choice) < 130 for choice in range(3))
    assert caption_of(1, 0, 0, "p") == 0
    assert [caption_of(5, 7, epoch, "007") for epoch in range(8)] == [4, 2, 3, 2, 1, 3, 3, 4], (
        "or resumed runs see other captions"
    )


def test_keys_are_equal_exactly_for_the_same_group_or_the_same_caption(rows: Rows) -> None:
    batch = run(rows, global_batch_size=ROWS)[0]
    groups = [PAIRS[name]["group"] for name in ids(batch)]
    captions = [caption.casefold() for caption in batch.captions]
    assert batch.keys.shape == (ROWS, 2)
    assert [key == 0 for key in batch.keys[:, 0].tolist()] == [group is None for group in groups]
    for one in range(ROWS):
        for other in range(ROWS):
            equal = (batch.keys[one] == batch.keys[other]).tolist()
            assert equal == [groups[one] == groups[other], captions[one] == captions[other]]
    assert len(set(captions)) < ROWS, "some captions are shared"
    assert key_hash("group", "x") != key_hash("caption", "x")


def test_augmentation_is_the_epochs_and_comes_before_the_resizing(rows: Rows) -> None:
    change = AugmentConfig(crop_scale=0.5, flip=0.5, colour=0.5)
    changed = 0
    for batch in run(rows, change=change):
        assert batch.pixels is not None
        for name, shown in zip(ids(batch), batch.pixels, strict=True):
            picture = PAIRS[name]["image"]
            expected = PREPROCESS(augment(picture, change, seed=3, epoch=batch.epoch, id=name))
            assert (shown.numpy() == expected).all()
            changed += bool((expected != PREPROCESS(picture)).any())
    assert changed > ROWS


def test_a_rank_without_rows_has_empty_batches_that_count_the_others(rows: Rows) -> None:
    batches = run(rows, lanes=2, rank=2, world_size=3)
    assert [batch.rows for batch in batches] == [0] * 12
    assert [batch.global_rows for batch in batches[:5]] == [8, 8, 8, 8, 7]
    for batch in batches:
        assert batch.pixels is not None
        assert batch.pixels.shape == (0, 32, 32, 3)
        assert batch.keys.shape == (0, 2)
        assert set(batch.table.column_names) >= {"id", "captions", "image"}


def test_without_preprocessing_no_picture_is_decoded(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "decode", lambda data: pytest.fail("decoded"))
    batches = list(Loader(rows, SHARES, None, None, NO_CHANGE, 0).batches())
    assert all(batch.pixels is None for batch in batches)
    assert [ids(batch)[0] for batch in batches][:2] != []


CHUNKS = [0, 3, 70, 0, 0, 32, 64, 1, 33, 0]


def chunk_items() -> list[list[Picture]]:
    """Items of CHUNKS pictures, each of a shade of its own that its id tells."""
    bounds, data = np.cumsum([0, *CHUNKS]), [png(Image.new("RGB", (40, 32), (shade, 0, 0))) for shade in range(256)]
    return [[(1, str(shade), data[shade]) for shade in range(*bounds[at : at + 2])] for at in range(len(CHUNKS))]


def test_items_of_any_number_of_pictures_come_in_order() -> None:
    items = chunk_items()
    found = list(decode_ahead(iter(items), list, Decode(PREPROCESS), 0))
    assert [item for item, _ in found] == items
    for item, pixels in found:
        assert pixels.shape == (len(item), 32, 32, 3)
        assert pixels[:, 0, 0, 0].tolist() == [int(name) for _, name, _ in item]


def test_a_broken_picture_names_its_row() -> None:
    broken = (0, "shoe-17", png(draw_shape("red", "circle", 0))[:60])
    with pytest.raises(RuntimeError, match=r"shoe-17: .*have changed since they were prepared"):
        list(decode_ahead(iter([[broken]]), list, Decode(PREPROCESS), 0))


def test_worker_processes_decode_what_this_process_decodes_in_the_same_order() -> None:
    decode, items = Decode(PREPROCESS, AugmentConfig(crop_scale=0.6, colour=0.5), seed=3), chunk_items()
    broken = [(0, "shoe-17", items[1][0][2][:40])]
    helped = decode_ahead(iter([*items, broken]), list, decode, 2)
    for item, pixels in decode_ahead(iter(items), list, decode, 0):
        other, same_pixels = next(helped)
        assert other == item
        assert torch.equal(same_pixels, pixels)
    with pytest.raises(RuntimeError, match=r"shoe-17: .*have changed since they were prepared"):
        next(helped)


def test_waiting_is_counted(rows: Rows) -> None:
    loader = Loader(rows, SHARES, None, PREPROCESS, NO_CHANGE, 0)
    next(loader.batches())
    assert loader.take_wait() > 0
    assert loader.take_wait() == 0
