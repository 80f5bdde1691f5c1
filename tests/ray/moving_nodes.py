"""Trains on a cluster of three processes' worth of nodes, takes one away on the way, and brings another:
python tests/ray/moving_nodes.py CONFIG killed|preempted. The last line printed is JSON."""

import json
import os
import sys
import threading
import time
from pathlib import Path

os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

import ray
from ray._private.worker import global_worker
from ray.cluster_utils import Cluster

from clipdist import checkpoint, train
from clipdist.config import load
from clipdist.recipe import TrainConfig

PREEMPTION = 2
"""DRAIN_NODE_REASON_PREEMPTION of Ray's autoscaler.proto."""


def step_of(output: str) -> int:
    """The newest complete checkpoint's step."""
    try:
        found = checkpoint.complete(output) if Path(output, "checkpoints").exists() else []
    except FileNotFoundError:  # pruned at this moment
        return step_of(output)
    return found[-1][1].step if found else 0


def main(path: str, how: str) -> None:
    config = load(TrainConfig, path, []).config
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            train.run(config)
        except BaseException as error:
            failed.append(error)

    training = threading.Thread(target=work)
    training.start()
    while step_of(config.output) < 12 and training.is_alive():
        time.sleep(0.05)
    went = step_of(config.output)
    saved = None
    if how == "killed":
        cluster.remove_node(nodes[1], allow_graceful=False)
    else:
        deadline = int((time.time() + 8) * 1000)
        accepted = global_worker.gcs_client.drain_node(nodes[1].node_id, PREEMPTION, "taken away", deadline)
        assert accepted[0], accepted
        for _ in range(70):  # the step at which it stands still is the one that was saved
            time.sleep(0.1)
            saved = step_of(config.output)
        time.sleep(max(0.0, deadline / 1000 - time.time()))
        cluster.remove_node(nodes[1], allow_graceful=True)
    cluster.add_node(num_cpus=1)
    training.join(300)
    assert not training.is_alive()
    if failed:
        raise failed[0]
    print(json.dumps({"went": went, "saved": saved}), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
