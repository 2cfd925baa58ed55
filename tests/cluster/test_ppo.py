"""`ppo.train` over real rooms: vLLM workers, scorers, the reference and DeepSpeed ranks as Ray actors.

The rooms are opened once. Gangs of learners - every ZeRO stage, one rank and two - then train from the same start with
the same seeds, and must tell the same story.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from rlhf_cluster import ppo
from rlhf_cluster.cluster.crew import Crew
from rlhf_cluster.cluster.learner_gang import start_learner
from rlhf_cluster.cluster.learner_group import LearnerGroup
from rlhf_cluster.cluster.placement import OpenRooms, open_rooms
from rlhf_cluster.cluster.sampling import GenerationPool
from rlhf_cluster.cluster.starter import Attempt, PPOInputs, Starter
from rlhf_cluster.config import AdvantageConfig, KLConfig, LoRAConfig, RunConfig
from rlhf_cluster.data.batches import PromptOrder
from rlhf_cluster.inputs import load_inputs
from rlhf_cluster.records import Prompts, ReferencedRollouts
from rlhf_cluster.rooms import Rooms
from rlhf_cluster.storage.checkpoints import Checkpoints
from rlhf_cluster.storage.rollout_log import RolloutLog
from rlhf_cluster.telemetry.metrics import JsonlSink, MetricsLog, read_metrics
from rlhf_cluster.telemetry.timer import Timeline, Timer

STEPS = 3
GANGS = [(3, 2), (2, 2), (0, 2), (1, 4), (0, 1)]  # ZeRO stage, ranks; the first is opened with the rooms
NO_ADAPTERS, ADAPTERS = LoRAConfig(), LoRAConfig(rank=4, alpha=8.0)
SAME = pytest.approx  # metrics of two gangs: float32, added up in another order
STORY = (
    *("actor/pg_loss", "actor/grad_norm", "actor/pg_clipfrac", "actor/ppo_kl", "actor/entropy"),
    *("critic/vf_loss", "critic/grad_norm", "critic/vf_clipfrac", "critic/vf_explained_var", "critic/advantages/max"),
    *("objective/kl", "objective/scores", "objective/rlhf_reward", "objective/entropy", "response_length/mean"),
    "ptx/loss",
)


@dataclass(frozen=True)
class Trained:
    """What a gang left: its directory, its metrics and its rollouts by iteration."""

    directory: Path
    metrics: Mapping[int, Mapping[str, Any]]
    rollouts: Mapping[int, ReferencedRollouts]

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.directory / "checkpoints")


@dataclass(frozen=True)
class Scene:
    """Where all gangs train: the config without a gang, the prompts, and the open rooms with the first gang."""

    cfg: RunConfig
    prompts: Prompts
    paths: PPOInputs
    opened: OpenRooms
    logs: Path

    @asynccontextmanager
    async def gang(
        self, stage: int, ranks: int, lora: LoRAConfig = NO_ADAPTERS, transport: str = "shm"
    ) -> AsyncIterator[tuple[Rooms, LearnerGroup]]:
        """The rooms with another gang in the learner's place, and a weight store of its own."""
        cfg, name = with_gang(self.cfg, stage, ranks, lora), f"zero-{stage}-ranks-{ranks}-lora-{lora.rank}-{transport}"
        cfg = dataclasses.replace(cfg, weights=dataclasses.replace(cfg.weights, transport=transport))
        starter = Starter(cfg, Attempt(f"test-{name}", 1, self.logs / name))
        try:
            gang = await start_learner(starter, self.paths)
            learner = LearnerGroup(gang, gang.channel, cfg.cluster.call_timeout_s)
            samplers = [host for host in self.opened.hosts if host.name.startswith("generation")]
            generation = GenerationPool(Crew.of(samplers), gang.channel, cfg.cluster.call_timeout_s)
            if transport != "shm":
                await learner.open_direct(samplers, 1)
            yield dataclasses.replace(self.opened.rooms, generation=generation, learner=learner), learner
        finally:
            await starter.end()

    async def train_from_the_start(
        self, directory: Path, stage: int, ranks: int, lora: LoRAConfig = NO_ADAPTERS, transport: str = "shm"
    ) -> Trained:
        """With a gang of its own; generation goes back to the first policy by receiving version 0 again."""
        async with self.gang(stage, ranks, lora, transport) as (rooms, learner):
            await learner.publish(0)
            await rooms.generation.receive(0)
            return await self.train(rooms, directory)

    async def train(self, rooms: Rooms, directory: Path, start: ppo.Start = ppo.AT_FIRST) -> Trained:
        with MetricsLog([JsonlSink(directory / "metrics.jsonl")], pytest.fail) as metrics:
            log = ppo.Log(
                metrics,
                Timer(Timeline(), ppo.STAGE),
                RolloutLog(directory / "rollouts"),
                Checkpoints(directory / "checkpoints"),
                lambda step, batch: None,
                lambda sentence: None,
            )
            await ppo.train(rooms, PromptOrder(self.prompts, self.cfg.seed), self.cfg.ppo, log, start)
        records = read_metrics(directory / "metrics.jsonl")
        return Trained(
            directory,
            {record.step - 1: record.metrics for record in records},
            {step: ReferencedRollouts(log.rollouts.read(step)) for step in log.rollouts.steps()},
        )


def with_gang(cfg: RunConfig, stage: int, ranks: int, lora: LoRAConfig = NO_ADAPTERS) -> RunConfig:
    engine = dataclasses.replace(cfg.learner.engine, zero_stage=stage)
    resources = dataclasses.replace(cfg.learner.resources, workers=ranks)
    learner = dataclasses.replace(cfg.learner, engine=engine, resources=resources, lora=lora)
    return dataclasses.replace(cfg, learner=learner)


def some_text(directory: Path) -> Path:
    """For the pretraining mix."""
    path = directory / "text.txt"
    path.write_text("\n\n".join(f"Line {n} has {n * n} words less one." for n in range(40)))
    return path


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as one:
        yield one


@pytest.fixture(scope="module")
def scene(
    private_ray: None,
    runner: asyncio.Runner,
    small: Callable[..., RunConfig],
    policy: Path,
    reward_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Scene]:
    cfg = small(
        *(f"ppo.steps={STEPS}", "ppo.samples_per_prompt=2", "ppo.epochs=2"),
        *("learner.policy.lr=1e-3", "learner.critic.lr=1e-3", "learner.engine.tokens_per_micro_batch=400"),
        *("generation.resources.workers=2", "reward.resources.workers=2"),
        *("ppo.ptx.coef=0.5", "ppo.ptx.ratio=1", "ppo.ptx.tokens=24", "ppo.ema_decay=0.5"),
        f"data.pretraining={some_text(tmp_path_factory.mktemp('text'))}",
    )
    inputs = load_inputs(cfg)
    logs, paths = tmp_path_factory.mktemp("logs"), PPOInputs(policy, policy, reward_model, inputs.pretraining)
    opening = open_rooms(with_gang(cfg, *GANGS[0]), Attempt("test-ppo", 1, logs), paths)
    opened = runner.run(opening.__aenter__())
    yield Scene(cfg, inputs.prompts, paths, opened, logs)
    runner.run(opening.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def trained(
    scene: Scene, runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[tuple[int, int], Trained]:
    """Every gang trains from the same policy."""
    first = runner.run(scene.train(scene.opened.rooms, tmp_path_factory.mktemp("first")))
    return {GANGS[0]: first} | {
        gang: runner.run(scene.train_from_the_start(tmp_path_factory.mktemp("gang"), *gang)) for gang in GANGS[1:]
    }


@pytest.mark.parametrize("gang", GANGS)
def test_the_first_minibatch_has_ratio_1_and_clips_nothing(
    trained: Mapping[Any, Trained], gang: tuple[int, int]
) -> None:
    for metrics in trained[gang].metrics.values():
        assert metrics["actor/first_ratio_max"] == pytest.approx(1, abs=1e-5)
        assert metrics["actor/first_ratio_min"] == pytest.approx(1, abs=1e-5)
        assert metrics["actor/first_clipfrac"] == 0


@pytest.mark.parametrize("gang", GANGS)
def test_after_each_publish_vllm_samples_from_the_learner_s_weights(
    trained: Mapping[Any, Trained], gang: tuple[int, int]
) -> None:
    """The policy has moved far beyond the tolerance, so that workers with an older version could not pass."""
    for step, metrics in trained[gang].metrics.items():
        assert metrics["rollout/logprob_diff_max"] < 1e-4
        rollouts = trained[gang].rollouts[step]
        moved = np.abs(np.concatenate(rollouts.rollout_logprobs) - np.concatenate(rollouts.ref_logprobs)).max()
        assert moved < 1e-4 if step == 0 else moved > 1e-2


@pytest.mark.parametrize("gang", GANGS)
def test_every_token_bears_the_version_of_its_iteration(trained: Mapping[Any, Trained], gang: tuple[int, int]) -> None:
    for step, rollouts in trained[gang].rollouts.items():
        assert set(np.concatenate(rollouts.weight_versions).tolist()) == {step}
        assert trained[gang].metrics[step]["rollout/staleness"] == 0
        assert trained[gang].metrics[step]["sync/version"] == step + 1


@pytest.mark.parametrize("gang", GANGS)
def test_every_member_is_trained_on_once(scene: Scene, trained: Mapping[Any, Trained], gang: tuple[int, int]) -> None:
    """The learner's own sums over its ranks speak of the same rows as the log."""
    order, ppo_cfg = PromptOrder(scene.prompts, scene.cfg.seed), scene.cfg.ppo
    for step, rollouts in trained[gang].rollouts.items():
        members = order.members(step, ppo_cfg.batch_size, ppo_cfg.samples_per_prompt)
        assert sorted(rollouts.sample_id) == sorted(members.sample_id)
        metrics, lengths = trained[gang].metrics[step], [len(ids) for ids in rollouts.response_ids]
        assert metrics["response_length/mean"] == pytest.approx(np.mean(lengths))
        assert metrics["objective/scores"] == pytest.approx(rollouts.score.mean(), abs=1e-6)


def test_both_workers_of_each_pool_take_part(trained: Mapping[Any, Trained]) -> None:
    """And responses end early or at the limit, so that what all the others say holds for ragged batches."""
    rollouts = trained[GANGS[0]].rollouts[0]
    assert set(rollouts.incarnation) == {"generation-0.1", "generation-1.1"}
    assert set(rollouts.finish_reason) == {"stop", "length"}
    assert len({len(ids) for ids in rollouts.response_ids}) > 1


@pytest.mark.parametrize("gang", GANGS[1:])
def test_zero_stages_and_numbers_of_ranks_agree(trained: Mapping[Any, Trained], gang: tuple[int, int]) -> None:
    first = trained[GANGS[0]]
    assert sorted(first.metrics) == sorted(trained[gang].metrics) == list(range(STEPS))
    for step in range(STEPS):
        mine, theirs = trained[gang].metrics[step], first.metrics[step]
        assert {name: mine[name] for name in STORY} == SAME({name: theirs[name] for name in STORY}, rel=1e-4, abs=1e-4)
    assert distance(trained[gang], first) < 1e-4


def test_weights_that_ranks_send_to_the_engines_themselves_are_the_same(
    scene: Scene, trained: Mapping[Any, Trained], runner: asyncio.Runner, tmp_path: Path
) -> None:
    """Over gloo, from two ranks at stage 3 to two workers, each of whom gets what the store would have given it."""
    sent = runner.run(scene.train_from_the_start(tmp_path, 3, 2, transport="gloo"))
    assert distance(sent, trained[(3, 2)]) < 1e-4
    for step, metrics in sent.metrics.items():
        assert metrics["rollout/logprob_diff_max"] < 1e-4
        if step:  # what there is to say of a publish stands on the record of the iteration after it
            assert metrics["sync/bytes"] == pytest.approx(trained[(3, 2)].metrics[step]["sync/bytes"], rel=0.05)
        assert set(np.concatenate(sent.rollouts[step].weight_versions).tolist()) == {step}


def test_adapters_are_the_same_on_one_rank_and_on_two(
    scene: Scene, trained: Mapping[Any, Trained], runner: asyncio.Runner, tmp_path: Path
) -> None:
    one, other, sent = (
        runner.run(scene.train_from_the_start(tmp_path / f"{stage}-{transport}", stage, ranks, ADAPTERS, transport))
        for stage, ranks, transport in [(0, 1, "shm"), (3, 2, "shm"), (3, 2, "gloo")]
    )
    assert distance(one, other) < 1e-4
    assert distance(sent, other) < 1e-4
    assert distance(one, trained[(0, 1)]) > 1e-3, "without adapters it would be the same"


def test_gradients_that_stream_are_the_same_on_one_rank_and_on_packed_ones(
    scene: Scene, runner: asyncio.Runner, tmp_path: Path
) -> None:
    """Groups without a critic, ratios and means of whole responses, each row computed once as it arrives."""
    ppo_cfg = dataclasses.replace(
        scene.cfg.ppo,
        epochs=1,
        minibatch_size=scene.cfg.ppo.batch_size,
        ratio="response",
        loss_mean="response",
        advantage=AdvantageConfig("grpo", whiten=False),
        kl=KLConfig(coef=0.0, loss_coef=0.04),
    )
    assert ppo_cfg.streams_gradients
    apart = dataclasses.replace(scene, cfg=dataclasses.replace(scene.cfg, ppo=ppo_cfg))
    learner = dataclasses.replace(scene.cfg.learner, packing=True)
    cfg = dataclasses.replace(apart.cfg, learner=learner, ppo=dataclasses.replace(ppo_cfg, share_prompts=False))
    packed = dataclasses.replace(scene, cfg=cfg)
    one, *others = (
        runner.run(which.train_from_the_start(tmp_path / name, *gang))
        for name, which, gang in (("one", apart, (0, 1)), ("two", packed, (3, 2)), ("four", apart, (2, 4)))
    )
    story = [name for name in STORY if name.startswith(("actor/", "objective/"))]
    for other in others:
        for step in range(STEPS):
            mine, theirs = ({name: of.metrics[step][name] for name in story} for of in (other, one))
            assert mine == SAME(theirs, rel=1e-4, abs=1e-4)
        assert distance(other, one, ("policy", "ema")) < 1e-4


def test_in_bfloat16_learner_and_vllm_differ_by_rounding(
    scene: Scene, runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What a laptop with bfloat16 and a GPU run: all rooms in it, masters in float32."""
    model = dataclasses.replace(scene.cfg.model, dtype="bfloat16")
    cfg = with_gang(dataclasses.replace(scene.cfg, model=model), 2, 1)

    async def trained() -> Trained:
        async with open_rooms(cfg, Attempt("test-ppo-bfloat16", 1, scene.logs / "bfloat16"), scene.paths) as opened:
            return await scene.train(opened.rooms, tmp_path_factory.mktemp("bfloat16"))

    whole = runner.run(trained())
    for metrics in whole.metrics.values():
        assert metrics["actor/first_clipfrac"] == 0
        assert metrics["actor/first_ratio_max"] == pytest.approx(1, abs=2e-2)
        assert metrics["actor/first_ratio_min"] == pytest.approx(1, abs=2e-2)
        assert metrics["rollout/logprob_diff_mean"] < 5e-3
    rollouts = whole.rollouts[STEPS - 1]
    moved = np.abs(np.concatenate(rollouts.rollout_logprobs) - np.concatenate(rollouts.ref_logprobs)).mean()
    assert moved > 2e-2, "workers with older weights would pass"


def distance(some: Trained, other: Trained, models: Sequence[str] = ("policy", "critic", "ema")) -> float:
    """The largest difference between two final policies, critics and averages of the policy."""
    largest = 0.0
    for model in models:
        mine, theirs = (
            load_file(which.checkpoints.directory / f"step-{STEPS}" / model / "model.safetensors")
            for which in (some, other)
        )
        assert mine.keys() == theirs.keys()
        largest = max(largest, *(float((mine[name] - theirs[name]).abs().max()) for name in mine))
    return largest


def test_a_checkpoint_of_two_ranks_at_stage_3_goes_on_with_one_rank_at_stage_0(
    scene: Scene, trained: Mapping[Any, Trained], runner: asyncio.Runner, tmp_path: Path
) -> None:
    whole = trained[(3, 2)]
    checkpoint = whole.checkpoints.directory / "step-1"

    async def resumed() -> Trained:
        async with scene.gang(0, 1) as (rooms, learner):
            await learner.load(checkpoint, 1)
            await learner.publish(1)
            await rooms.generation.receive(1)
            return await scene.train(rooms, tmp_path, ppo.resume(checkpoint))

    again = runner.run(resumed())
    assert sorted(again.metrics) == [1, 2]
    for step, metrics in again.metrics.items():
        expected = {name: whole.metrics[step][name] for name in STORY}
        assert {name: metrics[name] for name in STORY} == SAME(expected, rel=1e-4, abs=1e-4)
        assert metrics["rollout/logprob_diff_max"] < 1e-4
    assert distance(again, whole) < 1e-4
