"""What counts as right: a small example worked out by hand, in both directions."""

import numpy as np
import pytest
from numpy.typing import NDArray

from clipdist.metrics import Relevance
from clipdist.ranks import positive_ranks
from clipdist.retrieval import Gallery, joined, mean_of, measure, normal_caption, query_values

# Pictures 0 and 1 show one product. Captions 3 and 4 both belong to picture 3; caption 2 says the same as caption 3.
GALLERY = Gallery(
    groups=["shoe", "shoe", None, None],
    captions=["a boot", "a clog", "Red  HAT", "red hat", "a cap"],
    pair_of_text=np.array([0, 1, 2, 3, 3]),
)
RIGHT_IMAGES = [{0, 1}, {0, 1}, {2, 3}, {2, 3}, {3}]
RIGHT_TEXTS = [{0, 1}, {0, 1}, {2, 3}, {2, 3, 4}]

ANGLES = np.radians([0, 40, 90, 160])
IMAGES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)
TEXT_ANGLES = np.radians([35, 10, 155, 172, 82])
TEXTS = np.stack([np.cos(TEXT_ANGLES), np.sin(TEXT_ANGLES)], axis=1).astype(np.float32)
# Nearest pictures of each caption: 1 0 2 3;  0 1 2 3;  3 2 1 0;  3 2 1 0;  2 1 3 0
# Nearest captions of each picture: 1 0 4 2 3;  0 1 4 2 3;  4 0 2 1 3;  2 3 4 0 1


def sets_of(relevance: Relevance) -> list[set[int]]:
    edges = zip(relevance.offsets[:-1], relevance.offsets[1:], strict=True)
    return [set(relevance.positives[start:stop].tolist()) for start, stop in edges]


def test_group_and_caption_make_rows_right_for_each_other() -> None:
    relevance = GALLERY.relevance()
    assert sets_of(relevance["text_to_image"]) == RIGHT_IMAGES
    assert sets_of(relevance["image_to_text"]) == RIGHT_TEXTS


def test_being_right_is_mutual() -> None:
    relevance = GALLERY.relevance()
    pairs = {(text, image) for text, images in enumerate(sets_of(relevance["text_to_image"])) for image in images}
    back = {(text, image) for image, texts in enumerate(sets_of(relevance["image_to_text"])) for text in texts}
    assert pairs == back


def test_it_is_not_passed_on() -> None:
    """a says what b says, b is the product c: a and c are still strangers."""
    gallery = Gallery(["p", "q", "q"], ["same", "same", "other"], np.array([0, 1, 2]))
    assert sets_of(gallery.relevance()["text_to_image"]) == [{0, 1}, {0, 1, 2}, {1, 2}]


def test_metrics_by_hand() -> None:
    found = measure(IMAGES, TEXTS, GALLERY.relevance())
    # captions 0..3 find a right picture first; caption 4 finds its only one third
    assert found["text_to_image/hit_rate@1"] == pytest.approx(4 / 5)
    assert found["text_to_image/hit_rate@5"] == 1
    assert found["text_to_image/recall@10"] == 1
    assert found["text_to_image/mrr@10"] == pytest.approx((1 + 1 + 1 + 1 + 1 / 3) / 5)
    assert found["text_to_image/map@10"] == pytest.approx((1 + 1 + 1 + 1 + 1 / 3) / 5)
    # pictures 0, 1 and 3 find a right caption first; picture 2 finds its two third and fifth
    assert found["image_to_text/hit_rate@1"] == pytest.approx(3 / 4)
    assert found["image_to_text/mrr@10"] == pytest.approx((1 + 1 + 1 / 3 + 1) / 4)
    assert found["image_to_text/map@10"] == pytest.approx((1 + 1 + (1 / 3 + 2 / 5) / 2 + 1) / 4)
    assert found["image_to_text/queries"] == 4


def test_counting_only_the_own_pair_gives_other_numbers() -> None:
    """The control: the usual diagonal calls right hits wrong, as captions 0 and 1 find each other's picture."""
    alone = Gallery([None] * 4, [f"unique {row}" for row in range(5)], GALLERY.pair_of_text)
    relevance = alone.relevance()
    assert sets_of(relevance["text_to_image"]) == [{0}, {1}, {2}, {3}, {3}]
    assert sets_of(relevance["image_to_text"]) == [{0}, {1}, {2}, {3, 4}]
    found = measure(IMAGES, TEXTS, relevance)
    assert found["text_to_image/hit_rate@1"] == pytest.approx(1 / 5)
    assert found["image_to_text/hit_rate@1"] == 0


# -- queries shared by several processes ---------------------------------------------------------------


def catalog(pictures: int = 151, dim: int = 24) -> tuple[Gallery, NDArray[np.float32], NDArray[np.float32]]:
    """Pictures of products and their captions, some alike; a text lies near its picture. Five have no caption."""
    rng = np.random.default_rng(0)
    pair_of_text = np.sort(np.concatenate([np.arange(pictures)[5:], rng.integers(5, pictures, 170)]))
    groups = [None] * 5 + [f"g{n}" if n % 4 else None for n in rng.integers(70, size=pictures - 5)]
    captions = [f"caption {n}" for n in rng.integers(200, size=len(pair_of_text))]
    images = rng.standard_normal((pictures, dim))
    texts = images[pair_of_text] + 1.2 * rng.standard_normal((len(pair_of_text), dim))
    unit = [np.float32(rows / np.linalg.norm(rows, axis=1, keepdims=True)) for rows in (images, texts)]
    return Gallery(groups, captions, pair_of_text), unit[0], unit[1]


def all_at_once(ranks: NDArray[np.int64], relevance: Relevance) -> dict[str, float]:
    """The means written the plain way, over all positives of all queries."""
    counts, has = relevance.counts, relevance.counts > 0
    query_of = np.repeat(np.arange(len(counts)), counts)
    best = np.minimum.reduceat(ranks, relevance.offsets[:-1][has])
    ideal = np.concatenate(([0.0], np.cumsum(1.0 / np.log2(np.arange(2.0, 12)))))[np.minimum(counts, 10)]
    ordered = ranks[np.lexsort((ranks, query_of))]
    place = np.arange(len(ranks)) - relevance.offsets[query_of] + 1

    def mean_of_sums(values: NDArray[np.float64], divisor: NDArray[np.float64]) -> float:
        sums = np.bincount(query_of, weights=values, minlength=len(has))
        return float(np.mean(sums[has] / divisor[has]))

    found = {f"hit_rate@{k}": float(np.mean(best <= k)) for k in (1, 5, 10)}
    found["recall@10"] = mean_of_sums(ranks <= 10, counts)
    found["mrr@10"] = float(np.mean(np.where(best <= 10, 1.0 / best, 0.0)))
    found["ndcg@10"] = mean_of_sums(np.where(ranks <= 10, 1.0 / np.log2(ranks + 1.0), 0.0), ideal)
    found["map@10"] = mean_of_sums(np.where(ordered <= 10, place / ordered, 0.0), counts)
    found["median_rank"] = float(np.median(best))
    found["top1_accuracy"] = float(np.mean(best <= 1))
    return found | {"queries": float(has.sum()), "queries_without_positive": float((~has).sum())}


def test_the_numbers_are_those_of_the_formulas_over_everything_to_the_bit() -> None:
    gallery, images, texts = catalog()
    relevance = gallery.relevance()
    there = positive_ranks(texts, images, relevance["text_to_image"])
    back = positive_ranks(images, texts, relevance["image_to_text"])
    expected = {f"text_to_image/{k}": v for k, v in all_at_once(there, relevance["text_to_image"]).items()}
    expected |= {f"image_to_text/{k}": v for k, v in all_at_once(back, relevance["image_to_text"]).items()}
    found = measure(images, texts, relevance)
    assert found == expected
    assert list(found) == list(expected)
    assert found["image_to_text/queries_without_positive"] == 5
    assert 0.2 < found["text_to_image/map@10"] < 0.9


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 400])
def test_any_number_of_processes_finds_the_same_numbers_to_the_bit(world_size: int) -> None:
    """400 are more than there are queries. The control: the mean of the processes' means is another number."""
    gallery, images, texts = catalog()
    shares = [slice(rank, None, world_size) for rank in range(world_size)]
    parts = [query_values(images, texts, gallery.relevance(share), share) for share in shares]
    expected = measure(images, texts, gallery.relevance())
    assert mean_of(joined(parts)) == expected
    if 1 < world_size < 100:
        means = [mean_of(part)["image_to_text/map@10"] for part in parts]
        assert np.mean(means) != expected["image_to_text/map@10"]


def test_a_share_has_the_relevance_of_its_queries_alone() -> None:
    gallery, images, texts = catalog()
    share = slice(2, None, 5)
    mine, everything = gallery.relevance(share), gallery.relevance()
    for direction in ("text_to_image", "image_to_text"):
        assert sets_of(mine[direction]) == sets_of(everything[direction])[share]
    with pytest.raises(ValueError, match="queries but relevance for"):
        query_values(images, texts, everything, share)


def test_a_contiguous_share_will_do_too() -> None:
    gallery, images, texts = catalog()
    whole = query_values(images, texts, gallery.relevance())
    part = query_values(images, texts, gallery.relevance(slice(40, 90)), slice(40, 90))
    assert all(np.array_equal(whole[name][40:90], part[name], equal_nan=True) for name in whole)


@pytest.mark.parametrize("group", [None, ""])
def test_no_group_is_no_common_group(group: str | None) -> None:
    gallery = Gallery([group, group], ["a", "b"], np.array([0, 1]))
    assert sets_of(gallery.relevance()["text_to_image"]) == [{0}, {1}]


def test_a_group_named_like_a_caption_is_another_thing() -> None:
    gallery = Gallery(["red", "blue"], ["blue", "red"], np.array([0, 1]))
    assert sets_of(gallery.relevance()["text_to_image"]) == [{0}, {1}]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Red\t shoe ", "red shoe", True),
        ("ＲＥＤ shoe", "red shoe", True),  # full-width letters
        ("Straße", "STRASSE", True),
        ("한글", "한글", True),  # composed and decomposed
        ("red shoe", "red shoes", False),
        ("red-shoe", "red shoe", False),
        ("café", "cafe", False),
    ],
)
def test_captions_that_differ_only_in_form_are_the_same(a: str, b: str, same: bool) -> None:
    assert (normal_caption(a) == normal_caption(b)) == same
