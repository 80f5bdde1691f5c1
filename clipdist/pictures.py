"""The bytes of a picture from wherever its `image_uri` says: a file, a store, a URL, a tar member, a Parquet row."""

from __future__ import annotations

import functools
import re
import threading

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipdist import storage
from clipdist.fetch import FetchError, fetch
from clipdist.images import BadImage

STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""What a row may name beside http(s) URLs, which go through `fetch`, and paths. fsspec knows more, such as ftp:// and
simplecache::http://, and would reach hosts that `fetch` refuses."""

TAR_MEMBER = re.compile(r"^(?P<path>.+)#bytes=(?P<offset>\d+)\+(?P<size>\d+)$")
PARQUET_ROW = re.compile(r"^(?P<path>.+)#row=(?P<group>\d+):(?P<row>\d+):(?P<column>.+)$")


def read_picture(uri: str | None, *, max_image_bytes: int = 50 << 20, allow_private_hosts: bool = False) -> bytes:
    """The encoded picture. Raises BadImage with the reason when it is missing, unreachable or too large."""
    if not uri:
        raise BadImage("missing", "the row names no picture")
    try:
        if uri.lower().startswith(("http://", "https://")):
            return fetch(uri, max_bytes=max_image_bytes, allow_private_hosts=allow_private_hosts)
        if match := TAR_MEMBER.match(uri):
            offset, size = int(match["offset"]), int(match["size"])
            _check_size(size, max_image_bytes)
            return storage.read_bytes(_checked(match["path"]), offset, offset + size)
        if match := PARQUET_ROW.match(uri):
            with _one_reader:
                column = _row_group(_checked(match["path"]), int(match["group"]), match["column"])
            data = column[int(match["row"])].as_py()
            if data is None:
                raise BadImage("missing", "the picture column is null")
            _check_size(len(data), max_image_bytes)
            return bytes(data)
        size = storage.size(_checked(uri))
        _check_size(size, max_image_bytes)
        return storage.read_bytes(uri, 0, size)  # no more than was checked: /dev/zero has size 0 and no end
    except (BadImage, MemoryError):
        raise
    except FetchError as error:
        raise BadImage(f"fetch_{error.reason}", str(error)) from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BadImage("missing", f"no such file: {uri}") from None
    except Exception as error:  # whatever a store's client or a name out of somebody's table raises is one row's reject
        raise BadImage("unreadable", f"{uri}: {error.__class__.__name__}: {error}") from None


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise BadImage("too_many_bytes", f"{size:,} bytes; at most {limit:,} are read")


def _checked(path: str) -> str:
    scheme, separator, _ = path.partition("://")
    if separator and scheme not in STORES:
        raise BadImage("unreadable", f"{path}: pictures are not read from {scheme}://")
    return path


_one_reader = threading.Lock()


@functools.lru_cache(maxsize=2)
def _row_group(path: str, group: int, column: str) -> pa.ChunkedArray:
    """Rows come in order, so the last row group or two serve nearly every call. `_one_reader` keeps the threads that
    need the next one from each reading it."""
    with storage.open_read(path) as file:
        found = pq.ParquetFile(file).read_row_group(group, columns=[column]).column(0)
    return pc.struct_field(found, "bytes") if pa.types.is_struct(found.type) else found
