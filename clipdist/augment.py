"""Small random changes of training pictures: a pure function of (seed, epoch, id).

The same row at the same epoch is changed alike on every worker, process and machine, so runs on another number of
workers, and resumed ones, see the same pictures. The model's own resizing (`images.fit`) follows.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image, ImageEnhance
from pydantic import Field

from clipdist.config import Section

ASPECT = (0.9, 1.1)
_COLOURS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class AugmentConfig(Section):
    """Random changes of training pictures. Everything is off by default; validation pictures are never changed."""

    crop_scale: float = Field(1.0, gt=0, le=1)
    """Smallest share of a picture's area that a random crop keeps; 1: no crop. Products that fill the picture stay
    whole near 0.9."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a left-right flip; 0 where left and right mean something, such as printed text."""
    colour: float = Field(0.0, ge=0, le=1)
    """Strength of random brightness, contrast and saturation: at 1 each is multiplied by 0.5 to 1.5. Little or none
    where captions name colours."""

    @property
    def active(self) -> bool:
        """Whether any picture may change."""
        return self.crop_scale < 1 or self.flip > 0 or self.colour > 0


def augment(picture: Image.Image, config: AugmentConfig, *, seed: int, epoch: int, id: str) -> Image.Image:
    """The picture (RGB) cropped, flipped and recoloured by chance; the very same object where the config is inactive.

    The crop keeps a share of the area in crop_scale..1, evenly drawn, and its width to height is 0.9 to 1.1 times the
    picture's. Each change has its own random number: switching one on or off leaves the others as they were.
    """
    if not config.active:
        return picture
    area, aspect, left, top, flip, *colours = _random(seed, epoch, id)
    if config.crop_scale < 1:
        box = _box(picture.size, 1 - area * (1 - config.crop_scale), aspect, left, top)
        picture = picture.crop(box)
    if flip < config.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.colour > 0:
        for enhance, draw in zip(_COLOURS, colours, strict=True):
            picture = enhance(picture).enhance(1 + config.colour * (draw - 0.5))
    return picture


def _random(seed: int, epoch: int, id: str) -> list[float]:
    """Eight numbers in [0, 1) out of the 64 bytes of one hash."""
    key = f"{seed}:{epoch}:{id}".encode("utf-8", "surrogatepass")
    words = np.frombuffer(hashlib.blake2b(key, digest_size=64, person=b"augment").digest(), "<u8")
    return [int(word >> np.uint64(11)) * 2.0**-53 for word in words]


def _box(size: tuple[int, int], area: float, aspect: float, left: float, top: float) -> tuple[int, int, int, int]:
    """A crop of this share of the area. Its aspect is drawn where both sides fit, so that no area is lost."""
    low, high = max(ASPECT[0], area), min(ASPECT[1], 1 / area)
    ratio = low + aspect * (high - low)
    shares = (math.sqrt(area * ratio), math.sqrt(area / ratio))
    width, height = (min(side, math.ceil(side * share)) for side, share in zip(size, shares, strict=True))
    x, y = int(left * (size[0] - width + 1)), int(top * (size[1] - height + 1))
    return x, y, x + width, y + height
