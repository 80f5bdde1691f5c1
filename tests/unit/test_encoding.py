"""Rows are loaded and encoded: second attempts, padded batches, batches that are too large for a GPU."""

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipdist import loading, models
from clipdist.catalog import EmbedConfig
from clipdist.config import load
from clipdist.encoding import Encoder
from clipdist.images import BadImage
from clipdist.loading import Times, load_rows, rejects_of
from clipdist.models import ModelConfig
from clipdist.towers import Towers
from tests.unit.test_images import encoded


def config(model: str = "m", **settings: Any) -> EmbedConfig:
    values = {"output": "o", "pairs": "p", "model.name": model, **settings}
    made: EmbedConfig = load(EmbedConfig, None, [f"{name}={value}" for name, value in values.items()]).config
    return made


@pytest.fixture(scope="module")
def towers(tiny_clip: str) -> Towers:
    torch.manual_seed(0)
    return models.load(ModelConfig(name=tiny_clip))


def pixels(rows: int, towers: Towers) -> Any:
    size = towers.preprocess.size
    return np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_do_not_depend_on_what_else_is_in_the_unit(towers: Towers, dtype: str) -> None:
    encoder, shown = Encoder(config(batch_rows=8, dtype=dtype), towers), pixels(21, towers)
    whole = encoder.images(shown)
    assert (whole.shape, whole.dtype) == ((21, towers.dim), np.dtype(dtype))
    np.testing.assert_allclose(np.linalg.norm(whole.astype(np.float64), axis=1), 1, rtol=2e-3)
    np.testing.assert_array_equal(encoder.images(shown[:3]), whole[:3], "padded")
    assert not np.array_equal(encoder.images(shown[1:4]), whole[:3]), "the control"
    assert encoder.images(shown[:0]).shape == (0, towers.dim)
    assert encoder.texts([]).shape == (0, towers.dim)


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(towers: Towers) -> None:
    encoder, shown, sizes = Encoder(config(batch_rows=16), towers), pixels(20, towers), []

    def small_memory(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        if len(batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return towers.image_embeddings(batch)

    found = encoder._batches(torch.from_numpy(shown), small_memory)
    assert sizes == [16, 8, 4, 4, 4, 4, 4]
    np.testing.assert_allclose(found.astype(np.float32), encoder.images(shown).astype(np.float32), atol=2e-3)
    assert encoder.batch_rows == 4


def test_one_row_that_does_not_fit_is_told(towers: Towers) -> None:
    def no_memory(batch: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Encoder(config(batch_rows=4), towers)._batches(torch.zeros((2, 3)), no_memory)


class Store:
    """Pictures that fail at first, by their uri: `once-3` passes at the second attempt, `never-4` at none."""

    def __init__(self, picture: bytes) -> None:
        self.picture, self.reads, self.lock = picture, Counter[str](), threading.Lock()

    def read(self, uri: str, **_: Any) -> bytes:
        with self.lock:
            self.reads[uri] += 1
        if uri.startswith("never") or (uri.startswith("once") and self.reads[uri] == 1):
            raise BadImage("unreadable", "503", True)
        if uri.startswith("gone"):
            raise BadImage("missing", "404")
        return self.picture


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store(encoded(Image.new("RGB", (40, 30), "red"), "JPEG"))
    monkeypatch.setattr(loading, "read_picture", found.read)
    monkeypatch.setattr(loading, "SECOND_ATTEMPT_SECONDS", 0.01)
    return found


def rows(*uris: str) -> list[dict[str, Any]]:
    return [{"id": uri, "image_uri": uri, "reason": None, "captions": []} for uri in uris]


def test_faults_that_pass_get_a_second_attempt_and_others_none(store: Store, towers: Towers) -> None:
    uris = ["good", "once-1", "gone", "never-1", "once-2", "good-2"]
    found = load_rows(rows(*uris), config().reading(towers.preprocess), Times())
    assert rejects_of(found) == {"2": ["missing", "404"], "3": ["unreadable", "503"]}
    assert store.reads == {"good": 1, "good-2": 1, "gone": 1, "once-1": 2, "once-2": 2, "never-1": 2}


def test_a_store_that_is_down_is_not_asked_twice_for_everything(store: Store, towers: Towers) -> None:
    found = load_rows(rows(*(f"never-{i}" for i in range(100))), config().reading(towers.preprocess), Times())
    assert len(rejects_of(found)) == 100
    assert sum(store.reads.values()) == 100 + loading.PROBES


def test_rows_that_were_rejected_before_are_not_read(store: Store, towers: Towers) -> None:
    planned = rows("good", "good-2", "good-3")
    planned[1]["reason"], planned[2]["only"] = "duplicate_id", "texts"
    found = load_rows(planned, config().reading(towers.preprocess), Times())
    assert [type(one).__name__ for one in found] == ["ndarray", "NoneType", "NoneType"]
    assert set(store.reads) == {"good"}
