"""One learner rank: the verbs of `rooms.Learner`, each entered by all ranks together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from rlhf_cluster.config import GenerationConfig, LearnerConfig, ModelConfig, PPOConfig
from rlhf_cluster.engine.ranks import Ranks, join_ranks
from rlhf_cluster.engine.schedule import learning_rate
from rlhf_cluster.learner.experience import EvaluatedRow, evaluated_rows, make_experience
from rlhf_cluster.learner.gradient import PolicyGradient
from rlhf_cluster.learner.mix import PretrainingMix
from rlhf_cluster.learner.models import ActorCritic, Published
from rlhf_cluster.learner.plan import BatchPlan, plan_batch
from rlhf_cluster.learner.state import load_state, save_state
from rlhf_cluster.learner.statistics import seconds_by_part
from rlhf_cluster.learner.stream import GradientStream
from rlhf_cluster.learner.update import StepRates, Updater
from rlhf_cluster.models.load import save_policy
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.records import Controls, Pretraining, ScoredRollouts, UpdateStats
from rlhf_cluster.weights.probe import Probe
from rlhf_cluster.weights.sender import Engines, Rendezvous, Sender
from rlhf_cluster.weights.snapshot import Slot, Snapshot, stream_snapshot

PROBE_TOKENS = 64  # prompt and response: long enough to tell policies apart, and quickly computed


class LearnerError(RuntimeError):
    """A verb called out of turn."""


@dataclass
class OpenBatch:
    """A batch between `begin` and `update` on this rank."""

    plan: BatchPlan
    gradient: PolicyGradient
    rows: dict[str, EvaluatedRow] = field(default_factory=dict)
    waiting: list[ScoredRollouts] = field(default_factory=list)  # to be evaluated
    waiting_tokens: int = 0  # of their prompts and responses
    taken: list[ScoredRollouts] = field(default_factory=list)  # of which `rows` were made
    seconds: float = 0.0  # spent on evaluation

    def keep(self, rows: ScoredRollouts) -> None:
        self.waiting.append(rows)
        self.waiting_tokens += sum(map(len, rows.prompt_ids)) + sum(map(len, rows.response_ids))

    def take(self) -> ScoredRollouts:
        """Of what waits, the rows that are not here yet, by sample id."""
        rows = ScoredRollouts.concat(self.waiting)
        self.taken, self.waiting, self.waiting_tokens = [*self.taken, *self.waiting], [], 0
        wanted = self.plan.places.keys() - self.rows.keys()
        fresh = {sample_id: i for i, sample_id in enumerate(rows.sample_id) if sample_id in wanted}
        return rows.take([fresh[sample_id] for sample_id in sorted(fresh)])


class LearnerWorker:
    """Policy and critic of one rank. `start` joins the gang and loads; the other verbs follow `rooms.Learner`."""

    def __init__(
        self, cfg: LearnerConfig, ppo: PPOConfig, model: ModelConfig, generation: GenerationConfig, seed: int
    ) -> None:
        self._cfg, self._ppo, self._model, self._generation, self._seed = cfg, ppo, model, generation, seed
        self._open: dict[int, OpenBatch] = {}
        self._last: UpdateStats | None = None
        self._version = 0
        self._published = 0
        self._to_probe: EvaluatedRow | None = None

    def start(
        self,
        rank: int,
        world: int,
        endpoint: tuple[str, int],
        timeout_s: float,
        policy_path: Path,
        critic_path: Path | None,
        pretraining: Pretraining,
    ) -> None:
        """`endpoint`: address and free port of rank 0, where the ranks meet. `pretraining` is empty without a mix."""
        torch.manual_seed(self._seed)
        self._ranks: Ranks = join_ranks(rank, world, *endpoint, timeout_s)
        self._tokenizer = load_tokenizer(policy_path, self._model.chat_template)
        self._models = ActorCritic(
            policy_path,
            critic_path,
            self._cfg,
            self._model,
            self._ranks,
            self._ppo.entropy_coef > 0,
            self._ppo.advantage.needs_critic,
            self._ppo.ema_decay,
            self._ppo.share_prompts,
        )
        streams = self._ppo.streams_gradients
        self._stream = GradientStream(self._models, self._ppo, self._generation) if streams else None
        ptx, size = self._ppo.ptx, self._ppo.minibatch_size
        self._mix = PretrainingMix(pretraining, ptx.ratio, size, self._seed) if ptx.coef else None

    def begin(self, step: int, sample_ids: Sequence[str]) -> dict[str, int]:
        """Rank 0 returns the minibatch that each sample's row belongs to. A batch that was updated from is not opened
        again."""
        plan = plan_batch(sample_ids, self._ppo.minibatch_size, self._batch_seed(step))
        if not self._is_done(step):
            self._open.setdefault(step, OpenBatch(plan, self._new_gradient()))
        return self._told(plan)

    def _told(self, plan: BatchPlan) -> dict[str, int]:
        """Once, not by each of many ranks."""
        return {} if self._ranks.rank else plan.places

    def _new_gradient(self) -> PolicyGradient:
        return PolicyGradient(self._models, self._ppo, self._generation)

    def replace(self, step: int, gone: Sequence[str], come: Sequence[str]) -> dict[str, int]:
        """Other members in the places of some; rank 0 returns the minibatch of every member. Repeated, it changes
        nothing."""
        if self._is_done(step):
            return {}
        if step not in self._open:
            raise LearnerError(f"members of batch {step} are to change, but the open batches are {sorted(self._open)}")
        batch = self._open[step]
        if self._stream is not None and batch.rows.keys() & set(gone):
            raise LearnerError(f"members of batch {step} are to leave, but their gradient is computed already")
        batch.plan = batch.plan.replaced(gone, come)
        for sample_id in gone:
            batch.rows.pop(sample_id, None)
        return self._told(batch.plan)

    def _require_whole(self, step: int) -> None:
        """A batch that lost rows would train on fewer without a word. A collective."""
        batch = self._open[step]
        members, here = len(batch.plan.places), len(batch.rows)
        there = int(self._ranks.sum(torch.tensor(here, dtype=torch.float64)))
        if there != members:
            raise LearnerError(
                f"batch {step} has {members} members, but its ranks have {there} rows of them (rank "
                f"{self._ranks.rank}: {here})"
            )

    def _is_done(self, step: int) -> bool:
        """Whether this call repeats one whose answer got lost: the last update was this step's."""
        return self._last is not None and self._last.step == step

    def _batch_seed(self, step: int) -> int:
        return int(np.random.SeedSequence([self._seed, step]).generate_state(1)[0])

    def add(self, step: int, rows: ScoredRollouts, start: int, stop: int) -> None:
        """Evaluates this rank's rows, `start` to `stop`, or keeps them until the policy is the one that their batch
        will update - old logprobs and values are always its own - and is published, for which generation may wait.
        Where gradients stream, rows wait for a full micro-batch. Rows that it holds already are left as they are. A
        collective."""
        if self._is_done(step):
            return
        if step not in self._open:
            raise LearnerError(f"rows of batch {step} arrived, but the open batches are {sorted(self._open)}")
        batch = self._open[step]
        batch.keep(rows.slice(start, stop))
        due = step == self._version == self._published
        if due and (self._stream is None or self._stream.is_enough(batch.waiting_tokens)):
            self._evaluate(batch)

    def _evaluate(self, batch: OpenBatch) -> None:
        """What waits. A collective."""
        if not batch.waiting:
            return
        began, in_gradient = time.perf_counter(), batch.gradient.seconds["actor"]
        rows = batch.take()
        if self._stream is None:
            evaluation = self._models.evaluate(rows.prompt_ids, rows.response_ids, self._generation.temperature)
        else:
            evaluation = self._stream.evaluate(rows, batch.gradient)
        for row in evaluated_rows(rows, evaluation):
            batch.rows[row.sample_id] = row
        batch.seconds += time.perf_counter() - began - (batch.gradient.seconds["actor"] - in_gradient)

    def update(self, step: int, controls: Controls) -> UpdateStats:
        """Trains on the batch; repeating an update that was applied returns its stored answer. A collective."""
        if self._last is not None and self._is_done(step):
            return self._last
        if step not in self._open:
            raise LearnerError(f"update of batch {step}, but the open batches are {sorted(self._open)}")
        self._evaluate(self._open[step])
        self._require_whole(step)
        batch = self._open.pop(step)
        rows = [batch.rows[sample_id] for sample_id in sorted(batch.rows)]
        self._to_probe = self._fit_to_probe(rows)
        longest = self._generation.max_response_tokens
        experience = make_experience(rows, self._ppo, controls, self._ranks, longest)
        rates = self._rates(step)
        updater = Updater(self._models, experience, controls, self._ppo, batch.gradient, self._mix)
        metrics = updater.run(batch.plan, self._batch_seed(step), self._version, rates, step)
        metrics |= seconds_by_part({"evaluate": batch.seconds})
        self._version = step + 1
        self._last = UpdateStats(step, self._version, metrics)
        return self._last

    def _fit_to_probe(self, rows: Sequence[EvaluatedRow]) -> EvaluatedRow | None:
        """On rank 0, of those that an engine has room for with one token more, that nearest to PROBE_TOKENS."""
        lengths = [len(row.prompt_ids) + len(row.response_ids) for row in rows]
        fitting = [i for i, length in enumerate(lengths) if length < self._model.context]
        if self._ranks.rank or not fitting:
            return None
        return rows[min(fitting, key=lambda i: abs(lengths[i] - PROBE_TOKENS))]

    def _rates(self, step: int) -> StepRates:
        """The policy's schedule begins once the critic has warmed up."""
        steps, alone = self._ppo.steps, self._ppo.critic_warmup
        policy = learning_rate(self._cfg.policy, step - alone, steps - alone) if step >= alone else 0.0
        return StepRates(policy, learning_rate(self._cfg.critic, step, steps))

    def publish(self, version: int, directory: str, probed: bool = False) -> Snapshot | None:
        """Rank 0 writes the snapshot and returns it; the others take part where parameters are gathered. `probed`: with
        a response to be compared by, where it has one. A collective."""
        if version != self._version:
            raise LearnerError(f"the policy is version {self._version}, it cannot be published as {version}")
        self._published = version
        snapshot = self._snapshot(version, directory, averaged=False)
        probe = self._probe() if probed else None
        return snapshot if snapshot is None else replace(snapshot, probe=probe)

    def _probe(self) -> Probe | None:
        """What the policy says now of a row of rank 0's last batch. A collective."""
        rows = [] if self._to_probe is None else [self._to_probe]
        said = self._models.evaluate([row.prompt_ids for row in rows], [row.response_ids for row in rows], 1.0)
        if not rows:
            return None
        columns = (rows[0].prompt_ids, rows[0].response_ids, said.logprobs[0])
        return Probe(*(tuple(column.tolist()) for column in columns))

    def send_by(self, at: Rendezvous, client: Engines) -> None:
        """From now on there is a `sender` of the policy's weights. A collective."""

        def published() -> Published:
            return self._models.published(averaged=False)

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            return ((name, tensor.to(self._models.device)) for name, tensor in published().tensors)

        self.sender = Sender(at, client, published().shapes, self._models.policy.dtype, tensors)

    def publish_average(self, version: int, directory: str) -> Snapshot | None:
        """As `publish`, of the policy's average, by a `version` that no policy has. A collective."""
        if self._models.average is None or version <= self._version:
            kept = "no average is kept" if self._models.average is None else f"the policy is version {self._version}"
            raise LearnerError(f"an average cannot be published as version {version}: {kept}")
        return self._snapshot(version, directory, averaged=True)

    def _snapshot(self, version: int, directory: str, averaged: bool) -> Snapshot | None:
        published, dtype = self._models.published(averaged), self._models.policy.dtype
        if self._ranks.rank:
            deque(published.tensors, maxlen=0)  # each is gathered by all ranks
            return None
        slots = [Slot(name, shape, dtype) for name, shape in published.shapes.items()]
        return stream_snapshot(Path(directory), version, slots, published.tensors, published.header)

    def save(self, directory: str) -> list[str]:
        """`policy/` and, where there are, `ema/` and `critic/` as plain Hugging Face directories in the training dtype,
        `state/` beside them.

        Returns the files that this rank sees there, relative to `directory`. A collective.
        """
        target, models = Path(directory), self._models
        policy = models.policy_weights()
        if self._ranks.rank == 0:
            save_policy(models.policy_config, policy, self._tokenizer, target / "policy", models.policy.dtype)
        if models.average is not None:
            average = models.average_weights()
            if self._ranks.rank == 0:
                save_policy(models.policy_config, average, self._tokenizer, target / "ema", models.policy.dtype)
        models.save_adapter(target / "adapter")
        models.critic.save(self._tokenizer, target / "critic")
        save_state(models.engines, target / "state", self._ranks, models.average)
        return [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()]

    def keep(self, directory: str, version: int) -> None:
        """The part of `save` that `load` reads. A collective."""
        if version != self._version:
            raise LearnerError(f"the policy is version {self._version}, its state cannot be kept as {version}")
        save_state(self._models.engines, Path(directory) / "state", self._ranks, self._models.average)

    def load(self, directory: str, version: int) -> None:
        """Restores what `save` or `keep` wrote below `directory`; the policy is then `version`, and older batches are
        closed."""
        load_state(self._models.engines, Path(directory) / "state", self._models.average)
        self._version = version
        self._open = {step: batch for step, batch in self._open.items() if step >= version}
        for batch in self._open.values():
            self._begin_again(batch)
        self._last = None

    def _begin_again(self, batch: OpenBatch) -> None:
        """What another policy said of its rows is forgotten, and the gradient that came with it. A collective."""
        if batch.taken and self._stream is not None:
            self._models.policy.forget_gradient()
        again, batch.taken, batch.waiting, batch.waiting_tokens = [*batch.taken, *batch.waiting], [], [], 0
        for rows in again:
            batch.keep(rows)
        batch.rows.clear()
        batch.gradient = self._new_gradient()
