"""What counts as right: a small example worked out by hand, in both directions."""

import numpy as np
import pytest

from clipdist.metrics import Relevance
from clipdist.retrieval import Gallery, measure, normal_caption

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
