"""Workers that are killed or hang while a batch is under way: others take their places, and nothing of it is lost.
Workers that can never be placed are refused. And nothing stays behind.

The rooms are opened once and lose their workers one test after the other; the order of the tests matters.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import requests
from as_user import User
from ray_head import Head

from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.placement import OpenRooms, open_rooms
from rlhf_cluster.cluster.starter import Attempt, PPOInputs
from rlhf_cluster.config import RunConfig
from rlhf_cluster.data.batches import PromptOrder
from rlhf_cluster.inputs import load_inputs
from rlhf_cluster.records import Controls, Members, Rollouts, ScoredRollouts, UpdateStats, join
from rlhf_cluster.rooms import Generation
from rlhf_cluster.telemetry.timer import Timeline

RUN = "test-failures"
SOON_S = 90.0  # a wait that has not ended by then hangs
STEP = 0
STORY = ("actor/pg_loss", "actor/grad_norm", "actor/entropy", "critic/vf_loss", "objective/kl", "objective/rlhf_reward")


@dataclass
class Opening:
    """Open rooms, what was said of lost workers, and the members to sample."""

    runner: asyncio.Runner
    context: Any
    opened: OpenRooms
    members: Members
    said: list[str]
    saved: Path

    def soon(self, doing: Awaitable[Any]) -> Any:
        async def bounded() -> Any:
            return await asyncio.wait_for(doing, SOON_S)

        return self.runner.run(bounded())

    def hosts(self, role: str) -> list[Host]:
        return [host for host in self.opened.hosts if host.name.startswith(role)]

    def process(self, host: Host) -> psutil.Process:
        process, _ = self.soon(self.opened.starter.pulse.once(host))
        return psutil.Process(process)

    def serving(self, role: str) -> list[str]:
        return [host.name for host in self.opened.crews[role].serving]

    def whole_again(self, role: str, count: int) -> list[str]:
        """Once so many serve, their names."""

        async def wait() -> None:
            crew, changed = self.opened.crews[role], asyncio.Event()
            crew.on_change(changed.set)
            while len(crew.serving) < count:
                changed.clear()
                await changed.wait()

        self.soon(wait())
        return self.serving(role)

    def close(self) -> None:
        self.runner.run(self.context.__aexit__(None, None, None))


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
        *("ppo.batch_size=64", "ppo.minibatch_size=32", "generation.max_num_seqs=2", "generation.ignore_eos=true"),
        *(
            "cluster.pulse_s=0.5",
            "cluster.silence_s=6",
            "cluster.restart_backoff_s=0.1",
            "cluster.restarts=20",
            "learner.keep_state_every=1",
        ),
    )
    said: list[str] = []
    logs = tmp_path_factory.mktemp("logs")
    attempt = Attempt(RUN, 1, logs, Timeline(), said.append)
    members = PromptOrder(load_inputs(cfg).prompts, cfg.seed).members(STEP, cfg.ppo.batch_size, 1)
    with asyncio.Runner() as runner:
        context = open_rooms(cfg, attempt, PPOInputs(policy, policy, reward_model))
        opened = runner.run(context.__aenter__())
        yield Opening(runner, context, opened, members, said, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def rollouts(opening: Opening) -> Rollouts:
    """A batch."""
    return opening.soon(sampled(opening.opened.rooms.generation, opening.members))


@pytest.fixture(scope="module")
def rows(opening: Opening, rollouts: Rollouts) -> ScoredRollouts:
    rooms = opening.opened.rooms
    return join(rollouts, opening.soon(rooms.reward.score(rollouts)), opening.soon(rooms.reference.logprobs(rollouts)))


async def sampled(generation: Generation, members: Members) -> Rollouts:
    return Rollouts.concat([part async for part in generation.sample(members)])


async def disturbed(generation: Generation, members: Members, disturb: Callable[[], None]) -> Rollouts:
    """As `sampled`, disturbed after the first rollouts."""
    arrived: list[Rollouts] = []
    async for part in generation.sample(members):
        if not arrived:
            disturb()
        arrived.append(part)
    return Rollouts.concat(arrived)


def same_samples(found: Rollouts, expected: Rollouts) -> None:
    """Each once, and the same tokens: seeds are the members', whoever samples them."""
    assert sorted(found.sample_id) == sorted(expected.sample_id)
    one, other = found.sort_by("sample_id"), expected.sort_by("sample_id")
    assert [ids.tolist() for ids in one.response_ids] == [ids.tolist() for ids in other.response_ids]


def test_nobody_talks_beyond_this_machine(opening: Opening, rollouts: Rollouts) -> None:
    """Every open connection of Ray, vLLM, DeepSpeed and the driver leads to an address of this machine."""
    assert len(rollouts) == len(opening.members)
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    remote = {c.raddr.ip.removeprefix("::ffff:") for p in family for c in p.net_connections("inet") if c.raddr}
    assert len(family) > 8 and remote
    assert remote <= own


def test_what_a_killed_generation_worker_owed_is_sampled_by_the_others(opening: Opening, rollouts: Rollouts) -> None:
    """And its engine goes with it."""
    process = opening.process(opening.hosts("generation")[0])
    engines = process.children(recursive=True)
    assert engines
    found = opening.soon(disturbed(opening.opened.rooms.generation, opening.members, process.kill))
    same_samples(found, rollouts)
    assert opening.said[-1].startswith("generation 0 died during `sample`") and "takes its place" in opening.said[-1]
    assert opening.whole_again("generation", 2) == ["generation 1", "generation 2"]
    assert not psutil.wait_procs(engines, timeout=SOON_S)[1]


def test_a_worker_whose_engine_alone_is_killed_is_lost_too(opening: Opening, rollouts: Rollouts) -> None:
    engines = opening.process(opening.hosts("generation")[0]).children(recursive=True)

    def kill() -> None:
        for engine in engines:
            engine.kill()

    same_samples(opening.soon(disturbed(opening.opened.rooms.generation, opening.members, kill)), rollouts)
    assert re.match(r"generation 1('s engine)? died during `sample`", opening.said[-1])
    assert opening.whole_again("generation", 2) == ["generation 2", "generation 3"]


def test_a_generation_worker_that_hangs_is_found_by_its_pulse(opening: Opening, rollouts: Rollouts) -> None:
    process = opening.process(opening.hosts("generation")[0])
    family = [process, *process.children(recursive=True)]
    same_samples(opening.soon(disturbed(opening.opened.rooms.generation, opening.members, process.suspend)), rollouts)
    assert re.match(r"generation 2 hangs in `sample`: its last sign of life was \d+ s ago", opening.said[-1])
    assert opening.whole_again("generation", 2) == ["generation 3", "generation 4"]
    assert not psutil.wait_procs(family, timeout=SOON_S)[1], "a process that hangs is ended all the same"


def test_a_scorer_that_hangs_is_named_with_where_it_stands_and_another_scores(
    opening: Opening, rollouts: Rollouts, rows: ScoredRollouts
) -> None:
    process = opening.process(opening.hosts("reward")[0])
    process.suspend()
    scores = opening.soon(opening.opened.rooms.reward.score(rollouts))
    assert sorted(scores.sample_id) == sorted(rollouts.sample_id)
    assert opening.whole_again("reward", 2) == ["reward 1", "reward 2"]
    (hang,) = [sentence for sentence in opening.said if sentence.startswith("reward 0")]
    assert re.match(
        r"reward 0 hangs in `score`: its last sign of life was \d+ s ago \(cluster.silence_s=6\); it stands in ", hang
    )


def test_a_scorer_and_a_reference_killed_in_a_call_are_asked_elsewhere(
    opening: Opening, rollouts: Rollouts, rows: ScoredRollouts
) -> None:
    for role, ask in (
        ("reward", opening.opened.rooms.reward.score),
        ("reference", opening.opened.rooms.reference.logprobs),
    ):
        process = opening.process(opening.hosts(role)[0])
        process.suspend()  # so that the call is certainly under way when the process dies
        killing = threading.Timer(1.0, process.kill)
        killing.start()
        answer = opening.soon(ask(rollouts))
        assert sorted(answer.sample_id) == sorted(rollouts.sample_id)
        assert f"died during `{ask.__name__}`" in opening.said[-1]


def test_a_rank_that_is_lost_changes_nothing_of_what_is_learnt(opening: Opening, rows: ScoredRollouts) -> None:
    """Killed between `add` and `update`, and stopped in the middle of it: all ranks begin anew, and do again what was
    done."""
    learner = opening.opened.rooms.learner
    controls = Controls(0.02)

    async def learn(step: int, disturb: Callable[[], None]) -> UpdateStats:
        own = of_step(rows, step)
        await learner.begin(step, own.sample_id)
        await learner.add(step, own.slice(0, 40))
        disturb()
        await learner.add(step, own.slice(40, 64))
        stats = await learner.update(step, controls)
        await learner.publish(step + 1)
        await opening.opened.rooms.generation.receive(step + 1)
        return stats

    def kill() -> None:
        for host in opening.hosts("learner")[1:]:
            killed.append(host.name)
            processes[host.name].kill()

    def stop() -> None:
        for host in opening.hosts("learner")[:1]:
            killed.append(host.name)
            processes[host.name].suspend()

    def story(stats: Sequence[UpdateStats]) -> list[dict[str, float]]:
        return [{name: stats.metrics[name] for name in STORY} for stats in stats]

    opening.soon(learner.save(opening.saved))
    undisturbed = [opening.soon(learn(step, lambda: None)) for step in range(2)]
    opening.soon(learner.load(opening.saved, 0))
    opening.soon(learner.publish(0))
    killed: list[str] = []
    disturbed = []
    for step, disturb in enumerate((kill, stop)):
        processes = {host.name: opening.process(host) for host in opening.hosts("learner")}
        disturbed.append(opening.soon(learn(step, disturb)))
    assert killed == ["learner 1", "learner 2"]
    assert [host.name for host in opening.hosts("learner")] == ["learner 4", "learner 5"]
    for one, other in zip(story(undisturbed), story(disturbed), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert sum("the learner's ranks begin anew" in sentence for sentence in opening.said) == 2


def test_the_learner_goes_on_with_fewer_ranks_and_with_more(
    opening: Opening, rows: ScoredRollouts, tmp_path: Path
) -> None:
    """In the middle of a batch, and no differently than before."""
    learner = opening.opened.learner

    async def learn(step: int, ranks: int = 0) -> dict[str, float]:
        own = of_step(rows, step)
        await learner.begin(step, own.sample_id)
        await learner.add(step, own)
        if ranks:
            await learner.rescale(ranks)
        stats = await learner.update(step, Controls(0.02))
        return {name: stats.metrics[name] for name in STORY}

    opening.soon(learner.save(tmp_path))
    before = opening.soon(learn(2))
    for ranks in (1, 2):
        opening.soon(learner.load(tmp_path, 2))
        assert opening.soon(learn(2, ranks)) == pytest.approx(before, rel=1e-4, abs=1e-6)
        assert len(opening.hosts("learner")) == ranks
    opening.soon(learner.publish(3))
    opening.soon(opening.opened.rooms.generation.receive(3))


def of_step(rows: ScoredRollouts, step: int) -> ScoredRollouts:
    """The same rows, as those of another batch."""
    names = [f"{step}{sample_id.removeprefix('0')}" for sample_id in rows.sample_id]
    place = rows.table.schema.get_field_index("sample_id")
    return type(rows)(rows.table.set_column(place, "sample_id", [names]))


def test_pools_grow_and_shrink_while_a_batch_is_sampled(opening: Opening, rollouts: Rollouts) -> None:
    """A joiner samples from the version that the others have."""
    crew, rooms = opening.opened.crews["generation"], opening.opened.rooms

    async def grow_meanwhile() -> Rollouts:
        sampling = asyncio.ensure_future(sampled(rooms.generation, opening.members))
        await crew.scale(3)
        return await sampling

    assert len(opening.soon(grow_meanwhile())) == len(rollouts)
    assert len(opening.serving("generation")) == 3

    async def shrink_meanwhile() -> Rollouts:
        sampling = asyncio.ensure_future(sampled(rooms.generation, opening.members))
        await asyncio.sleep(0)
        await crew.scale(1)
        return await sampling

    found = opening.soon(shrink_meanwhile())
    assert sorted(found.sample_id) == sorted(rollouts.sample_id)
    assert {int(version) for versions in found.weight_versions for version in versions} == {3}
    assert len(opening.hosts("generation")) == 1
    same = opening.soon(sampled(rooms.generation, opening.members))
    same_samples(same, found)


def test_after_leaving_no_actor_no_process_and_no_shared_memory_is_left(opening: Opening) -> None:
    processes = [opening.process(host) for host in opening.opened.hosts if host.name != "store 0"]
    families = [process for host in processes for process in family(host)]
    kept = Path(f"/dev/shm/rlhf-cluster-{RUN}-1")
    kept.mkdir(exist_ok=True)
    opening.close()
    assert not list(Path("/dev/shm").glob(f"rlhf-cluster-{RUN}*"))
    assert not psutil.wait_procs(families, timeout=SOON_S)[1]
    assert not opening.opened.starter.attempt.state.exists()
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
