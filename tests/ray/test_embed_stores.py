"""An embed job on an S3 that fails for a while ends as on one that does not; one that never will do stops it soon."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from clipdist import storage
from tests.faulty_store import FaultyStore
from tests.ray.embed_jobs import Jobs, Outcome, outcome, wait_for, write_catalog

ROWS = 48
SHARDS = {"unit_rows": 16, "shard_rows": 32}


@pytest.fixture(scope="module")
def on_s3(faulty_cluster: Jobs, s3_bucket: str) -> str:
    """A catalog with its pictures in the bucket."""
    root = f"{s3_bucket}/faulty"
    write_catalog(root, ROWS)
    lines = [{"id": f"r{row}", "image": f"pictures/{row % ROWS:04d}.png", "caption": f"c{row}"} for row in range(400)]
    storage.write_atomic(f"{root}/many.jsonl", "\n".join(map(json.dumps, lines)).encode())
    return root


@pytest.fixture(scope="module")
def undisturbed(faulty_cluster: Jobs, on_s3: str) -> Outcome:
    faulty_cluster.run(f"{on_s3}/catalog.jsonl", f"{on_s3}/undisturbed", **SHARDS)
    found = outcome(f"{on_s3}/undisturbed")
    assert len(found.vectors) == 2 * ROWS
    return found


@pytest.fixture
def store(faulty_cluster: Jobs) -> Any:
    """The store of the jobs; all its switches are off again after a test."""
    store = faulty_cluster.store
    store.forget()
    yield store
    store.slow_down_every = store.deny_every = store.cut_every = store.lose_put_reply_every = 0
    store.refuse, store.ignores_conditions, store.lacks_conditions, store.deny_paths = None, False, None, ""


def slow_down(store: FaultyStore) -> None:
    store.slow_down_every = 5


def cut(store: FaultyStore) -> None:
    store.cut_every = 7


def lose_replies(store: FaultyStore) -> None:
    store.lose_put_reply_every = 3


def ignore_conditions(store: FaultyStore) -> None:
    store.ignores_conditions = True


def lack_conditions(store: FaultyStore) -> None:
    store.lacks_conditions = (501, "NotImplemented")


@pytest.mark.parametrize("fault", [slow_down, cut, lose_replies, ignore_conditions, lack_conditions])
def test_a_store_with_faults(
    cluster: Jobs, on_s3: str, undisturbed: Outcome, store: FaultyStore, fault: Callable[[FaultyStore], None]
) -> None:
    output = f"{on_s3}/{fault.__name__}"
    fault(store)
    driver = cluster.run(f"{on_s3}/catalog.jsonl", output, **SHARDS)
    print(f"{fault.__name__}: {driver.seconds:.1f} s, {dict(store.faults)} of {dict(store.requests)}")
    print(driver.said())
    assert outcome(output) == undisturbed
    if fault in (ignore_conditions, lack_conditions):
        assert "run only one job at a time on an output" in driver.said()
    else:
        assert sum(store.faults.values()) > 3
        assert "note:" not in driver.said()


def test_a_store_that_is_down_for_20_seconds(
    cluster: Jobs, on_s3: str, undisturbed: Outcome, store: FaultyStore
) -> None:
    output = f"{on_s3}/down"
    driver = cluster.start(f"{on_s3}/catalog.jsonl", output, **SHARDS)
    wait_for(lambda: bool(cluster.work("load")))
    store.down_for(20)
    began = time.monotonic()
    assert driver.wait() == 0, driver.said()
    print(f"{driver.seconds:.1f} s, of which {time.monotonic() - began:.1f} s after the store went down", driver.said())
    assert outcome(output) == undisturbed


def stops(cluster: Jobs, output: str, catalog: str, within: float = 90, **settings: Any) -> str:
    """What a job says that stops by itself, soon, with exit code 2, and publishes nothing."""
    driver = cluster.start(catalog, output, **SHARDS, **settings)
    assert driver.wait(within) == 2, driver.said()
    said = driver.said()
    print(f"{driver.seconds:.1f} s:", said)
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("answer", [(403, "InvalidAccessKeyId"), (403, "SignatureDoesNotMatch"), (403, "AccessDenied")])
def test_wrong_credentials(
    cluster: Jobs, catalog: Any, on_s3: str, store: FaultyStore, answer: tuple[int, str]
) -> None:
    store.refuse = answer
    output = f"{on_s3}/refused-{answer[1]}"
    said = stops(cluster, output, str(catalog), within=60)
    store.refuse = None
    assert answer[1] in said
    assert output in said
    assert storage.names(output) == []


def test_wrong_names(cluster: Jobs, catalog: Any, on_s3: str, tmp_path: Any) -> None:
    said = stops(cluster, f"{on_s3}/wrong", f"{on_s3}/not-there/catalog.jsonl", within=60)
    assert f"{on_s3}/not-there/catalog.jsonl: no such file" in said
    said = stops(cluster, "s3://no-such-bucket/out", str(catalog), within=60)
    assert "s3://no-such-bucket/out" in said
    assert storage.names(f"{on_s3}/wrong") == []
    said = stops(cluster, str(tmp_path / "random"), str(catalog), model={"name": str(cluster.home / "tiny.json")})
    assert "random weights; give model.pretrained" in said


def test_pictures_that_are_denied_stop_the_job_early(cluster: Jobs, on_s3: str, store: FaultyStore) -> None:
    store.deny_paths = "/pictures/"
    output = f"{on_s3}/denied-pictures"
    said = stops(cluster, output, f"{on_s3}/many.jsonl", within=120, max_rejected_fraction=0.3)
    assert "denied" in said
    assert "Nothing was published" in said
    assert "pictures/" in said
    done = re.search(r"of ([\d,]+) images were rejected", said)
    assert done
    assert int(done[1].replace(",", "")) < 400, "not the whole catalog was tried"
    assert storage.names(f"{output}/manifests") == []


def test_an_output_that_cannot_be_written(cluster: Jobs, catalog: Any, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    for output in (str(tmp_path / "file" / "out"), "/proc/embeddings"):
        said = stops(cluster, output, str(catalog), within=60)
        assert output in said


def test_a_disk_that_is_full(cluster: Jobs, catalog: Any, reference: Outcome) -> None:
    output = cluster.home / "full"
    cluster.faults(disk="full")
    driver = cluster.start(catalog, output)
    assert driver.wait() == 1, driver.said()
    print(f"{driver.seconds:.1f} s:", driver.said())
    assert "No space left on device" in driver.said()
    assert str(output) in driver.said()
    assert "Traceback" not in driver.said()
    assert not (output / "manifests").exists()
    cluster.faults()
    cluster.run(catalog, output)
    assert outcome(output) == reference
