"""Manifests: what a table of clipdist holds, as its readers see it. The highest number counts; nothing else is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from clipdist import storage
from clipdist.config import UserError, differences
from clipdist.schema import SCHEMA_VERSION, Stamp


@dataclass(frozen=True)
class File:
    """One committed Parquet file. `offsets`: where each row group's raw embedding matrix starts, in bytes."""

    path: str
    table: str
    rows: int
    row_groups: tuple[int, ...]
    file_bytes: int
    split: str | None = None
    offsets: tuple[int, ...] = ()

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> File:
        lists = {"row_groups": tuple(value["row_groups"]), "offsets": tuple(value["offsets"])}
        return File(**{**value, **lists})


@dataclass(frozen=True)
class Manifest:
    """The state of a table. Counts are per table: planned == rows of its files - deleted rows + the sum of rejected."""

    uri: str
    stamp: Stamp
    files: tuple[File, ...] = ()
    reject_files: tuple[str, ...] = ()
    planned: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, dict[str, int]] = field(default_factory=dict)
    delete_files: tuple[str, ...] = ()
    """Parquet files of rows that are no longer part of the table: `path` of a file, `row` in it."""
    deleted: dict[str, int] = field(default_factory=dict)
    """How many rows of each table these are."""
    number: int = 0
    plan: int = 0
    """The last plan whose results are in here."""
    is_part: bool = False
    """Whether these are only some of the table's files: what is deleted of the others is then none of its business."""

    def lost(self, table: str) -> int:
        """Rejected rows."""
        return sum(self.rejected.get(table, {}).values())

    def written(self, table: str) -> int:
        """Rows of a table that can be read."""
        return sum(file.rows for file in self.select(table)) - self.deleted.get(table, 0)

    def select(self, table: str, split: str | None = None) -> list[File]:
        return [file for file in self.files if file.table == table and split in (None, file.split)]

    def part(self, files: Iterable[File]) -> Manifest:
        """What one of several readers reads. Its counts are still those of the whole table."""
        return replace(self, files=tuple(files), is_part=True)

    def path(self, file: File) -> str:
        return storage.join(self.uri, file.path)

    def names(self) -> set[str]:
        """Every file that is part of the table."""
        return {file.path for file in self.files} | {*self.reject_files, *self.delete_files}

    def to_json(self) -> dict[str, Any]:
        """Everything but where it lies: a table may be moved."""
        value = asdict(self) | {"stamp": self.stamp.to_json()}
        return {name: value[name] for name in value if name not in ("uri", "is_part")}

    @staticmethod
    def from_json(uri: str, value: Mapping[str, Any]) -> Manifest:
        stamp = Stamp.from_json(value["stamp"])
        if stamp.schema_version != SCHEMA_VERSION:
            raise UserError(
                f"{uri}: schema version {stamp.schema_version} there, {SCHEMA_VERSION} expected: make it anew"
            )
        own: dict[str, Any] = {name: tuple(value[name]) for name in ("reject_files", "delete_files")}
        own |= {name: value[name] for name in ("planned", "rejected", "deleted", "number", "plan")}
        return Manifest(uri, stamp, tuple(File.from_json(file) for file in value["files"]), **own)


def latest(uri: str, folder: str) -> dict[str, Any] | None:
    """The highest numbered JSON file of a folder of `uri`."""
    names = storage.names(storage.join(uri, folder))
    numbers = [name for name in names if name.endswith(".json") and name.removesuffix(".json").isdecimal()]
    if not numbers:
        return None
    value = json.loads(storage.read_bytes(storage.join(uri, folder, max(numbers))))
    return value if isinstance(value, dict) else {}


def read_manifest(uri: str, kind: str | None = None) -> Manifest:
    """The valid manifest of a table. UserError when there is none, it is not finished, or it is of another kind."""
    value = latest(uri, "manifests")
    if value is None:
        raise UserError(f"{uri}: {_why_no_manifest(uri)}")
    manifest = Manifest.from_json(uri, value)
    if kind is not None and manifest.stamp.kind != kind:
        raise UserError(f"{uri}: expected {kind}, this folder holds {manifest.stamp.kind}")
    return manifest


def refuse_other_stamp(uri: str, ours: Stamp, theirs: Stamp, advice: str = "") -> None:
    """UserError naming every value in which the artefact at `uri` differs from what is asked for now."""
    found = differences(
        {"kind": ours.kind, "schema_version": ours.schema_version, **ours.identity},
        {"kind": theirs.kind, "schema_version": theirs.schema_version, **theirs.identity},
    )
    if found:
        lines = [f"  {key}: {_short(there)} there, {_short(now)} now" for key, now, there in found]
        what_to_do = "  choose another output, or the settings there"
        raise UserError("\n".join([f"{uri}: made with other settings:", *lines, what_to_do + advice]))


def _why_no_manifest(uri: str) -> str:
    if not storage.exists(uri):
        return "no such folder"
    plan = latest(uri, "plans")
    if plan is None:
        return "not a table of clipdist (no plans, no manifests)"
    if not {"stamp", "unit_rows", "shard_units"} <= plan.keys():
        return "not a table of clipdist (its plans are something else)"
    done = len(storage.names(storage.join(uri, "commits")))
    done += len(storage.names(storage.join(uri, "shards"))) * plan["shard_units"]
    kind, total = plan["stamp"]["kind"], len(plan["unit_rows"])
    return f"these {kind} are not finished ({min(done, total)} of {total} units): run the job that makes them again"


def _short(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 90 else text[:87] + "..."
