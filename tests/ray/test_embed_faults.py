"""An embed job whose driver, encoder, worker or node is killed ends as one that nobody disturbed: the same ids, once,
with the same vectors to the bit, and with little work done twice."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from clipdist import storage
from tests.conftest import draw_shape
from tests.ray.embed_jobs import UNIT_ROWS, Driver, Jobs, Outcome, encoded, outcome, wait_for, write_catalog
from tests.ray.faults_site.sitecustomize import KILLS_DECODER, MARKED

KILLS = 20
ROWS = 400


class Watched:
    """Which files a folder has got, or got anew, since this began, also those that are gone again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.new = folder, list[str]()
        self.old = set(self._there(folder))

    def _there(self, folder: Path) -> list[tuple[str, int]]:
        found = []
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(folder):
                if entry.is_dir():
                    found += self._there(Path(entry.path))
                elif not entry.name.endswith(".tmp"):
                    found.append((os.path.relpath(entry.path, self.folder), entry.stat().st_mtime_ns))
        return found

    def look(self) -> list[str]:
        for one in self._there(self.folder):
            if one not in self.old:
                self.old.add(one)
                self.new.append(one[0])
        return self.new

    def count(self, start: str) -> int:
        return sum(name.startswith(start) for name in self.look())


def kill_when(driver: Driver, moment: Callable[[], bool], seconds: float = 120) -> bool:
    """SIGKILL at a moment; False when the driver had ended before."""
    deadline = time.monotonic() + seconds
    while driver.alive() and not moment():
        assert time.monotonic() < deadline, driver.said()
        time.sleep(0.001)
    came = driver.alive()
    driver.kill()
    return came


def test_a_driver_killed_at_twenty_moments(cluster: Jobs, catalog: Path, reference: Outcome) -> None:
    output, chance = cluster.home / "killed", random.Random(7)
    # (how manieth new file, whose name begins so): planning, then units, joins, publishing
    moments = [(1, "running"), *((number, "plan/") for number in range(1, 7)), (1, "config"), (1, "config")]
    moments += [(chance.randint(1, 4), chance.choice(["pieces/", "commits/"])) for _ in range(5)]
    moments += [(1, "images/"), (1, "shards/"), (1, "texts/"), (3, "commits/"), (1, "shards/"), (1, "manifests/")]
    assert len(moments) == KILLS
    cluster.forget()
    killed, began = 0, time.monotonic()
    for number, start in moments:
        watched, driver = Watched(output), cluster.start(catalog, output)
        pause = chance.choice([0.0, 0.0, 0.01, 0.05])

        def reached(watched: Watched = watched, number: int = number, start: str = start) -> bool:
            return watched.count(start) >= number

        came = kill_when(driver, reached)
        time.sleep(pause if came else 0)
        killed += came
        print(f"killed at {start} {number}: {came}; new files: {len(watched.look())}; {time.monotonic() - began:.0f} s")
    last = cluster.run(catalog, output)
    assert outcome(output) == reference
    encoded_rows = sum(rows for rows, *_ in cluster.work("encode"))
    units = len(cluster.work("encode"))
    print(f"{killed} kills in {time.monotonic() - began:.0f} s; the last start took {last.seconds:.1f} s")
    print(f"{encoded_rows} rows encoded for {ROWS}: {units} units for {ROWS // UNIT_ROWS}")
    assert killed >= KILLS - 3
    # what is in flight: two units of the encoder, and those that wait for the process that writes to start
    assert encoded_rows <= ROWS + killed * 8 * UNIT_ROWS
    assert "lease" not in last.said()


def test_an_encoder_and_a_worker_are_killed(cluster: Jobs, catalog: Path, reference: Outcome) -> None:
    output = cluster.home / "killed-workers"
    cluster.faults(slow=0.3)
    cluster.forget()
    driver, watched = cluster.start(catalog, output), Watched(output)
    wait_for(lambda: watched.count("commits/") >= 2)
    os.kill(cluster.work("encode")[-1][1], signal.SIGKILL)
    wait_for(lambda: watched.count("commits/") >= 6)
    os.kill(cluster.work("load")[-1][1], signal.SIGKILL)
    assert driver.wait() == 0, driver.said()
    print(f"killed an encoder and a loader: {driver.seconds:.1f} s")
    print(driver.said())
    assert outcome(output) == reference
    loaded, rows = (sum(rows for rows, *_ in cluster.work(what)) for what in ("load", "encode"))
    print(f"{loaded} rows loaded, {rows} encoded, for {ROWS}")
    assert loaded <= ROWS + 6 * UNIT_ROWS
    assert rows <= ROWS + 4 * UNIT_ROWS


def test_sigterm_is_as_ctrl_c(cluster: Jobs, catalog: Path, reference: Outcome) -> None:
    output = cluster.home / "terminated"
    watched, driver = Watched(output), cluster.start(catalog, output)
    wait_for(lambda: watched.count("commits/") >= 2)
    os.kill(driver.pid, signal.SIGTERM)
    assert driver.wait(60) == 130
    assert "interrupted. What is finished stays" in driver.said()
    assert "***" not in driver.said(), "nobody's stack"
    assert not (output / "running.json").exists()
    cluster.run(catalog, output)
    assert outcome(output) == reference


def test_a_node_is_killed(cluster: Jobs, catalog: Path, reference: Outcome) -> None:
    output = cluster.home / "killed-node"
    cluster.faults(slow=1.5)  # so that the second node's processes are there before the first one's are done
    with cluster.second_node() as (raylet, replace):

        def begun() -> bool:
            return any(parent == raylet for what in ("load", "encode") for *_, parent in cluster.work(what))

        driver, watched = cluster.start(catalog, output, encoders=2), Watched(output)
        wait_for(lambda: begun() and watched.count("commits/") >= 2)
        replace()
        assert driver.wait(240) == 0, driver.said()
    print(f"killed a node: {driver.seconds:.1f} s")
    print(driver.said())
    assert outcome(output) == reference
    loaded, rows = (sum(rows for rows, *_ in cluster.work(what)) for what in ("load", "encode"))
    print(f"{loaded} rows loaded, {rows} encoded, for {ROWS}")


def test_rows_that_kill_their_process(cluster: Jobs) -> None:
    home = cluster.home / "killers"
    storage.write_atomic(str(home / "decoder.png"), encoded(draw_shape("red", "cross", 0)) + KILLS_DECODER)
    from PIL import Image

    storage.write_atomic(str(home / "encoder.png"), encoded(Image.new("RGB", (40, 40), MARKED)))
    killers = [("kills-decoder", str(home / "decoder.png")), ("kills-encoder", str(home / "encoder.png"))]
    catalog, units = write_catalog(str(home / "catalog"), 10, killers), {"unit_rows": 4, "shard_rows": 8}
    cluster.run(catalog, home / "undisturbed", **units)
    undisturbed = outcome(home / "undisturbed")
    assert len(undisturbed.vectors) == 2 * 12
    cluster.faults(decode="dies", encode="marked")
    cluster.forget()
    driver = cluster.run(catalog, home / "out", seconds=300, max_rejected_fraction=0.5, **units)
    print(driver.said(), f"{driver.seconds:.1f} s")
    found = outcome(home / "out")
    print(found.rejects)
    assert set(found.rejects) == {(table, row) for row, _ in killers for table in ("images", "texts")}
    assert set(found.rejects.values()) == {"kills_worker"}
    assert found.vectors == {row: v for row, v in undisturbed.vectors.items() if not row.startswith("kills")}
    attempts = {what: len(cluster.work(what)) for what in ("load", "encode")}
    print(f"attempts, for 3 units of 4 rows, two with a killer: {attempts}")
    assert attempts["load"] <= 3 + 2 + 2 * 2 * 4
    assert "kills_worker" in driver.said()


def test_an_encoder_that_always_dies(cluster: Jobs, catalog: Path) -> None:
    for fault in ({"load": "always"}, {"encode": "always"}):
        output = cluster.home / f"always-{next(iter(fault))}"
        cluster.faults(**fault)
        cluster.forget()
        driver = cluster.start(catalog, output)
        code = driver.wait(240)
        print(code, f"{driver.seconds:.1f} s", driver.said(), sep="\n")
        assert code in (1, 2)
        assert "memory" in driver.said()
        assert "Traceback" not in driver.said()
        assert not (output / "manifests").exists()


def test_two_jobs_at_once(cluster: Jobs, catalog: Path, reference: Outcome) -> None:
    output = cluster.home / "two"
    drivers = [cluster.start(catalog, output), cluster.start(catalog, output)]
    codes = [driver.wait() for driver in drivers]
    print(codes, *(driver.said() for driver in drivers), sep="\n")
    assert sorted(codes) in ([0, 2], [0, 0])
    if 2 in codes:
        assert "another run is at work on this output" in drivers[codes.index(2)].said()
    assert outcome(output) == reference
