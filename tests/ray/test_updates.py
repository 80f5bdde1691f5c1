"""Embeddings brought up to another catalog by the real job, on drawn shapes."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipdist import embed, info, models, units
from clipdist.config import UserError, load
from clipdist.embed import EmbedConfig
from clipdist.ledger import open_ledger
from clipdist.manifest import Manifest, read_manifest
from clipdist.models import ModelConfig
from clipdist.shards import Shards
from tests.conftest import write_shapes

pytestmark = pytest.mark.usefixtures("local_ray")


def write_rows(table: Path, rows: list[dict[str, str]]) -> Path:
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table


def run(table: Path, output: Path, model: str, **more: Any) -> Manifest:
    catalog = {"source": {"path": str(table)}, "captions": ["a {colour} {shape}"], "columns": {"keep": ["colour"]}}
    values = {"model": {"name": model}, "catalog": catalog, "output": str(output), "unit_rows": 8, "shard_rows": 16}
    config: EmbedConfig = load(EmbedConfig, None, [f"{k}={json.dumps(v)}" for k, v in (values | more).items()]).config
    return embed.run(config)


def vectors(manifest: Manifest) -> dict[str, bytes]:
    return {
        row_id: row.tobytes()
        for table in ("images", "texts")
        for shards in [Shards(manifest, table)]
        for row_id, row in zip(shards.columns(["id"])["id"].to_pylist(), shards.matrix(), strict=True)
    }


def test_a_catalog_that_is_rewritten_after_a_run_died_is_brought_in(
    tmp_path: Path, tiny_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had begun is finished as it was planned, of a first run as of an update; then its rows are compared."""
    table = write_shapes(tmp_path / "raw", copies=1)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    output, model = tmp_path / "embeddings", str(tmp_path / "model")
    models.load(ModelConfig(name=tiny_clip)).save(Path(model), final_path=model)

    def dies(self: Any, unit: int) -> None:
        raise RuntimeError("the machine is gone")

    for number, update in enumerate((None, "mirror")):
        write_rows(table, rows[2 * number : 24 + 8 * number])
        with monkeypatch.context() as patched:
            patched.setattr(units.Joiner, "committed", dies)
            with pytest.raises(RuntimeError, match="the machine is gone"):
                run(table, output, model, update=update)
        write_rows(table, rows[2 * number + 1 : 30])
        with pytest.raises(UserError, match="under way.*its rows are not done again"):
            run(table, output, model)
        run(table, output, model, update="mirror")
        expected = run(table, tmp_path / f"fresh{number}", model)
        assert vectors(read_manifest(str(output), "embeddings")) == vectors(expected)


def test_a_broken_version_of_a_catalog_locks_nothing(tmp_path: Path, tiny_clip: str) -> None:
    """Neither as an update nor as the first run: the corrected one is brought in, and good rows are not done again."""
    table = write_shapes(tmp_path / "raw", copies=1)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    model = str(tmp_path / "model")
    models.load(ModelConfig(name=tiny_clip)).save(Path(model), final_path=model)
    broken = [row | {"image": f"images/none-{row['id']}.png"} for row in rows]
    for name in ("update", "first"):
        output = tmp_path / name
        if name == "update":
            run(write_rows(table, rows[:24]), output, model)
        write_rows(table, broken)
        with pytest.raises(UserError, match="were rejected"):
            run(table, output, model, update="mirror" if name == "update" else None)
        write_rows(table, rows[2:30])
        with pytest.raises(UserError, match="with update=... its rows are not done again"):
            run(table, output, model)
        found = run(table, output, model, update="mirror")
        assert found.number == (2 if name == "update" else 1), "nothing was published on the way"
        if name == "update":
            book = open_ledger(str(output))
            assert book is not None
            assert int(book.unit_rows.sum()) == 6, "rows 2 to 24 were there"
        assert vectors(found) == vectors(run(table, tmp_path / f"fresh-{name}", model))


def test_a_second_retry_tries_again_what_the_first_one_rejected(tmp_path: Path, tiny_clip: str) -> None:
    """The first stops early, with some units done; then all pictures are mended."""
    table, output, model = write_shapes(tmp_path / "raw", copies=1), tmp_path / "embeddings", str(tmp_path / "model")
    models.load(ModelConfig(name=tiny_clip)).save(Path(model), final_path=model)
    pictures = tmp_path / "raw" / "images"
    hidden = pictures.rename(tmp_path / "hidden")
    run(table, output, model, max_rejected_fraction=1.0)
    with pytest.raises(UserError, match="were rejected"):
        run(table, output, model, retry_rejected=True)
    hidden.rename(pictures)
    found = run(table, output, model, retry_rejected=True)
    assert (found.written("images"), found.rejected.get("images", {})) == (32, {})


def test_a_retry_may_have_other_limits_and_a_rerun_no_other_precision(tmp_path: Path, tiny_clip: str) -> None:
    table, output, model = write_shapes(tmp_path / "raw", copies=1), tmp_path / "embeddings", str(tmp_path / "model")
    models.load(ModelConfig(name=tiny_clip)).save(Path(model), final_path=model)
    rejected = run(table, output, model, max_pixels=1000, max_rejected_fraction=1.0)
    assert rejected.rejected["images"] == {"too_many_pixels": 32}
    assert rejected.stamp.identity["precision"] == "fp32"
    with pytest.raises(UserError, match='precision: "fp32" there, "bf16" now'):
        run(table, output, model, precision="bf16")
    found = run(table, output, model, retry_rejected=True)
    assert (found.written("images"), found.rejected.get("images", {})) == (32, {})


def test_add_and_mirror_hold_what_a_new_run_holds(tmp_path: Path, tiny_clip: str) -> None:
    table = write_shapes(tmp_path / "raw", copies=1)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    output, model = tmp_path / "embeddings", str(tmp_path / "model")
    models.load(ModelConfig(name=tiny_clip)).save(Path(model), final_path=model)
    first = run(write_rows(table, rows[:24]), output, model)
    changed = [rows[2] | {"image": rows[3]["image"]}, rows[4] | {"colour": "dark red"}]
    more = [*changed, *rows[5:30], rows[30] | {"image": "images/none.png"}]
    write_rows(table, more)
    with pytest.raises(UserError, match="update=add or update=mirror"):
        run(table, output, model)
    added = run(table, output, model, update="add")
    book = open_ledger(str(output))
    assert book is not None
    assert int(book.unit_rows.sum()) == 9, "two changed, six new, one broken; nothing else"
    assert set(first.files) < set(added.files)
    assert added.planned == {"images": 31, "texts": 31}
    assert added.rejected == {"images": {"missing": 1}, "texts": {}}
    assert len(vectors(added)) == 30 + 31
    mirrored = run(table, output, model, update="mirror")
    assert info.describe(str(output))["last change"] == "an update"
    anew = run(table, tmp_path / "anew", model)
    assert mirrored.planned == anew.planned
    assert mirrored.rejected == anew.rejected
    here, there = vectors(mirrored), vectors(anew)
    assert here.keys() == there.keys()
    for row_id, one in here.items():  # of another place in its batch
        pair = [np.frombuffer(data, np.float16).astype(np.float32) for data in (one, there[row_id])]
        np.testing.assert_allclose(*pair, atol=2e-3)
    assert run(table, output, model, update="mirror").number == mirrored.number
    assert read_manifest(str(output)).number == mirrored.number == 3
