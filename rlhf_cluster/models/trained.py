"""What a stage that trains a policy leaves behind."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.models.forward import PolicyModule
from rlhf_cluster.models.load import save_policy
from rlhf_cluster.models.tokenizer import load_tokenizer


def leave_policy(engine: TrainEngine, config: PreTrainedConfig, source: Path, chat_template: str, output: Path) -> None:
    """A plain Hugging Face directory in float32, the next stage's masters, with the tokenizer of `source`. A
    collective: nobody goes on before it is written."""
    weights = PolicyModule.hf_names(engine.masters_on_rank_0())
    if engine.ranks.rank == 0:
        save_policy(config, weights, load_tokenizer(source, chat_template), output, torch.float32)
    engine.ranks.gather(None)
