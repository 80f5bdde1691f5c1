"""Embeddings for other programs: NumPy matrices, or flat faiss indexes, each with a table of ids in the same order."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipdist import storage
from clipdist.config import UserError
from clipdist.manifest import read_manifest, refuse_other_stamp
from clipdist.report import file_size, table
from clipdist.schema import Stamp
from clipdist.shards import Shards

Format = Literal["npy", "faiss"]
COLUMNS = ("id", "caption", "image_uri")
RECORD = "export.json"


def export(uri: str, output: str, form: Format) -> str:
    """Writes `<table>.npy` or `<table>.faiss`, `<table>.parquet` (id, caption, image_uri, in the same order) and the
    stamp to a new folder, all or nothing; returns what is there, for a person. Deleted rows are left out.

    Memory: one row group; for faiss, which writes only what it holds, the whole table."""
    manifest = read_manifest(storage.absolute(uri), "embeddings")
    stamp = Stamp("export", {"embeddings": manifest.stamp.identity, "manifest": manifest.number, "format": form})
    folder = local_folder(output)
    if (folder / RECORD).exists():
        refuse_other_stamp(str(folder), stamp, Stamp.from_json(json.loads((folder / RECORD).read_text())))
        return _show(folder)
    with new_folder(folder) as place:
        for name in manifest.planned:
            shards = Shards(manifest, name)
            if form == "npy":
                write_npy(shards, place / f"{name}.npy")
            else:
                write_faiss(shards, place / f"{name}.faiss")
            write_rows(shards, place / f"{name}.parquet")
        (place / RECORD).write_text(json.dumps(stamp.to_json(), indent=1))
    return _show(folder)


def write_npy(shards: Shards, path: Path) -> None:
    """A matrix [rows, dim] for `numpy.load(path, mmap_mode="r")`, in the type in which the vectors are stored."""
    header = {"descr": shards.dtype.str, "fortran_order": False, "shape": (len(shards), shards.dim)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _, block in shards.blocks():
            file.write(np.ascontiguousarray(block).data)


def write_faiss(shards: Shards, path: Path) -> None:
    """An exhaustive index by inner product, for `faiss.read_index(path)`: float32 as IndexFlatIP, float16 in half of
    that memory as IndexScalarQuantizer, without loss."""
    faiss = import_faiss()
    if shards.dtype.itemsize == 2:
        index = faiss.IndexScalarQuantizer(shards.dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexFlatIP(shards.dim)
    for _, block in shards.blocks():
        index.add(np.ascontiguousarray(block, np.float32))
    faiss.write_index(index, str(path))


def write_rows(shards: Shards, path: Path) -> None:
    """Ids, captions and places of the pictures, a row per vector."""
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for _, _, rows in shards.by_file(COLUMNS):
            writer.write_table(rows.cast(schema))


def import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("this needs faiss: pip install 'clipdist[faiss]', or pip install faiss-cpu") from None
    return faiss


def local_folder(output: str) -> Path:
    """UserError unless it is a place on this machine."""
    path = storage.absolute(output)
    if not storage.is_local(path):
        raise UserError(f"{output}: expected a folder on this machine; copy it to a store afterwards")
    return Path(path)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place to fill, which becomes `folder` in the end, all of it or nothing. UserError when something is there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: something is there already; choose a new folder")
    storage.check_writable(str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".tmp", dir=folder.parent))
    try:
        yield place
        for file in place.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        place.chmod(0o755)
        place.rename(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _show(folder: Path) -> str:
    files = sorted(file for file in folder.iterdir() if file.name != RECORD)
    return table(["file", "size"], [[str(file), file_size(file.stat().st_size)] for file in files])
