"""Augmentation: a function of (seed, epoch, id) alone, that keeps what it promises to keep."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from clipdist.augment import AugmentConfig, augment

ALL = AugmentConfig(crop_scale=0.8, flip=0.5, colour=0.3)
IDS = [f"product {n}" for n in range(300)]


def places(width: int = 200, height: int = 240) -> Image.Image:
    """A picture whose pixels say where they are: red the column, green the row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 90)], axis=-1))


def digest(picture: Image.Image) -> str:
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def test_off_by_default_and_then_the_very_same_object() -> None:
    picture = places()
    assert not AugmentConfig().active
    assert augment(picture, AugmentConfig(), seed=1, epoch=2, id="a") is picture


@pytest.mark.parametrize("one", [{"crop_scale": 0.99}, {"flip": 0.1}, {"colour": 0.1}])
def test_each_change_alone_makes_it_active(one: dict[str, float]) -> None:
    config = AugmentConfig(**one)
    assert config.active
    before = digest(picture := places())
    changed = [digest(augment(picture, config, seed=0, epoch=0, id=name)) != before for name in IDS]
    assert any(changed)
    assert digest(picture) == before, "the picture given is left alone"


def test_another_process_makes_the_same_pictures() -> None:
    code = (
        "import tests.unit.test_augment as t\n"
        "print(*[t.digest(t.augment(t.places(), t.ALL, seed=3, epoch=1, id=name)) for name in reversed(t.IDS[:20])])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    here = [digest(augment(places(), ALL, seed=3, epoch=1, id=name)) for name in IDS[:20]]
    assert there[::-1] == here


def test_the_numbers_behind_it_never_change() -> None:
    """A crop and a flip move pixels only: these bytes are the same on every machine and Pillow."""
    config = AugmentConfig(crop_scale=0.5, flip=0.5)
    found = [augment(places(), config, seed=7, epoch=3, id=name) for name in ("a", "빨간 구두", "\ud83d")]
    assert [(picture.size, picture.getpixel((0, 0))) for picture in found] == [
        ((181, 205), (189, 23, 90)),
        ((193, 229), (6, 4, 90)),
        ((171, 227), (4, 1, 90)),
    ]


def test_seed_epoch_and_id_all_count() -> None:
    base = {"seed": 1, "epoch": 2, "id": "3"}
    others = [base, {**base, "seed": 2}, {**base, "epoch": 1}, {**base, "id": "4"}, {"seed": 12, "epoch": 3, "id": ""}]
    assert len({digest(augment(places(), ALL, **other)) for other in others}) == len(others)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("size", [(200, 240), (240, 60), (3, 200)])
def test_a_crop_keeps_its_share_and_nearly_its_aspect(scale: float, size: tuple[int, int]) -> None:
    picture, config = places(*size), AugmentConfig(crop_scale=scale)
    areas, aspects, corners = [], [], set()
    for name in IDS:
        crop = augment(picture, config, seed=0, epoch=0, id=name)
        areas.append(crop.width * crop.height / (size[0] * size[1]))
        aspects.append(crop.width / crop.height / (size[0] / size[1]))
        first, last = crop.getpixel((0, 0)), crop.getpixel((crop.width - 1, crop.height - 1))
        corners.add(first[:2])
        assert (last[0] - first[0] + 1, last[1] - first[1] + 1) == crop.size, (
            "one whole piece, neither scaled nor turned"
        )
    assert min(areas) >= scale
    assert max(areas) <= 1
    if min(size) > 100:
        assert min(areas) < scale + 0.1 * (1 - scale) + 0.01
        assert np.mean(areas) == pytest.approx((1 + scale) / 2, abs=0.03)
        assert 0.89 < min(aspects) < 1 < max(aspects) < 1.11
        assert len(corners) > 10


def test_flips_come_as_often_as_asked() -> None:
    picture = places()
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    for probability, low, high in ((0.0, 0, 0), (0.3, 0.2, 0.4), (1.0, 1, 1)):
        config = AugmentConfig(flip=probability)
        share = np.mean([augment(picture, config, seed=0, epoch=0, id=name).tobytes() == mirrored for name in IDS])
        assert low <= share <= high


def test_colour_changes_within_its_strength_and_on_both_sides() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))  # contrast and saturation leave one grey as it is
    for strength, reach in ((0.2, 10), (1.0, 50)):
        config = AugmentConfig(colour=strength)
        levels = [augment(grey, config, seed=0, epoch=0, id=name).getpixel((0, 0))[0] for name in IDS]
        assert 100 - reach - 1 <= min(levels) < 100 - 0.8 * reach
        assert 100 + 0.8 * reach < max(levels) <= 100 + reach + 1


def test_a_change_switched_on_leaves_the_others_as_they_were() -> None:
    crop, both = AugmentConfig(crop_scale=0.7), AugmentConfig(crop_scale=0.7, flip=1.0)
    for name in IDS[:20]:
        flipped = augment(places(), both, seed=0, epoch=0, id=name)
        assert digest(flipped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == digest(
            augment(places(), crop, seed=0, epoch=0, id=name)
        )


@pytest.mark.parametrize("bad", [{"crop_scale": 0}, {"crop_scale": 1.1}, {"flip": 1.1}, {"colour": -0.1}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig(**bad)
