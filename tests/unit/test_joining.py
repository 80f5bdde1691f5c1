"""Pieces become one shard: the same rows in the same order, the vectors bit for bit, in full row groups."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdist import joining, shard_writer, storage
from clipdist.config import UserError
from clipdist.joining import join_shards
from clipdist.manifest import Manifest
from clipdist.schema import Dtype, Stamp
from clipdist.shard_writer import row_group_rows
from clipdist.shards import Shards
from tests.unit.some_shards import DTYPES, Vectors, encoded, some_vectors, stamp_of, vector_table


def write_pieces(uri: str, parts: Sequence[Vectors], table: str = "images") -> list[str]:
    first, paths = 0, []
    for number, part in enumerate(parts):
        paths.append(storage.join(uri, f"{number:04d}.parquet"))
        storage.write_atomic(paths[-1], encoded(part, first, table)[0])
        first += len(part)
    return paths


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", ["images", "texts"])
@pytest.mark.parametrize("sizes", [[7], [10], [20], [3, 3, 3], [1, 25, 0, 4, 10], [0, 0], [5] * 23])
def test_the_joined_shard_is_that_of_all_rows(
    place: str, sizes: list[int], table: str, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "ROW_GROUP", 10)
    vectors = some_vectors(sum(sizes), 6, dtype=dtype)
    paths = write_pieces(place, np.split(vectors, np.cumsum(sizes)[:-1]), table)
    data, file = join_shards(paths, table, stamp_of(vectors))
    assert pq.read_table(io.BytesIO(data)).equals(vector_table(vectors, table=table))
    full, rest = divmod(len(vectors), 10)
    assert file.row_groups == (10,) * full + ((rest,) if rest else ())
    assert (file.table, file.rows, file.file_bytes) == (table, len(vectors), len(data))
    storage.write_atomic(storage.join(place, "joined.parquet"), data)
    manifest = Manifest(place, stamp_of(vectors), (replace(file, path="joined.parquet"),), (), {}, {}, {})
    assert Shards(manifest, table).matrix().tobytes() == vectors.tobytes()
    assert data == encoded(vectors, table=table)[0], "a joined shard is the one that would have been written at once"


def test_every_bit_pattern_survives(tmp_path: Path) -> None:
    """NaN payloads, inf and -0 too: nothing on the way may compute."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(-1, 64)
    singles = np.random.default_rng(0).integers(1 << 32, size=(512, 64), dtype=np.uint32).view(np.float32)
    for vectors in (halves, singles):
        paths = write_pieces(str(tmp_path / vectors.dtype.name), np.split(vectors, 8))
        data, file = join_shards(paths, "images", stamp_of(vectors))
        assert data[file.offsets[0] : file.offsets[0] + vectors.nbytes] == vectors.tobytes()


def test_wide_rows_make_smaller_row_groups() -> None:
    """A page holds less than 2 GiB."""
    for dim, dtype, rows in ((512, "float32", 65536), (4096, "float32", 65536), (65536, "float32", 4096)):
        assert row_group_rows(Stamp("embeddings", {"dim": dim, "dtype": dtype})) == rows
    assert row_group_rows(Stamp("embeddings", {"dim": 16384})) == 32768


@pytest.mark.parametrize("left", [0.0, 0.5, 0.99, None])
def test_a_damaged_piece_is_named(place: str, left: float | None) -> None:
    paths = write_pieces(place, [some_vectors(20, 8, seed=number) for number in range(30)])
    data = storage.read_bytes(paths[17])
    storage.remove(paths[17])
    if left is not None:
        storage.write_atomic(paths[17], data[: int(len(data) * left)])
    with pytest.raises(UserError, match="0017.parquet: this shard is missing, unreadable or shorter"):
        join_shards(paths, "images", stamp_of(some_vectors(1, 8)))


def test_a_piece_of_another_table_is_named(tmp_path: Path) -> None:
    """Vectors of two models must never lie in one shard."""
    vectors = some_vectors(5, 8)
    paths = write_pieces(str(tmp_path), [vectors, vectors])
    stamp = stamp_of(vectors)
    with pytest.raises(UserError, match="0000.parquet: not a piece of this table"):
        join_shards(paths, "images", replace(stamp, identity={**stamp.identity, "weights_sha256": "other"}))
    pq.write_table(pa.table({"id": ["a"]}), paths[1])
    with pytest.raises(UserError, match="0001.parquet: not a piece of this table"):
        join_shards(paths, "images", stamp)
    storage.write_atomic(paths[1], encoded(vectors, table="texts")[0])
    with pytest.raises(UserError, match="0001.parquet: its columns differ from those of .*0000.parquet"):
        join_shards(paths, "images", stamp)
    with pytest.raises(ValueError, match="no pieces"):
        join_shards([], "images", stamp)


def test_few_pieces_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several at a time, for the latency of a store; but never all, for the memory."""
    paths = write_pieces(str(tmp_path), [some_vectors(5, 8, seed=number) for number in range(40)])
    real, begun = joining._piece, []

    def piece(path: str, identity: object, rows: object) -> pa.Table:
        begun.append(path)
        return real(path, identity, rows)

    monkeypatch.setattr(joining, "_piece", piece)
    pieces = joining._pieces(paths, stamp_of(some_vectors(1, 8)), {}, joining.READERS)
    next(pieces)
    assert 1 < len(begun) <= joining.READERS + 1
    assert len(list(pieces)) == 39
    assert sorted(begun) == paths
