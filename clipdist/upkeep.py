"""What changes of finished embeddings have in common: one at a time, and rows that are taken away."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdist import storage
from clipdist.config import UserError
from clipdist.deletes import write_deletes
from clipdist.ledger import Ledger, Purpose, open_ledger
from clipdist.manifest import Manifest, read_manifest

NAMES: dict[Purpose, str] = {
    "make": "the first run",
    "retry": "a retry of rejected rows",
    "update": "an update",
    "remove": "a removal",
    "compact": "a compaction",
}


def open_finished(uri: str, purpose: Purpose) -> Ledger:
    """The ledger of finished embeddings, or of those with an unfinished change of this purpose, which is to go on.
    UserError for everything else."""
    read_manifest(uri, "embeddings")
    ledger = open_ledger(uri)
    if ledger is None:
        raise UserError(f"{uri}: damaged: there is a manifest, but no plan")
    if ledger.finished() is None and ledger.purpose != purpose:
        raise UserError(f"{uri}: {under_way(ledger)}; finish that first: {finish_with(ledger)}")
    return ledger


def under_way(ledger: Ledger) -> str:
    """How far an unfinished plan is."""
    total = len(ledger.units)
    done = f": {total - len(ledger.missing())} of {total} units" if total else ""
    return f"{NAMES[ledger.purpose]} is under way{done}"


def finish_with(ledger: Ledger) -> str:
    """The command that finishes an unfinished plan."""
    if ledger.purpose == "remove":
        return f"clipdist remove {ledger.uri} with the same ids"
    compact = ledger.purpose == "compact"
    return f"clipdist compact {ledger.uri}" if compact else f"clipdist embed {ledger.uri}/config.yaml"


def without_rows(ledger: Ledger, state: Manifest, rows: Mapping[str, NDArray[np.integer[Any]]]) -> Manifest:
    """The state without rows that live in it: numbers in the file per `File.path`, each once. Writes the file of
    deletes for the plan that comes next; nothing reads it before that plan is there."""
    tables = {file.path: file.table for file in state.files}
    gone: Counter[str] = Counter()
    for path, numbers in rows.items():
        gone[tables[path]] += len(numbers)
    if not gone.total():
        return state
    name = f"deletes/{ledger.number + 1:06d}-{uuid.uuid4().hex[:12]}.parquet"
    storage.write_atomic(storage.join(ledger.uri, name), write_deletes(rows))
    return replace(
        state,
        delete_files=(*state.delete_files, name),
        deleted={table: state.deleted.get(table, 0) + gone[table] for table in state.planned},
        planned={table: count - gone[table] for table, count in state.planned.items()},
    )
