"""What is refused before anything starts, each with one sentence that has the offending numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rlhf_cluster.config.tree import (
    ADVANTAGES,
    COMPUTED_REWARDS,
    RAIL_ACTIONS,
    REWARD_KINDS,
    STAGES,
    ConfigError,
    RunConfig,
    leaves,
    optimizers,
    reward_budget_s,
    roles,
)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    _require(value in allowed, f"{key}={value}: it must be one of {', '.join(name or 'nothing' for name in allowed)}")


def validate(cfg: RunConfig) -> RunConfig:
    """Refuses what cannot run, with the offending numbers. Returns `cfg`."""
    for key, value in leaves(cfg):
        _require(not isinstance(value, float) or math.isfinite(value), f"{key}={value}: it must be a finite number")
    _validate_choices(cfg)
    _validate_roles(cfg)
    _validate_ranges(cfg)
    _validate_numbers(cfg)
    _validate_stages(cfg)
    if "ppo" in cfg.stages:
        _validate_ppo(cfg)
    return cfg


def _validate_choices(cfg: RunConfig) -> None:
    _one_of("model.source", cfg.model.source, ("pretrained", "smollm2_135m", "tiny"))
    _one_of("model.dtype", cfg.model.dtype, ("auto", "float32", "bfloat16"))
    _one_of("model.attention", cfg.model.attention, ("auto", "eager", "sdpa"))
    _one_of("data.source", cfg.data.source, ("files", "sentiment", "hh", "oasst"))
    _one_of("rm.ranking.labeler", cfg.rm.ranking.labeler, ("", "vader", "exact", "letters"))
    _one_of("evaluation.gold", cfg.evaluation.gold, ("", "vader", "exact", "letters"))
    _one_of("ppo.kl.kind", cfg.ppo.kl.kind, ("fixed", "adaptive", "none"))
    _one_of("ppo.kl.estimator", cfg.ppo.kl.estimator, ("k1", "k2", "k3"))
    _one_of("ppo.kl.loss_estimator", cfg.ppo.kl.loss_estimator, ("k2", "k3"))
    _one_of("sft.select", cfg.sft.select, ("last", "reward"))
    _one_of("dpo.loss", cfg.dpo.loss, ("dpo", "ipo", "kto"))
    _one_of("ppo.advantage.kind", cfg.ppo.advantage.kind, ADVANTAGES)
    _one_of("ppo.loss_mean", cfg.ppo.loss_mean, ("token", "response", "constant"))
    _one_of("ppo.ratio", cfg.ppo.ratio, ("token", "response"))
    _one_of("ppo.result", cfg.ppo.result, ("policy", "ema"))
    _one_of("ppo.missing_eos", cfg.ppo.missing_eos, ("subtract", "replace"))
    _one_of("weights.transport", cfg.weights.transport, ("shm",))
    _one_of("resume", cfg.resume, ("auto", "never"))
    for name, optimizer in optimizers(cfg):
        _one_of(f"{name}.schedule", optimizer.schedule, ("constant", "cosine", "linear"))
    for stage in cfg.stages:
        _one_of("stages", stage, STAGES)


def _validate_roles(cfg: RunConfig) -> None:
    """What workers take, and how they learn."""
    for name, resources in roles(cfg).items():
        _require(resources.workers >= 1, f"{name}.resources.workers={resources.workers}: at least 1 is needed")
        _require(resources.threads >= 1, f"{name}.resources.threads={resources.threads}: at least 1 is needed")
        _require(resources.num_gpus >= 0, f"{name}.resources.num_gpus={resources.num_gpus}: it must not be negative")
        _require(resources.memory >= 0, f"{name}.resources.memory={resources.memory}: bytes, or 0 to reserve none")
        _require(resources.num_cpus > 0, f"{name}.resources.num_cpus={resources.num_cpus}: it must be above 0, as 0.01")
    for name, engine in (
        ("sft", cfg.sft.engine),
        ("rm", cfg.rm.engine),
        ("dpo", cfg.dpo.engine),
        ("learner", cfg.learner.engine),
    ):
        _require(0 <= engine.zero_stage <= 3, f"{name}.engine.zero_stage={engine.zero_stage}: it must be 0, 1, 2 or 3")
    for name, optimizer in optimizers(cfg):
        for key in ("lr", "eps"):
            _require(getattr(optimizer, key) > 0, f"{name}.{key}={getattr(optimizer, key)}: it must be above 0")
        for key in ("warmup_steps", "weight_decay", "max_grad_norm", "final_lr_ratio"):
            number = getattr(optimizer, key)
            _require(number >= 0, f"{name}.{key}={number}: it must not be negative")


def _validate_ranges(cfg: RunConfig) -> None:
    at_least_1 = (
        ("model.context", cfg.model.context),
        ("sft.epochs", cfg.sft.epochs),
        ("sft.batch_size", cfg.sft.batch_size),
        ("rm.epochs", cfg.rm.epochs),
        ("rm.batch_size", cfg.rm.batch_size),
        ("dpo.epochs", cfg.dpo.epochs),
        ("dpo.batch_size", cfg.dpo.batch_size),
        ("ppo.steps", cfg.ppo.steps),
        ("ppo.batch_size", cfg.ppo.batch_size),
        ("ppo.minibatch_size", cfg.ppo.minibatch_size),
        ("ppo.samples_per_prompt", cfg.ppo.samples_per_prompt),
        ("ppo.epochs", cfg.ppo.epochs),
        ("ppo.ptx.ratio", cfg.ppo.ptx.ratio),
        ("generation.max_response_tokens", cfg.generation.max_response_tokens),
        ("generation.max_num_seqs", cfg.generation.max_num_seqs),
        ("generation.tensor_parallel", cfg.generation.tensor_parallel),
        ("data.max_prompt_tokens", cfg.data.max_prompt_tokens),
        ("evaluation.samples_per_prompt", cfg.evaluation.samples_per_prompt),
        ("rm.ranking.prompts", cfg.rm.ranking.prompts),
        ("weights.keep", cfg.weights.keep),
    )
    shares = (
        ("ppo.advantage.gamma", cfg.ppo.advantage.gamma),
        ("ppo.advantage.lam", cfg.ppo.advantage.lam),
        *((f"{name}.betas", beta) for name, optimizer in optimizers(cfg) for beta in optimizer.betas),
    )
    not_negative = (
        ("evaluation.every", cfg.evaluation.every),
        ("ppo.kl.coef", cfg.ppo.kl.coef),
        ("ppo.kl.loss_coef", cfg.ppo.kl.loss_coef),
        ("ppo.clip", cfg.ppo.clip),
        ("ppo.clip_high", cfg.ppo.clip_high),
        ("ppo.entropy_coef", cfg.ppo.entropy_coef),
        ("ppo.ptx.coef", cfg.ppo.ptx.coef),
        ("ppo.ptx.tokens", cfg.ppo.ptx.tokens),
        ("ppo.target_kl", cfg.ppo.target_kl),
        ("ppo.critic_warmup", cfg.ppo.critic_warmup),
        ("ppo.value_clip", cfg.ppo.value_clip),
        ("ppo.score_clip", cfg.ppo.score_clip),
        ("ppo.missing_eos_penalty", cfg.ppo.missing_eos_penalty),
        ("ppo.overlong_penalty", cfg.ppo.overlong_penalty),
        ("ppo.overlong_buffer", cfg.ppo.overlong_buffer),
        ("ppo.max_refill", cfg.ppo.max_refill),
        ("learner.lora.rank", cfg.learner.lora.rank),
        ("rm.ranking.tie_margin", cfg.rm.ranking.tie_margin),
        ("rm.layers", cfg.rm.layers),
        ("ppo.save_every", cfg.ppo.save_every),
        ("data.heldout_prompts", cfg.data.heldout_prompts),
        ("data.max_prompts", cfg.data.max_prompts),
        ("data.max_demonstrations", cfg.data.max_demonstrations),
        ("data.max_comparisons", cfg.data.max_comparisons),
        ("ppo.keep_checkpoints", cfg.ppo.keep_checkpoints),
    )
    for numbers, low, high, words in (
        (at_least_1, 1, math.inf, "be at least 1"),
        (shares, 0, 1, "be between 0 and 1"),
        (not_negative, 0, math.inf, "not be negative"),
    ):
        for key, number in numbers:
            _require(low <= number <= high, f"{key}={number}: it must {words}")


def _validate_numbers(cfg: RunConfig) -> None:
    """What has bounds of its own."""
    for name, optimizer in optimizers(cfg):
        _require(len(optimizer.betas) == 2, f"{name}.betas={list(optimizer.betas)}: there must be two")
    for name, share in (("dropout", cfg.sft.dropout), ("pretraining_share", cfg.sft.pretraining_share)):
        _require(0 <= share < 1, f"sft.{name}={share}: it must be from 0 up to but not 1")
    alpha = cfg.learner.lora.alpha
    _require(alpha > 0, f"learner.lora.alpha={alpha}: it must be above 0")
    _one_of("learner.lora.publish", cfg.learner.lora.publish, ("merged", "adapter"))
    _require(
        cfg.learner.lora.publish == "merged" or cfg.learner.lora.rank > 0,
        "learner.lora.publish=adapter, but learner.lora.rank=0 means that there are no adapters; set a rank",
    )
    _require(
        cfg.learner.lora.publish == "merged" or cfg.learner.lora.rank <= 512,
        f"learner.lora.rank={cfg.learner.lora.rank}: vLLM adds adapters up to rank 512; publish=merged takes any",
    )
    _require(cfg.dpo.beta > 0, f"dpo.beta={cfg.dpo.beta}: it must be above 0")
    smoothing = cfg.dpo.label_smoothing
    _require(0 <= smoothing < 0.5, f"dpo.label_smoothing={smoothing}: it must be from 0 up to but not 0.5")
    _require(0 <= cfg.ppo.ema_decay < 1, f"ppo.ema_decay={cfg.ppo.ema_decay}: it must be from 0 up to but not 1")
    fraction = cfg.data.heldout_fraction
    _require(0 <= fraction < 1, f"data.heldout_fraction={fraction}: it must be from 0 up to but not 1")
    _require(
        not cfg.data.heldout_comparisons
        or (cfg.data.source == "files" and bool(cfg.data.comparisons) and not cfg.rm.ranking.labeler),
        f"data.heldout_comparisons={cfg.data.heldout_comparisons} goes with rankings of a file: give data=files and "
        "data.comparisons, and no rm.ranking.labeler",
    )
    _require(0 <= cfg.seed < 1 << 32, f"seed={cfg.seed}: it must be from 0 to {(1 << 32) - 1}")
    least = 1 << 20
    _require(
        cfg.generation.kv_cache_memory >= least,
        f"generation.kv_cache_memory={cfg.generation.kv_cache_memory}: bytes, at least {least}",
    )
    for key, seconds in (
        ("start_timeout_s", cfg.cluster.start_timeout_s),
        ("call_timeout_s", cfg.cluster.call_timeout_s),
    ):
        _require(seconds > 0, f"cluster.{key}={seconds}: it must be above 0")
    _require(cfg.generation.temperature > 0, f"generation.temperature={cfg.generation.temperature}: it must be above 0")
    _require(cfg.ppo.max_staleness >= 0, f"ppo.max_staleness={cfg.ppo.max_staleness}: it must be 0 or more")


def _validate_stages(cfg: RunConfig) -> None:
    named = re.fullmatch(r"[\w-][\w.-]*", cfg.name) is not None
    _require(len(cfg.name) <= 100, f"name={cfg.name[:20]}...: {len(cfg.name)} letters; at most 100")
    _require(named, f"name={cfg.name}: only letters, digits, ., _ and -, and no . at the beginning")
    _require(
        re.fullmatch(r"local|auto|(ray://)?[\w.\-\[\]:]+:\d+", cfg.cluster.address) is not None,
        f"cluster.address={cfg.cluster.address}: it must be local, auto or HOST:PORT",
    )
    _require(bool(cfg.stages), f"stages is empty; it must name at least one of {', '.join(STAGES)}")
    order = [STAGES.index(stage) for stage in cfg.stages]
    _require(order == sorted(set(order)), f"stages={cfg.stages}: each at most once, in the order {', '.join(STAGES)}")
    total = cfg.data.max_prompt_tokens + cfg.generation.max_response_tokens
    _require(
        total <= cfg.model.context,
        f"data.max_prompt_tokens={cfg.data.max_prompt_tokens} and generation.max_response_tokens="
        f"{cfg.generation.max_response_tokens} make {total}, more than model.context={cfg.model.context}; lower one",
    )
    if cfg.model.source == "pretrained" and "sft" in cfg.stages:
        _require(
            bool(cfg.model.path), "model.path is empty; name a Hugging Face directory or hub id, or model=smollm2_135m"
        )
    if "sft" in cfg.stages:
        _validate_sft(cfg)
    if cfg.data.source in ("hh", "oasst"):
        _require(bool(cfg.data.path), f"data.path is empty; data={cfg.data.source} needs the file it reads")
    if cfg.data.source == "files":
        _validate_files(cfg)
    _require(
        cfg.rm.ranking.responses >= 2, f"rm.ranking.responses={cfg.rm.ranking.responses}: a ranking needs 2 or more"
    )


def _validate_sft(cfg: RunConfig) -> None:
    share = cfg.sft.pretraining_share
    _require(
        not share or bool(cfg.data.pretraining),
        f"sft.pretraining_share={share}, but data.pretraining is empty; name a file of text",
    )
    _require(
        not share or cfg.sft.texts_per_step > 0,
        f"sft.pretraining_share={share} of a step of {cfg.sft.batch_size} sequences is less than one; raise it or "
        "sft.batch_size",
    )
    if cfg.sft.select == "reward":
        _validate_reward(cfg)
    needs = [part.kind for part in cfg.reward.parts if part.kind == "model" and not (part.path or cfg.reward.path)]
    _require(
        cfg.sft.select == "last" or not needs,
        "sft.select=reward, but reward.path is empty: this run's reward model is trained after SFT; name another's",
    )


def _validate_files(cfg: RunConfig) -> None:
    """Each stage reads from a file of the user's own."""
    ranked = "prompts" if cfg.rm.ranking.labeler else "comparisons"
    for stage, kind in (("sft", "demonstrations"), ("rm", ranked), ("dpo", ranked), ("ppo", "prompts")):
        _require(
            stage not in cfg.stages or bool(getattr(cfg.data, kind)),
            f"data.{kind} is empty; stage {stage} needs that file with data.source=files",
        )


def _validate_kl(cfg: RunConfig) -> None:
    kl = cfg.ppo.kl
    if kl.kind == "adaptive":
        for key, number in (("coef", kl.coef), ("target", kl.target), ("horizon", kl.horizon)):
            _require(number > 0, f"ppo.kl.{key}={number}: with ppo.kl.kind=adaptive it must be above 0")
        _require(
            kl.horizon > 0.2 * cfg.ppo.batch_size,
            f"ppo.kl.horizon={kl.horizon}: one batch of {cfg.ppo.batch_size} could turn the coefficient negative; use "
            f"more than {0.2 * cfg.ppo.batch_size:g}",
        )
    if kl.kind == "none":
        for key, number in (("coef", kl.coef), ("loss_coef", kl.loss_coef)):
            _require(
                number == 0, f"ppo.kl.{key}={number}, but ppo.kl.kind=none starts no reference; use kl=fixed, or 0"
            )
    _require(
        cfg.ppo.dual_clip == 0 or cfg.ppo.dual_clip > 1,
        f"ppo.dual_clip={cfg.ppo.dual_clip}: it must be above 1, or 0 for none",
    )
    _require(cfg.ppo.clip > 0, f"ppo.clip={cfg.ppo.clip}: it must be above 0, or nothing can be learnt")


def _validate_ptx(cfg: RunConfig) -> None:
    ptx = cfg.ppo.ptx
    _require(
        ptx.coef == 0 or bool(cfg.data.pretraining),
        f"ppo.ptx.coef={ptx.coef}, but data.pretraining is empty; name a file of text",
    )
    _require(
        ptx.tokens <= cfg.model.context,
        f"ppo.ptx.tokens={ptx.tokens} is more than model.context={cfg.model.context}; lower it",
    )
    _require(ptx.tokens != 1, "ppo.ptx.tokens=1: an example of one token has nothing to predict; use 2 or more")


def _validate_guardrails(cfg: RunConfig) -> None:
    rails = cfg.ppo.guardrails
    _one_of("ppo.guardrails.not_finite", rails.not_finite, ("skip", "stop"))
    _require(rails.max_skips >= 1, f"ppo.guardrails.max_skips={rails.max_skips}: it must be at least 1")
    for name, rail in rails.rails.items():
        key = f"ppo.guardrails.{name}"
        after = name == "clipfrac"  # the update has been made by then
        of_samples = name in ("kl", "entropy", "length")
        _one_of(f"{key}.action", rail.action, ("warn", "rollback", "stop") if after else RAIL_ACTIONS)
        _require(rail.limit >= 0, f"{key}.limit={rail.limit}: it must not be negative; 0 watches nothing")
        _require(
            rail.action != "rollback" or not rail.limit or cfg.ppo.save_every > 0,
            f"{key}.action=rollback, but ppo.save_every=0 leaves no checkpoint to go back to; save some",
        )
        _require(
            rail.action != "rollback" or not rail.limit or not of_samples or cfg.ppo.keep_checkpoints != 1,
            f"{key}.action=rollback looks at samples of a policy that may be the last checkpoint; keep the one before "
            "too: ppo.keep_checkpoints=2",
        )
    _require(
        not rails.length.limit or rails.length.limit > 1,
        f"ppo.guardrails.length.limit={rails.length.limit}: a factor above 1, or 0 for none",
    )
    _require(
        not rails.kl.limit or cfg.ppo.kl.kind != "none",
        f"ppo.guardrails.kl.limit={rails.kl.limit}, but ppo.kl.kind=none starts no reference; use kl=fixed, or 0",
    )


def _validate_advantage(cfg: RunConfig) -> None:
    ppo = cfg.ppo
    kind = ppo.advantage.kind
    _require(
        not ppo.advantage.compares_groups or ppo.samples_per_prompt >= 2,
        f"ppo.samples_per_prompt={ppo.samples_per_prompt}, but ppo.advantage.kind={kind} compares the responses to a "
        "prompt with each other; use 2 or more",
    )
    _require(
        not ppo.dynamic_sampling or ppo.advantage.compares_groups,
        f"ppo.dynamic_sampling=true, but ppo.advantage.kind={kind} compares no responses; use one that does, as grpo",
    )
    _require(
        ppo.advantage.needs_critic or ppo.critic_warmup == 0,
        f"ppo.critic_warmup={ppo.critic_warmup}, but ppo.advantage.kind={kind} has no critic; use 0",
    )
    _require(
        ppo.critic_warmup < ppo.steps,
        f"ppo.critic_warmup={ppo.critic_warmup} leaves none of ppo.steps={ppo.steps} to the policy; lower it",
    )
    longest = cfg.generation.max_response_tokens
    _require(
        ppo.overlong_buffer <= longest,
        f"ppo.overlong_buffer={ppo.overlong_buffer} is more than generation.max_response_tokens={longest}; lower it",
    )
    _require(
        ppo.result == "policy" or ppo.ema_decay > 0,
        f"ppo.result={ppo.result}, but ppo.ema_decay={ppo.ema_decay} keeps no average; use a decay as 0.992",
    )


def _validate_reward(cfg: RunConfig) -> None:
    """Each part has what its kind needs. Whether it can be loaded is seen where it is loaded (`inputs`)."""
    reward = cfg.reward
    _require(bool(reward.parts), "reward.parts is empty; name at least one, as reward.parts=[{kind: model}]")
    needs = {"function": "path", "http": "path", "math": "column", "exact": "column"}
    needs |= {"regex": "pattern", "json_schema": "schema"}
    for index, part in enumerate(reward.parts):
        key = f"reward.parts[{index}]"
        _one_of(f"{key}.kind", part.kind, REWARD_KINDS)
        _one_of(f"{key}.on_failure", part.on_failure, ("", "drop", "neutral", "stop"))
        _require(math.isfinite(part.weight), f"{key}.weight={part.weight}: it must be a finite number")
        _require(
            re.fullmatch(r"[\w.-]*", part.name) is not None, f"{key}.name={part.name}: only letters, digits, ., _ and -"
        )
        if need := needs.get(part.kind):
            _require(bool(getattr(part, need)), f"{key}.{need} is empty; a part of kind {part.kind} needs it")
        if part.kind == "http":
            _require(
                re.fullmatch(r"https?://[^\s/]+(/\S*)?", part.path) is not None,
                f"{key}.path={part.path}: it must be http://HOST:PORT/PATH or https://...",
            )
        if part.kind == "model":
            found = part.path or reward.path or "rm" in cfg.stages
            _require(
                bool(found), "reward.path is empty and rm is not among the stages: name a reward model's directory"
            )
    for name, number in (("deadline_s", reward.deadline_s), ("breaker_s", reward.breaker_s)):
        _require(number > 0, f"reward.{name}={number}: it must be above 0")
    budget = reward_budget_s(cfg)
    _require(
        reward.deadline_s <= budget or all(part.kind in COMPUTED_REWARDS for part in reward.parts),
        f"reward.deadline_s={reward.deadline_s:g}: a part has {budget:g} s for all samples that come at once "
        f"(cluster.call_timeout_s={cfg.cluster.call_timeout_s:g}, a quarter of it shared among the parts); take less, "
        "or raise cluster.call_timeout_s",
    )
    for name in ("batch_size", "concurrency", "breaker_failures"):
        _require(getattr(reward, name) >= 1, f"reward.{name}={getattr(reward, name)}: it must be at least 1")
    for name in ("retries", "backoff_s"):
        _require(getattr(reward, name) >= 0, f"reward.{name}={getattr(reward, name)}: it must not be negative")


def _validate_ppo(cfg: RunConfig) -> None:
    ppo = cfg.ppo
    _require(
        ppo.batch_size % ppo.samples_per_prompt == 0,
        f"ppo.samples_per_prompt={ppo.samples_per_prompt} does not divide ppo.batch_size={ppo.batch_size}",
    )
    if ppo.batch_size % ppo.minibatch_size:
        fits = [n for n in range(1, ppo.batch_size + 1) if ppo.batch_size % n == 0]
        below = max(n for n in fits if n <= ppo.minibatch_size)
        above = min(n for n in fits if n >= min(ppo.minibatch_size, ppo.batch_size))
        choice = f"{below} or {above}" if below != above else f"{below}"
        raise ConfigError(
            f"ppo.minibatch_size={ppo.minibatch_size} does not divide ppo.batch_size={ppo.batch_size}; use {choice}"
        )
    ranks = cfg.learner.resources.workers
    _require(
        ppo.minibatch_size % ranks == 0,
        f"learner.resources.workers={ranks} does not divide ppo.minibatch_size={ppo.minibatch_size}; use one of "
        f"{', '.join(str(n) for n in range(1, ppo.minibatch_size + 1) if ppo.minibatch_size % n == 0)}",
    )
    _validate_advantage(cfg)
    _validate_guardrails(cfg)
    _validate_kl(cfg)
    _validate_ptx(cfg)
    parallel, gpus = cfg.generation.tensor_parallel, cfg.generation.resources.num_gpus
    _require(
        parallel == 1 or not gpus or parallel == gpus,
        f"generation.tensor_parallel={parallel} differs from generation.resources.num_gpus={gpus:g}; make them equal",
    )
    _validate_reward(cfg)
    no_policy = (
        "sft" not in cfg.stages and not cfg.policy_path and cfg.model.source == "pretrained" and not cfg.model.path
    )
    _require(not no_policy, "there is no policy to start from: set policy_path or model.path, or add sft to the stages")
