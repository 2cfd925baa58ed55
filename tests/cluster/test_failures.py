"""Workers that die, hang or can never be placed: who it was is said within seconds, and nothing stays behind.

The rooms are opened once and lose their workers one test after the other; the order of the tests matters.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import requests
from as_user import User
from ray_head import Head

from rlhf_cluster.cluster.clients import GenerationPool, RewardPool
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.placement import Attempt, OpenRooms, PPOInputs, open_rooms
from rlhf_cluster.cluster.waits import WorkerDied, WorkerError
from rlhf_cluster.config import RunConfig
from rlhf_cluster.data.batches import PromptOrder
from rlhf_cluster.inputs import load_inputs
from rlhf_cluster.records import Members, Rollouts
from rlhf_cluster.rooms import Generation

RUN = "test-failures"
SOON_S = 60.0  # a wait that has not ended by then hangs
STEP = 0


@dataclass
class Opening:
    """Open rooms, their workers' processes, and the members to sample."""

    runner: asyncio.Runner
    context: Any
    opened: OpenRooms
    members: Members
    processes: dict[str, psutil.Process]

    def soon(self, doing: Awaitable[Any]) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(doing, SOON_S)

        return self.runner.run(bounded())

    def hosts(self, role: str) -> list[Host]:
        return [host for host in self.opened.hosts if host.name.startswith(role)]

    def close(self) -> None:
        self.runner.run(self.context.__aexit__(None, None, None))


def process_of(host: Host) -> psutil.Process:
    return psutil.Process(ray.get(host.actor.__ray_call__.remote(lambda self: os.getpid()), timeout=SOON_S))


@pytest.fixture(scope="module")
def opening(
    private_ray: None,
    small: Callable[..., RunConfig],
    policy: Path,
    reward_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Opening]:
    cfg = small(
        *("generation.resources.workers=2", "reward.resources.workers=2", "learner.resources.workers=2"),
        *("ppo.batch_size=64", "generation.max_num_seqs=2", "generation.ignore_eos=true"),
    )
    attempt = Attempt(RUN, 1, tmp_path_factory.mktemp("logs"))
    members = PromptOrder(load_inputs(cfg).prompts, cfg.seed).members(STEP, cfg.ppo.batch_size, 1)
    with asyncio.Runner() as runner:
        context = open_rooms(cfg, attempt, PPOInputs(policy, policy, reward_model))
        opened = runner.run(context.__aenter__())
        processes = {host.name: process_of(host) for host in opened.hosts}
        yield Opening(runner, context, opened, members, processes)


@pytest.fixture(scope="module")
def rollouts(opening: Opening) -> Rollouts:
    """A few rollouts from workers that still live."""
    return opening.soon(sampled(opening.opened.rooms.generation, opening.members.slice(0, 8)))


async def sampled(generation: Generation, members: Members) -> Rollouts:
    return Rollouts.concat([part async for part in generation.sample(members)])


def test_nobody_talks_beyond_this_machine(opening: Opening, rollouts: Rollouts) -> None:
    """Every open connection of Ray, vLLM, DeepSpeed and the driver leads to an address of this machine."""
    assert len(rollouts) == 8
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    remote = {c.raddr.ip.removeprefix("::ffff:") for p in family for c in p.net_connections("inet") if c.raddr}
    assert len(family) > 8 and remote
    assert remote <= own


def test_a_worker_that_hangs_is_named_with_the_verb_and_the_seconds(opening: Opening, rollouts: Rollouts) -> None:
    hosts, process = opening.hosts("reward"), opening.processes["reward 0"]
    process.suspend()
    try:
        with pytest.raises(WorkerError, match=r"reward 0 did not answer `score` within 1\.5 s"):
            opening.soon(RewardPool(hosts, 1.5).score(rollouts))
    finally:
        process.resume()
    scores = opening.soon(opening.opened.rooms.reward.score(rollouts))
    assert scores.sample_id == rollouts.sample_id


def test_a_stream_that_dries_up_is_named_as_well(opening: Opening) -> None:
    hosts = opening.hosts("generation")
    pool = GenerationPool(hosts, opening.opened.learner._channel, 3)  # the channel is not used to sample
    engines = opening.processes["generation 1"].children(recursive=True)
    assert engines
    for engine in engines:
        engine.suspend()
    try:
        with pytest.raises(WorkerError, match=r"generation 1 did not answer `sample` within 3 s") as failed:
            opening.soon(sampled(pool, opening.members.slice(8, 16)))
    finally:
        for engine in engines:
            engine.resume()
    assert str(hosts[1].log) in str(failed.value)


def test_a_reward_worker_killed_in_a_call_is_named_and_the_other_goes_on(opening: Opening, rollouts: Rollouts) -> None:
    process, log = opening.processes["reward 0"], opening.hosts("reward")[0].log
    process.suspend()  # so that the call is certainly under way when the process dies

    async def killed_meanwhile() -> None:
        asyncio.get_running_loop().call_later(1, process.kill)
        await opening.opened.rooms.reward.score(rollouts)

    with pytest.raises(WorkerDied, match="reward 0 died during `score`") as died:
        opening.soon(killed_meanwhile())
    assert str(log) in str(died.value)
    scores = opening.soon(RewardPool(opening.hosts("reward")[1:], SOON_S).score(rollouts))
    assert scores.sample_id == rollouts.sample_id


def test_a_generation_worker_killed_in_a_batch_is_named_and_its_engine_goes_with_it(opening: Opening) -> None:
    process, log = opening.processes["generation 0"], opening.hosts("generation")[0].log
    engines = process.children(recursive=True)
    assert engines
    arrived: list[Rollouts] = []

    async def killed_after_the_first_rollouts() -> None:
        async for part in opening.opened.rooms.generation.sample(opening.members):
            if not arrived:
                process.kill()
            arrived.append(part)

    with pytest.raises(WorkerDied, match="generation 0 died during `sample`") as died:
        opening.soon(killed_after_the_first_rollouts())
    assert str(log) in str(died.value)
    assert 0 < sum(map(len, arrived)) < len(opening.members)
    assert not psutil.wait_procs(engines, timeout=SOON_S)[1]


def test_a_rank_killed_before_a_collective_fails_all_ranks_instead_of_hanging_them(
    opening: Opening, rollouts: Rollouts
) -> None:
    """Who is named first, the dead rank or one that missed it, is a matter of microseconds."""
    learner = opening.opened.rooms.learner
    opening.soon(learner.begin(STEP, rollouts.sample_id))
    opening.processes["learner 1"].kill()
    with pytest.raises(WorkerError, match=r"learner 1 died during `publish`|learner 0 failed in `publish`"):
        opening.soon(learner.publish(1))


def test_after_leaving_no_actor_no_process_and_no_shared_memory_is_left(opening: Opening) -> None:
    families = [process for host in opening.processes.values() for process in family(host)]
    kept = Path(f"/dev/shm/rlhf-cluster-{RUN}-1")
    kept.mkdir(exist_ok=True)
    opening.close()
    assert not list(Path("/dev/shm").glob(f"rlhf-cluster-{RUN}*"))
    assert not psutil.wait_procs(families, timeout=SOON_S)[1]
    deadline = time.monotonic() + SOON_S
    while living := [a["ClassName"] for a in ray._private.state.actors().values() if a["State"] != "DEAD"]:
        assert time.monotonic() < deadline, f"actors are left: {living}"
        time.sleep(0.2)


def family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def actors(head: Head) -> set[str]:
    answer = requests.get(
        f"{head.address}/api/v0/actors", headers={"Authorization": f"Bearer {head.token}"}, timeout=30
    )
    answer.raise_for_status()
    return {actor["actor_id"] for actor in answer.json()["data"]["result"]["result"]}


def test_more_workers_than_the_cluster_can_hold_are_refused_before_any_actor_starts(
    head: Head, user: User, tmp_path: Path
) -> None:
    before = actors(head)
    asked = (
        "recipe=smoke",
        f"dir={tmp_path / 'run'}",
        f"cluster.address={head.gcs}",
        "generation.resources.num_cpus=1",
    )
    ended = user.types("run", *asked, "generation.resources.workers=3", RAY_AUTH_TOKEN=head.token)
    assert ended.code == 2
    assert re.fullmatch(
        r"rlhf-cluster: stage ppo asks for 3\.03 CPU \(generation 3 x 1, reward 1 x 0\.01, learner 1 x 0\.01, "
        r"reference 1 x 0\.01\), but the cluster has 2 in all; ask for fewer workers or add nodes\n",
        ended.err,
    )
    assert actors(head) == before
    assert not user.left_behind()
