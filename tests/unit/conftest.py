"""Places to write to: a disk and S3."""

import threading
import uuid
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bucket(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://` URL of a new prefix. The server writes one object at a time: its If-None-Match is not atomic, S3's is."""
    from moto.s3.responses import S3Response

    real, lock = S3Response.put_object, threading.Lock()

    def one_at_a_time(self: S3Response) -> Any:
        with lock:
            return real(self)

    monkeypatch.setattr(S3Response, "put_object", one_at_a_time)
    return f"{s3_bucket}/{uuid.uuid4().hex}"


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on a disk and a prefix on S3: every test that asks for it runs on both."""
    return str(tmp_path / "out") if request.param == "disk" else f"{request.getfixturevalue('bucket')}/out"
