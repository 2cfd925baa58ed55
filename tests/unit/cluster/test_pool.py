"""How calls are dealt out to workers that are all alike. The workers here answer when the test says so; real ones stand
in `tests/cluster/`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from sampled import sampled

from rlhf_cluster.cluster.crew import Crew
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.pools import CALLS_AHEAD, PATIENCE, Pool, RewardPool
from rlhf_cluster.cluster.waits import WorkerError
from rlhf_cluster.records import Rollouts, Scores


@dataclass
class Worker:
    """A host whose calls end when they are ended."""

    name: str
    calls: list[asyncio.Future[Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    @property
    def host(self) -> Host:
        return Host(self.name, SimpleNamespace(score=SimpleNamespace(remote=self._begin)), Path())

    def _begin(self, rows: list[int]) -> Awaitable[Any]:
        self.calls.append(asyncio.get_running_loop().create_future())
        self.rows.append(len(rows))
        return self.calls[-1]


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def asked(pool: Pool, *sizes: int) -> list[asyncio.Task[Any]]:
    calls = [asyncio.ensure_future(pool.call("score", [0] * size)) for size in sizes]
    await settled()
    return calls


def test_a_worker_has_one_call_ahead_and_the_rest_wait_here() -> None:
    async def scenario() -> None:
        workers = [Worker("reward 0"), Worker("reward 1")]
        calls = await asked(Pool(Crew.of([worker.host for worker in workers]), 60.0), *[1] * 7)
        assert [len(worker.calls) for worker in workers] == [CALLS_AHEAD, CALLS_AHEAD]
        workers[1].calls[0].set_result("done")
        await settled()
        assert [len(worker.calls) for worker in workers] == [CALLS_AHEAD, CALLS_AHEAD + 1]
        for _ in range(2):
            for worker in workers:
                for call in worker.calls:
                    if not call.done():
                        call.set_result("done")
            await settled()
        assert [call.result() for call in calls] == ["done"] * 7

    asyncio.run(scenario())


def test_a_call_goes_to_the_worker_with_the_fewest_rows() -> None:
    async def scenario() -> None:
        workers = [Worker("reward 0"), Worker("reward 1")]
        calls = await asked(Pool(Crew.of([worker.host for worker in workers]), 60.0), 5, 2, 2)
        assert [worker.rows for worker in workers] == [[5], [2, 2]]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(scenario())


def test_a_deadline_begins_when_a_worker_is_asked() -> None:
    async def scenario() -> None:
        workers = [Worker("reward 0"), Worker("reward 1")]
        crew = Crew.of([workers[0].host])
        calls = await asked(Pool(crew, 0.2), *[1] * (CALLS_AHEAD + 1))
        crew.serving.append(workers[1].host)  # the other comes when the first is lost
        await asyncio.sleep(0.3)
        assert not crew.serving[1:] and crew.serving[0].name == "reward 1"
        assert len(workers[1].calls) == CALLS_AHEAD  # of which the last waited here
        for _ in range(3):
            for call in workers[1].calls:
                if not call.done():
                    call.set_result("done")
            await settled()
        assert [await call for call in calls] == ["done"] * 3

    asyncio.run(scenario())


def test_where_the_last_is_lost_whoever_waits_hears_why() -> None:
    async def scenario() -> None:
        calls = await asked(Pool(Crew.of([Worker("reward 0").host]), 0.1), *[1] * (CALLS_AHEAD + 1))
        for call in calls:
            with pytest.raises(WorkerError, match=r"reward 0 did not answer `score` within 0\.1 s"):
                await call

    asyncio.run(scenario())


@dataclass
class Deadly:
    """A pool's worker that dies of one sample, in whatever table it comes."""

    name: str
    crew: Crew
    poison: str
    asked: list[list[str]]

    @property
    def host(self) -> Host:
        return Host(self.name, SimpleNamespace(score=SimpleNamespace(remote=self._score)), Path())

    async def _score(self, rows: Rollouts) -> Scores:
        self.asked.append(rows.sample_id)
        if self.poison in rows.sample_id:
            successor = Deadly(f"reward {int(self.name[7:]) + 1}", self.crew, self.poison, self.asked)
            self.crew.serving.append(successor.host)
            raise ActorDiedError()
        count = len(rows)
        return Scores.of({"sample_id": rows.sample_id, "score": [1.0] * count, "failure": [""] * count})


def test_a_sample_that_scorers_die_of_is_given_up_and_the_others_of_its_table_have_scores() -> None:
    async def scenario() -> None:
        crew = Crew.of([])
        first = Deadly("reward 0", crew, "s5", [])
        crew.serving.append(first.host)
        found = await RewardPool(crew, 60.0).score(rollouts(8))
        scores = dict(zip(found.sample_id, found.failure, strict=True))
        assert scores.pop("s5").startswith("quarantined: scorers were lost over it, the last: reward ")
        assert scores == {f"s{i}": "" for i in range(8) if i != 5}
        assert max(map(len, first.asked)) == 8 and first.asked.count(["s5"]) == 2 * PATIENCE - 1

    asyncio.run(scenario())


def test_a_reference_has_no_word_for_what_it_cannot_say() -> None:
    async def scenario() -> None:
        crew = Crew.of([])
        crew.serving.append(Deadly("reward 0", crew, "s1", []).host)
        with pytest.raises(WorkerError, match="sample s1: 4 workers were lost over it; the last: reward"):
            await Pool(crew, 60.0).call("score", rollouts(2))

    asyncio.run(scenario())


def rollouts(count: int) -> Rollouts:
    return Rollouts.of(
        {
            "prompt_id": [f"p{i}" for i in range(count)],
            "prompt_ids": [[1]] * count,
            "step": [0] * count,
            "sample_index": [0] * count,
            "sample_id": [f"s{i}" for i in range(count)],
            "seed": [0] * count,
            **sampled(count),
        }
    )
