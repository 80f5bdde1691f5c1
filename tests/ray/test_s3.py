"""The whole journey with every artefact on S3 (a server on loopback)."""

from pathlib import Path

import numpy as np
import pytest

from clipdist import embed, prepare, storage, train
from clipdist.config import UserError
from clipdist.embed import EmbedConfig
from clipdist.manifest import read_manifest
from clipdist.searcher import Searcher
from tests.conftest import write_shapes
from tests.ray.test_journey import STAGES, config, prepare_config, train_config


@pytest.mark.usefixtures("local_ray")
def test_pairs_run_and_embeddings_on_s3(tmp_path: Path, s3_bucket: str, tiny_clip: str) -> None:
    table, root = write_shapes(tmp_path / "raw", copies=3), f"{s3_bucket}/journey"
    prepare.run(prepare_config(table, f"{root}/pairs"))
    assert read_manifest(f"{root}/pairs", "pairs").written("pairs") == 96
    settings = {
        "pairs": f"{root}/pairs",
        "output": f"{root}/run",
        "stages": STAGES[:1],
        "vocabulary": {"terms": ["cyan"]},
    }
    result = train.run(train_config(tmp_path, tiny_clip, **settings))
    assert "open_clip_model.safetensors" in storage.names(f"{root}/run/{result['best']}")
    embed_config = config(
        EmbedConfig, model={"name": f"{root}/run"}, pairs=f"{root}/pairs", output=f"{root}/embeddings"
    )
    assert embed.run(embed_config).planned == {"images": 96, "texts": 192}
    searcher = Searcher(f"{root}/embeddings")
    hits = searcher.find_image_from_image(tmp_path / "raw" / "images" / "red-cross-001.png", 3)
    assert hits[0].score > 0.99
    assert hits[0].picture().size == (40, 40)
    assert np.isfinite([hit.score for hit in hits]).all()
    with pytest.raises(UserError, match="there, .* now"):
        prepare.run(prepare_config(table, f"{root}/pairs", unit_rows=7))
