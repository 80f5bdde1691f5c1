"""Exactly-once tables: plans made once, a commit per unit of work, units joined into shards, numbered manifests.

plan/000001-<nonce>/000000.arrows   the planned rows, one Arrow stream per unit
plans/00000001.json           stamp, units, and the state that they add to; put-if-absent: the first writer wins
pieces/000012-<nonce>...      the results of unit 12
commits/000012.json           names the files of unit 12; put-if-absent: a unit is committed once
images/000003-<nonce>.parquet, rejects/000003-<nonce>.parquet
shards/000003.json            the record of a joined shard; replaces the commits of its units
manifests/00000001.json       every file of the table; the highest number counts, and readers trust nothing else

A table whose results need no joining (`shard_units` 0) has its units' files in <table>/ at once, and no pieces.
A later plan starts from the state that the earlier ones left (`base`), changed as it needs.
"""

from __future__ import annotations

import io
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from clipdist import storage
from clipdist.config import Fault, UserError
from clipdist.manifest import File, Manifest, latest, read_manifest, refuse_other_stamp
from clipdist.schema import REJECTS, Stamp

PLAN_FILE_UNITS = 256
THREADS = 16

Purpose = Literal["make", "retry", "update", "remove", "compact"]

Join: TypeAlias = Callable[[Sequence[str], str, Stamp], tuple[bytes, File]]
"""Paths of the pieces of a table, in order, its name, and the stamp of the shard -> the shard."""


@dataclass(frozen=True)
class Ledger:
    """An output under its latest plan. Units and shards are numbered through all plans."""

    uri: str
    stamp: Stamp
    number: int
    purpose: Purpose
    base: Manifest
    plan_files: tuple[str, ...]
    unit_rows: NDArray[np.int64]
    unit_ends: NDArray[np.int64]
    """Where the stream of each unit ends in its plan file, in bytes; it starts where the one before ends."""
    first_unit: int
    first_shard: int
    shard_units: int

    @property
    def units(self) -> range:
        return range(self.first_unit, self.first_unit + len(self.unit_rows))

    @property
    def per_shard(self) -> int:
        """Units per shard in this plan; a unit of a compaction is a whole shard."""
        return 1 if self.purpose == "compact" else self.shard_units

    @property
    def shards(self) -> range:
        count = -(-len(self.unit_rows) // self.per_shard) if self.per_shard else 0
        return range(self.first_shard, self.first_shard + count)

    def shard_of(self, unit: int) -> int:
        return self.first_shard + (unit - self.first_unit) // self.per_shard

    def units_of(self, shard: int) -> range:
        start = self.first_unit + (shard - self.first_shard) * self.per_shard
        return range(start, min(start + self.per_shard, self.units.stop))

    def rows_of(self, unit: int) -> int:
        return int(self.unit_rows[unit - self.first_unit])

    def rows(self, unit: int) -> pa.Table:
        """The planned rows of one unit: one range read."""
        index, size = unit - self.first_unit, self.shard_units or PLAN_FILE_UNITS
        start = int(self.unit_ends[index - 1]) if index % size else 0
        data = storage.read_bytes(self._path(self.plan_files[index // size]), start, int(self.unit_ends[index]))
        return pa.ipc.open_stream(data).read_all()

    def closed(self) -> set[int]:
        """The shards of this plan that are joined."""
        return {number for number in self._numbers("shards") if number in self.shards}

    def committed(self) -> set[int]:
        """The units of this plan that have a commit of their own: those that are in no joined shard."""
        closed = self.closed()
        loose = (unit for unit in self._numbers("commits") if unit in self.units)
        return {unit for unit in loose if not closed or self.shard_of(unit) not in closed}

    def missing(self) -> list[int]:
        """The units that are still to do, in order."""
        closed, committed = self.closed(), self.committed()
        return [unit for unit in self.units if unit not in committed and not (closed and self.shard_of(unit) in closed)]

    def left(self) -> int:
        """How many units, or at last shards, are still to do."""
        return len(self.missing()) or len(self.shards) - len(self.closed())

    def commit(
        self,
        unit: int,
        tables: Mapping[tuple[str, str | None], tuple[bytes, File]],
        planned: Mapping[str, int],
        rejects: list[dict[str, Any]],
    ) -> bool:
        """Writes a unit's files under an attempt's name, then its record. False: another attempt was first."""
        nonce, files = uuid.uuid4().hex[:12], []
        for data, file in tables.values():
            folder = file.table if file.split is None else f"{file.table}/{file.split}"
            path = f"pieces/{unit:06d}-{nonce}-{file.table}.parquet"
            files.append(replace(file, path=path if self.shard_units else f"{folder}/{unit:06d}-{nonce}.parquet"))
            storage.write_atomic(self._path(files[-1].path), data)
        folder = "pieces" if self.shard_units else "rejects"
        reject_file = f"{folder}/{unit:06d}-{nonce}{'-rejects' if self.shard_units else ''}.parquet"
        return self._record(f"commits/{unit:06d}.json", nonce, files, planned, rejects, reject_file)

    def join(self, shard: int, join: Join) -> bool:
        """Makes one shard per table of the pieces of its units; then these and their commits go. False: another
        attempt was first."""
        try:
            return self._join(shard, join)
        except (FileNotFoundError, UserError):  # what a killed run left running was done first, and cleaned up
            if shard in self.closed():
                return False
            raise

    def _join(self, shard: int, join: Join) -> bool:
        commits = self._read_all(f"commits/{unit:06d}.json" for unit in self.units_of(shard))
        pieces: dict[str, list[str]] = {}
        for piece in (piece for commit in commits for piece in commit["files"]):
            pieces.setdefault(piece["table"], []).append(piece["path"])
        nonce, files = uuid.uuid4().hex[:12], []
        planned: Counter[str] = Counter()
        for commit in commits:
            planned.update(commit["planned"])
        for table, paths in pieces.items():
            data, file = join([self._path(path) for path in paths], table, self.stamp)
            files.append(replace(file, path=f"{table}/{shard:06d}-{nonce}.parquet"))
            storage.write_atomic(self._path(files[-1].path), data)
        reject_files = [commit["reject_file"] for commit in commits if commit["reject_file"]]
        rejects = self.read_rejects(reject_files).to_pylist()
        name = f"rejects/{shard:06d}-{nonce}.parquet"
        won = self._record(f"shards/{shard:06d}.json", nonce, files, planned, rejects, name)
        self._remove([*(path for paths in pieces.values() for path in paths), *reject_files])
        self._remove([f"commits/{unit:06d}.json" for unit in self.units_of(shard)])
        return won

    def commit_shard(self, unit: int, data: bytes, file: File) -> bool:
        """Writes the shard that a unit of a compaction is, then its record. False: another attempt was first."""
        shard, nonce = self.shard_of(unit), uuid.uuid4().hex[:12]
        file = replace(file, path=f"{file.table}/{shard:06d}-{nonce}.parquet")
        storage.write_atomic(self._path(file.path), data)
        return self._record(f"shards/{shard:06d}.json", nonce, [file], {}, [], "")

    def records(self) -> list[dict[str, Any]]:
        """What this plan's units gave so far: records of joined shards, then commits of units in none."""
        names = [f"shards/{shard:06d}.json" for shard in sorted(self.closed())]
        return self._read_all([*names, *(f"commits/{unit:06d}.json" for unit in sorted(self.committed()))])

    def state(self) -> Manifest:
        """The base and the results of this plan. RuntimeError when a unit is missing, or a row is."""
        if left := self.left():
            raise RuntimeError(f"{self.uri}: {left} of {len(self.unit_rows)} units are not committed")
        planned, rejected = Counter(self.base.planned), {t: Counter(r) for t, r in self.base.rejected.items()}
        files, reject_files = list(self.base.files), list(self.base.reject_files)
        for record in self.records():
            planned.update(record["planned"])
            files += [File.from_json(file) for file in record["files"]]
            reject_files += [record["reject_file"]] if record["reject_file"] else []
            for table, reasons in record["rejected"].items():
                rejected.setdefault(table, Counter()).update(reasons)
        state = replace(
            self.base,
            stamp=self.stamp,
            files=tuple(files),
            reject_files=tuple(reject_files),
            planned=dict(planned),
            rejected={table: {reason: n for reason, n in r.items() if n} for table, r in rejected.items()},
            plan=self.number,
        )
        for table, rows in planned.items():
            kept, lost = state.written(table), sum(rejected.get(table, Counter()).values())
            if rows != kept + lost:
                raise RuntimeError(f"{self.uri}: {table}: planned {rows} rows != written {kept} + rejected {lost}")
        return state

    def finished(self) -> Manifest | None:
        """The manifest that holds the results of this plan."""
        manifest = self.published()
        return manifest if manifest is not None and manifest.plan == self.number else None

    def published(self) -> Manifest | None:
        """What readers see: the results of this plan or of an earlier one."""
        value = latest(self.uri, "manifests")
        return Manifest.from_json(self.uri, value) if value is not None else None

    def publish(self) -> Manifest:
        """Checks that every planned row was written or rejected, writes the manifest, deletes what is of no use."""
        state = self.state()
        manifest = replace(state, number=self.base.number + 1)
        path = self._path(f"manifests/{manifest.number:08d}.json")
        if not storage.put_if_absent(path, json.dumps(manifest.to_json()).encode()):
            manifest = read_manifest(self.uri)
            if manifest.plan < self.number:
                raise changed_meanwhile(self.uri)
        self.sweep(manifest)
        return manifest

    def read_rejects(self, names: Iterable[str]) -> pa.Table:
        """The rows of reject files, with `REJECTS` as schema."""

        def read(name: str) -> pa.Table:
            return pq.read_table(io.BytesIO(storage.read_bytes(self._path(name))), schema=REJECTS)

        with ThreadPoolExecutor(THREADS) as pool:
            return pa.concat_tables([REJECTS.empty_table(), *pool.map(read, names)])

    def has_rejects(self) -> bool:
        """Whether a unit of this plan rejected a row."""
        return any(record["reject_file"] for record in self.records())

    def reject_examples(self, count: int) -> list[str]:
        """A few rejects as lines for a person."""
        names = [record["reject_file"] for record in self.records() if record["reject_file"]]
        rows = self.read_rejects([*names[:count], *self.base.reject_files[:count]]).slice(0, count).to_pylist()
        return [f"{row['id'] or '(no id)'}: {row['reason']}: {row['message']}" for row in rows]

    def next_number(self) -> int:
        """What the first file of the next plan is named by."""
        return self.shards.stop if self.shard_units else self.units.stop

    def extend(self, stamp: Stamp, units: Iterable[pa.Table], base: Manifest, *, purpose: Purpose) -> Ledger:
        """Makes the next plan: `units` are added to `base`, which holds what shall stay of this one."""
        first = {"first_unit": self.units.stop, "first_shard": self.shards.stop, "shard_units": self.shard_units}
        return _make_plan(self.uri, self.number + 1, purpose, stamp, units, base, **first)

    def _record(
        self,
        name: str,
        nonce: str,
        files: Sequence[File],
        planned: Mapping[str, int],
        rejects: list[dict[str, Any]],
        reject_file: str,
    ) -> bool:
        """Writes the rejects, then puts the record that names everything; takes the files back when it is late."""
        if rejects:
            storage.write_atomic(self._path(reject_file), parquet(pa.Table.from_pylist(rejects, REJECTS)))
        reasons: dict[str, Counter[str]] = {table: Counter() for table in planned}
        for reject in rejects:
            reasons[reject["table"]][reject["reason"]] += 1
        record: dict[str, Any] = {"nonce": nonce, "files": [asdict(file) for file in files], "planned": dict(planned)}
        record |= {"rejected": reasons, "reject_file": reject_file if rejects else None}
        if storage.put_if_absent(self._path(name), json.dumps(record).encode()):
            return True
        self._remove([*(file.path for file in files), *([reject_file] if rejects else [])])
        return False

    def sweep(self, manifest: Manifest) -> None:
        """Deletes what no reader can need: attempts that came too late, and files that neither this manifest nor the
        one before names. A file carries the number of its unit, shard or plan: later ones belong to a later plan."""
        keep = manifest.names()
        before = self._path(f"manifests/{manifest.number - 1:08d}.json")
        if storage.exists(before):
            keep |= Manifest.from_json(self.uri, json.loads(storage.read_bytes(before))).names()
        for folder in ("pieces", "commits"):
            old = [f"{folder}/{name}" for name in storage.names(self._path(folder))]
            ours = [name for name in old if _is_below(name, self.units.stop)]
            self._remove(ours if self.shard_units else [])
        ends = dict.fromkeys([*manifest.planned, "rejects"], self.next_number()) | {"deletes": self.number + 1}
        for folder, end in ends.items():
            there = [path.removeprefix(f"{self.uri}/") for path, _ in _walk(self._path(folder))]
            self._remove([name for name in there if name not in keep and _is_below(name, end)])
        planned = {path.split("/")[1] for path in self.plan_files}
        for name in storage.names(self._path("plan")):
            if name not in planned and _is_below(name, self.number + 1):
                storage.remove_tree(self._path(f"plan/{name}"))
        for name in storage.names(self._path("manifests")):
            if _is_below(name, manifest.number - 1):
                storage.remove(self._path(f"manifests/{name}"))
        storage.remove_temporaries(self.uri)

    def _numbers(self, folder: str) -> set[int]:
        return {_number(name) for name in storage.names(self._path(folder)) if name.endswith(".json")}

    def _read_all(self, names: Iterable[str]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(THREADS) as pool:
            return [json.loads(data) for data in pool.map(storage.read_bytes, map(self._path, names))]

    def _remove(self, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(storage.remove, map(self._path, names)))

    def _path(self, name: str) -> str:
        return storage.join(self.uri, name)


def begin(uri: str, stamp: Stamp, plan: Callable[[], Iterable[pa.Table]], *, shard_units: int = 0) -> Ledger:
    """Opens the output at `uri`, or makes its plan when it is new. `plan()` gives one table per unit.

    Raises UserError when the output was made with another stamp (both values are named) or is something else.
    """
    found = open_ledger(uri)
    if found is None:
        strange = [name for name in storage.names(uri) if name not in ("plan", "plans", "running.json")]
        strange += [f"plan/{name}" for name in storage.names(storage.join(uri, "plan")) if _number(name) < 0]
        if strange:
            raise UserError(f"{uri}: this folder already holds {_some(strange)}; choose an empty or new output")
        first = {"first_unit": 0, "first_shard": 0, "shard_units": shard_units}
        found = _make_plan(uri, 1, "make", stamp, plan(), Manifest(uri, stamp), **first)
    refuse_other_stamp(uri, stamp, found.stamp)
    return found


def open_ledger(uri: str) -> Ledger | None:
    """The output at `uri` under its latest plan; None when nothing is planned there."""
    value = latest(uri, "plans")
    if value is None:
        return None
    stamp = Stamp.from_json(value.get("stamp"))  # type: ignore[arg-type]
    return Ledger(
        uri,
        stamp,
        value["number"],
        value["purpose"],
        Manifest.from_json(uri, value["base"]),
        tuple(value["plan_files"]),
        np.array(value["unit_rows"], np.int64),
        np.array(value["unit_ends"], np.int64),
        value["first_unit"],
        value["first_shard"],
        value["shard_units"],
    )


def _make_plan(
    uri: str,
    number: int,
    purpose: Purpose,
    stamp: Stamp,
    units: Iterable[pa.Table],
    base: Manifest,
    *,
    first_unit: int,
    first_shard: int,
    shard_units: int,
) -> Ledger:
    files, rows, ends = _write_plan(uri, number, units, shard_units or PLAN_FILE_UNITS)
    value: dict[str, Any] = {"number": number, "purpose": purpose, "nonce": uuid.uuid4().hex, "stamp": stamp.to_json()}
    value |= {"base": base.to_json(), "plan_files": files, "unit_rows": rows, "unit_ends": ends}
    value |= {"first_unit": first_unit, "first_shard": first_shard, "shard_units": shard_units}
    won = storage.put_if_absent(storage.join(uri, f"plans/{number:08d}.json"), json.dumps(value).encode())
    if not won and number > 1:
        raise changed_meanwhile(uri)
    made = open_ledger(uri)
    assert made is not None
    return made


def _write_plan(
    uri: str, number: int, units: Iterable[pa.Table], per_file: int
) -> tuple[list[str], list[int], list[int]]:
    """Plan files of `per_file` units; memory holds one of them."""
    folder, buffer = f"plan/{number:06d}-{uuid.uuid4().hex[:12]}", io.BytesIO()
    files: list[str] = []
    rows: list[int] = []
    ends: list[int] = []

    def close_file() -> None:
        files.append(f"{folder}/{len(files):06d}.arrows")
        storage.write_atomic(storage.join(uri, files[-1]), buffer.getvalue())
        buffer.seek(0)
        buffer.truncate()

    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for table in units:
        with pa.ipc.new_stream(buffer, table.schema, options=options) as writer:
            writer.write_table(table)
        rows.append(len(table))
        ends.append(buffer.tell())
        if len(rows) % per_file == 0:
            close_file()
    if len(rows) % per_file:
        close_file()
    return files, rows, ends


def changed_meanwhile(uri: str) -> Fault:
    return Fault(f"{uri}: another job changed this table meanwhile; run the same command again")


def parquet(table: pa.Table) -> bytes:
    """A small table as Parquet."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _walk(path: str) -> Iterable[tuple[str, int]]:
    return storage.walk_files(path) if storage.exists(path) else ()


def _number(name: str) -> int:
    """The number that a file's name begins with; -1 for a file of somebody else."""
    digits = name.rpartition("/")[2].partition("-")[0].removesuffix(".json")
    return int(digits) if digits.isdecimal() else -1


def _is_below(name: str, end: int) -> bool:
    """Whether a file is one of ours with a number below `end`."""
    return 0 <= _number(name) < end


def _some(values: list[str]) -> str:
    return ", ".join(values[:4]) + (f" and {len(values) - 4} more" if len(values) > 4 else "")
