"""What any artefact is: kind, stamp, rows, rejects by reason, size."""

from __future__ import annotations

import json
from typing import Any

from clipdist import storage
from clipdist.config import UserError
from clipdist.ledger import open_ledger
from clipdist.manifest import Manifest, latest, read_manifest
from clipdist.report import file_size, number, table
from clipdist.schema import Stamp
from clipdist.upkeep import NAMES, under_way


def describe(path: str) -> dict[str, Any]:
    """Facts of the artefact at `path`, as plain data. UserError when it is none."""
    uri = storage.absolute(path)
    if not storage.exists(uri):
        raise UserError(f"{path}: no such folder")
    names = set(storage.names(uri))
    if "plans" in names:
        return _describe_table(uri)
    if "metrics.json" in names:
        return _read(uri, "metrics.json") | {"kind": "metrics", "path": uri}
    if "stamp.json" in names:
        return _describe_run(uri, names)
    if "open_clip_config.json" in names:
        own = _read(uri, "clipdist.json") if "clipdist.json" in names else {}
        return {"kind": "checkpoint", "path": uri, "bytes": _size(uri), **own}
    raise UserError(f"{path}: not a folder of clipdist (no plans, metrics.json, stamp.json or open_clip_config.json)")


def show(found: dict[str, Any]) -> str:
    """The facts as lines for a person; rejects as a table."""
    rejects = {name: reasons for name, reasons in (found.get("rejected") or {}).items() if reasons}
    rows = [(name, _shown(name, value)) for name, value in _flat({**found, "rejected": None}) if name != "rejected"]
    longest = max(len(name) for name, _ in rows)
    lines = [f"{name:<{longest}}  {value}" for name, value in rows]
    if rejects:
        lines += ["", "rejected:", _rejects(rejects)]
    return "\n".join(lines)


def rejects_table(manifest: Manifest) -> str:
    """Rejects by table and reason; empty when there are none."""
    return _rejects(manifest.rejected)


def _rejects(rejected: dict[str, dict[str, int]]) -> str:
    rows = [[name, reason, number(count)] for name, reasons in rejected.items() for reason, count in reasons.items()]
    return table(["table", "reason", "rows"], rows) if rows else ""


def _describe_table(uri: str) -> dict[str, Any]:
    try:
        manifest = read_manifest(uri)
    except UserError as error:
        plan = latest(uri, "plans") or {}
        if "stamp" not in plan:
            raise
        return {"kind": Stamp.from_json(plan["stamp"]).kind, "path": uri, "state": str(error).removeprefix(f"{uri}: ")}
    ledger = open_ledger(uri)
    unfinished = ledger is not None and ledger.number > manifest.plan
    rows = {name: manifest.written(name) for name in manifest.planned}
    splits: dict[str, int] = {}
    for file in manifest.files:
        if file.split is not None:
            splits[file.split] = splits.get(file.split, 0) + file.rows
    facts: dict[str, Any] = {
        "kind": manifest.stamp.kind,
        "path": uri,
        "state": "finished" + (f"; {under_way(ledger)}" if ledger is not None and unfinished else ""),
        "rows": rows,
        "planned": manifest.planned,
    }
    deleted = {name: rows for name, rows in manifest.deleted.items() if rows}
    facts |= {"deleted": deleted} if deleted else {}
    facts |= {"splits": splits} if splits else {}
    if ledger is not None and not unfinished and ledger.number > 1:
        facts["last change"] = NAMES[ledger.purpose]
    facts |= {"files": len(manifest.files), "bytes": sum(file.file_bytes for file in manifest.files)}
    return facts | {"stamp": manifest.stamp.to_json(), "rejected": manifest.rejected}


def _describe_run(uri: str, names: set[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": "training run",
        "path": uri,
        "state": "finished" if "result.json" in names else "not finished",
    }
    if "result.json" in names:
        facts |= _read(uri, "result.json")
    return facts | {
        "checkpoints": storage.names(storage.join(uri, "checkpoints")),
        "stamp": _read(uri, "stamp.json"),
    }


def _read(uri: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(storage.read_bytes(storage.join(uri, name)))
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{uri}: {name} there is not one of clipdist")
    return value


def _size(uri: str) -> int:
    return sum(size for _, size in storage.walk_files(uri))


def _flat(value: dict[str, Any], depth: int = 0) -> list[tuple[str, Any]]:
    """Nested facts as indented lines; a small flat mapping fits on one."""
    rows: list[tuple[str, Any]] = []
    for name, item in value.items():
        if isinstance(item, dict) and (
            len(json.dumps(item, default=str)) > 100 or any(isinstance(v, dict) for v in item.values())
        ):
            rows += [("  " * depth + name, ""), *_flat(item, depth + 1)]
        else:
            rows.append(("  " * depth + name, item))
    return rows


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(key, item)}" for key, item in value.items()) or "none"
    if name.strip() == "bytes":
        return file_size(value)
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return number(value)
    return (
        f"{value:.4f}"
        if isinstance(value, float)
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
    )
