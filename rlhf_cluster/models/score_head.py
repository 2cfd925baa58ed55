"""A transformer body with one scalar per position: the reward model and the critic are both this class.

Takes the directory of a causal LM or one that `save` wrote; gives scores and values. It refuses to know which of the
two it is being, and where in a row to read: the positions come with the batch, from true lengths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cluster.models import ModelError
from rlhf_cluster.models.forward import hidden_states
from rlhf_cluster.models.load import load_config, load_pretrained, save_pretrained

WEIGHTS, DESCRIPTION = "score_head.safetensors", "score_head.json"
FORMAT = 1


class ScoreHead(nn.Linear):
    """Linear(H, 1) that computes in float32 whatever the body's dtype: three digits are too few to rank by."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, H] -> f32 [N]."""
        return functional.linear(input.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class ScalarHeadModel(nn.Module):
    """Body and score head, with bias (InstructGPT section 3.5: the bias centres the scores of demonstrations at 0)."""

    def __init__(self, body: PreTrainedModel, score: ScoreHead) -> None:
        super().__init__()
        self.body = body
        self.score = score

    @property
    def config(self) -> PreTrainedConfig:
        return self.body.config

    def forward(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor | None, positions: Tensor) -> Tensor:
        """The scalar at flat `positions` [N], f32 [N].

        `PackedBatch.value_arguments()` gives the value before each response token, `score_arguments()` the score of
        each sequence, read at its true last token.
        """
        return self.score(hidden_states(self.body, input_ids, position_ids, segment_ids)[positions])

    @classmethod
    def from_policy(
        cls, path: Path, dtype: torch.dtype | None, attention: str, seed: int, layers: int = 0
    ) -> ScalarHeadModel:
        """A reward model before its training: the body of a causal LM under a new head of weights N(0, 1/(H+1)) by
        variance and bias 0.

        Stiennon et al. 2020 (arXiv:2009.01325), appendix B.1. Of the body's layers the first `layers` stay; 0: all.
        Raises ModelError where the body has fewer.
        """
        model = cls.silent(path, dtype, attention, layers)
        deviation = (model.score.in_features + 1) ** -0.5
        with torch.no_grad():
            model.score.weight.normal_(0.0, deviation, generator=torch.Generator().manual_seed(seed))
        return model

    @classmethod
    def silent(cls, path: Path, dtype: torch.dtype | None, attention: str, layers: int = 0) -> ScalarHeadModel:
        """A critic before its training, where there is no reward model to start from: it says 0 everywhere.

        As in the code of Ziegler et al. 2019 (arXiv:1909.08593). Differences between values that nothing has taught
        would be advantages, the same in every batch, and push the policy one way.
        """
        body = load_pretrained(AutoModel, path, dtype, attention, layers=layers)
        score = _empty_head(body.config.hidden_size)
        with torch.no_grad():
            score.weight.zero_()
            score.bias.zero_()
        return cls(body, score)

    @classmethod
    def from_directory(cls, path: Path, dtype: torch.dtype | None, attention: str) -> ScalarHeadModel:
        """What `save` wrote; the head stays float32. Raises ModelError where the head is absent or does not fit."""
        check_scalar_head(path)
        body = load_pretrained(AutoModel, path, dtype, attention)
        score = _empty_head(body.config.hidden_size)
        score.load_state_dict(load_file(path / WEIGHTS))
        return cls(body, score)

    def save(self, directory: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
        save_scalar_head_model(self.config, self.state_dict(), tokenizer, directory, dtype)


def check_scalar_head(path: Path) -> None:
    """Raises ModelError unless `path` is what `save` wrote: a head that fits the body beside it."""
    config = load_config(path)
    for name in (WEIGHTS, DESCRIPTION):
        if not (path / name).is_file():
            raise ModelError(f"{path} is not a reward model or critic: it holds no {name}")
    description = json.loads((path / DESCRIPTION).read_text())
    expected = {"format": FORMAT, "hidden_size": config.hidden_size}
    if {key: description.get(key) for key in expected} != expected:
        raise ModelError(f"{path / DESCRIPTION} says {description}; the body beside it needs {expected}")


def save_scalar_head_model(
    model_config: PreTrainedConfig,
    state_dict: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    dtype: torch.dtype,
) -> None:
    """Writes the body as a plain Hugging Face directory (`dtype`) and the head beside it (float32).

    `state_dict` holds full tensors by the names of `ScalarHeadModel` (`body.*`, `score.*`), gathered where they were
    partitioned. Raises ModelError where a parameter is missing or unknown.
    """
    body = {name.removeprefix("body."): tensor for name, tensor in state_dict.items() if name.startswith("body.")}
    head = {name: state_dict.get(f"score.{name}") for name in ("weight", "bias")}
    missing = [f"score.{name}" for name, tensor in head.items() if tensor is None]
    if missing:
        raise ModelError(f"the state dict of a reward model or critic lacks {missing}")
    save_pretrained(AutoModel, model_config, body, tokenizer, directory, dtype)
    tensors = {name: t.detach().to("cpu", torch.float32, copy=True) for name, t in head.items() if t is not None}
    save_file(tensors, directory / WEIGHTS)
    description = {"format": FORMAT, "hidden_size": model_config.hidden_size, "read_at": "true last token"}
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def _empty_head(hidden_size: int) -> ScoreHead:
    return nn.utils.skip_init(ScoreHead, hidden_size, 1, dtype=torch.float32)
