"""What is exported is what is stored: bit for bit in NumPy, the same answers in faiss."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from clipdist.cli import main
from clipdist.config import UserError
from clipdist.export import Format, export
from clipdist.remove import remove
from clipdist.schema import Dtype
from clipdist.search import Index
from tests.unit.some_shards import DTYPES, some_vectors, write_embeddings


@pytest.fixture(params=DTYPES)
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Index:
    dtype: Dtype = request.param
    uri = str(tmp_path / "embeddings")
    write_embeddings(uri, [some_vectors(rows, 24, rows, dtype) for rows in (50, 1, 80)])
    remove(uri, [row["id"] for row in Index.open(uri).describe(np.array([0, 50, 77]))])
    return Index.open(uri)


def test_numpy_reads_the_vectors_and_their_ids(index: Index, tmp_path: Path) -> None:
    export(index.shards.manifest.uri, str(tmp_path / "out"), "npy")
    matrix = np.load(tmp_path / "out" / "images.npy", mmap_mode="r")
    assert isinstance(matrix, np.memmap)
    assert matrix.dtype == index.shards.dtype
    np.testing.assert_array_equal(matrix, index.shards.matrix())
    rows = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    expected = index.describe(np.arange(len(index)))
    assert rows == [{name: row[name] for name in ("id", "caption", "image_uri")} for row in expected]
    assert len(rows) == 128


def test_faiss_answers_as_the_search_does(index: Index, tmp_path: Path) -> None:
    export(index.shards.manifest.uri, str(tmp_path / "out"), "faiss")
    theirs = faiss.read_index(str(tmp_path / "out" / "images.faiss"))
    queries = some_vectors(20, 24, 5, "float32")
    scores, rows = theirs.search(queries, 7)
    found = index.search(queries, 7)
    np.testing.assert_array_equal(rows, np.stack(found.rows))
    np.testing.assert_allclose(scores, np.stack(found.scores), rtol=1e-5)
    np.testing.assert_array_equal(theirs.reconstruct_n(0, theirs.ntotal), index.shards.matrix().astype(np.float32))


def test_a_rerun_does_nothing_and_what_is_there_is_never_written_over(index: Index, tmp_path: Path) -> None:
    uri, out = index.shards.manifest.uri, tmp_path / "out"
    assert main(["export", uri, str(out)]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    export(uri, str(out), "npy")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match='format: "npy" there, "faiss" now'):
        export(uri, str(out), "faiss")
    remove(uri, [str(index.describe(np.array([1]))[0]["id"])])
    with pytest.raises(UserError, match="manifest: 2 there, 3 now"):
        export(uri, str(out), "npy")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="something is there already"):
        export(uri, str(tmp_path / "mine"), "npy")
    with pytest.raises(UserError, match="on this machine"):
        export(uri, "s3://bucket/out", "npy")


@pytest.mark.parametrize("form", ["npy", "faiss"])
def test_an_export_that_breaks_off_leaves_nothing(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Format
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clipdist.export.write_rows", full)
    with pytest.raises(OSError, match="No space"):
        export(index.shards.manifest.uri, str(tmp_path / "out"), form)
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings"]
