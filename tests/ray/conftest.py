"""Jobs on a cluster whose store and workers can be made to fail."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray.embed_jobs import Jobs, Outcome, jobs, outcome, write_catalog


@pytest.fixture(scope="session")
def faulty_cluster(tmp_path_factory: pytest.TempPathFactory, s3_bucket: str) -> Iterator[Jobs]:
    with jobs(tmp_path_factory.mktemp("faulty"), s3_bucket) as started:
        yield started


@pytest.fixture
def cluster(faulty_cluster: Jobs) -> Iterator[Jobs]:
    """The same, without any fault at the start and the end of a test."""
    faulty_cluster.faults()
    faulty_cluster.forget()
    yield faulty_cluster
    faulty_cluster.faults()


@pytest.fixture(scope="session")
def catalog(faulty_cluster: Jobs) -> Path:
    """400 pictures with captions: 25 units, 7 shards."""
    return Path(write_catalog(str(faulty_cluster.home / "catalog"), 400))


@pytest.fixture(scope="session")
def reference(faulty_cluster: Jobs, catalog: Path) -> Outcome:
    """What an undisturbed run makes of the catalog."""
    faulty_cluster.run(catalog, faulty_cluster.home / "reference")
    found = outcome(faulty_cluster.home / "reference")
    assert len(found.vectors) == 800
    assert not found.rejects
    return found
