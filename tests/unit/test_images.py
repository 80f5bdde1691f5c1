"""Decoding, bounding and fitting pictures: exact pixels, every way to be bad, equality with open_clip."""

import hashlib
import io
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile

from clipdist import images
from clipdist.images import BadImage, bound, decode, fit, thumbnail

Pixels = NDArray[np.uint8]
Mode = Literal["shortest", "longest", "squash"]
Interpolation = Literal["bicubic", "bilinear", "nearest"]


def pattern(width: int, height: int) -> Image.Image:
    """An RGB picture out of integer arithmetic: the same on every machine, and without any symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [(x * 7 + y * 3) % 256, (x * x + y * 11) % 256, (x * y * 5 + y * 13 + 40) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    return pattern(7, 5).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def distance(image: Image.Image, x: int, y: int, colour: tuple[float, ...]) -> int:
    """How far one pixel is from a colour, over all channels at most."""
    return int(np.abs(pixels(image)[y, x] - np.array(colour)).max())


def pixels(image: Image.Image) -> Pixels:
    return np.asarray(image)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, clear: bytes = b"") -> bytes:
    """A PNG byte by byte, for the kinds that Pillow does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    transparency = chunk(b"tRNS", clear) if clear else b""
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", header, transparency, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


def reason(data: bytes, **limits: int) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, **limits)
    assert caught.value.reason in images.REASONS
    return caught.value.reason


LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
}


# --- pixels ---------------------------------------------------------------------------------------


def test_golden_pixels() -> None:
    """If this fails, decoded pixels have changed: raise DECODE_ID, then write the new numbers here."""
    assert images.DECODE_ID == 1
    picture = pattern(33, 21)
    golden = "c23d82360fe38c26"
    for kind, options in LOSSLESS.items():
        image = decode(encoded(picture, kind, **options))
        assert (image.mode, image.size) == ("RGB", (33, 21))
        assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == golden, kind
    palette = picture.quantize(16)
    assert decode(encoded(palette, "GIF")).tobytes() == palette.convert("RGB").tobytes()
    assert decode(encoded(palette, "PNG")).tobytes() == palette.convert("RGB").tobytes()


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_golden_jpeg(options: dict[str, Any]) -> None:
    picture = smooth(64, 48)
    decoded = pixels(decode(encoded(picture, "JPEG", quality=95, **options))).astype(int)
    assert np.abs(decoded - pixels(picture)).mean() < 2.5
    corner, middle = decoded[0, 0], decoded[24, 32]
    assert np.abs(corner - np.array(pixels(picture)[0, 0], int)).max() <= 6
    assert np.abs(middle - np.array(pixels(picture)[24, 32], int)).max() <= 6


def test_grey_cmyk_and_one_bit() -> None:
    assert decode(encoded(Image.new("L", (3, 2), 77), "PNG")).getpixel((1, 1)) == (77, 77, 77)
    assert decode(encoded(Image.new("1", (3, 2), 1), "PNG")).getpixel((1, 1)) == (255, 255, 255)
    for ink, colour in (((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0))):
        for kind in ("JPEG", "TIFF"):  # Adobe's CMYK JPEGs are inverted; Pillow writes and reads them so
            image = decode(encoded(Image.new("CMYK", (16, 16), ink), kind))
            assert distance(image, 8, 8, colour) <= 3, (kind, ink)


def test_transparency_is_laid_on_white() -> None:
    hidden = Image.new("RGBA", (2, 1), (0, 200, 0, 0))
    hidden.putpixel((1, 0), (10, 20, 30, 128))
    half = tuple(round(255 + (value - 255) * 128 / 255) for value in (10, 20, 30))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        data = encoded(hidden, kind, **options)
        assert decode(data).getpixel((0, 0)) == (255, 255, 255)
        assert distance(decode(data), 1, 0, half) <= 1
    plain = Image.open(io.BytesIO(encoded(hidden, "PNG"))).convert("RGB")
    assert plain.getpixel((0, 0)) == (0, 200, 0), "control: a plain convert shows the hidden colour"

    assert decode(encoded(Image.new("LA", (1, 1), (9, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    for transparency, white in ((0, (0,)), (b"\0\0", (0, 1))):
        data = encoded(palette, "PNG", transparency=transparency)
        shown = [decode(data).getpixel((x, 0)) == (255, 255, 255) for x in (0, 1)]
        assert shown == [0 in white, 1 in white]
    assert decode(encoded(palette, "GIF", transparency=1)).getpixel((1, 0)) == (255, 255, 255)


def test_transparent_colour_of_grey_and_rgb_png() -> None:
    rgb = png(2, 1, 8, 2, b"\0" + bytes([1, 2, 3, 1, 2, 4]), clear=struct.pack(">3H", 1, 2, 3))
    assert [decode(rgb).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (1, 2, 4)]
    deep = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0, 0x8000)
    rgb16 = png(2, 1, 16, 2, b"\0" + deep, clear=struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))
    assert [decode(rgb16).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 128)]
    grey16 = png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 0, 257), clear=struct.pack(">H", 0))
    assert pixels(decode(grey16))[0, :, 0].tolist() == [255, 1]
    grey2 = png(4, 1, 2, 0, b"\0\x1b", clear=struct.pack(">H", 1))  # levels 0, 1, 2, 3; 1 is transparent
    assert pixels(decode(grey2))[0, :, 0].tolist() == [0, 255, 170, 255]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.array([[0, 128, 129, 257, 32768, 65534, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255, 255]
    for mode in ("I;16", "I;16B"):
        image = Image.frombytes(mode, (7, 1), ramp.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
        for kind in ("PNG", "TIFF") if mode == "I;16" else ("TIFF",):
            assert pixels(decode(encoded(image, kind)))[0, :, 0].tolist() == expected, (mode, kind)


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int32, [0, 10, 255], [0, 10, 255]),
        (np.int32, [0, 257, 65535], [0, 1, 255]),
        (np.int32, [-100_000, 0, 100_000], [0, 128, 255]),
        (np.int32, [70_000, 70_000, 70_000], [0, 0, 0]),
        (np.float32, [0.0, 0.5, 1.0], [0, 128, 255]),
        (np.float32, [0.0, 100.4, 255.0], [0, 100, 255]),
        (np.float32, [-1.0, 0.0, 1.0], [0, 128, 255]),
        (np.float32, [np.nan, 0.2, 1.0], [51, 51, 255]),
        (np.float32, [np.nan, np.inf, -np.inf], [0, 0, 0]),
        (np.float32, [-3e38, 0.0, 3e38], [0, 128, 255]),
    ],
)
def test_wide_grey_has_a_sensible_range(dtype: Any, values: list[float], expected: list[int]) -> None:
    data = encoded(Image.fromarray(np.array([values], dtype)), "TIFF")
    assert pixels(decode(data))[0, :, 0].tolist() == expected


UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_orientation_is_applied_once(orientation: int, kind: str) -> None:
    picture = smooth(24, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = LOSSLESS.get(kind, {"quality": 98, "subsampling": 0})
    image = decode(encoded(picture, kind, exif=exif, **options))
    expected = UPRIGHT[orientation](pixels(picture))
    assert pixels(image).shape == expected.shape
    assert np.abs(pixels(image).astype(int) - expected).max() <= (0 if kind in LOSSLESS else 12)
    assert not image.info
    assert not image.getexif()


def test_first_frame_of_an_animation() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(red, kind, save_all=True, append_images=[blue])
        assert distance(decode(data), 4, 4, (255, 0, 0)) <= 3, kind


# --- bad pictures ---------------------------------------------------------------------------------


def test_reasons_for_what_is_no_picture() -> None:
    assert reason(b"") == "empty"
    assert reason(b"<!DOCTYPE html><html>") == "not_an_image"
    assert reason(b"RIFF\0\0\0\0WAVEfmt ") == "not_an_image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not_an_image"
    assert reason(encoded(pattern(8, 8), "ICO")) == "not_an_image", "a format that Pillow knows and we do not"
    assert reason(encoded(pattern(8, 8), "PPM")) == "not_an_image"
    assert reason(encoded(pattern(8, 8), "PNG"), max_image_bytes=50) == "too_many_bytes"
    assert reason(encoded(pattern(8, 8), "PNG"), max_pixels=63) == "too_many_pixels"
    assert decode(encoded(pattern(8, 8), "PNG"), max_pixels=64).size == (8, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "TIFF tiff_lzw"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_truncated(kind: str, part: float) -> None:
    kind, _, compression = kind.partition(" ")
    data = encoded(pattern(60, 40), kind, compression=compression or None)
    assert decode(data).size == (60, 40)
    assert reason(data[: int(len(data) * part)]) == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_broken() -> None:
    data = bytearray(encoded(pattern(60, 40), "PNG"))
    data[len(data) // 2] ^= 0xFF  # the checksum of the chunk no longer holds
    assert reason(bytes(data)) == "broken"
    assert reason(b"\xff\xd8\xff" + b"x" * 100 + b"\xff\xd9") == "broken"


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_damage_never_raises_anything_else(kind: str) -> None:
    data = encoded(pattern(40, 30), kind)
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(100):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), size=3):
            damaged[place] = random.integers(0, 256)
        try:
            assert decode(bytes(damaged), max_pixels=1_000_000).mode == "RGB"
            outcomes.add("fine")
        except BadImage as error:
            outcomes.add(error.reason)
    assert outcomes <= {"fine", *images.REASONS}


def test_pixel_cap_is_ours_and_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above its limit and raises above twice that; both are set low here to stay small."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for width, cap in ((40, 1_000), (40, 10_000), (60, 1_000)):  # 1600 pixels: a warning; 3600: an error
        for kind, options in [*LOSSLESS.items(), ("JPEG", {}), ("GIF", {})]:
            data = encoded(pattern(width, width), kind, **options)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if width * width > cap:
                    assert reason(data, max_pixels=cap) == "too_many_pixels"
                else:
                    assert decode(data, max_pixels=cap).size == (width, width)
    with pytest.warns(Image.DecompressionBombWarning):  # control: the limit is in force
        Image.open(io.BytesIO(encoded(pattern(40, 40), "PNG")))


def test_a_small_file_of_many_pixels_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(data) < 30_000

    def never(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    assert reason(data) == "too_many_pixels"


def test_damaged_metadata_does_not_lose_the_picture() -> None:
    data = encoded(pattern(16, 16), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
    assert decode(data).size == (16, 16)


def test_bad_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadImage("truncated", "cut off")))
    assert (type(error), error.reason, str(error)) == (BadImage, "truncated", "cut off")


# --- bound, fit, thumbnail ------------------------------------------------------------------------


def test_bound_keeps_small_pictures_as_they_are() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(pattern(40, 30), "JPEG", exif=exif)
    assert bound(data, 40) == (data, 30, 40)
    assert bound(data, 39)[0] != data, "control"


@pytest.mark.parametrize("size", [(400, 300), (301, 400), (1000, 3), (3, 1000), (641, 640), (100, 100), (65, 64)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_bound_shrinks_the_longer_side_exactly(size: tuple[int, int], kind: str) -> None:
    picture = smooth(*size)
    exif = Image.Exif()
    exif[0x0112] = 6
    data, width, height = bound(encoded(picture, kind, exif=exif, quality=95), 64)
    stored = decode(data)
    assert data.startswith(b"\xff\xd8\xff")
    assert b"Exif" not in data
    assert stored.size == (width, height)
    short = max(1, round(min(size) * 64 / max(size)))
    assert (width, height) == ((short, 64) if size[0] >= size[1] else (64, short))
    expected = picture.transpose(Image.Transpose.ROTATE_270).resize((width, height), Image.Resampling.BICUBIC)
    assert np.abs(pixels(stored).astype(int) - pixels(expected)).mean() < 6
    assert Image.open(io.BytesIO(data)).layer[0][1:3] == (1, 1), "4:4:4"  # type: ignore[attr-defined]


def test_bound_checks_what_it_shrinks() -> None:
    data = encoded(pattern(800, 600), "JPEG")
    with pytest.raises(BadImage) as caught:
        bound(data[: len(data) * 9 // 10], 64)
    assert caught.value.reason == "truncated"
    with pytest.raises(BadImage, match="800 x 600"):
        bound(data, 64, max_pixels=1000)


SHAPES = [(1, 1), (1, 40), (500, 1), (300, 17), (17, 300), (32, 32), (32, 50), (50, 32), (31, 33), (33, 31)]
SHAPES += [(97, 64), (64, 97), (5, 7), (63, 64), (640, 479), (101, 100)]


def open_clip_pixels(image: Image.Image, size: int, mode: str, interpolation: str, fill: int) -> Pixels:
    transform = pytest.importorskip("open_clip.transform")
    config = transform.PreprocessCfg(
        size=size,
        interpolation=interpolation,
        resize_mode=mode,
        fill_color=fill,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    tensor = transform.image_transform_v2(config, is_train=False)(image)
    result: Pixels = (tensor * 255).round().byte().permute(1, 2, 0).numpy()
    return result


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, 37])
def test_fit_is_open_clip_to_the_last_bit(mode: Mode, interpolation: Interpolation, size: int) -> None:
    for width, height in SHAPES:
        if mode == "longest" and round(min(width, height) * size / max(width, height)) == 0:
            continue  # open_clip fails there
        image = pattern(width, height)
        expected = open_clip_pixels(image, size, mode, interpolation, fill=200)
        ours = fit(image, size, mode, interpolation, fill=200)
        assert ours.shape == (size, size, 3)
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, expected, err_msg=f"{width} x {height}")


def test_fit_control_that_differs() -> None:
    image = pattern(97, 64)
    expected = open_clip_pixels(image, 32, "shortest", "bicubic", fill=0)
    assert (fit(image, 32, "shortest", "bilinear", 0) != expected).any()
    assert (fit(image, 32, "squash", "bicubic", 0) != expected).any()
    shifted = image.crop((1, 0, 97, 64))
    assert (fit(shifted, 32, "shortest", "bicubic", 0) != expected).any()
    padded = fit(image, 32, "longest", "bicubic", 7)
    assert (padded[0] == 7).all()
    assert (padded != open_clip_pixels(image, 32, "longest", "bicubic", fill=8)).any()


def test_fit_nearest_copies_pixels() -> None:
    image = pattern(8, 8)
    np.testing.assert_array_equal(
        fit(image, 16, "shortest", "nearest", 0), np.kron(pixels(image), np.ones((2, 2, 1), np.uint8))
    )


def test_fit_of_extreme_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    thin = fit(pattern(1, 500), 32, "longest", "bicubic", fill=9)
    assert (thin[:, :15] == 9).all()
    assert (thin[:, 16:] == 9).all()
    for shape in ((300, 4), (301, 4), (4, 300), (3, 301), (1, 400)):
        image = smooth(*shape)
        whole = fit(image, 32, "shortest", "bicubic", 0).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(images, "_MAX_RESIZED_PIXELS", 1)
            middle = fit(image, 32, "shortest", "bicubic", 0).astype(int)
        assert np.abs(whole - middle).max() <= 3, shape
    assert fit(Image.new("RGB", (1, 3_000_000)), 32, "shortest", "bicubic", 0).shape == (32, 32, 3)


def test_thumbnail() -> None:
    shapes = {(400, 300): (64, 48), (300, 400): (48, 64), (40, 30): (40, 30), (900, 2): (64, 1)}
    for size, expected in shapes.items():
        image = smooth(*size)
        assert decode(thumbnail(image, 64)).size == expected
        assert image.size == size, "the given picture stays as it is"
