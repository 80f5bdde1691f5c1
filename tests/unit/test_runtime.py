"""Where Ray is looked for: never, for minutes, at an address where nothing answers."""

import socket
from collections.abc import Iterator

import pytest

from clipdist import runtime
from clipdist.config import UserError


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(runtime, "read_ray_address", lambda: None)


def test_without_an_address_ray_looks_itself() -> None:
    assert runtime.address() is None


def test_a_cluster_that_was_killed_and_left_its_address_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, listening: str, dead: str
) -> None:
    monkeypatch.setattr(runtime, "read_ray_address", lambda: dead)
    assert runtime.address() == "local"
    monkeypatch.setattr(runtime, "read_ray_address", lambda: listening)
    assert runtime.address() is None, "a cluster that runs on this machine is joined"


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_named_address_must_answer(monkeypatch: pytest.MonkeyPatch, listening: str, dead: str, scheme: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", scheme + listening)
    assert runtime.address() == scheme + listening
    monkeypatch.setenv("RAY_ADDRESS", scheme + dead)
    with pytest.raises(UserError, match=f"RAY_ADDRESS: nothing answers at {scheme}{dead}; start the cluster, or unset"):
        runtime.address()


@pytest.mark.parametrize("place", ["auto", "local"])
def test_rays_own_words_are_left_to_it(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", place)
    assert runtime.address() == place


@pytest.mark.parametrize("wrong", ["nonsense", "host:port", "127.0.0.1:99999"])
def test_what_is_no_address_is_told(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", wrong)
    with pytest.raises(UserError, match="RAY_ADDRESS: nothing answers"):
        runtime.address()
