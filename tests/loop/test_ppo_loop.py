"""The real `ppo.train` on in-process fakes of the rooms: no Ray, milliseconds."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import Broken, Events, FakeRooms, as_they_came, prompts, shuffled

from rlhf_cluster import collection, ppo
from rlhf_cluster.config import AdvantageConfig, GuardrailsConfig, KLConfig, PPOConfig, RailConfig
from rlhf_cluster.data.batches import PromptOrder
from rlhf_cluster.loop.admission import Batch
from rlhf_cluster.records import Controls, ReferencedRollouts, RefLogprobs, Rollouts, ScoredRollouts, Scores
from rlhf_cluster.storage.checkpoints import Checkpoints
from rlhf_cluster.storage.rollout_log import RolloutLog
from rlhf_cluster.telemetry.metrics import JsonlSink, MetricsLog, MetricsRecord, read_metrics
from rlhf_cluster.telemetry.timer import Timeline, Timer

STEPS, BATCH = 5, 8
ORDER = PromptOrder(prompts(), seed=3)


@dataclass
class RunOfLoop:
    """One run of the loop on fakes, and what it left behind in `directory`."""

    directory: Path
    fakes: FakeRooms = field(default_factory=FakeRooms)
    shown: list[int] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # tasks that were still pending when `train` ended
    evaluates: bool = True  # held-out prompts in every iteration

    def __call__(self, start: ppo.Start = ppo.AT_FIRST, **changed: Any) -> RunOfLoop:
        cfg = PPOConfig(steps=STEPS, batch_size=BATCH, samples_per_prompt=2, minibatch_size=4, **changed)
        asyncio.run(self._run(cfg, start))
        return self

    async def _run(self, cfg: PPOConfig, start: ppo.Start) -> None:
        def fail(sentence: str) -> None:
            raise AssertionError(sentence)

        def show(step: int, batch: Batch) -> None:
            self.shown.append(step)

        with MetricsLog([JsonlSink(self.directory / "metrics.jsonl")], warn=fail) as metrics:
            timer = Timer(Timeline(), "ppo")
            log = ppo.Log(
                metrics,
                timer,
                self.rollouts,
                self.checkpoints,
                show,
                self.warned.append,
                lambda rows: {"objective/rows": len(rows)},
                self._evaluate,
            )
            try:
                async with asyncio.timeout(20):
                    await ppo.train(self.fakes.rooms, ORDER, cfg, log, start)
            finally:
                self.left = [repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    async def _evaluate(self, version: int, served: Awaitable[None]) -> dict[str, float]:
        if not self.evaluates:
            return {}
        await served
        return {"eval/asked": version, "eval/served": self.fakes.generation.version}

    @property
    def rollouts(self) -> RolloutLog:
        return RolloutLog(self.directory / "rollouts")

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.directory / "checkpoints")

    @property
    def metrics(self) -> list[MetricsRecord]:
        return read_metrics(self.directory / "metrics.jsonl")


def leaves(error: BaseException) -> Iterator[BaseException]:
    """What a tree of exception groups is made of."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def members(step: int) -> list[str]:
    return sorted(ORDER.members(step, BATCH, 2).sample_id)


def test_verbs_of_the_synchronous_loop_come_in_order(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path)()
    log = run.fakes.events.log
    for step in range(STEPS):
        begin, update, publish, receive = (
            log.index(event)
            for event in [("begin", step), ("update", step), ("publish", step + 1), ("receive", step + 1)]
        )
        inside = [
            place
            for place, event in enumerate(log)
            if event[0] in ("sample", "score", "ref", "add") and event[1] == step
        ]
        assert begin < min(inside) and max(inside) < update < publish < receive
        assert len(inside) == 4 * BATCH // 2  # four verbs for each table of two rows
        if step:
            assert log.index(("receive", step)) < begin
    assert log[-1] == ("save", STEPS)
    assert run.left == []


def test_rows_move_on_while_others_are_still_sampled(tmp_path: Path) -> None:
    """The learner has evaluated the first rollouts before the last have ended."""
    log = RunOfLoop(tmp_path, FakeRooms(chunk=1, ticks={"generation": 5}))().fakes.events.log
    assert log.index(("add", 0)) < max(place for place, event in enumerate(log) if event == ("sample", 0))


def test_reward_and_reference_work_side_by_side(tmp_path: Path) -> None:
    fakes = FakeRooms(chunk=BATCH, ticks={"reward": 50, "reference": 50})
    log = RunOfLoop(tmp_path, fakes)().fakes.events.of("score", "ref", "add")
    assert log[:3] == [("score", 0), ("ref", 0), ("add", 0)]  # neither waited for the other's fifty turns


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
@pytest.mark.parametrize(("order", "chunk"), [(as_they_came, 1), (shuffled(0), 1), (shuffled(1), 3), (shuffled(2), 8)])
def test_every_member_is_trained_exactly_once(tmp_path: Path, max_staleness: int, order: Any, chunk: int) -> None:
    trained = RunOfLoop(tmp_path, FakeRooms(order=order, chunk=chunk))(
        max_staleness=max_staleness
    ).fakes.learner.trained
    assert trained == {step: members(step) for step in range(STEPS)}
    assert set(Counter(sample for step in trained.values() for sample in step).values()) == {1}


def test_arrival_order_changes_no_row(tmp_path: Path) -> None:
    runs = [
        RunOfLoop(tmp_path / name, FakeRooms(order=order, chunk=chunk))().fakes.learner.rows
        for name, order, chunk in (("a", as_they_came, 8), ("b", shuffled(5), 1))
    ]
    assert all(runs[0][step].table.equals(runs[1][step].table) for step in range(STEPS))


@pytest.mark.parametrize("generation", [1, 40])
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 9])
def test_staleness_is_bounded_and_used(tmp_path: Path, max_staleness: int, generation: int) -> None:
    learner = RunOfLoop(tmp_path, FakeRooms(ticks={"generation": generation}))(
        max_staleness=max_staleness
    ).fakes.learner
    assert learner.most_open == min(max_staleness + 1, STEPS)
    assert all(age <= max_staleness for age in learner.staleness.values())
    if generation == 1:  # batches that are sampled faster than trained on wait as long as they may
        assert learner.staleness == {step: min(step, max_staleness) for step in range(STEPS)}


def test_the_steps_own_tokens_are_never_newer_than_their_policy(tmp_path: Path) -> None:
    learner = RunOfLoop(tmp_path)(max_staleness=2).fakes.learner
    assert all(age >= 0 for age in learner.staleness.values())


def test_no_batch_past_the_last_is_begun(tmp_path: Path) -> None:
    events = RunOfLoop(tmp_path)(max_staleness=3).fakes.events
    assert events.of("begin") == [("begin", step) for step in range(STEPS)]


def test_weights_are_received_as_they_are_published(tmp_path: Path) -> None:
    events = RunOfLoop(tmp_path)(max_staleness=1).fakes.events
    expected = [(verb, version) for version in range(1, STEPS + 1) for verb in ("publish", "receive")]
    assert events.of("publish", "receive") == expected


def test_the_learner_goes_on_while_generation_takes_the_weights(tmp_path: Path) -> None:
    """With what was sampled before; what is not begun yet waits, and the next weights wait for the ones before."""
    run = RunOfLoop(tmp_path, FakeRooms(ticks={"receive": 500}), evaluates=False)
    log = run(max_staleness=1).fakes.events.log
    for step in range(1, STEPS):
        assert log.index(("update", step)) < log.index(("receive", step)) < log.index(("publish", step + 1))
        if step + 1 < STEPS:
            assert log.index(("receive", step)) < log.index(("begin", step + 1))


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_held_out_prompts_are_sampled_from_each_iterations_own_version(tmp_path: Path, max_staleness: int) -> None:
    metrics = [record.metrics for record in RunOfLoop(tmp_path)(max_staleness=max_staleness).metrics]
    found = [(record["eval/asked"], record["eval/served"]) for record in metrics]
    assert found == [(step + 1, step + 1) for step in range(STEPS)]


def test_with_a_penalty_rows_carry_the_reference(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path)(kl=KLConfig(coef=0.3))
    rows = ReferencedRollouts(run.rollouts.read(0))
    pairs = zip(rows.rollout_logprobs, rows.ref_logprobs, strict=True)
    assert all((own - ref).tolist() == pytest.approx([0.5] * len(own)) for own, ref in pairs)
    assert run.fakes.learner.controls == [Controls(0.3)] * STEPS


ADAPTIVE = KLConfig("adaptive", coef=0.1, target=0.4, horizon=80)


def test_where_the_kl_is_a_loss_its_coefficient_adapts(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path)(kl=KLConfig("adaptive", coef=0.0, loss_coef=0.1, target=0.4, horizon=80))
    found = [(controls.kl_coef, controls.kl_loss_coef) for controls in run.fakes.learner.controls]
    assert found == [(0.0, pytest.approx(0.1 * 1.02**step)) for step in range(STEPS)]
    assert [record.metrics["actor/kl_loss_coef"] for record in run.metrics] == [coef for _, coef in found]


def test_an_adaptive_coefficient_follows_the_kl_by_hand(tmp_path: Path) -> None:
    """The fake's KL is 0.5: an error of 0.25, held at 0.2; 8 responses of 80 make it a factor of 1.02 each time."""
    run = RunOfLoop(tmp_path)(kl=ADAPTIVE)
    found = [controls.kl_coef for controls in run.fakes.learner.controls]
    assert found == pytest.approx([0.1 * 1.02**step for step in range(STEPS)])
    assert [record.metrics["actor/kl_coef"] for record in run.metrics] == found


def test_scores_are_normalised_by_those_of_all_batches_so_far(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path)(score_norm=True)
    seen = np.zeros(0)
    for step, controls in enumerate(run.fakes.learner.controls):
        seen = np.concatenate([seen, ReferencedRollouts(run.rollouts.read(step)).score])
        assert (controls.score_mean, controls.score_std) == pytest.approx((seen.mean(), seen.std()))


def test_a_resumed_run_steers_on_as_the_whole_one(tmp_path: Path) -> None:
    changed = {"kl": ADAPTIVE, "score_norm": True}
    whole = RunOfLoop(tmp_path / "whole")(save_every=3, **changed)
    start = ppo.resume(whole.checkpoints.directory / "step-3")
    rest = RunOfLoop(tmp_path / "rest", FakeRooms(version=3))(start=start, **changed)
    assert rest.fakes.learner.controls == whole.fakes.learner.controls[3:]


def test_without_a_penalty_no_reference_is_asked(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path, FakeRooms(kl=False))(kl=KLConfig("none", 0.0))
    assert run.fakes.events.of("ref") == []
    for step in range(STEPS):
        assert type(run.fakes.learner.rows[step]) is ScoredRollouts
        assert "ref_logprobs" not in run.rollouts.read(step).column_names


FAILURES = [
    *[(verb, 1) for verb in ("begin", "sample", "score", "ref", "add", "update", "save")],
    ("publish", 2),
    ("receive", 2),
    ("score", 3),
]


@pytest.mark.parametrize("max_staleness", [0, 2])
@pytest.mark.parametrize("broken", FAILURES, ids=lambda event: f"{event[0]}-{event[1]}")
def test_a_failure_in_a_room_ends_the_loop_with_that_error(
    tmp_path: Path, broken: tuple[str, int], max_staleness: int
) -> None:
    run = RunOfLoop(tmp_path, FakeRooms(Events(broken=broken)))
    with pytest.raises(BaseException) as raised:  # noqa: PT011 - the leaves are looked at
        run(max_staleness=max_staleness, save_every=1)
    found = {f"{type(error).__name__} {error}" for error in leaves(raised.value)}
    assert found == {f"{Broken.__name__} {broken[0]} {broken[1]}"}
    assert run.left == []


def test_a_checkpoint_that_failed_is_not_there(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path, FakeRooms(Events(broken=("save", 2))))
    with pytest.raises(ExceptionGroup):
        run(save_every=1)
    assert [path.name for path in run.checkpoints.directory.iterdir()] == ["step-1"]


@pytest.mark.parametrize(("save_every", "kept"), [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (99, [5])])
def test_checkpoints_every_so_often_and_at_the_end(tmp_path: Path, save_every: int, kept: list[int]) -> None:
    run = RunOfLoop(tmp_path)(save_every=save_every)
    assert sorted(path.name for path in run.checkpoints.directory.iterdir()) == [f"step-{step}" for step in kept]
    newest = run.checkpoints.latest()
    assert newest is not None
    run.checkpoints.verify(newest)
    assert ppo.resume(newest.path).step == newest.step == STEPS
    assert (newest.path / "policy" / "weights").read_text() == f"version {STEPS}"


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_resumed_run_does_the_steps_that_were_left(tmp_path: Path, max_staleness: int) -> None:
    whole = RunOfLoop(tmp_path / "whole")(max_staleness=max_staleness)
    rest = RunOfLoop(tmp_path / "rest", FakeRooms(version=3))(start=ppo.Start(3), max_staleness=max_staleness)
    for verb in ("begin", "update"):
        assert rest.fakes.events.of(verb) == [event for event in whole.fakes.events.of(verb) if event[1] >= 3]
    assert rest.fakes.learner.trained == {step: members(step) for step in (3, 4)}
    for step in (3, 4):
        same = ["sample_id", "response_ids", "seed"]
        assert rest.rollouts.read(step).select(same).sort_by("sample_id") == whole.rollouts.read(step).select(
            same
        ).sort_by("sample_id")
    assert rest.fakes.learner.staleness[3] == 0


def test_a_run_that_is_done_starts_nothing(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path)(start=ppo.Start(STEPS))
    assert run.fakes.events.log == []
    assert run.metrics == [] and run.checkpoints.latest() is None


def test_what_happened_is_written_down(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path)()
    assert [(record.stage, record.step) for record in run.metrics] == [
        ("ppo", version) for version in range(1, STEPS + 1)
    ]
    assert run.rollouts.steps() == run.shown == list(range(STEPS))
    for step, record in enumerate(run.metrics):
        rows, found = ReferencedRollouts(run.rollouts.read(step)), record.metrics
        assert sorted(rows.sample_id) == members(step)
        assert found["critic/score/mean"] == pytest.approx(float(rows.score.mean()))
        assert (found["sync/version"], found["actor/kl_coef"], found["objective/rows"]) == (step + 1, 0.02, BATCH)
        assert found["perf/total_num_tokens"] == sum(map(len, rows.prompt_ids)) + sum(map(len, rows.response_ids))
        assert found["perf/throughput"] == pytest.approx(found["perf/total_num_tokens"] / found["timing_s/step"])
    assert [record.metrics.get("sync/bytes") for record in run.metrics] == [None, *range(1, STEPS)]
    parts = {"step", "gen", "reward", "ref", "old_log_prob", "update", "update_weights"}
    assert {f"timing_s/{part}" for part in parts} <= run.metrics[0].metrics.keys()


def test_what_a_checkpoint_has_behind_it_is_on_record_before_it_is_there(tmp_path: Path) -> None:
    """So a run that dies at any point and resumes has every iteration's rollouts and metrics once."""
    run = RunOfLoop(tmp_path, FakeRooms(Events(broken=("save", 4))))
    with pytest.raises(ExceptionGroup):
        run(save_every=2)
    newest = run.checkpoints.latest()
    assert newest is not None and newest.step == 2
    assert run.rollouts.steps() == [0, 1, 2, 3]
    assert [record.step for record in run.metrics] == [1, 2, 3, 4]
    assert ["timing_s/save_checkpoint" in record.metrics for record in run.metrics] == [False, False, True, False]


@pytest.mark.parametrize("verb", ["score", "ref"])
def test_a_slow_room_does_not_outlive_the_failure_of_another(tmp_path: Path, verb: str) -> None:
    run = RunOfLoop(tmp_path, FakeRooms(Events(broken=(verb, 1)), ticks={"reward": 30, "reference": 30}))
    with pytest.raises(BaseExceptionGroup):
        run()
    assert run.left == []


GROUPED = AdvantageConfig("grpo", whiten=False)


def failing(*words: str) -> Callable[[str], str]:
    """Samples whose id has one of the words fail."""
    return lambda sample_id: "mine: it hung" if any(word in sample_id for word in words) else ""


def replaced(run: RunOfLoop) -> list[str]:
    return [sample_id for ids in run.fakes.learner.trained.values() for sample_id in ids if "+" in sample_id]


def test_what_failed_is_replaced_and_the_batch_is_whole(tmp_path: Path) -> None:
    fakes = FakeRooms()
    first = members(0)[0]
    fakes.reward.failing = failing(first)
    run = RunOfLoop(tmp_path, fakes)()
    assert all(len(ids) == BATCH for ids in fakes.learner.trained.values())
    assert len(replaced(run)) == 1 and first not in fakes.learner.trained[0]
    record = run.rollouts.read(0)
    states = dict(zip(record.column("sample_id").to_pylist(), record.column("state").to_pylist(), strict=True))
    assert len(states) == BATCH + 1 and states[first] == "dropped"
    assert [entry.metrics["fault/dropped"] for entry in run.metrics] == [1.0] + [0.0] * (STEPS - 1)


def test_what_fails_again_and_again_leaves_the_batch_short(tmp_path: Path) -> None:
    fakes = FakeRooms()
    first, *others = members(1)
    fakes.reward.failing = failing(first, "1+")
    RunOfLoop(tmp_path, fakes)(max_refill=2)
    assert fakes.learner.trained[1] == sorted(others)
    assert fakes.events.of("replace") == [("replace", 1)] * 3  # two refills, then the place stays empty


def test_without_refills_nothing_is_sampled_anew(tmp_path: Path) -> None:
    fakes = FakeRooms()
    fakes.reward.failing = failing(members(0)[0])
    run = RunOfLoop(tmp_path, fakes)(max_refill=0)
    assert len(fakes.learner.trained[0]) == BATCH - 1 and not replaced(run)


@pytest.mark.parametrize("step", [0, 2])
def test_a_batch_of_which_nothing_is_left_is_said_and_nothing_is_lost(tmp_path: Path, step: int) -> None:
    """Its failures are on record, and the run goes on from here once the reward is mended."""
    fakes = FakeRooms()
    fakes.reward.failing = failing(f"{step}/", f"{step}+")
    run = RunOfLoop(tmp_path, fakes)
    with pytest.raises(BaseExceptionGroup) as raised:
        run(empty_wait_s=0.0)
    (error,) = leaves(raised.value)
    assert isinstance(error, ppo.EmptyBatchError)
    said = f"iteration {step + 1}: none of its 16 samples has a score to train on (16 x mine: it hung); "
    assert str(error).startswith(said)
    assert run.rollouts.read(step).column("state").to_pylist() == ["dropped"] * 16
    last = run.checkpoints.latest()
    assert (last.step if last else 0) == step


def test_whoever_gives_the_scores_may_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "PAUSE_S", 0.0)
    fakes = FakeRooms()
    fakes.reward.failing = failing("1/p", "1+1/p", "1+2/p", "1+3/p")
    run = RunOfLoop(tmp_path, fakes)()
    assert all(sample_id.startswith("1+4/") for sample_id in fakes.learner.trained[1])
    assert len(fakes.learner.trained[1]) == BATCH and len(fakes.learner.trained) == STEPS
    assert sum("no sample has a score yet" in sentence for sentence in run.warned) == 3


def test_a_group_stays_together(tmp_path: Path) -> None:
    """One of its two fails: both are replaced, by the two responses to another prompt."""
    fakes = FakeRooms(chunk=1, order=shuffled(3))
    first = members(0)[0]
    fakes.reward.failing = failing(first)
    run = RunOfLoop(tmp_path, fakes)(advantage=GROUPED)
    prompt = first.split("/")[1]
    assert not any(f"/{prompt}/" in i for i in fakes.learner.trained[0])
    new = replaced(run)
    assert len(new) == 2 and len({i.split("/")[1] for i in new}) == 1
    assert all(len(ids) == BATCH for ids in fakes.learner.trained.values())


def test_groups_that_say_nothing_are_sampled_anew(tmp_path: Path) -> None:
    """Responses of one token each: every score is 0 or 1, and of two samples many are alike."""
    fakes = FakeRooms()
    fakes.generation.max_tokens = 1
    run = RunOfLoop(tmp_path, fakes)(advantage=GROUPED, dynamic_sampling=True, max_refill=20)
    for rows in fakes.learner.rows.values():
        by_prompt: dict[str, set[float]] = {}
        for prompt, score in zip(rows.prompt_id, rows.score.tolist(), strict=True):
            by_prompt.setdefault(prompt, set()).add(score)
        assert all(len(scores) > 1 for scores in by_prompt.values())
        assert len(rows) == BATCH
    assert sum(entry.metrics["rollout/filtered"] for entry in run.metrics) > 0
    again = RunOfLoop(tmp_path / "again", FakeRooms(order=shuffled(5), chunk=1))
    again.fakes.generation.max_tokens = 1
    again(advantage=GROUPED, dynamic_sampling=True, max_refill=20)
    assert again.fakes.learner.trained == fakes.learner.trained  # whatever the order of arrival


def test_where_all_groups_say_nothing_the_last_are_trained_on(tmp_path: Path) -> None:
    fakes = FakeRooms()
    fakes.reward.score = equal_scores  # type: ignore[method-assign]
    RunOfLoop(tmp_path, fakes)(advantage=GROUPED, dynamic_sampling=True, max_refill=1)
    assert all(len(ids) == BATCH and all("+1" in i for i in ids) for ids in fakes.learner.trained.values())


async def equal_scores(rollouts: Rollouts) -> Scores:
    count = len(rollouts)
    return Scores.of({"sample_id": rollouts.sample_id, "score": [1.0] * count, "failure": [""] * count})


def test_parts_of_the_score_are_logged(tmp_path: Path) -> None:
    fakes = FakeRooms()

    async def in_parts(rollouts: Rollouts) -> Scores:
        count = len(rollouts)
        own = {"sample_id": rollouts.sample_id, "score": [3.0] * count, "failure": [""] * count}
        return Scores.of(own | {"reward/style": [2.0] * count, "reward_s/style": [0.25] * count})

    fakes.reward.score = in_parts  # type: ignore[method-assign]
    metrics = RunOfLoop(tmp_path, fakes)().metrics[0].metrics
    assert (metrics["reward/style"], metrics["reward_s/style"]) == (2.0, 0.25)


def rail(**rails: RailConfig) -> dict[str, Any]:
    return {"guardrails": GuardrailsConfig(**rails)}


def tokens_of(run: RunOfLoop, iteration: int) -> int:
    return sum(map(len, run.rollouts.read(iteration - 1).column("response_ids").to_pylist()))


def test_a_rail_that_warns_changes_nothing_else(tmp_path: Path) -> None:
    """The fake's reference is half a nat away at each token."""
    run = RunOfLoop(tmp_path)(**rail(kl=RailConfig(0.4)))
    assert run.fakes.learner.trained == {step: members(step) for step in range(STEPS)}
    assert all(controls.learn for controls in run.fakes.learner.controls)
    assert len(run.warned) == STEPS and re.match(r"iteration 1: guardrail kl \(warn\): [\d.]+ nats per", run.warned[0])
    for entry in run.metrics:  # the value that passed it
        assert entry.metrics["guard/kl"] == pytest.approx(tokens_of(run, entry.step) / BATCH * 0.5)


def test_a_rail_that_skips_lets_the_batch_be_looked_at(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path)(**rail(entropy=RailConfig(99.0, "skip")))
    assert [controls.learn for controls in run.fakes.learner.controls] == [False] * STEPS
    assert run.fakes.learner.published == list(range(1, STEPS + 1))  # versions count on


def test_a_rail_that_skips_for_ever_stops(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path)
    with pytest.raises(BaseExceptionGroup) as raised:
        run(guardrails=GuardrailsConfig(entropy=RailConfig(99.0, "skip"), max_skips=2))
    (error,) = leaves(raised.value)
    assert isinstance(error, ppo.GuardrailError)
    assert str(error).startswith(
        "iteration 2 was stopped by ppo.guardrails (max_skips: 2 updates in a row moved no weight"
    )
    assert "; entropy: " in str(error), "what led to it"
    assert [controls.learn for controls in run.fakes.learner.controls] == [False, False]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_steps_that_are_never_taken_stop(tmp_path: Path, action: str) -> None:
    """Going back to the checkpoint of the very policy whose gradients were refused is no way out either."""
    run = RunOfLoop(tmp_path)
    refused = {"actor/grad_norm_max": 9.0, "actor/steps_skipped": 1.0, "critic/steps_skipped": 1.0}
    run.fakes.learner.told = dict.fromkeys(range(1, STEPS), refused)
    with pytest.raises(BaseExceptionGroup) as raised:
        run(save_every=1, guardrails=GuardrailsConfig(grad_norm=RailConfig(5.0, action), max_skips=2))
    (error,) = leaves(raised.value)
    assert isinstance(error, ppo.GuardrailError) and str(error).startswith("iteration 3 was stopped")


def test_a_rail_that_stops_names_itself_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path)
    run.fakes.learner.told[2] = {"actor/pg_clipfrac_max": 0.9}
    with pytest.raises(BaseExceptionGroup) as raised:
        run(save_every=1, **rail(clipfrac=RailConfig(0.5, "stop")))
    (error,) = leaves(raised.value)
    assert isinstance(error, ppo.GuardrailError)
    words = "clipfrac: 0.9 of a minibatch's tokens were clipped; the limit is 0.5"
    assert str(error) == f"iteration 3 was stopped by ppo.guardrails ({words})"
    last = run.checkpoints.latest()
    assert last is not None and last.step == 2 and run.left == []
    assert run.metrics[-1].step == 3 and run.metrics[-1].metrics["guard/clipfrac"] == 0.9
    assert sorted(run.rollouts.read(2).column("sample_id").to_pylist()) == members(2)  # what led to it is on record


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_rail_that_rolls_back_goes_on_from_the_last_checkpoint(tmp_path: Path, max_staleness: int) -> None:
    run = RunOfLoop(tmp_path)
    run.fakes.learner.told[3] = {"actor/grad_norm_max": 100.0}
    run(save_every=2, max_staleness=max_staleness, **rail(grad_norm=RailConfig(50.0, "rollback")))
    learner = run.fakes.learner
    assert learner.loaded == ["version 2"]
    assert run.fakes.events.of("load", "publish")[3:5] == [("load", 4), ("publish", 4)]  # version 4 is what 2 was
    assert learner.trained.keys() == set(range(STEPS))
    assert run.warned[-1] == "iteration 4: the policy is that of the checkpoint of iteration 2 again"


@pytest.mark.parametrize(("save_every", "back"), [(1, 2), (3, None)])
def test_what_is_seen_in_samples_is_not_cured_by_the_checkpoint_of_their_own_policy(
    tmp_path: Path, save_every: int, back: int | None
) -> None:
    """The samples of iteration 4 are of version 3, which is far from the reference and has a checkpoint."""
    run = RunOfLoop(tmp_path)
    near = run.fakes.reference.logprobs

    async def far_away(rollouts: Rollouts) -> RefLogprobs:
        found = await near(rollouts)
        apart = [logprobs - 50.0 * (rollouts.step[0] == 3) for logprobs in found.ref_logprobs]
        return RefLogprobs.of({"sample_id": found.sample_id, "ref_logprobs": apart})

    run.fakes.reference.logprobs = far_away  # type: ignore[method-assign]
    rails = rail(kl=RailConfig(40.0, "rollback"))
    if back is None:
        with pytest.raises(BaseExceptionGroup) as raised:
            run(save_every=save_every, **rails)
        assert "no checkpoint of a policy before it" in str(next(leaves(raised.value)))
    else:
        run(save_every=save_every, **rails)
        assert run.fakes.learner.loaded == [f"version {back}"]
        assert not any(f"step-{back + 1}" in path.name for path in run.checkpoints.directory.iterdir())


def test_a_policy_that_came_back_is_not_cured_by_itself(tmp_path: Path) -> None:
    """The samples of iterations 4 and 5 are far from the reference. Iteration 4 goes back from version 3 to 2, which is
    version 4 then and has its checkpoint as 4 as well; what 5 saw is true of 2, so it goes back to 1."""
    run = RunOfLoop(tmp_path)
    near = run.fakes.reference.logprobs

    async def far_away(rollouts: Rollouts) -> RefLogprobs:
        found = await near(rollouts)
        apart = [logprobs - 50.0 * (rollouts.step[0] >= 3) for logprobs in found.ref_logprobs]
        return RefLogprobs.of({"sample_id": found.sample_id, "ref_logprobs": apart})

    run.fakes.reference.logprobs = far_away  # type: ignore[method-assign]
    run(save_every=1, **rail(kl=RailConfig(40.0, "rollback")))
    assert run.fakes.learner.loaded == ["version 2", "version 1"]
    told = [json.loads((one / ppo.RUN_STATE).read_text()) for one in sorted(run.checkpoints.directory.iterdir())]
    assert [state["guardrails"]["same"] for state in told] == [{}, {"4": 2, "5": 1}]


def test_without_a_checkpoint_a_rollback_is_the_end(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path)
    run.fakes.learner.told[0] = {"actor/grad_norm_max": 100.0}
    with pytest.raises(BaseExceptionGroup) as raised:
        run(save_every=2, **rail(grad_norm=RailConfig(50.0, "rollback")))
    assert str(next(leaves(raised.value))).endswith("and there is no checkpoint of a policy before it to go back to")


def test_the_first_length_is_kept_by_the_checkpoint(tmp_path: Path) -> None:
    run = RunOfLoop(tmp_path)()
    last = run.checkpoints.latest()
    assert last is not None and ppo.resume(last.path).guardrails["first_length"] > 0
