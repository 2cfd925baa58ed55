"""What stage 3 refuses: batches that do not divide, terms without what they need, guardrails that could not act, scores
that nobody gives (which SFT may ask for too)."""

from __future__ import annotations

import re

from rlhf_cluster.config.refusal import ConfigError, require
from rlhf_cluster.config.tree import RunConfig, reward_budget_s
from rlhf_cluster.config.workers import COMPUTED_REWARDS


def validate_ppo(cfg: RunConfig) -> None:
    ppo = cfg.ppo
    require(
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
    require(
        ppo.minibatch_size % ranks == 0,
        f"learner.resources.workers={ranks} does not divide ppo.minibatch_size={ppo.minibatch_size}; use one of "
        f"{', '.join(str(n) for n in range(1, ppo.minibatch_size + 1) if ppo.minibatch_size % n == 0)}",
    )
    _validate_advantage(cfg)
    _validate_scores(cfg)
    _validate_guardrails(cfg)
    _validate_kl(cfg)
    if ppo.ptx.coef:
        validate_text(cfg, f"ppo.ptx.coef={ppo.ptx.coef}")
    parallel, gpus = cfg.generation.tensor_parallel, cfg.generation.resources.num_gpus
    require(
        parallel == 1 or not gpus or parallel == gpus,
        f"generation.tensor_parallel={parallel} differs from generation.resources.num_gpus={gpus:g}; make them equal",
    )
    _validate_transport(cfg)
    validate_reward(cfg)
    no_policy = (
        "sft" not in cfg.stages and not cfg.policy_path and cfg.model.source == "pretrained" and not cfg.model.path
    )
    require(not no_policy, "there is no policy to start from: set policy_path or model.path, or add sft to the stages")


def _validate_transport(cfg: RunConfig) -> None:
    transport, gpus = cfg.weights.transport, (cfg.learner.resources.num_gpus, cfg.generation.resources.num_gpus)
    require(
        transport == "shm" or not cfg.learner.lora.rank or cfg.learner.lora.publish == "merged",
        f"weights.transport={transport} sends whole weights, but learner.lora.publish=adapter; use merged, or "
        "weights.transport=shm",
    )
    told = f"learner.resources.num_gpus={gpus[0]:g} and generation.resources.num_gpus={gpus[1]:g}"
    require(
        transport != "nccl" or min(gpus) >= 1,
        f"weights.transport=nccl is between GPUs of the learner's and of generation's own, but {told}; give each a "
        "whole one, or use shm or gloo",
    )
    require(
        transport != "ipc" or (min(gpus) > 0 and max(gpus) < 1),
        f"weights.transport=ipc is for learner and generation on one GPU, but {told}; give each a share of it below 1, "
        "or use nccl, shm or gloo",
    )
    ranks = cfg.learner.resources.workers
    require(
        transport != "ipc" or not cfg.learner.lora.rank or ranks == 1,
        f"weights.transport=ipc has every rank of the learner share its weights, but merged adapters "
        f"(learner.lora.rank={cfg.learner.lora.rank}) are on the first of {ranks} alone; use "
        "learner.resources.workers=1, or nccl, shm or gloo",
    )


def _validate_advantage(cfg: RunConfig) -> None:
    ppo = cfg.ppo
    kind = ppo.advantage.kind
    require(
        not ppo.advantage.compares_groups or ppo.samples_per_prompt >= 2,
        f"ppo.samples_per_prompt={ppo.samples_per_prompt}, but ppo.advantage.kind={kind} compares the responses to a "
        "prompt with each other; use 2 or more",
    )
    require(
        not ppo.dynamic_sampling or ppo.advantage.compares_groups,
        f"ppo.dynamic_sampling=true, but ppo.advantage.kind={kind} compares no responses; use one that does, as grpo",
    )
    require(
        not ppo.dynamic_sampling or ppo.max_refill > 0,
        "ppo.dynamic_sampling=true, but ppo.max_refill=0 samples nothing anew; use 1 or more",
    )
    require(
        ppo.ratio == "token" or ppo.advantage.compares_groups,
        f"ppo.ratio={ppo.ratio}, but ppo.advantage.kind={kind} tells the tokens of a response apart, which one ratio "
        "for all of them undoes; use ppo.ratio=token, or an advantage that compares responses, as grpo",
    )
    require(
        ppo.advantage.gamma == 1 or not ppo.advantage.compares_groups,
        f"ppo.advantage.gamma={ppo.advantage.gamma}, but ppo.advantage.kind={kind} discounts nothing; use 1",
    )
    require(
        ppo.advantage.needs_critic or ppo.critic_warmup == 0,
        f"ppo.critic_warmup={ppo.critic_warmup}, but ppo.advantage.kind={kind} has no critic; use 0",
    )
    require(
        ppo.critic_warmup < ppo.steps,
        f"ppo.critic_warmup={ppo.critic_warmup} leaves none of ppo.steps={ppo.steps} to the policy; lower it",
    )
    require(
        cfg.weights.kv == "recompute" or cfg.weights.running == "keep",
        f"weights.kv={cfg.weights.kv}, but weights.running={cfg.weights.running} leaves no response to keep it for; "
        "use weights.kv=recompute",
    )
    off_policy = ppo.off_policy
    require(
        off_policy.low < off_policy.high,
        f"ppo.off_policy.low={off_policy.low:g}, high={off_policy.high:g}: low must be below high",
    )
    require(
        ppo.result == "policy" or ppo.ema_decay > 0,
        f"ppo.result={ppo.result}, but ppo.ema_decay={ppo.ema_decay} keeps no average; use a decay as 0.992",
    )
    require(
        ppo.result == "policy" or not cfg.evaluation.every or not ppo.max_staleness,
        f"evaluation.every={cfg.evaluation.every} samples from the average (ppo.result={ppo.result}), and with "
        f"ppo.max_staleness={ppo.max_staleness} batches would be sampled from it too; set one of them to 0",
    )


def _validate_scores(cfg: RunConfig) -> None:
    """What becomes of scores before they are rewards."""
    ppo = cfg.ppo
    replaced, penalty = ppo.missing_eos == "replace", ppo.missing_eos_penalty
    require(
        not replaced or penalty > 0,
        f"ppo.missing_eos=replace, but ppo.missing_eos_penalty={penalty:g}: a response that scores below 0 would gain "
        "by not ending; use a penalty as 1",
    )
    require(
        not cfg.generation.ignore_eos or not (replaced or penalty),
        f"generation.ignore_eos=true: no response ends, so ppo.missing_eos_penalty={penalty:g} would fall on all "
        "alike; use ppo.missing_eos=subtract and 0",
    )


def _validate_kl(cfg: RunConfig) -> None:
    kl = cfg.ppo.kl
    if kl.kind == "adaptive":
        for key, number in (("target", kl.target), ("horizon", kl.horizon)):
            require(number > 0, f"ppo.kl.{key}={number}: with ppo.kl.kind=adaptive it must be above 0")
        require(
            (kl.coef > 0) != (kl.loss_coef > 0),
            f"ppo.kl.coef={kl.coef}, ppo.kl.loss_coef={kl.loss_coef}: ppo.kl.kind=adaptive steers one coefficient; set "
            "one of the two above 0",
        )
        require(
            kl.horizon > 0.2 * cfg.ppo.batch_size,
            f"ppo.kl.horizon={kl.horizon}: one batch of {cfg.ppo.batch_size} could turn the coefficient negative; use "
            f"more than {0.2 * cfg.ppo.batch_size:g}",
        )
    if kl.kind == "none":
        for key, number in (("coef", kl.coef), ("loss_coef", kl.loss_coef)):
            require(number == 0, f"ppo.kl.{key}={number}, but ppo.kl.kind=none starts no reference; use kl=fixed, or 0")
    require(
        cfg.ppo.dual_clip == 0 or cfg.ppo.dual_clip > 1,
        f"ppo.dual_clip={cfg.ppo.dual_clip}: it must be above 1, or 0 for none",
    )


def validate_text(cfg: RunConfig, asks: str) -> None:
    """There is text for what `asks` to mix it in, in blocks that can be learnt from."""
    ptx = cfg.ppo.ptx
    require(bool(cfg.data.pretraining), f"{asks}, but data.pretraining is empty; name a file of text")
    require(
        ptx.tokens <= cfg.model.context,
        f"ppo.ptx.tokens={ptx.tokens} is more than model.context={cfg.model.context}; lower it",
    )
    require(ptx.tokens != 1, "ppo.ptx.tokens=1: an example of one token has nothing to predict; use 2 or more")


def _validate_guardrails(cfg: RunConfig) -> None:
    rails = cfg.ppo.guardrails
    for name, rail in rails.rails.items():
        require(
            rail.limit > 0 or rail.action == "warn",
            f"ppo.guardrails.{name}.action={rail.action}, but its limit is 0, which watches nothing; set "
            f"ppo.guardrails.{name}.limit",
        )
        if rail.limit and rail.action == "rollback":
            _validate_rollback(cfg, name)
    require(
        not rails.length.limit or rails.length.limit > 1,
        f"ppo.guardrails.length.limit={rails.length.limit}: a factor above 1, or 0 for none",
    )
    require(
        not rails.kl.limit or cfg.ppo.kl.kind != "none",
        f"ppo.guardrails.kl.limit={rails.kl.limit}, but ppo.kl.kind=none starts no reference; use kl=fixed, or 0",
    )


def _validate_rollback(cfg: RunConfig, name: str) -> None:
    """A checkpoint of a policy before the one that the rail `name` judges is kept: what was seen in samples is true of
    the policy that sampled them."""
    key = f"ppo.guardrails.{name}"
    save_every, kept, staleness = cfg.ppo.save_every, cfg.ppo.keep_checkpoints, cfg.ppo.max_staleness
    require(
        save_every > 0, f"{key}.action=rollback, but ppo.save_every=0 leaves no checkpoint to go back to; save some"
    )
    require(
        name not in ("kl", "entropy", "length") or not kept or (kept - 1) * save_every > staleness,
        f"{key}.action=rollback judges a policy by its samples, and of ppo.keep_checkpoints={kept}, "
        f"ppo.save_every={save_every}: with ppo.max_staleness={staleness} the policy before it may be gone; keep more: "
        f"ppo.keep_checkpoints={staleness // save_every + 2}",
    )


def validate_reward(cfg: RunConfig) -> None:
    """Each part has what its kind needs. Whether it can be loaded is seen where it is loaded (`inputs`)."""
    reward = cfg.reward
    require(bool(reward.parts), "reward.parts is empty; name at least one, as reward.parts=[{kind: model}]")
    needs = {"function": "path", "http": "path", "math": "column", "exact": "column"}
    needs |= {"regex": "pattern", "json_schema": "schema"}
    for index, part in enumerate(reward.parts):
        key = f"reward.parts[{index}]"
        require(
            re.fullmatch(r"[\w.-]*", part.name) is not None, f"{key}.name={part.name}: only letters, digits, ., _ and -"
        )
        if need := needs.get(part.kind):
            require(bool(getattr(part, need)), f"{key}.{need} is empty; a part of kind {part.kind} needs it")
        if part.kind == "regex":
            fault = _fault_of_pattern(part.pattern)
            require(not fault, f"{key}.pattern={part.pattern}: it is no regular expression of Python's re: {fault}")
        if part.kind == "http":
            require(
                re.fullmatch(r"https?://[^\s/]+(/\S*)?", part.path) is not None,
                f"{key}.path={part.path}: it must be http://HOST:PORT/PATH or https://...",
            )
        if part.kind == "model":
            found = part.path or reward.path or "rm" in cfg.stages
            require(bool(found), "reward.path is empty and rm is not among the stages: name a reward model's directory")
    budget = reward_budget_s(cfg)
    require(
        reward.deadline_s <= budget or all(part.kind in COMPUTED_REWARDS for part in reward.parts),
        f"reward.deadline_s={reward.deadline_s:g}: a part has {budget:g} s for all samples that come at once "
        f"(cluster.call_timeout_s={cfg.cluster.call_timeout_s:g}, a quarter of it shared among the parts); take less, "
        "or raise cluster.call_timeout_s",
    )


def _fault_of_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return ""
