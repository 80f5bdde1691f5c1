"""The bytes of a picture from wherever its `image_uri` says: a file, a store, a URL, a tar member, a Parquet row."""

from __future__ import annotations

import functools
import re

import pyarrow as pa
import pyarrow.parquet as pq

from clipdist import storage
from clipdist.fetch import FetchError, fetch
from clipdist.images import BadImage

TAR_MEMBER = re.compile(r"^(?P<path>.+)#bytes=(?P<offset>\d+)\+(?P<size>\d+)$")
PARQUET_ROW = re.compile(r"^(?P<path>.+)#row=(?P<group>\d+):(?P<row>\d+):(?P<column>.+)$")


def read_picture(uri: str | None, *, max_image_bytes: int = 50 << 20, allow_private_hosts: bool = False) -> bytes:
    """The encoded picture. Raises BadImage with the reason when it is missing, unreachable or too large."""
    if not uri:
        raise BadImage("missing", "the row names no picture")
    try:
        if uri.startswith(("http://", "https://")):
            return fetch(uri, max_bytes=max_image_bytes, allow_private_hosts=allow_private_hosts)
        if match := TAR_MEMBER.match(uri):
            offset, size = int(match["offset"]), int(match["size"])
            _check_size(size, max_image_bytes)
            return storage.read_bytes(match["path"], offset, offset + size)
        if match := PARQUET_ROW.match(uri):
            column = _row_group(match["path"], int(match["group"]), match["column"])
            data = column[int(match["row"])].as_py()
            if data is None:
                raise BadImage("missing", "the picture column is null")
            return bytes(data)
        _check_size(storage.size(uri), max_image_bytes)
        return storage.read_bytes(uri)
    except FetchError as error:
        raise BadImage(f"fetch_{error.reason}", str(error)) from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BadImage("missing", f"no such file: {uri}") from None
    except (OSError, pa.ArrowException) as error:
        raise BadImage("unreadable", f"{uri}: {error.__class__.__name__}: {error}") from None


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise BadImage("too_many_bytes", f"{size:,} bytes; at most {limit:,} are read")


@functools.lru_cache(maxsize=2)
def _row_group(path: str, group: int, column: str) -> pa.ChunkedArray:
    """Rows come in order, so the last row group or two serve nearly every call."""
    with storage.open_read(path) as file:
        table = pq.ParquetFile(file).read_row_group(group, columns=[column])
    found = table.column(column.partition(".")[0])
    for name in column.split(".")[1:]:
        found = pa.chunked_array([chunk.field(name) for chunk in found.chunks], type=found.type.field(name).type)
    return found
