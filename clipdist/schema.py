"""Arrow schemas of the tables between the jobs, and the Stamp that tells what made a table."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import pyarrow as pa

from clipdist.config import UserError

SCHEMA_VERSION = 2
"""Raised by hand whenever a reader of the old layout could not read the new one."""

ROW_GROUP_ROWS = 256
"""Rows per row group of a pairs shard: what one random read of the trainer fetches."""

Kind = Literal["pairs", "embeddings", "checkpoint", "metrics", "hits"]
Dtype = Literal["float16", "float32"]

RESERVED = (
    "id",
    "image",
    "captions",
    "group",
    "split",
    "embedding",
    "caption",
    "image_uri",
    "pair_id",
    "thumbnail",
    "reason",
    "message",
    "only",
)
"""Column names that clipdist fills itself; passthrough columns need other names."""

REJECTS = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("table", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string()),
        pa.field("row", pa.binary()),
    ]
)
"""`row`: the planned row as an Arrow stream, where trying again may help (`retry.planned_row`)."""


HITS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("image_uri", pa.string()),
    ]
)
"""One row per hit, best first; `rank` counts from 1."""


def pairs_schema(passthrough: Sequence[pa.Field]) -> pa.Schema:
    """One row per pair: the original encoded picture with all its captions."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("image", pa.binary(), nullable=False),
            pa.field("captions", pa.list_(pa.string()), nullable=False),
            pa.field("group", pa.string()),
            pa.field("split", pa.string(), nullable=False),
            *passthrough,
        ]
    )


def vector_type(dim: int, dtype: Dtype) -> pa.DataType:
    return pa.list_(pa.field("element", pa.type_for_alias(dtype), nullable=False), dim)


def embeddings_schema(table: str, dim: int, passthrough: Sequence[pa.Field], dtype: Dtype = "float16") -> pa.Schema:
    """One row per picture (`images`) or per caption (`texts`, id `<pair id>#<n>`); embeddings are L2-normalised."""
    own = [pa.field("pair_id", pa.string(), nullable=False)] if table == "texts" else []
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("embedding", vector_type(dim, dtype), nullable=False),
            *own,
            pa.field("caption", pa.string()),
            pa.field("image_uri", pa.string()),
            pa.field("group", pa.string()),
            pa.field("split", pa.string()),
            *passthrough,
        ]
    )


@dataclass(frozen=True)
class Stamp:
    """What made an artefact. `identity` is compared by readers and reruns; `recorded` is for people."""

    kind: str
    identity: dict[str, Any]
    recorded: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Stamp:
        try:
            return Stamp(value["kind"], value["identity"], value.get("recorded", {}), value["schema_version"])
        except (KeyError, TypeError, AttributeError):
            raise UserError("the stamp found there is not one of clipdist") from None


def stored_dtype(stamp: Stamp) -> Dtype:
    """How embeddings are stored. Tables made before there was a choice do not say, and are float16."""
    dtype: Dtype = stamp.identity.get("dtype", "float16")
    if dtype not in get_args(Dtype):
        raise UserError(f"embeddings stored as {dtype}; expected {' or '.join(get_args(Dtype))}")
    return dtype


def recorded(**facts: Any) -> dict[str, Any]:
    """When and with which libraries: written down, never compared."""
    packages = ("clipdist", "ray", "torch", "open_clip_torch", "pillow", "pyarrow", "numpy")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"made_at": now, "versions": {name: _version(name) for name in packages}, **facts}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
