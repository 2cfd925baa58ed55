"""The real rooms in this process, single rank, on the tiny model: plain workers under the async face of `rooms.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rlhf_cluster.config import (
    EngineConfig,
    GenerationConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    RewardPart,
)
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.learner.worker import LearnerWorker
from rlhf_cluster.models.score_head import ScalarHeadModel
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.records import Controls, Pretraining, RefLogprobs, Rollouts, ScoredRollouts, Scores, UpdateStats
from rlhf_cluster.reference.worker import ReferenceWorker
from rlhf_cluster.rooms import Learner, Reference, RewardModel
from rlhf_cluster.scoring.worker import RewardWorker, ScorerInputs
from rlhf_cluster.weights.snapshot import check


class OneReward:
    """Keeps `rooms.RewardModel` over one worker."""

    def __init__(self, worker: RewardWorker) -> None:
        self.worker = worker

    async def score(self, rollouts: Rollouts) -> Scores:
        return self.worker.score(rollouts)


class OneReference:
    """Keeps `rooms.Reference` over one worker."""

    def __init__(self, worker: ReferenceWorker) -> None:
        self.worker = worker

    async def logprobs(self, rollouts: Rollouts) -> RefLogprobs:
        return self.worker.logprobs(rollouts)


class OneLearner:
    """Keeps `rooms.Learner` over one rank."""

    def __init__(self, worker: LearnerWorker, store: Path) -> None:
        self.worker, self.store = worker, store

    async def begin(self, step: int, sample_ids: Sequence[str]) -> None:
        assert self.worker.begin(step, sample_ids).keys() == set(sample_ids)

    async def add(self, step: int, rows: ScoredRollouts) -> None:
        self.worker.add(step, rows, 0, len(rows))

    async def replace(self, step: int, gone: Sequence[str], come: Sequence[str]) -> None:
        self.worker.replace(step, gone, come)

    async def update(self, step: int, controls: Controls) -> UpdateStats:
        return self.worker.update(step, controls)

    async def publish(self, version: int) -> None:
        snapshot = self.worker.publish(version, str(self.store))
        assert snapshot is not None
        check(snapshot)

    async def load(self, directory: Path, version: int) -> None:
        self.worker.load(str(directory), version)

    async def save(self, directory: Path) -> None:
        self.worker.save(str(directory))


@pytest.fixture(scope="session")
def reward_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward_model")
    ScalarHeadModel.from_policy(tiny, torch.float32, "eager", seed=7).save(path, load_tokenizer(tiny), torch.float32)
    return path


@pytest.fixture(scope="session")
def random_reward() -> RewardModel:
    return OneReward(
        RewardWorker(RewardConfig([RewardPart("random")]), ScorerInputs("", "", "float32", "eager", 0, 60.0))
    )


@pytest.fixture(scope="session")
def real_reward(reward_model: Path) -> RewardModel:
    return OneReward(
        RewardWorker(
            RewardConfig(tokens_per_micro_batch=40), ScorerInputs(str(reward_model), "", "float32", "eager", 0, 60.0)
        )
    )


@pytest.fixture(scope="session")
def real_reference(tiny: Path) -> Reference:
    return OneReference(ReferenceWorker(str(tiny), "float32", "eager", 40))


@pytest.fixture
def real_learner(tiny: Path, reward_model: Path, one_rank: Ranks, free_port: int, tmp_path: Path) -> Learner:
    rate = OptimizerConfig(lr=1e-3)
    cfg = LearnerConfig(rate, rate, engine=EngineConfig(tokens_per_micro_batch=64))
    model = ModelConfig(source="tiny", dtype="float32", attention="eager")
    worker = LearnerWorker(cfg, PPOConfig(batch_size=6, minibatch_size=3), model, GenerationConfig(), seed=5)
    worker.start(0, 1, ("127.0.0.1", free_port), 60, tiny, reward_model, Pretraining.empty())
    return OneLearner(worker, tmp_path / "store")


@pytest.fixture
def room(request: pytest.FixtureRequest) -> object:
    """The room that a test is run against, by the name of its fixture."""
    return request.getfixturevalue(request.param)
