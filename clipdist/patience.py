"""Faults of a store that pass are waited out: which ones these are, for how long, and what is said at the end."""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from clipdist.config import Fault

SECONDS = 90.0
"""How long an operation is tried again: longer than the restart of a store, shorter than a person's patience."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 15.0
CLIENT_RETRIES = {"total_max_attempts": 3, "mode": "standard"}
"""What botocore does by itself in each request (some 1.5 s in all), so that one lost page of a long listing or one lost
part of an upload does not begin the whole anew. All longer waiting is done here, and nowhere twice."""

PASSING_CODES = (
    "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "RequestTimeoutException", "Throttling",
    "ThrottlingException", "RequestThrottled", "TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded",
    "IncompleteBody", "XAmzContentSHA256Mismatch",
)  # fmt: skip
PASSING_STATUS = (408, 429)  # and all from 500, but not 501: what a store lacks it will not learn
DENIED_CODES = ("AccessDenied", "403")  # 403: the answer to a HEAD has no body that could name a code
# By name, because this module works without the clients: of botocore, aiohttp, urllib3 and http.client.
PASSING_TYPES = {
    "HTTPClientError", "EndpointConnectionError", "IncompleteReadError", "ResponseParserError", "ClientPayloadError",
    "ClientConnectionError", "IncompleteRead", "ProtocolError",
}  # fmt: skip

Result = TypeVar("Result")


class StoreDown(Fault):
    """A store that did not answer, or asked to come back later, for as long as one may wait."""


@dataclass(frozen=True)
class Limit:
    """`deadline` is of time.monotonic(). `denials`: how often a denial is tried again."""

    deadline: float
    denials: int = 0


_limit: ContextVar[Limit | None] = ContextVar("limit", default=None)


@contextlib.contextmanager
def at_most(seconds: float, denials: int = 0) -> Iterator[None]:
    """Inside, what the block asks of stores is tried again for at most `seconds` in all, instead of SECONDS for each.

    `denials`: so often is "access denied" tried again too, because S3 also says so under load."""
    outer, deadline = _limit.get(), time.monotonic() + seconds
    token = _limit.set(Limit(min(deadline, outer.deadline) if outer else deadline, denials))
    try:
        yield
    finally:
        _limit.reset(token)


def limit() -> Limit | None:
    """The limit of the block that runs now. Other threads do not see it: hand it to what works there."""
    return _limit.get()


def patiently(fs: Any, path: str, work: Callable[[], Result], limit: Limit | None = None) -> Result:
    """What `work` returns; it is called again while its faults are of the kind that passes.

    Raises StoreDown when they have not passed in time, and every other error at once."""
    limit, started = limit or _limit.get(), time.monotonic()
    deadline, denials = (limit.deadline, limit.denials) if limit else (started + SECONDS, 0)
    tries = 0
    while True:
        try:
            return work()
        except Exception as error:
            tries += 1
            denied = is_denial(error)
            left = deadline - time.monotonic()
            if not passes(error) and not (denied and tries <= denials and left > 0):
                raise
            if left <= 0:
                raise StoreDown(_message(fs, path, error, tries, time.monotonic() - started)) from error
            wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** min(tries - 1, 30))
        # Full jitter spreads many workers. A denial is no reason to hurry: tries that are too close see the same load.
        time.sleep(min(left, random.uniform(2 * wait, 4 * wait) if denied else random.uniform(0, wait)))


def code_of(error: BaseException) -> str:
    """The error code in a store's answer, such as SlowDown; "" when there was no such answer."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def is_denial(error: BaseException) -> bool:
    """Whether a store refused this object, as it also does under load. Wrong credentials are another thing."""
    return code_of(error) in DENIED_CODES


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if answer := _answer(error):
        code = code_of(error)
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or (int(code) if code.isdigit() else 0)
        return code in PASSING_CODES or status in PASSING_STATUS or (status >= 500 and not lacks(error))
    if "certificate" in str(error).lower():  # also an HTTPClientError, and as wrong tomorrow
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, TimeoutError | ConnectionError) or bool(names & PASSING_TYPES)


def lacks(error: BaseException) -> bool:
    """Whether the store says that it cannot do what the request asks."""
    status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status == 501 or code_of(error) in ("NotImplemented", "501")


def _answer(error: BaseException) -> dict[str, Any]:
    """What botocore read from the store. s3fs raises an OSError and keeps the botocore error as its cause."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _message(fs: Any, path: str, error: BaseException, tries: int, seconds: float) -> str:
    client = getattr(fs, "_s3", None)
    parts = urlsplit(str(client.meta.endpoint_url)) if client is not None else None
    port = f":{parts.port}" if parts and parts.port else ""
    store = f"the store at {parts.scheme}://{parts.hostname}{port}" if parts else "the store"
    # A URL may hold a password, and its query a signature.
    said = re.sub(r"//[^/@\s]*@|\?\S*", lambda found: "//" if found[0].startswith("//") else "", str(error))
    what = code_of(error) or type(error).__name__
    return f"{path}: {store} did not do its work in {tries} tries within {seconds:.0f} s ({what}: {said[:200]}); " + (
        "see whether it runs and can be reached from here, then run the same command again"
    )
