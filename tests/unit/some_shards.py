"""Embeddings to write and read: random unit vectors with rows as `embed` has them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipdist.ledger import begin
from clipdist.manifest import File
from clipdist.schema import Dtype, Stamp, embeddings_schema
from clipdist.shard_writer import encode_shard
from clipdist.shards import Shards

Vectors = NDArray[Any]
DTYPES: tuple[Dtype, ...] = ("float16", "float32")


def some_vectors(rows: int, dim: int, seed: int = 0, dtype: Dtype = "float16") -> Vectors:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim))
    stored: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)
    return stored


def stamp_of(vectors: Vectors) -> Stamp:
    """float16 is what a stamp without a dtype says."""
    dtype = {} if vectors.dtype == np.float16 else {"dtype": vectors.dtype.name}
    return Stamp("embeddings", {"dim": vectors.shape[1], **dtype}, {"model": "크림"})


def vector_table(vectors: Vectors, first: int = 0, table: str = "images") -> pa.Table:
    """Rows as `embed` writes them; ids are not in row order, and "10" comes before "9"."""
    dtype: Dtype = "float16" if vectors.dtype == np.float16 else "float32"
    schema = embeddings_schema(table, vectors.shape[1], [pa.field("price", pa.float64())], dtype)
    rows = range(first, first + len(vectors))
    values: dict[str, Any] = {name: pa.nulls(len(vectors), schema.field(name).type) for name in schema.names}
    values["id"] = pa.array([str(row * 7919 % 100_003) for row in rows], pa.string())
    values["pair_id"] = values["id"]
    values["caption"] = pa.array([None if row % 3 else f"신발 {row}" for row in rows], pa.string())
    values["image_uri"] = pa.array([f"/pictures/{row}.jpg" for row in rows], pa.string())
    values["price"] = pa.array([row / 4 for row in rows], pa.float64())
    flat = pa.array(vectors.reshape(-1))
    values["embedding"] = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type)
    return pa.table([values[name] for name in schema.names], schema=schema)


def encoded(vectors: Vectors, first: int = 0, table: str = "images") -> tuple[bytes, File]:
    return encode_shard(vector_table(vectors, first, table), table, stamp_of(vectors))


def write_embeddings(uri: str, parts: Sequence[Vectors], table: str = "images") -> Shards:
    """A finished embeddings artefact with one shard per part."""
    plan = [pa.table({"unit": [number]}) for number in range(len(parts))]
    book = begin(uri, stamp_of(parts[0]), lambda: iter(plan))
    first = 0
    for unit, part in enumerate(parts):
        book.commit(unit, {(table, None): encoded(part, first, table)}, {table: len(part)}, [])
        first += len(part)
    return Shards(book.publish(), table)
