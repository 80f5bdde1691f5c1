"""Paths on a disk or an object store through one fsspec client: read, list, atomic write, put-if-absent.

A path is a local path or a URL such as `s3://bucket/prefix`; endpoint, region and credentials come the usual AWS ways.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from typing import Any, TypeAlias

import fsspec
from fsspec.implementations.local import LocalFileSystem

from clipdist.config import UserError

Filesystem: TypeAlias = Any  # an fsspec.AbstractFileSystem; fsspec has no types

CONFLICT_WAITS_SECONDS = (0.1, 0.5, 2.0)


def filesystem(path: str) -> tuple[Filesystem, str]:
    """The client and the path as the client wants it."""
    scheme, separator, _ = path.partition("://")
    if not separator:
        return LocalFileSystem(), LocalFileSystem._strip_protocol(path)
    # As fsspec's url_to_fs does, to which "::" in a name would mean another thing. Without the cache of listings: other
    # processes write here too.
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except (ValueError, ImportError) as error:
        raise UserError(f"{path}: {scheme}:// cannot be read here: {error}") from None
    return kind(use_listings_cache=False, **kind._get_kwargs_from_urls(path)), kind._strip_protocol(path)


def is_local(path: str) -> bool:
    return isinstance(filesystem(path)[0], LocalFileSystem)


def absolute(path: str) -> str:
    """Local paths made absolute, because Ray workers run elsewhere; URLs unchanged."""
    path = path.removeprefix("file://")
    return path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))


def join(path: str, *parts: str) -> str:
    return "/".join([path.rstrip("/"), *parts])


def exists(path: str) -> bool:
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))


def is_directory(path: str) -> bool:
    fs, inner = filesystem(path)
    return bool(fs.isdir(inner))


def size(path: str) -> int:
    fs, inner = filesystem(path)
    return int(fs.size(inner))


def read_bytes(path: str, start: int | None = None, end: int | None = None) -> bytes:
    """The whole file, or its bytes [start, end)."""
    fs, inner = filesystem(path)
    if start is not None and start == end:
        return b""  # S3 has no empty range and would send the whole file
    return bytes(fs.cat_file(inner, start=start, end=end))


def open_read(path: str) -> Any:
    """A seekable binary file."""
    fs, inner = filesystem(path)
    return fs.open(inner, "rb")


def names(path: str) -> list[str]:
    """Names in a directory, sorted; [] when there is none. Left out: what a killed `write_atomic` left behind, and the
    empty object by which an S3 console marks a folder."""
    fs, inner = filesystem(path)
    try:
        entries = [entry.rstrip("/") for entry in fs.ls(inner, detail=False)]
    except FileNotFoundError:
        return []
    found = (entry.rpartition("/")[2] for entry in entries if entry != inner)
    return sorted(name for name in found if not (name.startswith(".") and name.endswith(".tmp")))


def walk_files(path: str) -> Iterator[tuple[str, int]]:
    """Every file below `path` as (path, bytes): those of a directory by name, then its directories by name."""
    fs, inner = filesystem(path)
    folders = [inner]
    while folders:
        folder = folders.pop()
        entries = [entry for entry in fs.ls(folder, detail=True) if entry["name"].rstrip("/") != folder]
        for entry in sorted(entries, key=lambda entry: str(entry["name"])):
            if entry["type"] != "directory":
                name = entry["name"]
                yield (name if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(name), int(entry["size"] or 0))
        inside = (entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")
        folders += sorted(inside, reverse=True)


def make_directory(path: str) -> None:
    fs, inner = filesystem(path)
    fs.makedirs(inner, exist_ok=True)


def write_atomic(path: str, data: bytes) -> None:
    """All of `data` or nothing is visible under `path`: rename on a disk, one PUT (or a multipart) on a store."""
    fs, inner = filesystem(path)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(inner, data)
        return
    temporary = _write_temporary(inner, data)
    os.replace(temporary, inner)


def put_if_absent(path: str, data: bytes) -> bool:
    """Writes `data` unless `path` exists; False when another content is there. Seeing one's own content is success:
    the reply to an earlier try may have been lost, so callers put a nonce into what they write."""
    fs, inner = filesystem(path)
    try:
        if isinstance(fs, LocalFileSystem):
            temporary = _write_temporary(inner, data)
            try:
                os.link(temporary, inner)
            finally:
                os.unlink(temporary)
        elif "s3" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
            _create_object(fs, inner, data)
        else:
            if fs.exists(inner):
                raise FileExistsError(inner)
            fs.pipe_file(inner, data)
    except FileExistsError:
        try:
            return read_bytes(path) == data
        except FileNotFoundError:  # removed since
            return False
    return True


def _create_object(fs: Filesystem, inner: str, data: bytes) -> None:
    """A PUT with If-None-Match. FileExistsError when the object is there."""
    for wait_seconds in (*CONFLICT_WAITS_SECONDS, None):
        try:
            fs.pipe_file(inner, data, mode="create")
            return
        except OSError as error:
            response = getattr(error.__cause__, "response", None) or {}
            code = response.get("Error", {}).get("Code")
            if code in ("PreconditionFailed", "412"):  # s3fs knows only the answer of AWS
                raise FileExistsError(inner) from None
            if code not in ("ConditionalRequestConflict", "409") or wait_seconds is None:
                raise
            time.sleep(wait_seconds)  # S3 asks to try again when two write at once


def remove(path: str) -> None:
    """Removes one file; nothing happens when it is not there."""
    fs, inner = filesystem(path)
    try:
        fs.rm_file(inner)
    except FileNotFoundError:
        return


def remove_tree(path: str) -> None:
    fs, inner = filesystem(path)
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


def fingerprint(path: str, edge_bytes: int = 1 << 20) -> str:
    """Changes when the file changes: its size and a hash of its first and last MiB (reading 2 MiB at most)."""
    total = size(path)
    digest = hashlib.sha256(read_bytes(path, 0, min(edge_bytes, total)) if total else b"")
    if total > edge_bytes:
        digest.update(read_bytes(path, max(total - edge_bytes, edge_bytes), total))
    return f"{total}-{digest.hexdigest()[:16]}"


def _write_temporary(inner: str, data: bytes) -> str:
    os.makedirs(os.path.dirname(inner) or ".", exist_ok=True)
    temporary = os.path.join(os.path.dirname(inner), f".{os.path.basename(inner)}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary
