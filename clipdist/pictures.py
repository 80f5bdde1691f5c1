"""The bytes of a picture from wherever its `image_uri` says: a file, a store, a URL, a tar member, a Parquet row."""

from __future__ import annotations

import functools
import re
import threading
import time

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipdist import patience, storage
from clipdist.fetch import FetchError, fetch
from clipdist.images import BadImage

STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""What a row may name beside http(s) URLs, which go through `fetch`, and paths. fsspec knows more, such as ftp:// and
simplecache::http://, and would reach hosts that `fetch` refuses."""

PATIENCE_SECONDS = 40.0
"""How long a store is asked for a picture: shorter than for a job's own files, as one row can be rejected."""
OUTAGE_SECONDS = patience.SECONDS
"""A store that has not answered for so long is asked once for each picture, or a unit would wait for many minutes."""
DENIALS, BELIEVED_AFTER = 2, 20
"""A denial is tried again so often, since S3 also denies under load; in no process more than so many times in vain."""

TAR_MEMBER = re.compile(r"^(?P<path>.+)#bytes=(?P<offset>\d+)\+(?P<size>\d+)$")
PARQUET_ROW = re.compile(r"^(?P<path>.+)#row=(?P<group>\d+):(?P<row>\d+):(?P<column>.+)$")


def read_picture(uri: str | None, *, max_image_bytes: int = 50 << 20, allow_private_hosts: bool = False) -> bytes:
    """The encoded picture. Raises BadImage with the reason when it is missing, denied, unreachable or too large."""
    if not uri:
        raise BadImage("missing", "the row names no picture")
    store, started = "/".join(uri.split("/")[:3]), time.monotonic()
    seconds = min(PATIENCE_SECONDS, max(0.0, _down_since.get(store, started) + OUTAGE_SECONDS - started))
    try:
        if uri.lower().startswith(("http://", "https://")):
            return fetch(uri, max_bytes=max_image_bytes, allow_private_hosts=allow_private_hosts)
        with patience.at_most(seconds, DENIALS if _denied.in_vain < BELIEVED_AFTER else 0):
            data = _read(uri, max_image_bytes)
        _down_since.pop(store, None)
        return data
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # whatever a store's client or a name out of somebody's table raises is one row's reject
        if isinstance(error, patience.StoreDown):
            _down_since.setdefault(store, started)
        raise _bad(uri, error) from None


def _read(uri: str, limit: int) -> bytes:
    if match := TAR_MEMBER.match(uri):
        offset, size = int(match["offset"]), int(match["size"])
        _check_size(size, limit)
        return storage.read_bytes(_checked(match["path"]), offset, offset + size)
    if match := PARQUET_ROW.match(uri):
        column = _column(_checked(match["path"]), int(match["group"]), match["column"])
        data = column[int(match["row"])].as_py()
        if data is None:
            raise BadImage("missing", "the picture column is null")
        _check_size(len(data), limit)
        return bytes(data)
    if storage.is_local(_checked(uri)):
        size = storage.size(uri)
        _check_size(size, limit)
        return storage.read_bytes(uri, 0, size)  # no more than was checked: /dev/zero has size 0 and no end
    data = storage.read_bytes(uri, 0, limit + 1)  # one request: to ask for the size first would be another
    if len(data) > limit:
        raise BadImage("too_many_bytes", f"more than {limit:,} bytes; at most {limit:,} are read")
    return data


def _bad(uri: str, error: Exception) -> BadImage:
    """The BadImage that stands for whatever was raised."""
    said = str(error).removeprefix(f"{uri}: ")
    message = f"{uri}: {error.__class__.__name__}: {said}"
    match error:
        case FetchError():
            return BadImage(f"fetch_{error.reason}", str(error), error.transient)
        case FileNotFoundError() | NotADirectoryError() | IsADirectoryError():
            return BadImage("missing", f"no such file: {uri}")
        case patience.StoreDown():
            return BadImage("unreadable", str(error), True)
        case PermissionError():
            _denied.in_vain += patience.is_denial(error)
            return BadImage("denied", message, patience.is_denial(error))
        case _:
            return BadImage("unreadable", message, patience.passes(error))


class _Denied:
    in_vain = 0


_denied = _Denied()
_down_since: dict[str, float] = {}
"""By scheme and bucket: when the first picture was asked for that did not come; until one does."""


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise BadImage("too_many_bytes", f"{size:,} bytes; at most {limit:,} are read")


def _checked(path: str) -> str:
    scheme, separator, _ = path.partition("://")
    if separator and scheme not in STORES:
        raise BadImage("unreadable", f"{path}: pictures are not read from {scheme}://")
    return path


_one_reader = threading.Lock()
_failed: dict[tuple[str, int, str], tuple[float, Exception]] = {}


def _column(path: str, group: int, column: str) -> pa.ChunkedArray:
    """`_one_reader` keeps the threads that need the next row group from each reading it. What failed for the first of
    them has failed for those that waited meanwhile: or each would wait out a store's fault after the other."""
    key, asked = (path, group, column), time.monotonic()
    with _one_reader:
        when, error = _failed.get(key, (0.0, None))
        if error is not None and when > asked:
            raise error
        _failed.clear()
        try:
            return _row_group(path, group, column)
        except Exception as error:
            _failed[key] = (time.monotonic(), error)
            raise


@functools.lru_cache(maxsize=2)
def _row_group(path: str, group: int, column: str) -> pa.ChunkedArray:
    """Rows come in order, so the last row group or two serve nearly every call."""
    with storage.open_read(path) as file:
        found = pq.ParquetFile(file).read_row_group(group, columns=[column]).column(0)
    return pc.struct_field(found, "bytes") if pa.types.is_struct(found.type) else found
