"""Keys of the workers: what they take, how they learn, and what each role of PPO is told.

Where the paper gives a value, that is the default and the comment says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_cluster.config.bounds import count, fraction, none_or_at_least, not_negative, one_of, positive

VERIFIERS, PENALTIES = ("math", "exact", "regex", "json_schema"), ("length", "repetition")
REWARD_KINDS = ("model", "random", "function", "http", *VERIFIERS, *PENALTIES)
COMPUTED_REWARDS = ("model", "random", *PENALTIES)  # by a scorer itself; the others ask somebody


@dataclass
class Resources:
    """What one worker of a role takes."""

    workers: int = count(1)  # how many
    num_cpus: float = positive(0.01)  # logical CPUs that Ray reserves (scheduling only)
    num_gpus: float = not_negative(0.0)  # GPUs that Ray reserves
    threads: int = count(1)  # threads that it computes with
    memory: int = not_negative(0)  # bytes that Ray reserves; 0 reserves none


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = positive(1e-5)  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # InstructGPT, appendix C
    eps: float = positive(1e-8)
    weight_decay: float = not_negative(0.0)
    schedule: str = one_of("constant", "cosine", "linear", default="constant")  # the last two down to `final_lr_ratio`
    final_lr_ratio: float = not_negative(0.1)  # cosine and linear end at this share of the peak (InstructGPT C.1, C.2)
    warmup_steps: int = not_negative(0)  # linear from a tenth of the peak (InstructGPT C.4)
    max_grad_norm: float = not_negative(1.0)


@dataclass
class EngineConfig:
    """DeepSpeed, for SFT, reward model and learner alike. Its JSON is derived from this."""

    zero_stage: int = one_of(0, 1, 2, 3, default=0)  # 0 with bfloat16 runs as 1, since DeepSpeed accumulates in
    # bfloat16 there
    tokens_per_micro_batch: int = count(4096)  # memory limit per worker: padded tokens of one forward
    offload_optimizer: bool = False  # optimizer state in CPU memory (GPU runs)
    activation_checkpointing: bool = False  # what layers computed is not kept for the backward pass but computed again:
    # a third more to compute, and long rows fit


@dataclass
class GenerationConfig:
    """The vLLM workers."""

    max_response_tokens: int = count(128)
    temperature: float = positive(1.0)  # InstructGPT C.4
    ignore_eos: bool = False  # sample exactly max_response_tokens (benchmarks)
    max_num_seqs: int = count(64)  # responses that one worker samples at once
    kv_cache_memory: int = none_or_at_least(
        1 << 20
    )  # bytes of keys and values that a worker keeps; 0: on a GPU what its share
    # has room for, else what max_num_seqs responses of the whole context take
    gpu_memory_share: float = fraction(
        0.9
    )  # that a worker's model, keys and values may take of what it reserved of its
    # GPU
    enforce_eager: bool = True  # no graph capture or compilation: quick to start
    tensor_parallel: int = count(1)  # processes of a worker that share each layer, one for each of its GPUs
    flush_ms: int = not_negative(50)  # what ended within this time leaves as one table
    resources: Resources = field(default_factory=Resources)


@dataclass
class RewardPart:
    """One part of the score: who gives it, and what it weighs."""

    kind: str = one_of(*REWARD_KINDS, default="model")  # random is a control: noise from the sample id; length is in
    # tokens, repetition the share of 3-grams said before: these two with a weight < 0
    name: str = ""  # in metrics, as reward/<name>; empty: the kind
    weight: float = 1.0
    path: str = ""  # model: a directory; empty: reward.path | function: FILE.py:NAME or package.module:NAME | http: URL
    column: str = "answer"  # math, exact, labels of a function: the prompts' column with the answer
    pattern: str = ""  # regex
    schema: str = ""  # json_schema: the file with it
    on_failure: str = one_of("", "drop", "neutral", "stop", default="")  # of a sample; neutral: reward.neutral_score;
    # empty: stop where the score is computed here (model, random, length, repetition), drop where somebody is asked


@dataclass
class RewardConfig:
    """The scoring pool: the score of a response is the weighted sum of its parts."""

    parts: list[RewardPart] = field(default_factory=lambda: [RewardPart()])
    path: str = ""  # for parts of kind model: a reward model's directory; empty: the one that stage 2 trained
    tokens_per_micro_batch: int = count(4096)
    batch_size: int = count(8)  # samples of one call of a function, verifier or server
    deadline_s: float = positive(10.0)  # for each sample of a call
    retries: int = not_negative(1)  # of a sample that failed, asked alone
    backoff_s: float = not_negative(0.5)  # before the first retry; doubles with each
    breaker_failures: int = count(16)  # samples in a row that failed, after which nothing is asked for
    # `breaker_s`
    breaker_s: float = positive(30.0)
    concurrency: int = count(4)  # http: requests at once of a worker
    token_env: str = ""  # http: the environment variable that holds a bearer token; empty: none is sent
    neutral_score: float = 0.0  # of a failed sample under on_failure=neutral
    resources: Resources = field(default_factory=Resources)


@dataclass
class ReferenceConfig:
    """The frozen reference policy."""

    path: str = ""  # empty: the policy that PPO starts from
    tokens_per_micro_batch: int = count(4096)
    resources: Resources = field(default_factory=Resources)


@dataclass
class LoRAConfig:
    """Low-rank adapters on all linear layers of policy and critic; the rest is frozen (Hu et al. 2021)."""

    rank: int = not_negative(0)  # 0: none, all weights learn
    alpha: float = positive(16.0)  # what they add is scaled by alpha / rank
    publish: str = one_of("merged", "adapter", default="merged")  # to generation: merged into full weights; adapter:
    # alone, and vLLM adds them as it samples


@dataclass
class LearnerConfig:
    """Policy and critic, one DeepSpeed engine each, on every rank."""

    policy: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6, warmup_steps=10))
    critic: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6, warmup_steps=10))
    packing: bool = False  # as many sequences in a row of up to engine.tokens_per_micro_batch tokens as it holds, so
    # that hardly anything is padding; without, rows of about a length are padded to the longest
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(zero_stage=2))
    resources: Resources = field(default_factory=Resources)
    min_workers: int = not_negative(0)  # ranks that it may go on with where there is no room for all; 0: all
    keep_state_every: int = not_negative(4)  # iterations between states that ranks begin anew from where one is lost,
    # which what came after is done again from; 0: none is kept, and the run ends with a rank


@dataclass
class WeightsConfig:
    """How published weights reach the generation workers."""

    transport: str = one_of("shm", "gloo", "nccl", "ipc", default="shm")  # shm: a file in shared memory of the store's
    # node, of which workers on other nodes fetch what changed | straight from the learner to all engines at once: gloo,
    # between processes anywhere; nccl, between GPUs; ipc, where learner and engine share a GPU (by vLLM's own engines)
    keep: int = count(2)  # versions kept in the store
    running: str = one_of("keep", "finish", "abort", default="keep")  # responses under way when weights come: keep,
    # they go on with the new ones; finish, they end with the old ones first; abort, they begin again
    kv: str = one_of("recompute", "keep", default="recompute")  # keys and values of what is sampled already: recompute
    # them with the new weights, or go on with those of the old ones (prompts that come again too)
    compare: bool = True  # what the workers' engines compute with, after each load; not where they are of unlike
    # hardware, on which the same weights have other digests
    probe_every: int = not_negative(10)  # publishes, until each worker says its logprobs of a response that the learner
    # has said its own of; 0: never
    probe_tolerance: float = positive(0.1)  # nats per token that they may differ by

    @property
    def is_direct(self) -> bool:
        """Whether the learner sends them to the engines itself."""
        return self.transport != "shm"
