"""Exactly-once tables: a plan made once, one commit per unit of work, numbered manifests; what is still to do.

plan/<nonce>/000000.parquet   the planned rows, one row group per unit
plan.json                     stamp, plan files, rows planned; put-if-absent: the first writer wins
<table>/000012-<nonce>.parquet, rejects/000012-<nonce>.parquet
commits/000012.json           names the files of unit 12; put-if-absent: a unit is committed once
manifests/00000001.json       every committed file; the highest number counts, and readers trust nothing else
"""

from __future__ import annotations

import io
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipdist import storage
from clipdist.config import UserError, differences
from clipdist.schema import REJECTS, SCHEMA_VERSION, Stamp

UNITS_PER_PLAN_FILE = 256


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
    """A finished table. Counts are per table: planned == written + the sum of rejected.

    `delete_files` name rows of `files` that are no longer to be found (see `deletes`); `written` still counts them.
    """

    uri: str
    stamp: Stamp
    files: tuple[File, ...]
    reject_files: tuple[str, ...]
    planned: dict[str, int]
    rejected: dict[str, dict[str, int]]
    facts: dict[str, Any]
    delete_files: tuple[str, ...] = ()

    def written(self, table: str) -> int:
        return sum(file.rows for file in self.files if file.table == table)

    def select(self, table: str, split: str | None = None) -> list[File]:
        return [file for file in self.files if file.table == table and split in (None, file.split)]

    def path(self, file: File) -> str:
        return storage.join(self.uri, file.path)


@dataclass(frozen=True)
class Ledger:
    """An output under work. `units`: rows planned per unit, in order."""

    uri: str
    stamp: Stamp
    plan_files: tuple[str, ...]
    units: tuple[int, ...]
    facts: dict[str, Any]

    def rows(self, unit: int) -> pa.Table:
        """The planned rows of one unit."""
        path = storage.join(self.uri, self.plan_files[unit // UNITS_PER_PLAN_FILE])
        with storage.open_read(path) as file:
            return pq.ParquetFile(file).read_row_group(unit % UNITS_PER_PLAN_FILE)

    def committed(self) -> set[int]:
        return {int(name.removesuffix(".json")) for name in storage.names(self._path("commits"))}

    def commit(
        self,
        unit: int,
        tables: Mapping[tuple[str, str | None], tuple[bytes, File]],
        planned: Mapping[str, int],
        rejects: list[dict[str, Any]],
    ) -> bool:
        """Writes a unit's files under an attempt's name, then its record. False: another attempt was first."""
        nonce, written = uuid.uuid4().hex[:12], []
        for data, file in tables.values():
            folder = file.table if file.split is None else f"{file.table}/{file.split}"
            named = {**asdict(file), "path": f"{folder}/{unit:06d}-{nonce}.parquet"}
            storage.write_atomic(self._path(named["path"]), data)
            written.append(named)
        reject_file = None
        if rejects:
            reject_file = f"rejects/{unit:06d}-{nonce}.parquet"
            storage.write_atomic(self._path(reject_file), _parquet(pa.Table.from_pylist(rejects, REJECTS)))
        reasons: dict[str, Counter[str]] = {table: Counter() for table in planned}
        for reject in rejects:
            reasons[reject["table"]][reject["reason"]] += 1
        record = {"unit": unit, "nonce": nonce, "files": written, "reject_file": reject_file}
        record |= {"planned": dict(planned), "rejected": reasons}
        if storage.put_if_absent(self._path(f"commits/{unit:06d}.json"), json.dumps(record).encode()):
            return True
        for path in [*(file["path"] for file in written), *([reject_file] if reject_file else [])]:
            storage.remove(self._path(path))
        return False

    def commits(self) -> list[dict[str, Any]]:
        paths = [self._path(f"commits/{unit:06d}.json") for unit in sorted(self.committed())]
        with ThreadPoolExecutor(16) as pool:
            return [json.loads(data) for data in pool.map(storage.read_bytes, paths)]

    def reject_examples(self, count: int) -> list[str]:
        """A few rejects as lines for a person."""
        lines: list[str] = []
        for commit in self.commits():
            if commit["reject_file"] and len(lines) < count:
                with storage.open_read(self._path(commit["reject_file"])) as file:
                    rows = pq.read_table(file).slice(0, count - len(lines)).to_pylist()
                lines += [f"{row['id'] or '(no id)'}: {row['reason']}: {row['message']}" for row in rows]
        return lines

    def forget_rejecting_units(self) -> int:
        """Takes back the commits of units with rejects, so that a rerun tries these rows again."""
        forgotten = [commit for commit in self.commits() if commit["reject_file"]]
        for commit in forgotten:
            storage.remove(self._path(f"commits/{commit['unit']:06d}.json"))
            for path in [*(file["path"] for file in commit["files"]), commit["reject_file"]]:
                storage.remove(self._path(path))
        return len(forgotten)

    def publish(self, **facts: Any) -> Manifest:
        """Checks that every planned row was written or rejected, then writes the manifest."""
        commits = self.commits()
        missing = len(self.units) - len(commits)
        if missing:
            raise RuntimeError(f"{self.uri}: {missing} of {len(self.units)} units are not committed")
        planned: Counter[str] = Counter()
        rejected: dict[str, Counter[str]] = {}
        files: list[File] = []
        for commit in commits:
            planned.update(commit["planned"])
            files += [File.from_json(file) for file in commit["files"]]
            for table, reasons in commit["rejected"].items():
                rejected.setdefault(table, Counter()).update(reasons)
        reject_files = tuple(commit["reject_file"] for commit in commits if commit["reject_file"])
        counts = {table: dict(reasons) for table, reasons in rejected.items()}
        manifest = Manifest(
            self.uri, self.stamp, tuple(files), reject_files, dict(planned), counts, {**self.facts, **facts}
        )
        for table, rows in planned.items():
            kept, lost = manifest.written(table), sum(rejected[table].values())
            if rows != kept + lost:
                raise RuntimeError(f"{self.uri}: {table}: planned {rows} rows != written {kept} + rejected {lost}")
        data = json.dumps({**asdict(manifest), "stamp": self.stamp.to_json()}).encode()
        if not storage.put_if_absent(self._path("manifests/00000001.json"), data):
            return read_manifest(self.uri)
        return manifest

    def _path(self, name: str) -> str:
        return storage.join(self.uri, name)


def begin(uri: str, stamp: Stamp, plan: Callable[[], tuple[Iterable[pa.Table], dict[str, Any]]]) -> Ledger:
    """Opens the output at `uri`, or makes its plan when it is new. `plan()` gives one table per unit, and facts.

    Raises UserError when the output was made with another stamp (both values are named) or is something else.
    """
    path = storage.join(uri, "plan.json")
    if not storage.exists(path):
        strange = [name for name in storage.names(uri) if name not in ("plan", "config.yaml")]
        if strange:
            raise UserError(f"{uri}: this folder already holds {_some(strange)}; choose an empty or new output")
        units, facts = plan()
        files, rows = _write_plan(uri, units)
        value = {"stamp": stamp.to_json(), "plan_files": files, "units": rows, "facts": facts}
        storage.put_if_absent(path, json.dumps({**value, "nonce": uuid.uuid4().hex}).encode())
    value = json.loads(storage.read_bytes(path))
    refuse_other_stamp(uri, stamp, Stamp.from_json(value["stamp"]))
    return Ledger(uri, stamp, tuple(value["plan_files"]), tuple(value["units"]), value["facts"])


def refuse_other_stamp(uri: str, ours: Stamp, theirs: Stamp) -> None:
    """UserError naming every value in which the artefact at `uri` differs from what is asked for now."""
    found = differences(
        {"kind": ours.kind, "schema_version": ours.schema_version, **ours.identity},
        {"kind": theirs.kind, "schema_version": theirs.schema_version, **theirs.identity},
    )
    if found:
        lines = [f"  {key}: {_short(there)} there, {_short(now)} now" for key, now, there in found]
        raise UserError(
            "\n".join(
                [
                    f"{uri}: made with other settings:",
                    *lines,
                    "  choose another output, or the settings there",
                ]
            )
        )


def read_manifest(uri: str, kind: str | None = None) -> Manifest:
    """The valid manifest of a table. UserError when there is none, it is not finished, or it is of another kind."""
    numbers = [name for name in storage.names(storage.join(uri, "manifests")) if name.endswith(".json")]
    if not numbers:
        raise UserError(f"{uri}: {_why_no_manifest(uri)}")
    value = json.loads(storage.read_bytes(storage.join(uri, "manifests", max(numbers))))
    stamp = Stamp.from_json(value["stamp"])
    if stamp.schema_version != SCHEMA_VERSION:
        raise UserError(f"{uri}: schema version {stamp.schema_version} there, {SCHEMA_VERSION} expected: make it anew")
    if kind is not None and stamp.kind != kind:
        raise UserError(f"{uri}: expected {kind}, this folder holds {stamp.kind}")
    files = tuple(File.from_json(file) for file in value["files"])
    rest = {name: value[name] for name in ("planned", "rejected", "facts")}
    deletes = tuple(value.get("delete_files", ()))  # a manifest of before rows could be deleted has none
    return Manifest(uri, stamp, files, tuple(value["reject_files"]), **rest, delete_files=deletes)


def _why_no_manifest(uri: str) -> str:
    if not storage.exists(uri):
        return "no such folder"
    path = storage.join(uri, "plan.json")
    if not storage.exists(path):
        return "not a table of clipdist (no plan.json, no manifests)"
    plan = json.loads(storage.read_bytes(path))
    if not isinstance(plan, dict) or not {"stamp", "units"} <= plan.keys():
        return "not a table of clipdist (its plan.json is something else)"
    done = len(storage.names(storage.join(uri, "commits")))
    kind, total = plan["stamp"]["kind"], len(plan["units"])
    return f"these {kind} are not finished ({done} of {total} units): run the job that makes them again"


def _write_plan(uri: str, units: Iterable[pa.Table]) -> tuple[list[str], list[int]]:
    """Plan files of UNITS_PER_PLAN_FILE row groups; memory holds one of them."""
    nonce = uuid.uuid4().hex[:12]
    files: list[str] = []
    rows: list[int] = []
    buffer, writer = io.BytesIO(), None
    for table in units:
        if writer is None:
            buffer = io.BytesIO()
            writer = pq.ParquetWriter(buffer, table.schema)
        writer.write_table(table, row_group_size=max(len(table), 1))
        rows.append(len(table))
        if len(rows) % UNITS_PER_PLAN_FILE == 0:
            _close_plan_file(uri, nonce, buffer, writer, files)
            writer = None
    if writer is not None:
        _close_plan_file(uri, nonce, buffer, writer, files)
    return files, rows


def _close_plan_file(uri: str, nonce: str, buffer: io.BytesIO, writer: pq.ParquetWriter, files: list[str]) -> None:
    writer.close()
    files.append(f"plan/{nonce}/{len(files):06d}.parquet")
    storage.write_atomic(storage.join(uri, files[-1]), buffer.getvalue())


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _short(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 90 else text[:87] + "..."


def _some(values: list[str]) -> str:
    return ", ".join(values[:4]) + (f" and {len(values) - 4} more" if len(values) > 4 else "")
