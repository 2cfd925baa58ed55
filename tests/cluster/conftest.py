"""What the cluster tests share: a Ray of their own, a head node, small models, and configs that use them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from as_user import User
    from ray_head import Head

    from rlhf_cluster.config import RunConfig


@pytest.fixture(scope="session")
def short_dir() -> Iterator[Path]:
    """For Ray's sessions, whose socket paths must be short."""
    path = Path(tempfile.mkdtemp(prefix="rlhf-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where commands and jobs keep the models that they make."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def head(cache: str) -> Iterator[Head]:
    """A head node of 2 CPUs."""
    from ray_head import started_head

    with started_head(num_cpus=2, RLHF_CLUSTER_CACHE=cache) as node:
        yield node


@pytest.fixture(scope="session")
def user(cache: str, short_dir: Path) -> User:
    """The command line, with a model cache and Ray sessions of its own."""
    from as_user import User

    return User({"RLHF_CLUSTER_CACHE": cache, "RAY_TMPDIR": str(short_dir)})


@pytest.fixture(scope="module")
def private_ray(short_dir: Path) -> Iterator[None]:
    """A local Ray, as `rlhf-cluster run` starts one. Not for the session: a process knows one token at a time."""
    from rlhf_cluster.cluster.session import ray_session
    from rlhf_cluster.config import ClusterConfig, Resources

    os.environ.pop("RAY_ADDRESS", None)
    with ray_session(ClusterConfig(temp_dir=str(short_dir)), {"tests": {"any": Resources(workers=8, num_cpus=0.25)}}):
        yield


@pytest.fixture(scope="session")
def policy(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, made to prefer some tokens and to end some responses early: lengths differ as in real runs."""
    import torch

    from rlhf_cluster.models.load import load_policy, save_policy
    from rlhf_cluster.models.tokenizer import load_tokenizer

    directory = tmp_path_factory.mktemp("models") / "policy"
    model, tokenizer = load_policy(tiny, torch.float32, "eager"), load_tokenizer(tiny)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding *= 4.0
        embedding[tokenizer.eos_token_id] *= 6.0
    save_policy(model.config, model.state_dict(), tokenizer, directory, torch.float32)
    return directory


@pytest.fixture(scope="session")
def reward_model(policy: Path) -> Path:
    """The policy's body under a random score head."""
    import torch

    from rlhf_cluster.models.score_head import ScalarHeadModel
    from rlhf_cluster.models.tokenizer import load_tokenizer

    directory = policy.with_name("reward_model")
    model = ScalarHeadModel.from_policy(policy, torch.float32, "eager", seed=1)
    model.save(directory, load_tokenizer(policy), torch.float32)
    return directory


@pytest.fixture(scope="session")
def small(policy: Path, reward_model: Path) -> Callable[..., RunConfig]:
    """PPO of the small policy in float32; further overrides as on the command line."""
    from rlhf_cluster.config import load

    given = ("recipe=smoke", "stages=[ppo]", f"policy_path={policy}", f"reward.path={reward_model}")
    limits = ("model.dtype=float32", "cluster.start_timeout_s=240", "cluster.call_timeout_s=120")
    return lambda *overrides: load([*given, *limits, *overrides])
