"""Keys of the stages: supervised fine-tuning, reward model, DPO, PPO.

Where the paper gives a value the comment says it. It is the default, but for sizes and lengths, and for what the paper
adds to plain SFT and PPO: those are the recipes'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rlhf_cluster.config.bounds import at_least, count, fraction, not_negative, one_of, positive, share
from rlhf_cluster.config.workers import EngineConfig, OptimizerConfig, Resources

RAIL_ACTIONS = ("warn", "skip", "rollback", "stop")
GROUP_ADVANTAGES = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline")
ADVANTAGES = ("gae", "reinforce_plus_plus", *GROUP_ADVANTAGES)


@dataclass
class SFTConfig:
    """Stage 1, supervised fine-tuning (InstructGPT section 3.5, C.1)."""

    epochs: int = count(1)  # 16 in InstructGPT C.1, 2 in C.3
    batch_size: int = count(32)  # packed sequences of a step over all workers
    packing: bool = True  # several demonstrations share a sequence, attention kept apart
    dropout: float = fraction(0.0)  # on what each layer adds to the residual stream; 0.2 in InstructGPT C.1
    pretraining_share: float = fraction(0.0)  # of a step's loss, and of its sequences as near as whole ones allow, that
    # is text from data.pretraining; 0.1 in InstructGPT C.3
    select: str = one_of("last", "reward", default="last")  # last: the last epoch's policy goes on; reward: that of
    # the epoch whose samples score highest (InstructGPT C.1)
    select_prompts: int = count(64)  # of which there are samples then: held-out ones where no stage after SFT is judged
    # by them, else some that nobody demonstrated
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

    labeler: str = one_of("", "vader", "exact", "letters", default="")  # empty: comparisons come from data; vader:
    # the sentiment lexicon; exact: who knows the answer (data.answer_column); letters: for tests
    prompts: int = count(128)  # prompts whose samples are ranked
    responses: int = at_least(2, default=4)  # K, responses ranked per prompt
    tie_margin: float = not_negative(0.05)  # labeler scores closer than this are a tie


@dataclass
class RMConfig:
    """Stage 2, the reward model (InstructGPT section 3.5 eq. 1, C.2)."""

    epochs: int = count(1)
    batch_size: int = count(64)  # prompts (not pairs) of a step over all workers
    layers: int = not_negative(0)  # first layers of the policy's body that reward model and critic keep; 0: all
    # (InstructGPT's 6B reward model served policies of every size)
    share_prompts: bool = True  # responses to one prompt stand behind it in one row of up to model.context tokens, so
    # that it is computed once; equal up to rounding. Models with a sliding window or a state do without
    ranking: RankingConfig = field(default_factory=RankingConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6, schedule="cosine"))
    engine: EngineConfig = field(default_factory=EngineConfig)
    resources: Resources = field(default_factory=Resources)


@dataclass
class DPOConfig:
    """Learning from the comparisons without a reward model; the policy that it starts from is the reference."""

    loss: str = one_of("dpo", "ipo", "kto", default="dpo")
    beta: float = positive(0.1)  # how dear it is to leave the reference (Rafailov et al. 2023)
    label_smoothing: float = 0.0  # dpo: share of pairs taken to be ranked the wrong way round
    epochs: int = count(1)
    batch_size: int = count(64)  # prompts (not pairs) of a step over all workers
    share_prompts: bool = True  # responses to one prompt stand behind it in one row of up to model.context tokens, so
    # that it is computed once; equal up to rounding. Models with a sliding window or a state do without
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-6, betas=(0.9, 0.999), warmup_steps=10)
    )  # Rafailov et al. 2023, B: 1e-6, linear warm-up
    engine: EngineConfig = field(default_factory=EngineConfig)
    resources: Resources = field(default_factory=Resources)


@dataclass
class KLConfig:
    """The penalty for leaving the reference policy (InstructGPT eq. 2)."""

    kind: str = one_of("fixed", "adaptive", "none", default="fixed")  # adaptive: steers towards `target`; none: no
    # reference is started
    coef: float = not_negative(0.02)  # beta; 0.02 in InstructGPT C.4; adaptive: where it begins (or `loss_coef`)
    estimator: str = one_of("k1", "k2", "k3", default="k1")  # of the KL in the rewards; k1 is the papers'
    target: float = 6.0  # adaptive: nats per response; lm-human-preferences
    horizon: int = 10_000  # adaptive: responses over which it corrects itself; lm-human-preferences
    loss_coef: float = not_negative(0.0)  # of a KL term in the policy's loss, beside the penalty in the rewards
    loss_estimator: str = one_of("k2", "k3", default="k3")  # of that term


@dataclass
class AdvantageConfig:
    """How rewards become advantages. All but `gae` do without a critic: none is started."""

    kind: str = one_of(*ADVANTAGES, default="gae")
    gamma: float = share(1.0)  # InstructGPT C.4: no discount
    lam: float = share(0.95)  # gae; not in the paper: lm-human-preferences
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

    coef: float = not_negative(0.0)  # gamma; 27.8 in InstructGPT C.4; 0: plain PPO
    ratio: int = count(8)  # pretraining examples for each response of a minibatch; 8 in InstructGPT C.4
    tokens: int = not_negative(0)  # of an example; 0: model.context


@dataclass
class OffPolicyConfig:
    """What tokens count for in the policy's loss that another policy sampled than the one that the update starts from:
    by older weights, or with the sampler's own rounding. Ratios are those of the learner's probability to the
    sampler's."""

    weights: str = one_of("auto", "none", "token", "response", default="auto")  # each token's loss is multiplied by
    # its ratio, or by that of its whole response; auto: token where ppo.max_staleness is above 0, else none
    cap: float = positive(2.0)  # of a weight
    mask: str = one_of("none", "token", "response", "response_mean", default="none")  # what is left out whose ratio is
    # beyond the bounds: tokens; responses by their product of ratios, or by the geometric mean of them
    low: float = not_negative(0.5)  # bounds of `mask`; IcePop's, for tokens
    high: float = positive(5.0)


@dataclass
class RailConfig:
    """A limit and what is done beyond it."""

    limit: float = not_negative(0.0)  # 0: not watched
    action: str = one_of(*RAIL_ACTIONS, default="warn")  # skip the update, rollback to a checkpoint's policy, stop
    # the run

    @property
    def most(self) -> float:
        """Beyond which an optimizer step is not taken."""
        return self.limit if self.limit and self.action != "warn" else math.inf

    def withholds(self, value: float) -> bool:
        """Whether an optimizer step of this value is not to be taken."""
        return self.most < math.inf and not value <= self.most


@dataclass
class GuardrailsConfig:
    """What a run is kept within. The first four are looked at before an update, the others in it and after."""

    kl: RailConfig = field(default_factory=RailConfig)  # nats per response from the reference, at most
    entropy: RailConfig = field(default_factory=RailConfig)  # nats per token, at least
    length: RailConfig = field(default_factory=RailConfig)  # mean length as a factor of the first batch's, either way
    score: RailConfig = field(default_factory=RailConfig)  # mean score, in standard deviations of all scores so far
    # from their mean, either way
    clipfrac: RailConfig = field(default_factory=RailConfig)  # share of a minibatch's tokens that are clipped, at most
    grad_norm: RailConfig = field(default_factory=RailConfig)  # of an optimizer step, before clipping, at most. But for
    # warn, a step beyond one of these two is not taken
    max_skips: int = count(10)  # updates in a row that moved no weight, with which the run stops
    not_finite: str = one_of(*RAIL_ACTIONS, default="stop")  # a gradient that is NaN or infinite moves nothing, so warn
    # is skip here

    @property
    def rails(self) -> dict[str, RailConfig]:
        """All limits, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, RailConfig)}


@dataclass
class PPOConfig:
    """Stage 3, proximal policy optimization (InstructGPT section 3.5, C.4)."""

    steps: int = count(100)  # iterations; 500 in InstructGPT C.4
    batch_size: int = count(512)  # responses of an iteration
    samples_per_prompt: int = count(1)
    minibatch_size: int = count(64)  # responses of an optimizer step
    epochs: int = count(1)  # passes over the batch
    max_refill: int = not_negative(1)  # rounds in which new prompts take the places of samples that failed or were
    # filtered
    empty_wait_s: float = not_negative(300.0)  # how long an iteration, all of whose samples failed, tries more of them
    # before the run stops
    dynamic_sampling: bool = False  # a prompt whose responses all score alike is filtered (DAPO)
    loss_mean: str = one_of("token", "response", "constant", default="token")  # policy loss of a minibatch: token,
    # the mean over its tokens; response, over responses of the mean over their tokens (GRPO); constant, the sum by
    # responses x max_response_tokens (Dr. GRPO)
    ratio: str = one_of("token", "response", default="token")  # of probabilities, of each token or (GSPO) of each
    # response
    share_prompts: bool = True  # in the learner responses to one prompt stand behind it in one row of up to
    # model.context tokens, so that it is computed once; equal up to rounding
    clip: float = positive(0.2)  # ratio clip
    clip_high: float = not_negative(0.0)  # upper ratio clip, where it differs (DAPO: 0.28); 0: as `clip`
    dual_clip: float = 0.0  # bound of the ratio where the advantage is negative (Ye et al. 2020: 3); 0: none
    entropy_coef: float = not_negative(0.0)  # of an entropy bonus
    target_kl: float = not_negative(0.0)  # the batch's further minibatches are left out above this `actor/ppo_kl`; 0:
    # never
    critic_warmup: int = not_negative(0)  # first iterations in which the critic alone learns
    value_clip: float = not_negative(0.2)  # not in the paper: lm-human-preferences
    value_coef: float = positive(1.0)  # scales the value loss; policy and critic have their own optimizers
    missing_eos: str = one_of("subtract", "replace", default="subtract")  # of a response without EOS: subtract the
    # penalty from its score, or replace the score by -penalty
    missing_eos_penalty: float = not_negative(
        0.0
    )  # replace: above 0, or not to end would pay wherever scores are below
    score_norm: bool = False  # scores are brought to mean 0 and deviation 1 by those of all batches so far
    overlong_buffer: float = fraction(0.0)  # the last share of max_response_tokens, in which length costs more and more
    # (DAPO: 0.2); 0: none
    overlong_penalty: float = not_negative(1.0)  # what the longest response costs then
    score_clip: float = not_negative(0.0)  # scores are clipped to +-this, after `score_norm`; 0: not clipped
    ema_decay: float = fraction(0.0)  # of an average of the policy's weights over optimizer steps; 0.992 in InstructGPT
    # C.4; 0: none
    result: str = one_of("policy", "ema", default="policy")  # what is compared with the policy before, talked to and
    # exported
    max_staleness: int = not_negative(0)  # versions that a batch may be behind when the learner uses it
    save_every: int = not_negative(0)  # checkpoint every so many steps; 0: only at the end
    keep_checkpoints: int = not_negative(0)  # newest checkpoints that stay; 0: all
    kl: KLConfig = field(default_factory=KLConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    off_policy: OffPolicyConfig = field(default_factory=OffPolicyConfig)
    ptx: PTXConfig = field(default_factory=PTXConfig)
    guardrails: GuardrailsConfig = field(default_factory=GuardrailsConfig)

    @property
    def streams_gradients(self) -> bool:
        """Whether a group's gradient waits for nothing of the rest of the batch, so that the learner may compute it as
        the group arrives."""
        one_step = self.epochs == 1 and self.minibatch_size == self.batch_size
        own_scope = self.advantage.compares_groups and not (self.advantage.whiten or self.advantage.whiten_rewards)
        known = not (self.kl.coef or self.score_norm) and (self.kl.kind == "fixed" or not self.kl.loss_coef)
        return one_step and own_scope and known

    @property
    def off_policy_weights(self) -> str:
        """`off_policy.weights`, resolved."""
        if self.off_policy.weights != "auto":
            return self.off_policy.weights
        return "token" if self.max_staleness else "none"
