"""Who samples what: members are dealt out by how much each worker has to do. The workers here answer when the test says
so; real ones stand in `tests/cluster/`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sampled import sampled

from rlhf_cluster.cluster.crew import Crew
from rlhf_cluster.cluster.delivery import WeightChannel
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.sampling import GenerationPool
from rlhf_cluster.cluster.waits import WorkerDied, WorkerError
from rlhf_cluster.config import WeightsConfig
from rlhf_cluster.records import Members, Rollouts

NO_CHANNEL = WeightChannel(Host("store", None, Path()), "", "", "", 1, WeightsConfig())
AT_ONCE, DEADLINE_S = 8, 20  # with a queue of a fourth: 10 responses for a worker, and more when it owes 8


@dataclass
class Sampler:
    """A generation worker that ends the responses that it is told to."""

    name: str
    calls: list[Members] = field(default_factory=list)
    ended: list[asyncio.Queue[list[int] | Exception | None]] = field(default_factory=list)

    @property
    def host(self) -> Host:
        called = SimpleNamespace(remote=self._sample)
        actor = SimpleNamespace(sample=SimpleNamespace(options=lambda num_returns: called))
        return Host(self.name, actor, Path("its.log"))

    def _sample(self, members: Members) -> AsyncIterator[Awaitable[Rollouts]]:
        self.calls.append(members)
        self.ended.append(asyncio.Queue())
        return self._stream(members, self.ended[-1])

    async def _stream(
        self, members: Members, ended: asyncio.Queue[list[int] | Exception | None]
    ) -> AsyncIterator[Awaitable[Rollouts]]:
        while (rows := await ended.get()) is not None:
            if isinstance(rows, Exception):
                raise rows
            yield answered(members.take(rows))

    def end(self, call: int, *rows: int) -> None:
        """Of one call all rows where none are named, and the call itself."""
        every = range(len(self.calls[call]))
        self.ended[call].put_nowait(list(rows or every))
        if not rows:
            self.ended[call].put_nowait(None)

    def got(self) -> list[int]:
        return [len(call) for call in self.calls]


async def answered(members: Members) -> Rollouts:
    return members.extend(Rollouts, sampled(len(members)))


def members(prompts: int, samples: int = 1, step: int = 0) -> Members:
    count = prompts * samples
    return Members.of(
        {
            "prompt_id": [f"p{i // samples}" for i in range(count)],
            "prompt_ids": [[1, 2]] * count,
            "step": [step] * count,
            "sample_index": [i % samples for i in range(count)],
            "sample_id": [f"{step}/p{i // samples}/{i % samples}" for i in range(count)],
            "seed": list(range(count)),
        }
    )


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def collected(pool: GenerationPool, asked: Members) -> list[str]:
    return [sample_id async for part in pool.sample(asked) for sample_id in part.sample_id]


def scenario(steps: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(steps, DEADLINE_S))


def pool_of(*workers: Sampler) -> GenerationPool:
    return GenerationPool(Crew.of([worker.host for worker in workers]), NO_CHANNEL, DEADLINE_S, AT_ONCE)


def test_what_all_can_take_at_once_is_dealt_out_evenly_in_one_call_each() -> None:
    async def steps() -> None:
        workers = [Sampler("generation 0"), Sampler("generation 1")]
        collecting = asyncio.ensure_future(collected(pool_of(*workers), asked := members(7)))
        await settled()
        assert [worker.got() for worker in workers] == [[4], [3]]
        for worker in workers:
            worker.end(0)
        assert sorted(await collecting) == sorted(asked.sample_id)

    scenario(steps())


def test_responses_to_one_prompt_stay_together() -> None:
    async def steps() -> None:
        workers = [Sampler("generation 0"), Sampler("generation 1")]
        collecting = asyncio.ensure_future(collected(pool_of(*workers), members(3, samples=4)))
        await settled()
        groups = [[set(call.prompt_id) for call in worker.calls] for worker in workers]
        assert groups == [[{"p0", "p2"}], [{"p1"}]]
        for worker in workers:
            worker.end(0)
        await collecting

    scenario(steps())


def test_more_goes_to_whoever_is_done_first() -> None:
    async def steps() -> None:
        quick, slow = Sampler("generation 0"), Sampler("generation 1")
        collecting = asyncio.ensure_future(collected(pool_of(quick, slow), asked := members(30)))
        await settled()
        assert (quick.got(), slow.got()) == ([10], [10])
        quick.end(0, 0)
        await settled()
        assert quick.got() == [10]  # it has its queue still
        quick.end(0, 1)
        await settled()
        assert quick.got() == [10, 2]
        quick.end(0, *range(2, 10))
        await settled()
        assert quick.got() == [10, 2, 8] and slow.got() == [10]
        quick.ended[0].put_nowait(None)
        for call in (1, 2):
            quick.end(call)
        slow.end(0)
        assert sorted(await collecting) == sorted(asked.sample_id)

    scenario(steps())


def test_an_older_batch_goes_first() -> None:
    async def steps() -> None:
        worker = Sampler("generation 0")
        pool = pool_of(worker)
        first = asyncio.ensure_future(collected(pool, members(10, step=5)))
        await settled()
        newer = asyncio.ensure_future(collected(pool, members(4, step=7)))
        older = asyncio.ensure_future(collected(pool, members(4, step=6)))
        await settled()
        worker.end(0)
        await settled()
        assert [sorted(set(call.step.tolist())) for call in worker.calls] == [[5], [6], [7]]
        worker.end(1)
        worker.end(2)
        assert [len(await one) for one in (first, older, newer)] == [10, 4, 4]
        await settled()
        assert pool.held == {} and not any(pool._outstanding.values())

    scenario(steps())


def test_what_a_lost_worker_owed_goes_to_another_before_all_that_waits() -> None:
    async def steps() -> None:
        good, bad = Sampler("generation 0"), Sampler("generation 1")
        pool = pool_of(good, bad)
        collecting = asyncio.ensure_future(collected(pool, asked := members(30)))
        await settled()
        bad.end(0, 0)
        await settled()
        owed = bad.calls[0].sample_id[1:]
        bad.ended[0].put_nowait(WorkerDied("generation 1 died"))
        await settled()
        good.end(0)
        await settled()
        assert set(owed) <= set(good.calls[1].sample_id) and pool.requeued == len(owed)
        for call in range(1, 5):
            await settled()
            if call < len(good.calls):
                good.end(call)
        found = await collecting
        assert sorted(found) == sorted(asked.sample_id) and len(bad.calls) == 1
        await settled()
        assert pool.held == {} and not any(pool._outstanding.values()) and pool._waiting == []

    scenario(steps())


def test_where_the_last_worker_is_lost_the_batch_ends_with_why() -> None:
    async def steps() -> None:
        worker = Sampler("generation 0")
        pool = pool_of(worker)
        collecting = asyncio.ensure_future(collected(pool, members(30)))
        await settled()
        worker.ended[0].put_nowait(WorkerDied("generation 0 died"))
        with pytest.raises(WorkerDied, match="generation 0 died"):
            await collecting
        await settled()
        assert pool.held == {} and not any(pool._outstanding.values()) and pool._waiting == []
        with pytest.raises(WorkerDied, match="generation 0 died"):
            await collected(pool, members(1))

    scenario(steps())


def test_what_fails_otherwise_ends_the_batch_at_once() -> None:
    async def steps() -> None:
        workers = [Sampler("generation 0"), Sampler("generation 1")]
        collecting = asyncio.ensure_future(collected(pool_of(*workers), members(7)))
        await settled()
        workers[1].ended[0].put_nowait(WorkerError("generation 1 failed in `sample`: ValueError: no"))
        with pytest.raises(WorkerError, match="ValueError: no"):
            await collecting

    scenario(steps())


def test_a_lease_that_ends_early_is_a_lost_worker() -> None:
    async def steps() -> None:
        worker = Sampler("generation 0")
        collecting = asyncio.ensure_future(collected(pool_of(worker), members(3)))
        await settled()
        worker.end(0, 0, 1)
        worker.ended[0].put_nowait(None)
        with pytest.raises(WorkerDied, match=r"generation 0 ended lease .* without 1 of its samples"):
            await collecting

    scenario(steps())


def test_a_sample_that_worker_after_worker_is_lost_over_is_sampled_alone_and_then_given_up() -> None:
    """The others, which were lost along with it, are sampled."""

    async def steps() -> None:
        workers = [Sampler(f"generation {i}") for i in range(6)]
        crew = Crew.of([workers[0].host])
        pool = GenerationPool(crew, NO_CHANNEL, DEADLINE_S, AT_ONCE)
        poison = (asked := members(3)).sample_id[1]
        found: list[Rollouts] = []

        async def collect() -> None:
            found.extend([part async for part in pool.sample(asked)])

        collecting = asyncio.ensure_future(collect())
        for number, worker in enumerate(workers):
            await settled()
            for call, share in enumerate(worker.calls):
                if poison in share.sample_id:
                    crew.serving.append(workers[number + 1].host)
                    worker.ended[call].put_nowait(WorkerDied(f"generation {number} died"))
                    break
                worker.end(call)
                await settled()
        await collecting
        whole = Rollouts.concat(found)
        rows = dict(zip(whole.sample_id, whole.finish_reason, strict=True))
        assert rows.pop(poison) == "quarantined: generation workers were lost over it, the last: generation 3 died"
        assert rows == dict.fromkeys(set(asked.sample_id) - {poison}, "stop")
        alone = [share.sample_id for worker in workers[2:4] for share in worker.calls if poison in share.sample_id]
        assert alone == [[poison]] * 2
        await settled()
        assert pool.held == {} and not any(pool._outstanding.values())

    scenario(steps())


def test_what_comes_in_one_moment_leaves_as_one_table() -> None:
    async def steps() -> None:
        workers = [Sampler(f"generation {i}") for i in range(4)]
        pool = GenerationPool(Crew.of([worker.host for worker in workers]), NO_CHANNEL, DEADLINE_S, 64, 5)
        sizes: list[int] = []

        async def count() -> None:
            sizes.extend([len(part) async for part in pool.sample(members(200))])

        counting = asyncio.ensure_future(count())
        await settled()
        for row in range(50):
            for worker in workers:
                worker.end(0, row)
        for worker in workers:
            worker.ended[0].put_nowait(None)
        await counting
        assert sum(sizes) == 200 and 4 < max(sizes) <= 64 + 1  # and not 200 tables of one row

    scenario(steps())


def test_nothing_asked_is_nothing_sampled() -> None:
    async def steps() -> None:
        worker = Sampler("generation 0")
        assert await collected(pool_of(worker), members(1).take(np.zeros(0, int))) == []
        assert worker.calls == []

    scenario(steps())


def test_what_one_batch_no_longer_takes_another_gets() -> None:
    """Also where its leases are ended before they began."""

    async def steps() -> None:
        worker = Sampler("generation 0")
        pool = pool_of(worker)
        first = asyncio.ensure_future(collected(pool, members(10, step=5)))
        await settled()
        second = asyncio.ensure_future(collected(pool, asked := members(4, step=6)))
        await settled()
        assert worker.got() == [10]
        first.cancel()
        await settled()
        assert worker.got() == [10, 4] and pool._outstanding == {"generation 0": 4}
        worker.end(1)
        assert sorted(await second) == sorted(asked.sample_id)
        unborn = pool.sample(members(3, step=7))
        taking = asyncio.ensure_future(anext(unborn))
        await asyncio.sleep(0)  # it has dealt, and its lease has not begun
        taking.cancel()
        await settled()
        assert not any(pool._outstanding.values()) and pool.held == {}

    scenario(steps())
