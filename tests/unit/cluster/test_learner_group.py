"""What the ranks are asked again when they begin anew. The ranks here remember what they were asked; real ones stand in
`tests/cluster/`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from sampled import sampled

from rlhf_cluster.cluster.delivery import WeightChannel
from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.learner_group import Keeping, LearnerGroup, Settled
from rlhf_cluster.cluster.waits import WorkerDied, WorkerError, WorkerLost
from rlhf_cluster.config import WeightsConfig
from rlhf_cluster.records import Controls, ScoredRollouts, UpdateStats
from rlhf_cluster.weights.snapshot import Snapshot

CONTROLS = Controls(0.1)


@dataclass
class Rank:
    """Remembers what it was asked, and fails in the calls that the test names, by their number."""

    name: str
    fails: dict[str, Exception] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    @property
    def host(self) -> Host:
        verbs = ("begin", "add", "replace", "update", "publish", "save", "load", "keep")
        actor = {verb: SimpleNamespace(remote=self._verb(verb)) for verb in verbs}
        return Host(self.name, SimpleNamespace(**actor), Path())

    def _verb(self, verb: str) -> Any:
        async def asked(*args: Any) -> Any:
            said = {
                "add": lambda step, rows, start, stop: ",".join(rows.slice(start, stop).sample_id),
                "begin": lambda step, ids: str(len(ids)),
                "load": lambda directory, version: f"{Path(directory).name}@{version}",
                "keep": lambda directory, version: Path(directory).name,
            }
            told = said[verb](*args) if verb in said else ""
            self.asked.append(f"{verb} {'' if verb in ('load', 'keep') else args[0]} {told}".replace("  ", " ").strip())
            if verb in self.fails:
                raise self.fails.pop(verb)
            if verb in ("begin", "replace"):
                return {f"{args[0]}/{i}": 0 for i in range(8)}
            if verb == "update":
                return UpdateStats(args[0], args[0] + 1, {})
            return Snapshot(args[0], "", ()) if verb == "publish" else []

        return asked


@dataclass
class Ranks:
    """A gang: those of each life, and how many lives there may be."""

    lives: list[list[Rank]]
    dead: WorkerLost | None = None
    empty: bool = False
    down: asyncio.Event = field(default_factory=asyncio.Event)
    began: list[str] = field(default_factory=list)

    @property
    def hosts(self) -> Sequence[Host]:
        return [rank.host for rank in self.lives[0]]

    async def follow(self) -> NoReturn:
        await self.down.wait()
        raise WorkerDied("learner 1 hangs")

    async def lost(self) -> WorkerLost | None:
        return self.dead

    async def anew(self, error: WorkerError, ranks: int = 0) -> bool:
        self.began.append(str(error))
        if len(self.lives) == 1:
            raise WorkerError(f"{error}; no restart is left")
        self.lives.pop(0)
        self.down, self.dead = asyncio.Event(), None
        return self.empty


def group(gang: Any, tmp_path: Path, every: int = 1) -> LearnerGroup:
    store = SimpleNamespace(add=SimpleNamespace(remote=_nothing))
    channel = WeightChannel(Host("store 0", store, Path()), "node", "/", "run", 1, WeightsConfig())
    return LearnerGroup(gang, channel, 10, put=lambda table: table, keeping=Keeping(tmp_path, every))


async def _nothing(*args: Any) -> None:
    return None


def rows(step: int, *numbers: int) -> ScoredRollouts:
    count = len(numbers)
    return ScoredRollouts.of(
        {
            "prompt_id": [f"p{i}" for i in numbers],
            "prompt_ids": [[1]] * count,
            "step": [step] * count,
            "sample_index": [0] * count,
            "sample_id": [f"{step}/{i}" for i in numbers],
            "seed": [0] * count,
            **sampled(count),
            "score": [0.0] * count,
            "failure": [""] * count,
        }
    )


def scenario(steps: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(steps, 10))


async def learn(learner: LearnerGroup, step: int, *parts: Sequence[int]) -> UpdateStats:
    await learner.begin(step, [f"{step}/{i}" for i in range(8)])
    for part in parts:
        await learner.add(step, rows(step, *part))
    return await learner.update(step, CONTROLS)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_what_was_asked_since_the_kept_state_is_asked_again(tmp_path: Path) -> None:
    async def steps() -> None:
        first, second = Rank("learner 0"), Rank("learner 1")
        gang = Ranks([[first], [second]])
        learner = group(gang, tmp_path)
        await learn(learner, 0, [0, 1], [2])
        await learner.publish(1)
        await settled()
        assert first.asked == ["begin 0 8", "add 0 0/0,0/1", "add 0 0/2", "update 0", "publish 1", "keep version-1"]
        first.fails["update"] = ActorDiedError()
        stats = await learn(learner, 1, [0, 1], [2])
        assert (stats.step, stats.weight_version) == (1, 2)
        assert gang.began == ["learner 0 died during `update`"] and learner.losses == 1
        assert second.asked == ["load version-1@1", "begin 1 8", "add 1 1/0,1/1", "add 1 1/2", "update 1"]

    scenario(steps())


def test_without_a_kept_state_all_is_asked_again(tmp_path: Path) -> None:
    async def steps() -> None:
        first, second = Rank("learner 0"), Rank("learner 1")
        learner = group(Ranks([[first], [second]]), tmp_path, every=5)
        await learn(learner, 0, [0])
        await learner.publish(1)
        first.fails["begin"] = ActorDiedError()
        await learn(learner, 1, [0])
        assert second.asked == ["begin 0 8", "add 0 0/0", "update 0", "begin 1 8", "add 1 1/0", "update 1"]

    scenario(steps())


def test_ranks_that_begin_anew_may_be_lost_too(tmp_path: Path) -> None:
    async def steps() -> None:
        lives = [[Rank("learner 0")], [Rank("learner 1")], [Rank("learner 2")]]
        gang = Ranks(list(lives))
        learner = group(gang, tmp_path)
        lives[0][0].fails["update"] = ActorDiedError()
        lives[1][0].fails["add"] = ActorDiedError()
        assert (await learn(learner, 0, [0])).weight_version == 1
        assert gang.began == ["learner 0 died during `update`", "learner 1 died during `add`"]
        assert lives[2][0].asked == ["begin 0 8", "add 0 0/0", "update 0"]

    scenario(steps())


def test_all_that_was_under_way_is_answered_by_the_ranks_that_came(tmp_path: Path) -> None:
    """Of two batches, one of whose rows come while the other is updated from."""

    async def steps() -> None:
        first, second = Rank("learner 0"), Rank("learner 1")
        gang = Ranks([[first], [second]])
        learner = group(gang, tmp_path)
        for step in (0, 1):
            await learner.begin(step, [f"{step}/{i}" for i in range(8)])
        await learner.add(0, rows(0, 0))
        first.fails |= {"update": ActorDiedError(), "add": ActorDiedError()}
        stats, _ = await asyncio.gather(learner.update(0, CONTROLS), learner.add(1, rows(1, 3)))
        assert stats.weight_version == 1 and len(gang.began) == 1
        assert sorted(second.asked) == ["add 0 0/0", "add 1 1/3", "begin 0 8", "begin 1 8", "update 0"]

    scenario(steps())


def test_a_rank_that_fails_because_another_died_is_not_to_blame(tmp_path: Path) -> None:
    async def steps() -> None:
        first, others = [Rank("learner 0"), Rank("learner 1")], [Rank("learner 2"), Rank("learner 3")]
        gang = Ranks([first, others], dead=WorkerDied("learner 1 died during `update`"))
        learner = group(gang, tmp_path)
        first[0].fails["update"] = RayTaskError("update", "", RuntimeError("Connection closed by peer"))
        assert (await learn(learner, 0, range(8))).weight_version == 1
        assert gang.began == ["learner 1 died during `update`"]

    scenario(steps())


def test_an_error_of_a_rank_that_lives_is_an_error(tmp_path: Path) -> None:
    async def steps() -> None:
        rank = Rank("learner 0", {"update": RayTaskError("update", "", ValueError("no"))})
        with pytest.raises(WorkerError, match="learner 0 failed in `update`: ValueError: no"):
            await learn(group(Ranks([[rank], [Rank("learner 1")]]), tmp_path), 0, [0])

    scenario(steps())


def test_a_rank_that_hangs_ends_the_wait_for_all(tmp_path: Path) -> None:
    async def steps() -> None:
        first, second = Rank("learner 0"), Rank("learner 1")
        gang = Ranks([[first], [second]])
        learner = group(gang, tmp_path)
        await learner.begin(0, [f"0/{i}" for i in range(8)])
        gang.down.set()
        assert (await learner.update(0, CONTROLS)).weight_version == 1
        assert gang.began == ["learner 1 hangs"] and second.asked == ["begin 0 8", "update 0"]

    scenario(steps())


def test_where_nothing_is_kept_or_nobody_comes_a_lost_rank_is_the_end(tmp_path: Path) -> None:
    async def steps() -> None:
        rank = Rank("learner 0", {"update": ActorDiedError()})
        with pytest.raises(WorkerLost, match="learner 0 died during `update`"):
            await learn(group(Settled([rank.host]), tmp_path, 0), 0, [0])
        rank = Rank("learner 0", {"update": ActorDiedError()})
        with pytest.raises(WorkerError, match="learner 0 died during `update`; no restart is left"):
            await learn(group(Ranks([[rank]]), tmp_path), 0, [0])

    scenario(steps())


def test_without_a_journal_no_rank_begins_anew(tmp_path: Path) -> None:
    """It would begin as it was started, and nobody would know."""

    async def steps() -> None:
        rank = Rank("learner 0")
        gang = Ranks([[rank], [Rank("learner 1")]])
        learner = group(gang, tmp_path, every=0)
        await learn(learner, 0, [0])
        rank.fails["update"] = ActorDiedError()
        with pytest.raises(WorkerLost, match="learner 0 died during `update`"):
            await learn(learner, 1, [0])
        assert gang.began == []

    scenario(steps())


def test_a_state_is_kept_before_the_next_update_is_asked_for(tmp_path: Path) -> None:
    """Also where that follows in the same moment: it is the state of its version."""

    async def steps() -> None:
        rank = Rank("learner 0")
        learner = group(Ranks([[rank]]), tmp_path)
        for step in (0, 1):
            await learner.begin(step, [f"{step}/{i}" for i in range(8)])
        await learner.update(0, CONTROLS)
        await learner.publish(1)
        await learner.update(1, CONTROLS)
        assert rank.asked[-3:] == ["publish 1", "keep version-1", "update 1"]

    scenario(steps())


def test_after_a_checkpoint_is_loaded_a_state_of_its_own_is_kept(tmp_path: Path) -> None:
    """The checkpoint may go."""

    async def steps() -> None:
        rank = Rank("learner 0")
        learner = group(Ranks([[rank]]), tmp_path, every=9)
        await learner.load(Path("/run/checkpoints/step-5"), 5)
        await learner.publish(5)
        await settled()
        assert rank.asked == ["load step-5@5", "publish 5", "keep version-5"]

    scenario(steps())


def test_a_store_that_went_with_a_node_is_filled_again(tmp_path: Path) -> None:
    async def steps() -> None:
        first, second = Rank("learner 0"), Rank("learner 1")
        learner = group(Ranks([[first], [second]], empty=True), tmp_path)
        await learn(learner, 0, [0])
        await learner.publish(1)
        await settled()
        first.fails["begin"] = ActorDiedError()
        await learner.begin(1, [f"1/{i}" for i in range(8)])
        assert second.asked == ["load version-1@1", "begin 1 8", "publish 1"]

    scenario(steps())


def test_more_or_fewer_ranks_begin_from_where_the_others_were(tmp_path: Path) -> None:
    async def steps() -> None:
        one, two = [Rank("learner 0")], [Rank("learner 1"), Rank("learner 2")]
        learner = group(Ranks([one, two]), tmp_path)
        await learner.begin(0, [f"0/{i}" for i in range(8)])
        await learner.add(0, rows(0, *range(8)))
        await learner.rescale(2)
        await learner.update(0, CONTROLS)
        assert [rank.asked[0] for rank in two] == ["begin 0 8"] * 2 and learner.losses == 0
        shares = [next(said for said in rank.asked if said.startswith("add")) for rank in two]
        assert sorted(len(said.split(",")) for said in shares) == [4, 4]

    scenario(steps())


def test_one_state_is_kept_at_a_time(tmp_path: Path) -> None:
    async def steps() -> None:
        rank = Rank("learner 0")
        learner = group(Ranks([[rank]]), tmp_path)
        for version in (1, 2):
            (tmp_path / f"version-{version}").mkdir()
            await learn(learner, version - 1, [0])
            await learner.publish(version)
            await asyncio.sleep(0.05)
        assert [path.name for path in tmp_path.iterdir()] == ["version-2"]
        await learner.close()
        assert not tmp_path.exists()

    scenario(steps())
