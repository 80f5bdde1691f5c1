"""Ray Data: raw tables, folders or tars -> validated pairs.

Contract: every input row ends as a pair or as a reject with its reason; no product is in two splits; a pair keeps its
original encoded bytes unless its longer side is above `max_side`; run again, a finished output is left alone.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from pydantic import Field, field_validator

from clipdist import images, planning, storage, units
from clipdist.captions import checked_templates, default_captions
from clipdist.config import Section, dump
from clipdist.images import BadImage
from clipdist.ledger import Ledger
from clipdist.making import make_table
from clipdist.manifest import File, Manifest
from clipdist.pictures import read_picture
from clipdist.planning import ColumnsConfig, SplitConfig
from clipdist.retry import planned_row
from clipdist.schema import ROW_GROUP_ROWS, Stamp, pairs_schema, recorded
from clipdist.sources import Source, SourceConfig, estimate_rows, open_source, refuse_inside

READERS_PER_TASK = 8


class PrepareConfig(Section):
    """Raw product data -> pairs."""

    source: SourceConfig
    """The raw rows."""
    output: str
    """Where the pairs go: a new folder or prefix."""
    captions: tuple[str, ...] = ()
    """Caption templates over the columns, such as "{colour} {article_type} for {gender}. {title}"; several give a pair
    several captions. Folders and tars have a default."""
    columns: ColumnsConfig = ColumnsConfig()
    """Which column is what."""
    split: SplitConfig = SplitConfig()
    """What is held out."""
    max_side: int = Field(640, ge=16)
    """Pixels: a picture with a longer side is re-encoded to this; at least the largest training resolution."""
    max_rejected_fraction: float = Field(0.05, ge=0, le=1)
    """The job fails when a larger share of the rows is rejected."""
    retry_rejected: bool = False
    """Try the rows once more that an earlier run rejected; nothing else is done again."""
    unit_rows: int = Field(2048, ge=1, le=100_000)
    """Rows per unit of work: what is committed at once, and at most lost by a kill."""
    max_image_bytes: int = Field(50 << 20, ge=1)
    """Larger pictures are rejected unread."""
    max_pixels: int = Field(100_000_000, ge=1)
    """Pictures with more pixels are rejected undecoded."""
    allow_private_hosts: bool = False
    """Whether http(s) pictures may come from addresses inside your network."""

    @field_validator("captions")
    @classmethod
    def _templates(cls, captions: tuple[str, ...]) -> tuple[str, ...]:
        return checked_templates(captions)


def run(config: PrepareConfig) -> Manifest:
    """Makes the pairs at `config.output`, or goes on with them, or finds them finished."""
    source, templates = _open(config)
    output = storage.absolute(config.output)

    def plan() -> Iterator[pa.Table]:
        rows = planning.not_empty(_plan(config, source, templates), config.source.path)
        return planning.whole_groups(rows, config.columns)

    def pipeline(todo: ray.data.Dataset, ledger: Ledger, _: Any) -> ray.data.Dataset:
        return todo.map(partial(prepare_unit, ledger=ledger, config=config), num_cpus=1)

    return make_table(
        output,
        _stamp(config, source, templates),
        plan,
        units.Work("prepare", pipeline),
        max_rejected_fraction=config.max_rejected_fraction,
        retry_rejected=config.retry_rejected,
        config=dump(
            config.model_copy(
                update={
                    "output": output,
                    "source": config.source.absolute(),
                    "retry_rejected": False,
                }  # it was for once
            )
        ),
    )


def dry_run(config: PrepareConfig) -> list[tuple[str, str]]:
    """Opens the input and prepares its first rows without writing anything."""
    source, templates = _open(config)
    unit = next(_plan(config, source, templates, first_rows=16), None)
    pairs, rejects = _prepare_rows(unit, config) if unit is not None else ([], [])
    facts = [("input", f"{source.kind}, {len(source.files)} files"), ("columns", ", ".join(source.columns))]
    rows, exact = estimate_rows(source)
    facts += [("rows", f"{rows:,}" if exact else f"about {rows:,}")]
    facts += [("first rows", f"{len(pairs)} pairs, {len(rejects)} rejects")]
    facts += [("caption", caption) for pair in pairs[:3] for caption in pair["captions"]]
    return facts + [("reject", f"{reject['id']}: {reject['reason']}: {reject['message']}") for reject in rejects[:3]]


def derived(config: PrepareConfig) -> list[tuple[str, str]]:
    return [("row groups per unit", str(-(-config.unit_rows // ROW_GROUP_ROWS)))]


def prepare_unit(row: dict[str, Any], ledger: Ledger, config: PrepareConfig) -> dict[str, Any]:
    """One unit: read and check its pictures, write a shard per split, commit."""
    unit = int(row["unit"])
    plan = ledger.rows(unit)
    pairs, rejects = _prepare_rows(plan, config)
    tables = {}
    for split in sorted({pair["split"] for pair in pairs}):
        mine = [pair for pair in pairs if pair["split"] == split]
        tables["pairs", split] = _encode(pa.Table.from_pylist(mine, _schema(config)), split)
    ledger.commit(unit, tables, {"pairs": len(plan)}, rejects)
    return dict(units.report(unit, {"pairs": len(plan)}, rejects, {}))


def _open(config: PrepareConfig) -> tuple[Source, tuple[str, ...]]:
    refuse_inside(config.source, config.output)
    source = open_source(config.source)
    templates = config.captions or default_captions(source)
    planning.check_columns(source, config.columns, templates)
    return source, templates


def _plan(
    config: PrepareConfig, source: Source, templates: tuple[str, ...], first_rows: int | None = None
) -> Iterator[pa.Table]:
    size, first_only = first_rows or config.unit_rows, first_rows is not None
    return planning.plan_units(source, config.columns, templates, config.split, size, first_only=first_only)


def _stamp(config: PrepareConfig, source: Source, templates: tuple[str, ...]) -> Stamp:
    identity = {
        "source": source.fingerprint(),
        "captions": list(templates),
        "columns": config.columns.model_dump(mode="json"),
        "split": config.split.model_dump(mode="json"),
        "decode": {"id": images.DECODE_ID, "max_side": config.max_side},
        "unit_rows": config.unit_rows,
    }
    limits = {name: getattr(config, name) for name in ("max_image_bytes", "max_pixels", "allow_private_hosts")}
    return Stamp("pairs", identity, recorded(limits=limits))


def _schema(config: PrepareConfig) -> pa.Schema:
    return pairs_schema(planning.kept_fields(config.columns))


def _prepare_rows(plan: pa.Table, config: PrepareConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    with ThreadPoolExecutor(READERS_PER_TASK) as pool:
        results = list(pool.map(lambda row: _prepare_row(row, config), plan.to_pylist()))
    preset = plan.column("reason").is_valid().to_pylist()
    rejects = [
        reject | {"row": None if preset[index] else planned_row(plan, index)}
        for index, (_, reject) in enumerate(results)
        if reject is not None
    ]
    return [pair for pair, _ in results if pair is not None], rejects


def _prepare_row(row: dict[str, Any], config: PrepareConfig) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The pair, or else its reject."""
    uri = row.pop("image_uri")
    row.pop("only", None)
    reason, message = row.pop("reason"), row.pop("message")
    try:
        if reason is not None:
            raise BadImage(reason, message)
        data = read_picture(uri, max_image_bytes=config.max_image_bytes, allow_private_hosts=config.allow_private_hosts)
        limits = {"max_image_bytes": config.max_image_bytes, "max_pixels": config.max_pixels}
        image, _, _ = images.bound(data, config.max_side, **limits)
    except BadImage as error:
        found = {"id": row["id"], "table": "pairs", "uri": uri, "reason": error.reason, "message": str(error)}
        return None, found
    return {**row, "image": image}, None


def _encode(table: pa.Table, split: str) -> tuple[bytes, File]:
    """Row groups of at most ROW_GROUP_ROWS; encoded pictures do not compress again."""
    buffer = io.BytesIO()
    compression = {name: "zstd" for name in table.schema.names if name not in ("image", "captions")}
    compression |= {"image": "none", "captions.list.element": "zstd"}
    pq.write_table(
        table,
        buffer,
        row_group_size=ROW_GROUP_ROWS,
        compression=compression,
        use_dictionary=["split", "group"],
    )
    data = buffer.getvalue()
    groups = [min(ROW_GROUP_ROWS, len(table) - start) for start in range(0, len(table), ROW_GROUP_ROWS)]
    return data, File("", "pairs", len(table), tuple(groups), len(data), split)


def summary(manifest: Manifest) -> list[tuple[str, str]]:
    """What came out, for the end of the job and for `clipdist info`."""
    splits: Counter[str] = Counter()
    for file in manifest.select("pairs"):
        splits[file.split or ""] += file.rows
    return [("pairs", f"{manifest.written('pairs'):,}")] + [(f"  {name}", f"{rows:,}") for name, rows in splits.items()]
