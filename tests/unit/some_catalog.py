"""A small catalog, embedded without a model: vectors are functions of what they are made of."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from clipdist import storage
from clipdist.compare import Mode
from clipdist.joining import join_shards
from clipdist.ledger import Ledger, open_ledger
from clipdist.manifest import File, Manifest, read_manifest
from clipdist.retry import planned_row
from clipdist.schema import Stamp, embeddings_schema
from clipdist.search import Index
from clipdist.shard_writer import encode_shard
from clipdist.shards import Shards
from clipdist.update import begin_or_update, is_outdated

DIM, UNIT_ROWS, SHARD_ROWS = 4, 3, 6
KEPT = [pa.field("price", pa.float64())]
COLUMNS = ["id", "image_uri", "captions", "group", "split", "reason", "message", "price"]


@dataclass(frozen=True)
class Item:
    """A row of the catalog. A picture whose path says so is broken."""

    id: str | None
    uri: str = ""
    captions: tuple[str, ...] = ()
    group: str | None = None
    price: float | None = None

    @property
    def broken(self) -> bool:
        return "broken" in self.uri


def planned(items: Sequence[Item], rows: int = UNIT_ROWS) -> Iterator[pa.Table]:
    """Tables of planned rows; a later row with the same id is a duplicate."""
    seen: set[str] = set()
    for start in range(0, len(items), rows):
        found = []
        for item in items[start : start + rows]:
            reason = "empty_id" if item.id is None else "duplicate_id" if item.id in seen else None
            seen.add(item.id or "")
            values = (item.id, item.uri, list(item.captions), item.group, "train", reason, reason, item.price)
            found.append(dict(zip(COLUMNS, values, strict=True)))
        lists = {"captions": pa.list_(pa.string()), "price": pa.float64()}
        yield pa.Table.from_pylist(found, pa.schema([(name, lists.get(name, pa.string())) for name in COLUMNS]))


def stamp_of(items: Sequence[Item], towers: Sequence[str] = ("images", "texts")) -> Stamp:
    source = hashlib.sha256(repr(list(items)).encode()).hexdigest()
    sizes = {"unit_rows": UNIT_ROWS, "shard_rows": SHARD_ROWS}
    return Stamp("embeddings", {"dim": DIM, "towers": list(towers), **sizes, "input": {"source": source}})


def vector(text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    made = np.random.default_rng(seed).normal(size=DIM)
    return (made / np.linalg.norm(made)).astype(np.float16)


def embed(
    uri: str, items: Sequence[Item], mode: Mode | None = None, towers: Sequence[str] = ("images", "texts")
) -> Manifest:
    """What the job does, without Ray: open, go on or update; commit what is missing, join, publish."""
    there = open_ledger(uri)
    if there is not None and there.finished() is None and is_outdated(there, stamp_of(items, towers), mode):
        finish(there)
    ledger = open_embeddings(uri, items, mode, towers)
    return ledger.finished() or finish(ledger)


def open_embeddings(uri: str, items: Sequence[Item], mode: Mode | None, towers: Sequence[str]) -> Ledger:
    shard_units = SHARD_ROWS // UNIT_ROWS
    stamp = stamp_of(items, towers)
    return begin_or_update(uri, stamp, lambda: planned(items), mode, shard_units=shard_units)


def finish(ledger: Ledger) -> Manifest:
    for unit in ledger.missing():
        commit(ledger, unit)
    for shard in sorted(set(ledger.shards) - ledger.closed()):
        ledger.join(shard, join_shards)
    return ledger.publish()


def commit(ledger: Ledger, unit: int) -> None:
    plan = ledger.rows(unit)
    tables: dict[tuple[str, str | None], tuple[bytes, File]] = {}
    counts: dict[str, int] = {}
    rejects: list[dict[str, Any]] = []
    for table in ledger.stamp.identity["towers"]:
        found: list[tuple[dict[str, Any], np.ndarray]] = []
        before = len(rejects)
        for index, row in enumerate(plan.to_pylist()):
            if row.get("only") not in (None, table):
                continue
            broken = row["reason"] is None and table == "images" and "broken" in row["image_uri"]
            if broken or row["reason"] is not None:
                why = {"reason": row["reason"] or "missing", "message": row["message"] or "no such file"}
                rejects.append({"id": row["id"], "table": table, "uri": row["image_uri"], **why})
                rejects[-1]["row"] = planned_row(plan, index) if broken else None
                continue
            common = {name: row[name] for name in ("image_uri", "group", "split", "price")}
            if table == "images":
                own = {"id": row["id"], "caption": next(iter(row["captions"]), None)}
                found.append((own | common, vector(row["image_uri"])))
            else:
                for number, caption in enumerate(row["captions"]):
                    own = {"id": f"{row['id']}#{number}", "pair_id": row["id"], "caption": caption}
                    found.append((own | common, vector(caption)))
        counts[table] = len(found) + len(rejects) - before
        if found:
            schema = embeddings_schema(table, DIM, KEPT)
            rows = [values | {"embedding": vector.tolist()} for values, vector in found]
            tables[table, None] = encode_shard(pa.Table.from_pylist(rows, schema), table, ledger.stamp)
    ledger.commit(unit, tables, counts, rejects)


Held = dict[str, tuple[Any, ...]]


def held(items: Iterable[Item], towers: Sequence[str] = ("images", "texts")) -> Held:
    """What the tables hold of these rows: id -> its columns and vector."""
    found: Held = {}
    for item in items:
        common = (item.uri, item.group, item.price)
        if "images" in towers and not item.broken:
            first = next(iter(item.captions), None)
            found[str(item.id)] = (first, *common, vector(item.uri).tobytes())
        if "texts" in towers:
            for number, caption in enumerate(item.captions):
                found[f"{item.id}#{number}"] = (caption, *common, vector(caption).tobytes())
    return found


def read(uri: str) -> Held:
    """What readers find, through Shards and by search; with the ledger's sums and no file too many or too few."""
    manifest = read_manifest(uri, "embeddings")
    found: Held = {}
    for table in manifest.stamp.identity["towers"]:
        shards = Shards(manifest, table)
        rows, matrix = shards.columns(["id", "caption", "image_uri", "group", "price"]).to_pylist(), shards.matrix()
        assert len(rows) == len(matrix) == len(shards) == manifest.written(table)
        for row, one in zip(rows, matrix, strict=True):
            assert row["id"] not in found, "each id once"
            found[row["id"]] = (*list(row.values())[1:], one.tobytes())
        assert manifest.planned[table] == manifest.written(table) + sum(manifest.rejected[table].values())
        if rows:
            hits = Index(shards).search(matrix, 1)
            assert all(found[one[0]][-1] == vector.tobytes() for one, vector in zip(hits.ids, matrix, strict=True))
    rejects = list(chain(*({reason: n for reason, n in r.items() if n} for r in manifest.rejected.values())))
    assert bool(rejects) == bool(manifest.reject_files)
    there = {path.removeprefix(f"{uri}/") for path, _ in storage.walk_files(uri)}
    assert manifest.names() <= there
    return found


def rejected(uri: str) -> list[tuple[str | None, str, str]]:
    """(id, table, reason) of every reject, sorted."""
    from clipdist.ledger import open_ledger

    ledger = open_ledger(uri)
    assert ledger is not None
    rows = ledger.read_rejects(read_manifest(uri).reject_files).to_pylist()
    return sorted(((row["id"], row["table"], row["reason"]) for row in rows), key=str)


def item(row_id: str, version: int = 0, captions: int = 2) -> Item:
    texts = tuple(f"{row_id} 신발 {version} {number}" for number in range(captions))
    return Item(row_id, f"/pictures/{row_id}-{version}.jpg", texts, f"group {row_id}", version / 4)


def changed(one: Item, **values: Any) -> Item:
    return replace(one, **values)
