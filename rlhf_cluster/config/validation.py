"""What is refused before anything starts, each with one sentence that has the offending numbers.

What a key may be by itself stands beside it where a bound can say it (`bounds`); what takes words of its own or relates
several keys stands here, and for stage 3 in `ppo_validation`.
"""

from __future__ import annotations

import re

from rlhf_cluster.config.bounds import require_one_of, within_bounds
from rlhf_cluster.config.ppo_validation import validate_ppo, validate_reward, validate_text
from rlhf_cluster.config.refusal import require
from rlhf_cluster.config.tree import STAGES, RunConfig, optimizers


def validate(cfg: RunConfig) -> RunConfig:
    """Refuses what cannot run, with the offending numbers. Returns `cfg`."""
    within_bounds(cfg)
    _validate_run(cfg)
    _validate_learning(cfg)
    _validate_data(cfg)
    if "sft" in cfg.stages:
        _validate_sft(cfg)
    if "ppo" in cfg.stages:
        validate_ppo(cfg)
    return cfg


def _validate_run(cfg: RunConfig) -> None:
    """Its name, its seed, its cluster, its stages."""
    named = re.fullmatch(r"[\w-][\w.-]*", cfg.name) is not None
    require(len(cfg.name) <= 100, f"name={cfg.name[:20]}...: {len(cfg.name)} letters; at most 100")
    require(named, f"name={cfg.name}: only letters, digits, ., _ and -, and no . at the beginning")
    require(
        re.fullmatch(r"local|auto|(ray://)?[\w.\-\[\]:]+:\d+", cfg.cluster.address) is not None,
        f"cluster.address={cfg.cluster.address}: it must be local, auto or HOST:PORT",
    )
    require(0 <= cfg.seed < 1 << 32, f"seed={cfg.seed}: it must be from 0 to {(1 << 32) - 1}")
    auto = cfg.cluster.autoscale
    require(
        not auto.most or auto.least <= auto.most,
        f"cluster.autoscale.least={auto.least}, most={auto.most}: least must not be above most",
    )
    for stage in cfg.stages:
        require_one_of("stages", stage, STAGES)
    require(bool(cfg.stages), f"stages is empty; it must name at least one of {', '.join(STAGES)}")
    order = [STAGES.index(stage) for stage in cfg.stages]
    require(order == sorted(set(order)), f"stages={cfg.stages}: each at most once, in the order {', '.join(STAGES)}")


def _validate_learning(cfg: RunConfig) -> None:
    """Lengths, optimizers and adapters."""
    total = cfg.data.max_prompt_tokens + cfg.generation.max_response_tokens
    require(
        total <= cfg.model.context,
        f"data.max_prompt_tokens={cfg.data.max_prompt_tokens} and generation.max_response_tokens="
        f"{cfg.generation.max_response_tokens} make {total}, more than model.context={cfg.model.context}; lower one",
    )
    for name, optimizer in optimizers(cfg):
        require(len(optimizer.betas) == 2, f"{name}.betas={list(optimizer.betas)}: there must be two")
        for beta in optimizer.betas:
            require(0 <= beta < 1, f"{name}.betas={beta}: it must be from 0 up to but not 1")
    require(
        cfg.learner.lora.publish == "merged" or cfg.learner.lora.rank > 0,
        "learner.lora.publish=adapter, but learner.lora.rank=0 means that there are no adapters; set a rank",
    )
    require(
        cfg.learner.lora.publish == "merged" or cfg.learner.lora.rank <= 512,
        f"learner.lora.rank={cfg.learner.lora.rank}: vLLM adds adapters up to rank 512; publish=merged takes any",
    )
    smoothing = cfg.dpo.label_smoothing
    require(0 <= smoothing < 0.5, f"dpo.label_smoothing={smoothing}: it must be from 0 up to but not 0.5")
    require(
        not smoothing or cfg.dpo.loss == "dpo",
        f"dpo.label_smoothing={smoothing}, but dpo.loss={cfg.dpo.loss} has no such term; use 0",
    )


def _validate_data(cfg: RunConfig) -> None:
    require(
        not cfg.data.heldout_comparisons
        or (cfg.data.source == "files" and bool(cfg.data.comparisons) and not cfg.rm.ranking.labeler),
        f"data.heldout_comparisons={cfg.data.heldout_comparisons} goes with rankings of a file: give data=files and "
        "data.comparisons, and no rm.ranking.labeler",
    )
    require(
        cfg.data.source != "files" or not cfg.data.comparisons or not cfg.rm.ranking.labeler,
        f"data.comparisons={cfg.data.comparisons}, but rm.ranking.labeler={cfg.rm.ranking.labeler} has the policy's "
        "own samples ranked instead; set rm.ranking.labeler= (nothing) to learn from the file, or give none",
    )
    if cfg.data.source in ("hh", "oasst"):
        require(bool(cfg.data.path), f"data.path is empty; data={cfg.data.source} needs the file it reads")
    if cfg.data.source == "files":
        _validate_files(cfg)


def _validate_sft(cfg: RunConfig) -> None:
    require(
        cfg.model.source != "pretrained" or bool(cfg.model.path),
        "model.path is empty; name a Hugging Face directory or hub id, or model=smollm2_135m",
    )
    share = cfg.sft.pretraining_share
    require(
        not share or cfg.sft.texts_per_step > 0,
        f"sft.pretraining_share={share} of a step of {cfg.sft.batch_size} sequences is less than one; raise it or "
        "sft.batch_size",
    )
    if share:
        validate_text(cfg, f"sft.pretraining_share={share}")
    if cfg.sft.select == "reward":
        validate_reward(cfg)
    needs = [part.kind for part in cfg.reward.parts if part.kind == "model" and not (part.path or cfg.reward.path)]
    require(
        cfg.sft.select == "last" or not needs,
        "sft.select=reward, but reward.path is empty: this run's reward model is trained after SFT; name another's",
    )


def _validate_files(cfg: RunConfig) -> None:
    """Each stage reads from a file of the user's own."""
    ranked = "prompts" if cfg.rm.ranking.labeler else "comparisons"
    for stage, kind in (("sft", "demonstrations"), ("rm", ranked), ("dpo", ranked), ("ppo", "prompts")):
        require(
            stage not in cfg.stages or bool(getattr(cfg.data, kind)),
            f"data.{kind} is empty; stage {stage} needs that file with data.source=files",
        )
