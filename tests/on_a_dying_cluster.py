"""Run a study on a local Ray cluster of three nodes while two workers and a node are killed.

    python tests/on_a_dying_cluster.py STUDY.toml ROOT

Prints what was killed, as JSON.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from posmask.study import run
from posmask.study.study_file import read_study


def main() -> None:
    settings, root = read_study(Path(sys.argv[1])), Path(sys.argv[2])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    os.environ["RAY_ADDRESS"] = cluster.address
    killed: list[str] = []

    def kill() -> None:
        for stage in ("train", "evaluate"):
            worker = _working(stage)
            worker.kill()
            killed.append(stage)
        # A busy node: its raylet is a parent of a working process.
        while True:
            worker = _working("")
            for node in nodes:
                raylet = node.all_processes["raylet"][0].process.pid
                if raylet in [parent.pid for parent in worker.parents()]:
                    cluster.remove_node(node, allow_graceful=False)
                    killed.append("node")
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run.run_study(settings, root, say=print, n_jobs=3, engine="ray")
    killer.join(1)
    print(json.dumps(killed))
    cluster.shutdown()


def _working(stage: str) -> psutil.Process:
    """Return a process that runs a task of this stage, or of any stage if it is empty."""
    names = tuple(f"ray::{task}" for task in ((stage,) if stage else ("train", "evaluate")))
    while True:
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith(names):
                return process
        time.sleep(0.01)


if __name__ == "__main__":
    main()
