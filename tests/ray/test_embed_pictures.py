"""Catalogs with bad and odd pictures: the good ones are embedded as they look, the bad ones are rejects with their
reason, and only those are tried again once they are mended."""

import json
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from clipdist import storage
from tests.conftest import draw_shape
from tests.ray.embed_jobs import Jobs, encoded, outcome, picture, write_catalog


def shape(colour: str = "red", kind: str = "triangle") -> Image.Image:
    return draw_shape(colour, kind, 3, size=64)


def bomb() -> bytes:
    """A PNG of a few bytes whose header says 20,000 x 20,000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def odd_pictures() -> dict[str, tuple[bytes, Image.Image, Image.Image]]:
    """By name: the file, the RGB picture that it shows, and one that careless readers would see."""
    red, blue = shape(), shape("blue", "cross")
    grey = np.asarray(shape("black", "circle").convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    clear = red.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.asarray(red)[:, :, 1] > 128, 0, 255).astype(np.uint8)))
    palette = clear.quantize(8, method=Image.Quantize.FASTOCTREE)
    black = Image.new("RGB", red.size, "black")
    black.paste(clear, mask=clear.getchannel("A"))
    turned = red.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    frames = {"append_images": [blue], "save_all": True, "duration": 100}
    return {
        "cmyk": (
            encoded(red.convert("CMYK"), "JPEG", quality=98, subsampling=0),
            red,
            Image.eval(red, lambda v: 255 - v),
        ),
        "deep": (encoded(deep), Image.fromarray(grey).convert("RGB"), Image.new("RGB", red.size, "white")),
        "palette": (encoded(palette), red, black),
        "turned": (encoded(turned, "JPEG", quality=98, subsampling=0, exif=exif), red, turned),
        "gif": (encoded(red, "GIF", **frames), red, blue),
        "webp": (encoded(red, "WEBP", lossless=True, **frames), red, blue),
    }


BAD = {
    "missing": (None, "missing"),
    "truncated": (encoded(shape(), "JPEG")[:600], "truncated"),
    "text": (b"this is not a picture", "not_an_image"),
    "bomb": (bomb(), "too_many_pixels"),
    "nothing": (b"", "empty"),
}


def test_good_and_bad_pictures_of_many_kinds(cluster: Jobs) -> None:
    home, more = cluster.home / "kinds", []
    odd = odd_pictures()
    for name, (data, looks, careless) in odd.items():
        for row, bytes_ in ((name, data), (f"{name}-looks", encoded(looks)), (f"{name}-careless", encoded(careless))):
            storage.write_atomic(str(home / row), bytes_)
            more.append((row, str(home / row)))
    for name, (data, _) in BAD.items():
        if data is not None:
            storage.write_atomic(str(home / f"{name}.jpg"), data)
        more.append((name, str(home / f"{name}.jpg")))
    catalog = write_catalog(str(home / "catalog"), 100 - len(more), more)
    driver = cluster.run(catalog, home / "out", towers=["images"], dtype="float32", max_rejected_fraction=0.05)
    print(f"{driver.seconds:.1f} s", driver.said(), sep="\n")
    found = outcome(home / "out")
    assert found.rejects == {("images", name): reason for name, (_, reason) in BAD.items()}
    for reason in (reason for _, reason in BAD.values()):
        assert f"images  {reason}" in driver.said()
    vectors = {row: np.frombuffer(data, np.float32) for row, data in found.vectors.items()}
    for name in odd:
        cosine, other = (float(vectors[name] @ vectors[f"{name}-{how}"]) for how in ("looks", "careless"))
        print(f"{name}: {cosine:.6f} to how it looks, {other:.6f} to what a careless reader sees")
        assert cosine > 0.999
        assert other < cosine - 1e-3
        if name not in ("cmyk", "turned"):  # JPEGs lose a little
            assert found.vectors[name] == found.vectors[f"{name}-looks"]


def test_rejected_rows_are_tried_again_when_they_are_mended(cluster: Jobs) -> None:
    home, rows = cluster.home / "mended", 64
    broken = list(range(3, 63, 3))  # 20 of them
    catalog = write_catalog(str(home / "catalog"), rows)
    cluster.run(catalog, home / "whole", shard_rows=32)
    whole = outcome(home / "whole")

    def mend(numbers: list[int]) -> None:
        for number in numbers:
            storage.write_atomic(str(home / f"catalog/pictures/{number:04d}.png"), encoded(picture(number)))

    for number in broken:
        (home / f"catalog/pictures/{number:04d}.png").write_bytes(b"broken")
    driver = cluster.start(catalog, home / "out", shard_rows=32)
    assert driver.wait() == 2, driver.said()
    print(driver.said())
    assert "Nothing was published" in driver.said()
    assert "retry_rejected=true" in driver.said()
    assert not (home / "out/manifests").exists()
    mend(broken[:10])
    cluster.forget()
    driver = cluster.run(catalog, home / "out", shard_rows=32, retry_rejected=True, max_rejected_fraction=0.2)
    first = sum(loaded for loaded, *_ in cluster.work("load"))
    found = outcome(home / "out")
    assert found.rejects == {("images", f"r{number:04d}"): "not_an_image" for number in broken[10:]}
    assert found.vectors.items() <= whole.vectors.items()
    print(f"{driver.seconds:.1f} s; {first} rows loaded after the first run stopped; 20 were rejects")
    mend(broken[10:])
    cluster.forget()
    driver = cluster.run(catalog, home / "out", shard_rows=32, retry_rejected=True)
    assert sum(loaded for loaded, *_ in cluster.work("load")) == 10, "only what was rejected is read"
    assert sum(rows for rows, *_ in cluster.work("encode")) == 10
    assert outcome(home / "out") == whole
    cluster.forget()
    driver = cluster.run(catalog, home / "out", shard_rows=32, retry_rejected=True)
    assert not cluster.work("load")
    assert driver.seconds < 30
    assert outcome(home / "out") == whole


class _Pictures(BaseHTTPRequestHandler):
    asked: ClassVar[Counter[str]] = Counter()

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        kind, number = self.path.strip("/").split("/")
        if kind == "hangs":
            time.sleep(60)
        elif kind == "later" and self.asked[self.path] == 1:
            self.send_error(503)
        elif kind == "gone":
            self.send_error(404)
        elif kind == "inside":
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.2:{self.server.server_address[1]}/good/{number}")
            self.end_headers()
        else:
            data = encoded(picture(int(number)))
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("0.0.0.0", 0), _Pictures)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_pictures_of_a_web_server(cluster: Jobs, web: str) -> None:
    home = cluster.home / "web"
    kinds = {"good": 16, "later": 8, "gone": 3, "hangs": 2, "inside": 2}
    rows = [(f"{kind}-{n}", f"{web}/{kind}/{n}") for kind, count in kinds.items() for n in range(count)]
    catalog = write_catalog(str(home / "catalog"), 16, rows)
    settings = {"towers": ["images"], "max_rejected_fraction": 0.5, "unit_rows": 64}
    cluster.faults(public="127.0.0.1")
    driver = cluster.run(catalog, home / "out", seconds=150, **settings)
    print(f"{driver.seconds:.1f} s", driver.said(), sep="\n")
    found = outcome(home / "out")
    reasons = {"gone": "fetch_not_found", "hangs": "fetch_timeout", "inside": "fetch_private_address"}
    expected = {("images", f"{kind}-{n}"): reasons[kind] for kind in reasons for n in range(kinds[kind])}
    assert found.rejects == expected
    for kind in ("good", "later"):
        for n in range(kinds[kind]):
            assert found.vectors[f"{kind}-{n}"] == found.vectors[f"r{n:04d}"], "the same picture from a disk"
    assert not [path for path in _Pictures.asked if path.startswith("/good/") and _Pictures.asked[path] > 1]
    assert all(_Pictures.asked[f"/gone/{n}"] == 1 for n in range(kinds["gone"])), "what is gone is asked for once"


def test_private_addresses_need_permission(cluster: Jobs, web: str) -> None:
    home = cluster.home / "private"
    rows = [(f"good-{n}", f"{web}/good/{n}") for n in range(4)] + [(f"inside-{n}", f"{web}/inside/{n}") for n in (0, 1)]
    catalog = write_catalog(str(home / "catalog"), 20, rows)
    settings = {"towers": ["images"], "max_rejected_fraction": 0.5}
    cluster.run(catalog, home / "refused", **settings)
    found = outcome(home / "refused")
    assert Counter(found.rejects.values()) == {"fetch_private_address": 6}
    cluster.run(catalog, home / "allowed", allow_private_hosts=True, **settings)
    found = outcome(home / "allowed")
    assert not found.rejects
    assert len(found.vectors) == 26
    manifest = json.loads(Path(home / "allowed/manifests/00000001.json").read_text())
    assert manifest["stamp"]["recorded"]["limits"]["allow_private_hosts"] is True
