"""What a learner leaves on disk: plain Hugging Face directories, and the training state by parameter name.

The state holds fp32 masters and both moments, and the policy's average where one is kept, written in shares by all
ranks; it opens on any number of ranks at any ZeRO stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlhf_cluster.engine.average import WeightAverage
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.engine.ranks import Ranks

INDEX = "index.json"
AVERAGE = "policy_average"


class StateError(RuntimeError):
    """A training state that is not there, or not of this model."""


def save_state(
    engines: Mapping[str, TrainEngine], directory: Path, ranks: Ranks, average: WeightAverage | None = None
) -> None:
    """Writes `rank-<i>.safetensors` on every rank and the index on rank 0. `average`: of the policy. A collective."""
    directory.mkdir(parents=True, exist_ok=True)
    share: dict[str, torch.Tensor] = {}
    holder: dict[str, int] = {}
    for model, engine in engines.items():
        for number, (name, state) in enumerate(engine.full_state()):
            owner = holder[f"{model}/{name}"] = number % ranks.world
            if owner == ranks.rank:
                share |= {f"{model}/{name}/{key}": t.detach().cpu().clone() for key, t in state.items()}
    for number, (name, tensor) in enumerate(average.full() if average else ()):
        owner = holder[f"{AVERAGE}/{name}"] = number % ranks.world
        if owner == ranks.rank:
            share[f"{AVERAGE}/{name}"] = tensor.to("cpu", copy=True)
    save_file(share, directory / f"rank-{ranks.rank}.safetensors")
    if ranks.rank == 0:
        steps = {model: engine.optimizer_steps for model, engine in engines.items()}
        (directory / INDEX).write_text(json.dumps({"holder": holder, "optimizer_steps": steps}))
    ranks.gather(None)  # nobody goes on before every share is written


def load_state(engines: Mapping[str, TrainEngine], directory: Path, average: WeightAverage | None = None) -> None:
    """Restores every engine, whatever stage and number of ranks wrote the state. A collective."""
    try:
        index = json.loads((directory / INDEX).read_text())
    except OSError as error:
        raise StateError(f"no training state at {directory}: {error.strerror}") from error
    shares = {rank: safe_open(directory / f"rank-{rank}.safetensors", "pt") for rank in set(index["holder"].values())}

    def share_of(key: str) -> Any:
        if key not in index["holder"]:
            raise StateError(f"the training state at {directory} has no parameter {key}: it is of another model")
        return shares[index["holder"][key]]

    if average:
        average.load_full(lambda name: share_of(f"{AVERAGE}/{name}").get_tensor(f"{AVERAGE}/{name}"))
    for model, engine in engines.items():

        def state_of(name: str, model: str = model) -> dict[str, torch.Tensor]:
            key = f"{model}/{name}"
            return {part: share_of(key).get_tensor(f"{key}/{part}") for part in ("master", "exp_avg", "exp_avg_sq")}

        engine.load_full_state(state_of, index["optimizer_steps"][model])
