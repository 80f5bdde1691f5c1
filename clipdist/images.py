"""Bytes -> RGB picture, or a BadImage with its reason: the one way in which all jobs decode.

A picture that is decoded differently in training, catalog and query is a silent loss of quality, so nothing
else in the package opens pictures. `DECODE_ID` names this way of decoding and stands in every stamp.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

DECODE_ID = 1
"""Raised by hand whenever decoded pixels change; golden pictures in tests/unit/test_images.py guard it."""

_READERS: dict[str, tuple[bytes, type[ImageFile]]] = {
    "JPEG": (rb"\xff\xd8\xff", JpegImageFile),
    "PNG": (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    "WEBP": (rb"RIFF....WEBP", WebPImageFile),
    "GIF": (rb"GIF8[79]a", GifImageFile),
    "BMP": (rb"BM", BmpImageFile),
    "TIFF": (rb"II[*+]\0|MM\0[*+]", TiffImageFile),
}
# Nothing else is read. AVIF is an optional part of Pillow: one machine would decode what another one rejects.
FORMATS = tuple(_READERS)
REASONS = ("empty", "too_many_bytes", "not_an_image", "too_many_pixels", "truncated", "broken")

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_RESIZED_PIXELS = 1 << 26
_WARNINGS_LOCK = threading.Lock()


class BadImage(Exception):
    """Bytes that are not a usable picture. `reason` is one of REASONS, or says why there are no bytes; the message is
    for a person. `transient`: trying again later may help."""

    def __init__(self, reason: str, message: str, transient: bool = False) -> None:
        super().__init__(reason, message, transient)  # all in args, so that it survives pickling
        self.reason = reason
        self.transient = transient

    def __str__(self) -> str:
        return str(self.args[1])


def decode(data: bytes, *, max_image_bytes: int = 50 << 20, max_pixels: int = 100_000_000) -> Image.Image:
    """Decode a picture file to mode RGB, upright, without metadata.

    EXIF orientation is applied; transparency of any kind is laid on white; of an animation the first frame
    counts; colour profiles are ignored (as open_clip does). 16-bit grey is divided by 257. 32-bit and float
    grey have no fixed white: their range is 0..1 (float only), 0..255 or 0..65535, the first that holds all
    values, else the picture's own minimum..maximum; infinities and NaN count as the minimum.

    Raises BadImage: `max_pixels` is checked against the header, before any pixel is decoded.
    """
    image = _open(data, max_image_bytes, max_pixels)
    return _pixels(image, data)


def bound(
    data: bytes,
    max_side: int,
    quality: int = 92,
    *,
    max_image_bytes: int = 50 << 20,
    max_pixels: int = 100_000_000,
) -> tuple[bytes, int, int]:
    """Check a picture file and bound its longer side: (bytes, width, height), the size as `decode` gives it.

    The given bytes come back unchanged if the longer side is at most `max_side` pixels; else a JPEG (4:4:4,
    no metadata) whose longer side is `max_side`. A JPEG that shrinks to less than half is decoded at a
    reduced scale, never below twice `max_side` (libjpeg's DCT scaling; all bytes are still read and checked).
    Raises BadImage.
    """
    image = _open(data, max_image_bytes, max_pixels)
    long_side, short_side = max(image.size), min(image.size)
    if long_side <= max_side:
        whole = _pixels(image, data)
        return data, whole.width, whole.height
    scale = max_side / long_side
    image.draft(None, (int(image.width * scale * 2) + 1, int(image.height * scale * 2) + 1))  # JPEG only
    large = _pixels(image, data)
    short = max(1, round(short_side * scale))
    size = (max_side, short) if large.width >= large.height else (short, max_side)
    small = large.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return _jpeg(small, quality, subsampling=0), small.width, small.height


def fit(
    image: Image.Image,
    size: int,
    mode: Literal["shortest", "longest", "squash"],
    interpolation: Literal["bicubic", "bilinear", "nearest"],
    fill: int = 0,
) -> NDArray[np.uint8]:
    """Bring an RGB picture to uint8 [size, size, 3], bit for bit as open_clip's evaluation transform does.

    shortest: the shorter side becomes `size`, then the centre is cropped. longest: the longer side becomes
    `size`, the rest is padded with the grey value `fill`. squash: both sides become `size`.
    Where open_clip fails: a side that rounds to 0 is 1 pixel; of a picture so long that it would exceed
    64 megapixels when resized, only the middle is (the crop may move by less than a pixel).
    "nearest" is Pillow's.
    """
    method = _FILTERS[interpolation]
    image = image if image.mode == "RGB" else image.convert("RGB")
    if mode == "squash":
        return np.array(image.resize((size, size), method))
    if mode == "longest":
        ratio = max(image.width / size, image.height / size)
        width, height = max(1, round(image.width / ratio)), max(1, round(image.height / ratio))
        square = Image.new("RGB", (size, size), (fill, fill, fill))
        square.paste(image.resize((width, height), method), ((size - width) // 2, (size - height) // 2))
        return np.array(square)
    if mode != "shortest":
        raise ValueError(f"mode is {mode!r}; expected shortest, longest or squash")
    if size * size * max(image.size) > _MAX_RESIZED_PIXELS * min(image.size):
        image = _middle(image)
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.array(image.resize((width, height), method).crop((left, top, left + size, top + size)))


@dataclass(frozen=True)
class Preprocess:
    """How a decoded picture becomes the image tower's input; stands in every stamp."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear", "nearest"]
    resize_mode: Literal["shortest", "longest", "squash"]
    fill_color: int

    def __call__(self, picture: Image.Image) -> NDArray[np.uint8]:
        """RGB picture -> uint8 [size, size, 3]; the towers normalise on their device."""
        return fit(picture, self.size, self.resize_mode, self.interpolation, self.fill_color)


def thumbnail(image: Image.Image, side: int) -> bytes:
    """JPEG bytes of an RGB picture whose longer side is at most `side` pixels; never enlarged."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return _jpeg(small, quality=85, subsampling=2)


def _open(data: bytes, max_image_bytes: int, max_pixels: int) -> ImageFile:
    """Read the header. Not with Image.open, which would add its own pixel limit and a warning."""
    if not data:
        raise BadImage("empty", "the file is empty")
    if len(data) > max_image_bytes:
        raise BadImage("too_many_bytes", f"the file has {len(data)} bytes; the limit is {max_image_bytes}")
    _, reader = _READERS[_format(data)]
    try:
        image = reader(io.BytesIO(data))
    except Exception as error:
        raise _bad(error, data) from error
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        raise BadImage("too_many_pixels", f"the picture has {size} pixels; the limit is {max_pixels}")
    return image


def _format(data: bytes) -> str:
    for name, (start, _) in _READERS.items():
        if re.match(start, data, re.DOTALL):
            return name
    raise BadImage("not_an_image", f"not one of {', '.join(FORMATS)}; the file starts with {data[:12]!r}")


def _pixels(image: ImageFile, data: bytes) -> Image.Image:
    try:
        _load(image)
        rgb = _upright(image, _rgb(image, data))
    except Exception as error:
        raise _bad(error, data) from error
    rgb.info = {}
    return rgb


def _load(image: ImageFile) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or image.width * image.height <= limit:
        image.load()
        return
    # The TIFF reader warns here about a size that was accepted above. Rare, so the lock costs nothing.
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image.load()


def _upright(image: ImageFile, rgb: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged metadata is no reason to lose a picture
        return rgb
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _rgb(image: ImageFile, data: bytes) -> Image.Image:
    if image.format == "PNG" and "transparency" in image.info:
        image.info["transparency"] = _clear_colour(image, depth=data[24])  # bit depth, in the IHDR chunk
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        grey = _grey8(values)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGB", layer.size, (255, 255, 255))
    white.paste(layer, mask=layer.getchannel("A"))
    return white


def _clear_colour(image: ImageFile, depth: int) -> Any:
    """The transparent colour of a PNG, which Pillow keeps at the file's bit depth, at that of the pixels."""
    clear = image.info["transparency"]
    if image.mode == "RGB" and depth == 16:
        return tuple(value >> 8 for value in clear)
    if image.mode == "L" and depth in (2, 4):
        return clear * (255 // (2**depth - 1))
    return clear


def _grey8(values: NDArray[Any]) -> NDArray[np.uint8]:
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        table: NDArray[np.uint8] = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # x / 257, rounded
        grey: NDArray[np.uint8] = table[values]
        return grey
    wide = values.astype(np.float64)
    finite = np.isfinite(wide)
    wide[~finite] = wide[finite].min() if finite.any() else 0.0
    black, white = float(wide.min()), float(wide.max())
    for top in (1, 255, 65535) if values.dtype.kind == "f" else (255, 65535):
        if black >= 0 and white <= top:
            black, white = 0.0, float(top)
            break
    scaled = (wide - black) * (255 / (white - black)) if white > black else np.zeros_like(wide)
    return np.rint(scaled).astype(np.uint8)


def _bad(error: Exception, data: bytes) -> BadImage:
    """The BadImage that stands for whatever Pillow raised."""
    if isinstance(error, MemoryError):
        raise error  # says something about this machine, not about the picture
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return BadImage("too_many_pixels", f"the picture is too large for Pillow: {error}")
    if _ends_early(error, data):
        return BadImage("truncated", f"the {_format(data)} file is cut off after {len(data)} bytes")
    return BadImage("broken", f"the {_format(data)} file cannot be decoded: {error or type(error).__name__}")


def _ends_early(error: Exception, data: bytes) -> bool:
    """Whether the file stops before its own end mark, or is shorter than it says."""
    match _format(data):
        case "JPEG":
            return b"\xff\xd9" not in data[-1024:]
        case "PNG":
            return b"IEND" not in data[-1024:]
        case "GIF":
            return not data.rstrip(b"\0").endswith(b";")
        case "WEBP":
            return int.from_bytes(data[4:8], "little") + 8 > len(data)
        case "BMP":
            return int.from_bytes(data[2:6], "little") > len(data)
        case _:  # a TIFF has no end mark: is its directory, or a strip of pixels, beyond the end?
            order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
            start = int.from_bytes(data[4:8], order)
            entries = int.from_bytes(data[start : start + 2], order)
            return start + 2 + 12 * entries > len(data) or "truncated" in str(error)


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a very long picture, eight times as long as it is wide, on the same pixel centre."""
    short, long = sorted(image.size)
    keep = short * 8 + (long - short * 8) % 2
    start = (long - keep) // 2
    if image.width > image.height:
        return image.crop((start, 0, start + keep, short))
    return image.crop((0, start, short, start + keep))


def _jpeg(image: Image.Image, quality: int, subsampling: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()
