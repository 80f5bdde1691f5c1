"""Paths on a disk or an object store through one fsspec client: read, list, atomic write, put-if-absent.

A path is a local path or a URL such as `s3://bucket/prefix`; endpoint, region and credentials come the usual AWS ways.
What a store fails to do for a while is tried again (`patience.py`); on a disk nothing is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from clipdist import patience
from clipdist.config import UserError

_TRIES = 5  # to put a file in its place, while others sweep
MORE_THAN_ANY = 1 << 50
"""Bytes: no object of a store is so large."""

Filesystem: TypeAlias = Any  # an fsspec.AbstractFileSystem; fsspec has no types
Result = TypeVar("Result")

S3 = ("s3", "s3a")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
WITHOUT_KEYS = ("NoCredentialsError", "PartialCredentialsError")
CONFLICT_WAITS_SECONDS = (0.1, 0.5, 2.0)
UNKNOWN_CONDITION_CODES = ("InvalidArgument", "InvalidRequest")
"""What some stores answer to If-None-Match instead of NotImplemented. Where it meant another thing, the plain PUT that
follows is refused as well."""


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
    settings = {"use_listings_cache": False, **kind._get_kwargs_from_urls(path)}
    if scheme in S3:  # what a person set for fsspec stays
        theirs = [fsspec.config.conf.get(name, {}).get("config_kwargs", {}) for name in S3]
        settings["config_kwargs"] = {"retries": patience.CLIENT_RETRIES, **theirs[0], **theirs[1]}
    fs = kind(**settings)
    if scheme in S3:
        fs.retries = 1  # s3fs has two loops of five tries, one in the other, around those of botocore
    return fs, kind._strip_protocol(path)


def _patiently(fs: Filesystem, path: str, work: Callable[[], Result]) -> Result:
    if isinstance(fs, LocalFileSystem):
        return work()
    try:
        return patience.patiently(fs, path, work)
    except OSError as error:  # a store says what it denies, not where
        if len(error.args) == 1 and isinstance(error.args[0], str) and path not in error.args[0]:
            error.args = (f"{path}: {error.args[0]}",)
        raise
    except Exception as error:
        if type(error).__name__ not in WITHOUT_KEYS:
            raise
        keys = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
        raise UserError(f"{path}: no credentials ({error}): {keys}") from None


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
    return bool(_patiently(fs, path, lambda: fs.exists(inner)))


def is_directory(path: str) -> bool:
    fs, inner = filesystem(path)
    return bool(_patiently(fs, path, lambda: fs.isdir(inner)))


def is_file(path: str) -> bool:
    fs, inner = filesystem(path)
    if isinstance(fs, LocalFileSystem):
        return bool(fs.isfile(inner))
    try:  # a store's `isfile` says False also when it cannot know
        return bool(_patiently(fs, path, lambda: fs.info(inner))["type"] == "file")
    except FileNotFoundError:
        return False


def glob(pattern: str) -> dict[str, int]:
    """The paths that match, sorted, with their bytes (0 for a folder)."""
    fs, inner = filesystem(pattern)
    found = sorted(_patiently(fs, pattern, lambda: fs.glob(inner, detail=True)).items())
    local = isinstance(fs, LocalFileSystem)
    return {path if local else fs.unstrip_protocol(path): int(facts["size"] or 0) for path, facts in found}


def size(path: str) -> int:
    fs, inner = filesystem(path)
    return int(_patiently(fs, path, lambda: fs.size(inner)))


def read_bytes(path: str, start: int | None = None, end: int | None = None) -> bytes:
    """The whole file, or its bytes [start, end)."""
    fs, inner = filesystem(path)
    if start is not None and start == end:
        return b""  # S3 has no empty range and would send the whole file
    return _patiently(fs, path, lambda: _read(fs, inner, start, end))


def open_read(path: str, buffered: bool = True) -> Any:
    """A seekable binary file. Not `buffered`: a store is asked for just the bytes that are read, and no more ahead."""
    fs, inner = filesystem(path)
    settings = {} if buffered or isinstance(fs, LocalFileSystem) else {"cache_type": "none"}
    file = _patiently(fs, path, lambda: fs.open(inner, "rb", **settings))
    cache: Any = getattr(file, "cache", None)  # of every remote file; what it does not hold it asks its fetcher for
    if not isinstance(fs, LocalFileSystem) and getattr(cache, "fetcher", None):
        real, limit = cache.fetcher, patience.limit()  # pyarrow reads in threads of its own
        cache.fetcher = lambda start, end: patience.patiently(fs, path, lambda: real(start, end), limit)
    return file


def names(path: str) -> list[str]:
    """Names in a directory, sorted; [] when there is none. Left out: what a killed `write_atomic` left behind, and the
    empty object by which an S3 console marks a folder."""
    fs, inner = filesystem(path)
    try:
        listed = _patiently(fs, path, lambda: fs.ls(inner, detail=False))
    except FileNotFoundError:
        return []
    entries = [entry.rstrip("/") for entry in listed]
    found = (entry.rpartition("/")[2] for entry in entries if entry != inner)
    return sorted(name for name in found if not (name.startswith(".") and name.endswith(".tmp")))


def walk_files(path: str) -> Iterator[tuple[str, int]]:
    """Every file below `path` as (path, bytes): those of a directory by name, then its directories by name."""
    fs, inner = filesystem(path)
    folders = [inner]
    while folders:
        folder = folders.pop()
        listed = _patiently(fs, path, lambda: fs.ls(folder, detail=True))  # noqa: B023
        entries = [entry for entry in listed if entry["name"].rstrip("/") != folder]
        for entry in sorted(entries, key=lambda entry: str(entry["name"])):
            if entry["type"] != "directory":
                name = entry["name"]
                yield (name if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(name), int(entry["size"] or 0))
        inside = (entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")
        folders += sorted(inside, reverse=True)


def check_writable(path: str) -> None:
    """UserError when files cannot be written below a local path. A store says so itself when it is asked."""
    if not is_local(path):
        return
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{path}: cannot be written: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written: no permission in {place}")


def make_directory(path: str) -> None:
    fs, inner = filesystem(path)
    _patiently(fs, path, lambda: fs.makedirs(inner, exist_ok=True))


def write_atomic(path: str, data: bytes) -> None:
    """All of `data` or nothing is visible under `path`: rename on a disk, one PUT (or a multipart) on a store."""
    fs, inner = filesystem(path)
    if not isinstance(fs, LocalFileSystem):
        _patiently(fs, path, lambda: fs.pipe_file(inner, data))
        return
    _place(inner, data, os.replace)


def upload(folder: str, path: str) -> None:
    """The files of a local folder, copied below `path` on a store."""
    fs, inner = filesystem(path)
    _patiently(fs, path, lambda: fs.put(folder.rstrip("/") + "/", inner.rstrip("/") + "/", recursive=True))


def put_if_absent(path: str, data: bytes) -> bool:
    """Writes `data` unless `path` exists; False when another content is there. Seeing one's own content is success:
    the reply to an earlier try may have been lost, so callers put a nonce into what they write.

    One of many wins on a disk and on a store for which `has_conditional_put`. Elsewhere what is there already is
    respected, but of several that write at the same moment more than one may believe that it won."""
    fs, inner = filesystem(path)

    def put() -> bool:
        try:
            if isinstance(fs, LocalFileSystem):
                _place(inner, data, os.link)
            elif _is_there(fs, inner):  # a store may ignore the condition without a word
                raise FileExistsError(inner)
            elif not _create_object(fs, inner, data):
                fs.pipe_file(inner, data)
                return _holds(fs, inner, data)
        except FileExistsError:
            return _holds(fs, inner, data)
        return True

    return _patiently(fs, path, put)


def has_conditional_put(uri: str) -> bool:
    """Whether put_if_absent has exactly one winner below `uri`. Asks a store by writing one object there twice."""
    fs, _ = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return True
    probe = join(uri, f".probe-{uuid.uuid4().hex}.tmp")  # a name that `names` leaves out, should it stay
    inner = filesystem(probe)[1]

    def twice() -> bool:
        try:
            for data in (b"1", b"2"):
                if not _create_object(fs, inner, data):
                    break
            return False
        except FileExistsError:
            return True

    try:
        return _patiently(fs, uri, twice)
    finally:
        with contextlib.suppress(Exception), patience.at_most(0):
            remove(probe)


def _place(inner: str, data: bytes, move: Callable[[str, str], None]) -> None:
    """Writes a temporary file and moves it to its place; anew when `remove_temporaries` of another process took it for
    what a killed writer left."""
    for left in reversed(range(_TRIES)):
        temporary = _write_temporary(inner, data)
        try:
            move(temporary, inner)
            return
        except FileNotFoundError:
            if not left:
                raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _read(fs: Filesystem, inner: str, start: int | None, end: int | None) -> bytes:
    if start is None and end is None and _is_s3(fs):
        start, end = 0, MORE_THAN_ANY  # a range is one request; for a whole object s3fs asks for its size first
    try:
        return bytes(fs.cat_file(inner, start=start, end=end))
    except OSError as error:
        if start == 0 and patience.code_of(error) in ("InvalidRange", "416"):
            return b""  # an empty object has no byte 0
        raise


def _holds(fs: Filesystem, inner: str, data: bytes) -> bool:
    """Whether a file has this content."""
    try:
        return _read(fs, inner, 0, len(data) + 1) == data
    except FileNotFoundError:  # removed since
        return False


def _is_there(fs: Filesystem, inner: str) -> bool:
    """Not `fs.exists`: for S3 that is two requests, and other clients say False when they cannot know."""
    try:
        if _is_s3(fs):
            bucket, key, _ = fs.split_path(inner)
            fs.call_s3("head_object", Bucket=bucket, Key=key)
        else:
            fs.info(inner)
    except FileNotFoundError:
        return False
    return True


def _is_s3(fs: Filesystem) -> bool:
    return "s3" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _create_object(fs: Filesystem, inner: str, data: bytes) -> bool:
    """A PUT with If-None-Match. FileExistsError when the object is there; False, with nothing written, when the store
    has no such PUT."""
    if not _is_s3(fs):
        return False
    for wait_seconds in (*CONFLICT_WAITS_SECONDS, None):
        try:
            fs.pipe_file(inner, data, mode="create")
            return True
        except OSError as error:
            code = patience.code_of(error)
            if code in ("PreconditionFailed", "412"):  # s3fs knows only the answer of AWS
                raise FileExistsError(inner) from None
            if patience.lacks(error) or code in UNKNOWN_CONDITION_CODES:
                return False
            if code not in ("ConditionalRequestConflict", "409") or wait_seconds is None:
                raise
            time.sleep(wait_seconds)  # S3 asks to try again when two write at once
    raise AssertionError("unreachable")


def remove(path: str) -> None:
    """Removes one file; nothing happens when it is not there."""
    fs, inner = filesystem(path)
    try:
        _patiently(fs, path, lambda: fs.rm_file(inner))
    except FileNotFoundError:
        return


def remove_tree(path: str) -> None:
    fs, inner = filesystem(path)

    def remove_all() -> None:
        with contextlib.suppress(FileNotFoundError):  # an earlier try may have been done, and only its reply lost
            if fs.exists(inner):
                fs.rm(inner, recursive=True)

    _patiently(fs, path, remove_all)


def fingerprint(path: str, whole_bytes: int = 16 << 20, edge_bytes: int = 1 << 20) -> str:
    """Changes when the file changes: its size, and what its store says of its content (an ETag) or a hash of it. Of a
    file larger than `whole_bytes` it is the hash of both ends, and on a disk the time at which it was written."""
    fs, inner = filesystem(path)
    facts = _patiently(fs, path, lambda: fs.info(inner))
    total, tag = int(facts["size"] or 0), facts.get("ETag") or facts.get("etag")
    if tag:
        return f"{total}-{str(tag).strip(chr(34))}"
    if total <= whole_bytes:
        return f"{total}-{_hash(read_bytes(path, 0, total))}"
    ends = read_bytes(path, 0, edge_bytes) + read_bytes(path, total - edge_bytes, total)
    written = os.stat(inner).st_mtime_ns if isinstance(fs, LocalFileSystem) else ""
    return f"{total}-{_hash(ends)}-{written}"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def remove_temporaries(path: str) -> None:
    """Removes what killed writers left in the folders of a local folder. Whoever writes there now starts anew."""
    if is_local(path):
        for file in Path(path).glob("*/**/.*.tmp"):
            if TEMPORARY.fullmatch(file.name):
                file.unlink(missing_ok=True)


def _write_temporary(inner: str, data: bytes) -> str:
    os.makedirs(os.path.dirname(inner) or ".", exist_ok=True)
    temporary = os.path.join(os.path.dirname(inner), f".{os.path.basename(inner)}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary
