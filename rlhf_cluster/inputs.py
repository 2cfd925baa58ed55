"""What a run starts from: the base model's directory, its tokenizer, and the data as records. All of it is
checked here, before any worker starts."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cluster.config import ConfigError, RunConfig, part_names
from rlhf_cluster.data.rows import Place
from rlhf_cluster.data.sources import load_corpus
from rlhf_cluster.data.split import Corpus
from rlhf_cluster.data.text import pack_texts, read_texts
from rlhf_cluster.data.tokenize import encode_comparisons, encode_demonstrations, encode_prompts
from rlhf_cluster.models.build import prepare_model
from rlhf_cluster.models.load import load_config
from rlhf_cluster.models.score_head import check_scalar_head
from rlhf_cluster.models.tokenizer import context_length, load_tokenizer
from rlhf_cluster.records import Comparisons, Demonstrations, Pretraining, Prompts
from rlhf_cluster.scoring.function import FunctionCall, FunctionLoadError
from rlhf_cluster.scoring.worker import function_spec


@dataclass(frozen=True, eq=False)
class Inputs:
    """The base model and the data of a run; `dropped` says by reason what was read and is not used."""

    base_path: Path
    tokenizer: Any
    prompts: Prompts
    heldout_prompts: Prompts
    demonstrations: Demonstrations
    comparisons: Comparisons
    heldout_comparisons: Comparisons
    pretraining: Pretraining
    dropped: dict[str, int]

    def text(self, ids: Any) -> str:
        """Tokens as a person reads them."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load_inputs(cfg: RunConfig) -> Inputs:
    """Raises ConfigError, ModelError or DataError, each a single sentence."""
    named = Path(cfg.policy_path) if cfg.policy_path else prepare_model(cfg.model)
    base_path = named.resolve()  # workers may stand elsewhere than the driver: those of Ray Train always do
    limit = context_length(base_path)
    if cfg.model.context > limit:
        raise ConfigError(
            f"model.context={cfg.model.context} is beyond the model's own context of {limit} tokens; lower it"
        )
    _require_models(cfg, base_path)
    tokenizer = load_tokenizer(base_path, cfg.model.chat_template)
    inputs = encode(load_corpus(cfg.data, cfg.seed), cfg, base_path, tokenizer)
    _require_data(cfg, inputs)
    if "ppo" in cfg.stages or cfg.sft.select == "reward":
        _require_rewards(cfg, inputs)
    if {"rm", "dpo"} & set(cfg.stages) and cfg.rm.ranking.labeler == "exact":
        _require_answers("rm.ranking.labeler=exact", cfg.data.answer_column, inputs)
    return inputs


def encode(corpus: Corpus, cfg: RunConfig, base_path: Path, tokenizer: Any) -> Inputs:
    prompt_limit, context, too_long = cfg.data.max_prompt_tokens, cfg.model.context, corpus.too_long
    prompts = encode_prompts(corpus.prompts, tokenizer, prompt_limit, too_long)
    heldout = encode_prompts(corpus.heldout_prompts, tokenizer, prompt_limit, too_long)
    demonstrations = encode_demonstrations(corpus.demonstrations, tokenizer, prompt_limit, context, too_long)
    comparisons = encode_comparisons(corpus.comparisons, tokenizer, prompt_limit, context, too_long)
    heldout_comparisons = encode_comparisons(corpus.heldout_comparisons, tokenizer, prompt_limit, context, too_long)
    dropped = Counter(corpus.dropped)
    for encoded in (prompts, heldout, demonstrations, comparisons, heldout_comparisons):
        dropped.update(encoded.dropped)
    return Inputs(
        base_path,
        tokenizer,
        prompts.record,
        heldout.record,
        demonstrations.record,
        comparisons.record,
        heldout_comparisons.record,
        _pretraining(cfg, tokenizer),
        dict(dropped),
    )


def _pretraining(cfg: RunConfig, tokenizer: Any) -> Pretraining:
    """Text, where SFT or PPO mixes it in."""
    in_sft = "sft" in cfg.stages and cfg.sft.pretraining_share
    in_ppo = "ppo" in cfg.stages and cfg.ppo.ptx.coef
    if not (in_sft or in_ppo):
        return Pretraining.empty()
    path, tokens = cfg.data.pretraining, cfg.ppo.ptx.tokens or cfg.model.context
    return pack_texts(read_texts(path), tokenizer, tokens, Place(path))


def _require_models(cfg: RunConfig, base_path: Path) -> None:
    """The models that PPO is told to use are there, speak the policy's tokens and read as many; the reward model does
    not keep more layers than there are."""
    base = load_config(base_path)
    layers, vocabulary = base.num_hidden_layers, base.vocab_size
    if "rm" in cfg.stages and cfg.rm.layers > layers:
        raise ConfigError(f"rm.layers={cfg.rm.layers}, but {base_path} has {layers} layers; lower it, or 0 for all")
    if cfg.learner.lora.publish == "adapter" and base.model_type == "gpt2":
        raise ConfigError(
            f"learner.lora.publish=adapter, but {base_path} is a GPT-2, to which vLLM cannot add adapters; use merged"
        )
    if "ppo" not in cfg.stages and cfg.sft.select != "reward":
        return
    given = {}
    for name, part in part_names(cfg.reward).items():
        if part.kind == "model" and (model := part.path or cfg.reward.path):
            key = f"the reward {name}'s path" if part.path else "reward.path"
            given[key] = Path(model)
            check_scalar_head(given[key])
    if cfg.reference.path and cfg.ppo.kl.kind != "none":
        given["reference.path"] = Path(cfg.reference.path)
    for key, path in given.items():
        found = load_config(path).vocab_size
        if found != vocabulary:
            raise ConfigError(
                f"{key}={path} is a model of {found} tokens, the policy's has {vocabulary}; use one with its tokenizer"
            )
        if cfg.model.context > (limit := context_length(path)):
            raise ConfigError(f"{key}={path} reads {limit} tokens, model.context={cfg.model.context} is more; lower it")


def _require_rewards(cfg: RunConfig, inputs: Inputs) -> None:
    """Functions load, prompts have the answers that are asked for, and the token is there."""
    if cfg.evaluation.gold == "exact":
        _require_answers("evaluation.gold=exact", cfg.data.answer_column, inputs)
    for name, part in part_names(cfg.reward).items():
        if part.kind in ("math", "exact"):
            _require_answers(f"the reward {name}", part.column, inputs)
        if part.kind in ("function", "regex", "json_schema"):  # what may be wrong with the others was seen above
            function = FunctionCall(function_spec(part))
            try:
                function.start()
            except FunctionLoadError as error:
                of = next(key for key in ("path", "pattern", "schema") if getattr(part, key))
                told = f"{of}={getattr(part, of)}"
                raise ConfigError(f"the reward {name} ({told}, in reward.parts) cannot be loaded: {error}") from error
            finally:
                function.close()
    if cfg.reward.token_env and not os.environ.get(cfg.reward.token_env):
        raise ConfigError(f"reward.token_env={cfg.reward.token_env}, but there is no such environment variable; set it")


def _require_answers(who: str, column: str, inputs: Inputs) -> None:
    for prompts in (inputs.prompts, inputs.heldout_prompts):
        table = prompts.table
        if column not in table.column_names:
            own = [name for name in table.column_names if name not in Prompts.COLUMNS]
            raise ConfigError(
                f"{who} reads the prompts' column {column!r}, which they lack; their own columns are "
                f"{', '.join(own) or 'none'}"
            )
        if missing := table.column(column).null_count:
            raise ConfigError(f"{missing} of {len(prompts)} prompts have no {column!r}, which {who} needs")


def _require_data(cfg: RunConfig, inputs: Inputs) -> None:
    """Each stage that runs has what it learns from."""
    prompts = (len(inputs.prompts), "prompts (data.prompts)")
    comparisons = (
        len(inputs.comparisons),
        "comparisons (data.comparisons, or rm.ranking.labeler=vader to have the policy's own samples ranked)",
    )
    ranked = prompts if cfg.rm.ranking.labeler else comparisons
    demonstrations = (len(inputs.demonstrations), "demonstrations (data.demonstrations)")
    needs = {"sft": demonstrations, "rm": ranked, "dpo": ranked, "ppo": prompts}
    for stage in cfg.stages:
        count, what = needs[stage]
        if not count:
            dropped = f"; dropped: {inputs.dropped}" if inputs.dropped else ""
            raise ConfigError(f"stage {stage} has no {what} to learn from: data.source={cfg.data.source}{dropped}")
    if "sft" in cfg.stages and cfg.sft.select == "reward" and not len(inputs.prompts):
        raise ConfigError("sft.select=reward scores samples for prompts of PPO, and there are none; give data.prompts")
    if "ppo" in cfg.stages and len(inputs.heldout_prompts) < 2:
        raise ConfigError(
            f"{len(inputs.heldout_prompts)} held-out prompts are left of "
            f"data.heldout_prompts={cfg.data.heldout_prompts}; the comparison before/after needs 2 or more"
        )
