"""Several nodes: three raylets on this machine, of which two bear the custom resource of a role. Who goes where, and
how weights come to a node that is not the learner's."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import asyncio, json, os, sys
from pathlib import Path
import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group
from rlhf_cluster.cluster.delivery import Delivery, WeightChannel
from rlhf_cluster.cluster.generation_host import GenerationHost
from rlhf_cluster.cluster.hosts import reserved, set_apart, spawn
from rlhf_cluster.cluster.session import _refuse_impossible
from rlhf_cluster.config import ConfigError, GenerationConfig, Resources, WeightsConfig
from rlhf_cluster.models.load import load_policy
from rlhf_cluster.weights.snapshot import store_directory, write_snapshot
from rlhf_cluster.weights.store import WeightStore

class Plain:
    pass

async def deliver(tiny, logs, run):
    "Two versions of the tiny model, of which the second changes a hundred numbers, to a worker on another node."
    light = Resources(num_cpus=0.1)
    store = spawn(WeightStore, "store", logs / "store.log", light, (run, 1, 2), role="learner")
    cfg = GenerationConfig(max_response_tokens=8, kv_cache_memory=1 << 26)
    args = (str(tiny), cfg, WeightsConfig(), 64, "float32", "generation-0.1")
    host = spawn(GenerationHost, "generation", logs / "generation.log", light, args, role="generation")
    node = await store.actor.ready.remote()
    channel = WeightChannel(store, node, str(store_directory(run, 1)), run, 1, WeightsConfig())
    await asyncio.wait_for(host.actor.start.remote(0), 200)
    weights = {name: tensor.detach() for name, tensor in load_policy(tiny, torch.float32, "eager").named_parameters()}
    told = []
    for version in (1, 2):
        largest = max(weights.values(), key=torch.Tensor.numel)
        largest.view(-1)[:100] += 0.5
        snapshot = write_snapshot(store_directory(run, 1), version, weights)
        await store.actor.add.remote(snapshot)
        found = await Delivery(channel, snapshot, 100).to([host])
        told.append({**found, "whole": snapshot.bytes, "version": await host.actor.version.remote()})
    await host.actor.stop.remote()
    await store.actor.stop.remote()
    return {"told": told, "left": [path.name for path in Path("/dev/shm").glob(f"rlhf-cluster-{run}-*")]}

logs, tiny, one = Path(sys.argv[1]), Path(sys.argv[2]), Resources(num_cpus=0.5)
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
    delivered = asyncio.run(deliver(tiny, logs, f"placement{os.getpid()}"))
    print(json.dumps({"where": where, "refused": refused, "delivered": delivered}))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.fixture(scope="module")
def found(tiny: Path, tmp_path_factory: pytest.TempPathFactory, short_dir: Path) -> dict[str, Any]:
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(short_dir),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    logs = str(tmp_path_factory.mktemp("logs"))
    command = [sys.executable, "-c", SCRIPT, logs, str(tiny)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_workers_go_to_the_nodes_that_are_set_apart_for_their_role(found: dict[str, Any]) -> None:
    assert {role: found["where"][role] for role in ("generation", "learner", "sft")} == {
        "generation": "generation",
        "learner": "learner",
        "sft": "learner",
    }
    assert found["refused"].startswith("a worker of generation asks for 2 CPU, 0.001 generation, which none of 3 nodes")


def test_a_worker_on_another_node_gets_what_changed(found: dict[str, Any]) -> None:
    """The first version whole, the second as places and values of two bytes; nothing stays in shared memory."""
    first, second = found["delivered"]["told"]
    assert (first["version"], second["version"]) == (1, 2)
    assert first["sync/bytes"] == first["whole"]
    assert 0 < second["sync/bytes"] <= 2 * 100 * 6
    assert found["delivered"]["left"] == []
