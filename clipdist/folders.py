"""Pictures without a table as rows: folders with .txt captions beside the pictures, class folders, WebDataset tars."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from clipdist import storage
from clipdist.batches import MALFORMED, Row, in_batches
from clipdist.config import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
READERS = 16
SAMPLED_ROWS = 64


def class_batches(files: Iterable[str], root: str) -> Iterator[list[Row]]:
    """Per picture its id and the name of its folder as `label`."""
    for batch in in_batches(_folder_row(path, root) for path in files):
        for row in batch:
            parts = PurePosixPath(row["id"]).parts
            row["label"] = parts[0].replace("_", " ") if len(parts) > 1 else ""
        yield batch


def folder_batches(files: Sequence[str], root: str, captioned: Sequence[int] | None) -> Iterator[list[Row]]:
    """Per picture its id and, unless `captioned` is None, the `text` of its sidecar, which is read only where it is
    `captioned`."""
    start = 0
    with ThreadPoolExecutor(READERS) as pool:
        for batch in in_batches(_folder_row(path, root) for path in files):
            if captioned is not None:
                end = start + len(batch)
                flags = zip(files[start:end], captioned[start:end], strict=True)
                sidecars = [sidecar(path) if there else None for path, there in flags]
                for row, text in zip(batch, pool.map(_read_text, sidecars), strict=True):
                    row["text"] = text
            yield batch
            start += len(batch)


def _folder_row(path: str, root: str) -> Row:
    return {"id": str(PurePosixPath(relative(path, root)).with_suffix("")), "image_uri": path}


def _read_text(path: str | None) -> str:
    return "" if path is None else storage.read_bytes(path).decode("utf-8", "replace").strip()


def sidecar(path: str) -> str:
    return path[: path.rindex(".")] + ".txt"


def relative(path: str, root: str) -> str:
    """The part of `path` below `root`: a folder, a glob, or the file itself."""
    root = root.partition("*")[0].rpartition("/")[0] if "*" in root else root
    return path[len(root.rstrip("/")) + 1 :] if path != root else path.rpartition("/")[2]


def tar_rows(path: str) -> Iterator[Row]:
    """WebDataset: neighbouring members with the same name up to the first dot are one row."""
    row: Row = {}
    with storage.open_read(path) as opened:
        try:
            with tarfile.open(fileobj=opened, mode="r:") as tar:
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would hold every header of the tar
                    key, extension = _key(member.name)
                    if not member.isfile():
                        continue
                    if row and row["id"] != key:
                        yield row
                        row = {}
                    row = row or {"id": key, "image_uri": None}
                    _add_member(row, path, tar, member, extension)
                opened.seek(tar.offset)
                if opened.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                    raise tarfile.ReadError(f"damaged at byte {tar.offset}")
        except tarfile.TarError as error:
            raise UserError(f"source.path: {path}: cannot be read as tar: {error}") from None
    if row:
        yield row


def _key(name: str) -> tuple[str, str]:
    folder, _, name = name.rpartition("/")
    stem, _, extension = name.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _add_member(row: Row, path: str, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
    """`jpg` goes before `mask.png`; several captions become a list; a .json that cannot be read spoils its row."""
    if f".{extension}".endswith(PICTURES):
        if row["image_uri"] is None or f".{extension}" in PICTURES:
            row["image_uri"] = f"{path}#bytes={member.offset_data}+{member.size}"
        return
    if extension not in ("txt", "caption", "cls", "json"):
        return
    content = tar.extractfile(member)
    data = content.read().decode("utf-8", "replace").strip() if content else ""
    fields: Any = {"label" if extension == "cls" else "text": data}
    if extension == "json":
        try:
            fields = json.loads(data)
        except json.JSONDecodeError as error:
            fields = {MALFORMED: f"{path}: {member.name}: not valid JSON: {error}"}
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if name not in row:
            row[name] = value
        elif name not in ("id", "image_uri", MALFORMED) and row[name] != value:
            row[name] = [*(row[name] if isinstance(row[name], list) else [row[name]]), value]


def tar_bytes_per_row(path: str) -> float:
    """From the headers of the first rows; no member is read."""
    try:
        with storage.open_read(path) as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
            groups = itertools.groupby((m for m in tar if m.isfile()), key=lambda member: _key(member.name)[0])
            starts = [next(members).offset for _, members in itertools.islice(groups, SAMPLED_ROWS + 1)]
            end = starts[-1] if len(starts) > SAMPLED_ROWS else tar.offset
    except (tarfile.TarError, IndexError) as error:
        raise UserError(f"source.path: {path}: cannot be read as tar: {error}") from None
    return end / min(len(starts), SAMPLED_ROWS)
