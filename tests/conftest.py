"""What tests of several rooms share: the tiny model's directory, and a process group of one rank.

The fakes of `tests/loop` and the laws of `tests/contract` are imported by their file names from other folders.
"""

from __future__ import annotations

import gc
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from rlhf_cluster.engine.ranks import Ranks

for folder in ("loop", "contract"):
    sys.path.append(str(Path(__file__).parent / folder))


# The same examples on every machine; no test is timed.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What torch, transformers and DeepSpeed have made by now stays: looking through it again at each full collection
    takes a fifth of the time of the tests."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries count at exit what was never collected, and print it


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `model=tiny`."""
    from rlhf_cluster.config import ModelConfig
    from rlhf_cluster.models.build import prepare_model

    return prepare_model(ModelConfig(source="tiny"), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def one_rank(free_port: int) -> Iterator[Ranks]:
    """This process as a gang of one."""
    from rlhf_cluster.engine.ranks import join_ranks, leave_ranks
    from rlhf_cluster.telemetry.quiet import quiet_libraries

    quiet_libraries()
    yield join_ranks(0, 1, "127.0.0.1", free_port, 60)
    leave_ranks()
