"""Nodes set apart for a role: three raylets on this machine, of which two bear the custom resource of a role."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import asyncio, json, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group
from rlhf_cluster.cluster.hosts import reserved, set_apart, spawn
from rlhf_cluster.cluster.session import _refuse_impossible
from rlhf_cluster.config import ConfigError, Resources

class Plain:
    pass

logs, one = Path(sys.argv[1]), Resources(num_cpus=0.5)
small = {"num_cpus": 1, "object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args=small)
nodes = {role: cluster.add_node(**small, resources={role: 1}).node_id for role in ("generation", "learner")}
ray.init(address=cluster.address, log_to_driver=False)
try:
    where = {}
    for role in ("generation", "learner", "sft", "reward"):
        host = spawn(Plain, role, logs / f"{role}.log", one, role=role)
        node = ray.get(host.actor.ready.remote(), timeout=120)
        where[role] = next((name for name, known in nodes.items() if known == node), "any")
    refused = ""
    try:  # a node has one CPU: two fit no node of generation's, whatever the others hold
        _refuse_impossible({"ppo": {"generation": Resources(num_cpus=2)}})
    except ConfigError as error:
        refused = str(error)
    group = placement_group([reserved(one) | set_apart("learner")])
    ray.get(group.ready(), timeout=60)
    print(json.dumps({"where": where, "refused": refused}))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def test_workers_go_to_the_nodes_that_are_set_apart_for_their_role(tmp_path: Path, short_dir: Path) -> None:
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(short_dir),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert {role: found["where"][role] for role in ("generation", "learner", "sft")} == {
        "generation": "generation",
        "learner": "learner",
        "sft": "learner",
    }
    assert found["refused"].startswith("a worker of generation asks for 2 CPU, 0.001 generation, which none of 3 nodes")
