"""What Ray exports to Prometheus while a job runs."""

import time
import urllib.request

import pytest
import ray

from clipdist.units import Metrics

WAIT_SECONDS = 60


@pytest.mark.timeout(120)
def test_rows_rejects_bytes_and_seconds_are_exported(local_ray: None) -> None:
    metrics = Metrics("counted")
    facts = {"bytes": 10, "seconds": {"fetch": 1.5, "encode": 0.0}}
    metrics.add(100, {"images": {"missing": 3}}, facts, 7.0)
    expected = {
        "ray_clipdist_rows_total": 100,
        "ray_clipdist_rejected_rows_total": 3,
        "ray_clipdist_read_bytes_total": 10,
        "ray_clipdist_stage_seconds_total": 1.5,
        "ray_clipdist_rows_per_second": 7,
    }
    port, values, deadline = ray.nodes()[0]["MetricsExportPort"], dict[str, float](), time.monotonic() + WAIT_SECONDS
    lines: list[str] = []
    while len(values) < len(expected):  # they come one after the other
        assert time.monotonic() < deadline, f"of ours only {values} are exported"
        time.sleep(1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if 'job="counted"' in line]
        values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert values == expected
    assert any('reason="missing"' in line and 'table="images"' in line for line in lines)
