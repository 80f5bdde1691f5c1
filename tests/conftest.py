"""Shared by all tests: one local Ray, pictures that are drawn, a tiny CLIP."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # or Ray's workers start through `uv run` again

import pytest
from PIL import Image, ImageDraw

from tests.faulty_store import FaultyStore, faulty_store

COLOURS = ("red", "green", "blue", "yellow", "purple", "black", "orange", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")

TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def draw_shape(colour: str, shape: str, shift: int, size: int = 40) -> Image.Image:
    """A coloured shape on white, moved a little by `shift`."""
    image = Image.new("RGB", (size, size), "white")
    draw, a, b = ImageDraw.Draw(image), 6 + shift % 5, size - 10 + shift // 5 % 5
    if shape == "circle":
        draw.ellipse((a, a, b, b), fill=colour)
    elif shape == "square":
        draw.rectangle((a, a, b, b), fill=colour)
    elif shape == "triangle":
        draw.polygon([(a, b), (b, b), ((a + b) // 2, a)], fill=colour)
    else:
        middle = (a + b) // 2
        draw.line((a, middle, b, middle), fill=colour, width=8)
        draw.line((middle, a, middle, b), fill=colour, width=8)
    return image


def write_shapes(folder: Path, copies: int) -> Path:
    """products.csv with `copies` pictures of each coloured shape; returns its path."""
    (folder / "images").mkdir(parents=True)
    rows = [["id", "image", "colour", "shape", "product"]]
    for colour in COLOURS:
        for shape in SHAPES:
            for copy in range(copies):
                name = f"{colour}-{shape}-{copy:03d}"
                draw_shape(colour, shape, copy).save(folder / "images" / f"{name}.png")
                rows.append([name, f"images/{name}.png", colour, shape, f"{name}"])
    with (folder / "products.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "products.csv"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests, and processes that they start, keep nothing in the cache of whoever runs them."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An open_clip JSON config of a CLIP that trains in seconds."""
    path = tmp_path_factory.mktemp("model") / "tiny-clip.json"
    path.write_text(json.dumps(TINY_CLIP))
    return str(path)


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """An S3 on loopback with an empty bucket; its address and keys stand in the environment, where workers look."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys | {"AWS_ENDPOINT_URL": f"http://{address}:{port}"})
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket="clipdist")
    yield "s3://clipdist"
    server.stop()


@pytest.fixture
def faulty(s3_bucket: str) -> Iterator[FaultyStore]:
    """A store with faults in front of that S3; `{s3_bucket}/...` leads through it while the test runs."""
    with faulty_store(os.environ["AWS_ENDPOINT_URL"]) as store:
        yield store


@pytest.fixture(scope="session")
def local_ray(s3_bucket: str) -> Iterator[None]:
    """Ray on this machine with two cores, for the whole test session."""
    import ray

    from clipdist import runtime

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    runtime.connect()
    yield
    ray.shutdown()
