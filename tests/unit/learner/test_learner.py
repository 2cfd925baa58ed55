"""The real learner on one rank with the tiny model: what must change nothing changes nothing, and PPO starts at 1."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from real import (
    CONTROLS,
    COUNT,
    MODEL,
    TEXT,
    Start,
    distance,
    give,
    numbers,
    rows,
    updated,
    weights,
    with_column,
)
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_cluster.config import (
    ADVANTAGES,
    AdvantageConfig,
    GuardrailsConfig,
    KLConfig,
    LearnerConfig,
    LoRAConfig,
    ModelConfig,
    OffPolicyConfig,
    OptimizerConfig,
    PTXConfig,
    RailConfig,
    RewardConfig,
)
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.learner.mix import PretrainingMix
from rlhf_cluster.learner.models import ActorCritic
from rlhf_cluster.learner.worker import LearnerError, LearnerWorker
from rlhf_cluster.loop.guardrails import Guardrails, Rail, moved_nothing
from rlhf_cluster.models.load import load_policy
from rlhf_cluster.models.lora import Adapters
from rlhf_cluster.models.score_head import ScalarHeadModel
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.records import Controls, ReferencedRollouts, ScoredRollouts
from rlhf_cluster.scoring.worker import RewardWorker, ScorerInputs
from rlhf_cluster.weights.adapter import unpack


def test_the_first_minibatch_has_ratio_1_and_clips_nothing(start: Start) -> None:
    """Old logprobs come from the same forward, in other micro-batches: equal up to rounding."""
    worker = start(minibatch_size=COUNT)
    give(worker, rows())
    found = worker.update(0, Controls(0.02)).metrics
    assert found["actor/first_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert found["actor/first_ratio_min"] == pytest.approx(1.0, abs=1e-5)
    assert found["actor/first_clipfrac"] == found["actor/pg_clipfrac"] == found["critic/vf_clipfrac"] == 0.0
    assert found["actor/ppo_kl"] < 1e-9
    assert found["actor/grad_norm"] > 1e-3  # advantages are whitened: the loss is 0, its gradient is not


def test_guardrails_read_what_the_learner_says(start: Start) -> None:
    """By its own names: a rail that found none of them would never speak."""
    rails = Guardrails({"grad_norm": Rail(1e-9, "warn"), "clipfrac": Rail(1e-9, "warn")})
    said = updated(start(epochs=4, clip=1e-6))
    assert [alarm.name for alarm in rails.after(said)] == ["clipfrac", "grad_norm"]


@pytest.mark.parametrize("action", ["warn", "skip", "stop"])
def test_a_minibatch_that_is_clipped_beyond_its_rail_moves_nothing_but_for_warn(start: Start, action: str) -> None:
    """The first of eight is clipped nowhere; the policy that it leaves is beyond the clip in each of the others."""
    guardrails = GuardrailsConfig(clipfrac=RailConfig(1e-9, action))
    plain, railed = start(epochs=4, clip=1e-3), start(epochs=4, clip=1e-3, guardrails=guardrails)
    without, said = updated(plain), updated(railed)
    assert without["actor/steps_skipped"] == said["critic/steps_skipped"] == 0.0
    assert said["actor/steps_skipped"] == (0.0 if action == "warn" else 7 / 8)
    alarms = Guardrails({"clipfrac": Rail(1e-9, action)}).after(said)
    assert [(alarm.name, alarm.action) for alarm in alarms] == [("clipfrac", action)]
    assert (distance(plain, railed) == 0.0) == (action == "warn")


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_said(start: Start) -> None:
    """One score that is NaN, whitened into all advantages; of the critic's minibatches, one."""
    worker, table = start(), rows().table
    scores = pa.array([math.nan, *table.column("score").to_pylist()[1:]], pa.float32())
    before = weights(worker)
    give(worker, ReferencedRollouts(table.set_column(table.column_names.index("score"), "score", scores)))
    said = worker.update(0, CONTROLS).metrics
    assert said["actor/not_finite"] == said["actor/steps_skipped"] == 1.0
    assert said["critic/not_finite"] == said["critic/steps_skipped"] == 0.5
    after = {name: tensor for name, tensor in weights(worker).items() if name.startswith("policy/")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    (alarm,) = Guardrails({}, "rollback").after(said)
    assert (alarm.name, alarm.action, alarm.value) == ("not_finite", "rollback", 1.0)


def test_an_entropy_bonus_makes_the_policy_less_sure(start: Start) -> None:
    """Against the same update without: the bonus is the only difference."""
    plain, rewarded = start(epochs=4), start(epochs=4, entropy_coef=1.0)
    without, with_bonus = updated(plain), updated(rewarded)
    assert with_bonus["actor/entropy"] > without["actor/entropy"] + 1e-4
    assert with_bonus["critic/vf_loss"] == pytest.approx(without["critic/vf_loss"])


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_loss_holds_the_policy_at_the_reference(start: Start, estimator: str) -> None:
    """The reference of these rows is noise that no policy has; the loss pulls towards it all the same."""
    plain, held = (
        updated(start(epochs=4, kl=KLConfig(loss_estimator=estimator)), Controls(0.02, kl_loss_coef=coef))
        for coef in (1e-9, 10.0)
    )
    assert held["actor/kl_loss"] < plain["actor/kl_loss"] - 1e-4


def test_beyond_the_target_kl_the_minibatches_that_are_left_are_left_out(start: Start) -> None:
    whole, stopped = updated(start(epochs=4)), updated(start(epochs=4, target_kl=1e-5))
    assert whole["actor/minibatches_done"] == 1.0
    # Of 8 minibatches the first is at the old policy; the second is past the target after one step.
    assert stopped["actor/minibatches_done"] == pytest.approx(2 / 8)
    assert stopped["actor/ppo_kl"] < whole["actor/ppo_kl"]


def test_while_the_critic_warms_up_it_learns_alone(start: Start) -> None:
    worker = start(critic_warmup=1)
    before = weights(worker)
    found = updated(worker)
    after = weights(worker)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("critic/") for name in moved)
    assert found["actor/lr"] == 0 and "actor/pg_loss" not in found
    assert updated(worker, step=1)["actor/lr"] == 1e-3
    assert any(not torch.equal(after[name], now) for name, now in weights(worker).items() if name.startswith("policy/"))


def first_moments(worker: LearnerWorker) -> dict[str, torch.Tensor]:
    """After one step from nothing: (1 - beta_1) x the gradient."""
    return {name: state["exp_avg"].clone() for name, state in worker._models.policy.full_state()}


def test_the_mix_adds_its_coefficient_times_the_language_model_s_gradient(start: Start, tiny: Path) -> None:
    """grad(PPO-ptx) = grad(PPO) + 27.8 grad(LM), the latter by plain torch over the same blocks."""
    ptx = PTXConfig(coef=27.8, ratio=1)
    plain, mixed = start(minibatch_size=COUNT), start(minibatch_size=COUNT, text=TEXT, ptx=ptx)
    updated(plain)
    found = updated(mixed)
    model = load_policy(tiny, torch.float32, "eager")
    ids = torch.tensor(np.array(PretrainingMix(TEXT, 1, COUNT, seed=5).share(0, mixed._ranks)), dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert found["ptx/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    beta = OptimizerConfig().betas[0]
    with_mix, without = first_moments(mixed), first_moments(plain)
    for name, parameter in model.named_parameters():
        expected = (1 - beta) * 27.8 * parameter.grad
        torch.testing.assert_close(with_mix[f"model.{name}"] - without[f"model.{name}"], expected, atol=1e-6, rtol=1e-4)


def test_without_a_coefficient_the_mix_is_plain_ppo_bit_for_bit(start: Start) -> None:
    plain, mixed = start(epochs=2), start(epochs=2, text=TEXT, ptx=PTXConfig(coef=0.0))
    assert numbers(updated(plain)) == numbers(updated(mixed))
    assert distance(plain, mixed) == 0


def test_normalised_scores_make_the_rewards_of_the_norm(start: Start) -> None:
    """No penalty: what is left of the rewards of a row is its score, shifted and scaled."""
    found = updated(start(), Controls(0.0, score_mean=1.0, score_std=4.0))
    scores = (rows().score - 1.0) / 4.0
    assert found["objective/rlhf_reward"] == pytest.approx(scores.mean(), abs=1e-6)
    assert found["objective/scores"] == pytest.approx(rows().score.mean(), abs=1e-6)


def test_later_minibatches_do_move_away(start: Start) -> None:
    worker = start(epochs=4)
    give(worker, rows())
    found = worker.update(0, Controls(0.02)).metrics
    assert found["actor/first_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert found["actor/ppo_kl"] > 1e-5


@pytest.mark.parametrize("limit", [1, 40, 1 << 20])
def test_the_size_of_micro_batches_changes_nothing(start: Start, limit: int) -> None:
    one, other = start(64), start(limit)
    for worker in (one, other):
        give(worker, rows())
    expected, found = (numbers(worker.update(0, Controls(0.02)).metrics) for worker in (one, other))
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-4)
    assert distance(one, other) < 1e-5
    assert distance(one, start()) > 1e-4  # they did learn


@pytest.mark.parametrize("limit", [1, 40, 64, 1 << 20])
def test_packed_rows_change_nothing(start: Start, limit: int) -> None:
    """A row holds as many sequences as there is room for, each apart from the others."""
    one, other = start(64), start(limit, packing=True)
    for worker in (one, other):
        give(worker, rows())
    expected, found = (numbers(worker.update(0, Controls(0.02)).metrics) for worker in (one, other))
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-4)
    assert distance(one, other) < 1e-5


def test_packed_rows_hold_no_padding_to_speak_of(start: Start) -> None:
    def padded(worker: LearnerWorker) -> int:
        batches = worker._models.micro_batches(rows().prompt_ids, rows().response_ids)
        return sum(batch.padded_tokens for batch in batches)

    tokens = sum(map(len, [*rows().prompt_ids, *rows().response_ids]))
    assert padded(start(1 << 20, packing=True)) == tokens < padded(start(1 << 20))
    assert padded(start(64, packing=True)) < 1.3 * tokens


def test_packed_rows_are_no_wider_than_the_context_since_attention_grows_with_their_square(start: Start) -> None:
    prompts, responses = ([*ids] * 20 for ids in (rows().prompt_ids, rows().response_ids))
    worker = start(1 << 20, packing=True, share_prompts=False)
    batches = worker._models.micro_batches(prompts, responses)
    assert MODEL.context / 2 < max(batch.input_ids.shape[1] for batch in batches) <= MODEL.context


def test_nothing_is_evaluated_before_the_policy_that_generation_waits_for_is_published(
    start: Start, tmp_path: Path
) -> None:
    """Rows of the next batch may be in the learner's queue before `publish` is; what they become is the same."""
    before, behind = start(), start()
    for worker in (before, behind):
        updated(worker)
    before.publish(1, str(tmp_path / "before"))
    give(before, rows(1))
    give(behind, rows(1))
    assert len(before._open[1].rows) == COUNT and not behind._open[1].rows
    behind.publish(1, str(tmp_path / "behind"))
    expected, found = (numbers(worker.update(1, CONTROLS).metrics) for worker in (before, behind))
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 5])
def test_order_of_arrival_changes_nothing(start: Start, chunk: int) -> None:
    one, other = start(), start()
    give(one, rows())
    give(other, rows(), order=np.random.default_rng(chunk).permutation(COUNT).tolist(), chunk=chunk)
    expected, found = (numbers(worker.update(0, Controls(0.02)).metrics) for worker in (one, other))
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-4)
    assert distance(one, other) < 1e-5


def test_rows_that_come_early_are_evaluated_by_the_policy_that_they_update(start: Start) -> None:
    """A batch that was open while the one before it was trained on: the same as one that came after, bit by bit."""
    one, other = (start(max_staleness=1) for _ in range(2))
    for worker in (one, other):
        give(worker, rows())
    one.begin(1, rows(1).sample_id)
    for first, last in ((3, 5), (0, 4)):  # one row twice, as a repeated call would
        one.add(1, rows(1), first, last)
    one.update(0, CONTROLS)
    other.update(0, CONTROLS)
    one.add(1, rows(1), 5, 8)
    give(other, rows(1), chunk=8)
    found, expected = (numbers(worker.update(1, CONTROLS).metrics) for worker in (one, other))
    assert found == expected and distance(one, other) == 0
    assert found["actor/first_ratio_max"] == pytest.approx(1, abs=1e-5)


def test_a_whole_batch_may_come_early(start: Start) -> None:
    one, other = (start(max_staleness=2) for _ in range(2))
    for worker in (one, other):
        give(worker, rows())
    give(one, rows(1))
    for worker in (one, other):
        worker.update(0, CONTROLS)
    give(other, rows(1), chunk=8)
    assert numbers(one.update(1, CONTROLS).metrics) == numbers(other.update(1, CONTROLS).metrics)
    assert distance(one, other) == 0


def test_off_policy_weights_scale_the_policys_gradient(start: Start) -> None:
    """Tokens of which the sampler said half of what the learner says count twice: as twice the advantage. What is left
    out moves nothing."""

    def trained(**asked: Any) -> LearnerWorker:
        worker = start(minibatch_size=COUNT, max_staleness=1, off_policy=OffPolicyConfig(**asked))
        give(worker, batch)
        metrics.append(worker.update(0, CONTROLS).metrics)
        return worker

    metrics: list[dict[str, float]] = []
    plain = start(minibatch_size=COUNT)
    give(plain, rows())
    own = plain._open[0].rows
    halved = [(own[i].old_logprobs - math.log(2)).tolist() for i in rows().sample_id]
    batch = with_column(rows(), "rollout_logprobs", halved)
    trained(weights="none")
    trained(cap=4.0)
    trained(cap=1.5)
    assert metrics[1]["actor/pg_loss"] == pytest.approx(2 * metrics[0]["actor/pg_loss"], rel=1e-4)
    assert metrics[1]["actor/grad_norm"] == pytest.approx(2 * metrics[0]["actor/grad_norm"], rel=1e-4)
    assert metrics[2]["actor/grad_norm"] == pytest.approx(1.5 * metrics[0]["actor/grad_norm"], rel=1e-4)
    assert metrics[0]["critic/grad_norm"] == metrics[1]["critic/grad_norm"]  # values are no question of who sampled
    assert [told["rollout/masked"] for told in metrics] == [0, 0, 0]
    assert metrics[0]["rollout/ess"] == pytest.approx(1)
    left_out = trained(mask="token", high=1.9)
    assert metrics[3]["rollout/masked"] == 1 and metrics[3]["actor/grad_norm"] == 0
    assert left_out._version == 1


def test_repeating_what_was_applied_changes_nothing(start: Start) -> None:
    one, other = start(), start()
    for worker in (one, other):
        give(worker, rows())
    assert sorted(other.begin(0, rows().sample_id).values()) == [0] * 4 + [1] * 4
    other.add(0, rows(), 2, 6)
    expected, first = one.update(0, Controls(0.02)), other.update(0, Controls(0.02))
    assert numbers(first.metrics) == numbers(expected.metrics)
    before = weights(other)
    assert other.update(0, Controls(0.02)) is first
    other.begin(0, rows().sample_id)
    other.add(0, rows(), 0, COUNT)
    assert other.update(0, Controls(0.02)) is first
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(other).items())
    assert distance(one, other) == 0.0
    with pytest.raises(LearnerError, match=r"update of batch 1, but the open batches are \[\]"):
        other.update(1, Controls(0.02))


def test_an_update_gives_the_next_version_and_closes_its_batch(start: Start) -> None:
    worker = start()
    give(worker, rows(0))
    give(worker, rows(1))  # two batches may be open
    assert (worker.update(0, Controls(0.02)).weight_version, worker.update(1, Controls(0.02)).weight_version) == (1, 2)
    with pytest.raises(LearnerError, match=r"update of batch 0, but the open batches are \[\]"):
        worker.update(0, Controls(0.02))
    with pytest.raises(LearnerError, match=r"rows of batch 7 arrived, but the open batches are \[\]"):
        worker.add(7, rows(7), 0, 1)


def test_a_batch_that_lost_rows_is_not_trained_on(start: Start) -> None:
    worker = start()
    worker.begin(0, rows().sample_id)
    worker.add(0, rows(), 0, COUNT - 2)
    before = weights(worker)
    with pytest.raises(
        LearnerError, match=rf"batch 0 has {COUNT} members, but its ranks have {COUNT - 2} rows of them \(rank 0: 6\)"
    ):
        worker.update(0, Controls(0.02))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(worker).items())


def test_a_saved_learner_goes_on_bit_by_bit(start: Start, tmp_path: Path) -> None:
    one, other = start(), start()
    give(one, rows(0))
    one.update(0, Controls(0.02))
    one.save(str(tmp_path))
    give(other, rows(0))  # of an iteration that the checkpoint has behind it
    other.load(str(tmp_path), 1)
    with pytest.raises(LearnerError, match=r"the open batches are \[\]"):
        other.update(0, Controls(0.02))
    assert distance(one, other) == 0.0
    for worker in (one, other):
        give(worker, rows(1))
    expected, found = one.update(1, Controls(0.02)), other.update(1, Controls(0.02))
    assert numbers(found.metrics) == numbers(expected.metrics)
    assert found.weight_version == expected.weight_version == 2
    assert distance(one, other) == 0.0


def test_saved_models_are_what_was_learnt(start: Start, tmp_path: Path) -> None:
    worker = start()
    give(worker, rows())
    worker.update(0, Controls(0.02))
    worker.save(str(tmp_path))
    saved, learnt = load_file(tmp_path / "policy" / "model.safetensors"), weights(worker)
    assert all(torch.equal(tensor, learnt[f"policy/model.{name}"]) for name, tensor in saved.items())
    head = load_file(tmp_path / "critic" / "score_head.safetensors")
    assert torch.equal(head["weight"], learnt["critic/score.weight"])


def test_published_weights_are_the_policys(start: Start, tmp_path: Path) -> None:
    worker = start()
    with pytest.raises(LearnerError, match="the policy is version 0, it cannot be published as 3"):
        worker.publish(3, str(tmp_path))
    snapshot = worker.publish(0, str(tmp_path))
    assert snapshot is not None and snapshot.version == 0
    published, own = load_file(snapshot.path), weights(worker)
    assert {f"policy/model.{name}" for name in published} == {name for name in own if name.startswith("policy/")}
    assert all(torch.equal(tensor, own[f"policy/model.{name}"]) for name, tensor in published.items())


def test_a_probe_is_what_the_policy_says_of_a_row_after_the_update(start: Start, tmp_path: Path) -> None:
    worker = start()
    assert worker.publish(0, str(tmp_path), probed=True).probe is None  # no row has come yet
    batch = rows()
    give(worker, batch)
    before = worker._models.evaluate(batch.prompt_ids, batch.response_ids, 1.0).logprobs
    worker.update(0, Controls(0.02))
    assert worker.publish(1, str(tmp_path)).probe is None  # not asked for
    probe = worker.publish(1, str(tmp_path), probed=True).probe
    ids = [tuple(row.tolist()) for row in batch.response_ids]
    row = ids.index(probe.response_ids)
    assert probe.prompt_ids == tuple(batch.prompt_ids[row].tolist())
    after = worker._models.evaluate(batch.prompt_ids, batch.response_ids, 1.0).logprobs
    assert probe.distance(after[row].tolist()) < 1e-5 < probe.distance(before[row].tolist())


def test_values_start_as_the_reward_models_scores(tiny: Path, reward_model: Path, one_rank: Ranks) -> None:
    """The value before one more token is the reward model's score of what stands there, EOS included."""
    batch = rows()
    scores = (
        RewardWorker(RewardConfig(), ScorerInputs(str(reward_model), "", "float32", "eager", 0, 60.0))
        .score(batch)
        .score
    )
    models = ActorCritic(tiny, reward_model, LearnerConfig(), MODEL, one_rank)
    longer = [np.append(response, 0).astype(np.int32) for response in batch.response_ids]
    values = models.evaluate(batch.prompt_ids, longer, 1.0).values
    assert [own[-1] for own in values] == pytest.approx(scores.tolist(), abs=1e-5)
    assert np.std(scores) > 0.05


def test_without_a_reward_model_the_critic_is_the_policys_body_and_says_0(tiny: Path, one_rank: Ranks) -> None:
    """Values that nothing has taught would be advantages, and push the policy one way whatever the rewards are."""
    models = ActorCritic(tiny, None, LearnerConfig(), MODEL, one_rank)
    policy = {name.removeprefix("model.model."): t for name, t in models.policy.full_parameters()}
    critic = {name.removeprefix("body."): t for name, t in models.engines["critic"].full_parameters()}
    assert torch.equal(critic["layers.0.mlp.up_proj.weight"], policy["layers.0.mlp.up_proj.weight"])
    batch = rows()
    assert not np.concatenate(models.evaluate(batch.prompt_ids, batch.response_ids, 1.0).values).any()


def test_bfloat16_rounds_weights_and_not_the_rotary_frequencies(
    tiny: Path, reward_model: Path, one_rank: Ranks
) -> None:
    """As vLLM, the reference and the scorers have them: `from_pretrained(dtype=...)` leaves buffers alone."""
    model = ModelConfig(source="tiny", dtype="bfloat16", attention="eager")
    models = ActorCritic(tiny, reward_model, LearnerConfig(), model, one_rank)
    plain = load_policy(tiny, torch.bfloat16, "eager")
    frequencies = dict(plain.named_buffers())["model.rotary_emb.inv_freq"]
    assert frequencies.dtype == torch.float32
    for module in (engine.module for engine in models.engines.values()):
        (own,) = [buffer for name, buffer in module.named_buffers() if name.endswith("rotary_emb.inv_freq")]
        assert torch.equal(own, frequencies)
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_without_a_reference_the_kl_is_zero(start: Start) -> None:
    plain = ScoredRollouts(rows().table.drop_columns(["ref_logprobs"]))
    worker = start()
    give(worker, plain)
    found = worker.update(0, Controls(0.0)).metrics
    assert found["objective/kl"] == found["objective/non_score_reward"] == 0.0
    assert found["objective/rlhf_reward"] == pytest.approx(found["objective/scores"])


@pytest.mark.parametrize("kind", [kind for kind in ADVANTAGES if kind != "gae"])
def test_without_a_critic_the_policy_learns_alone(start: Start, kind: str, tmp_path: Path) -> None:
    """Its rows have a prompt of their own each here, unless told that pairs share one."""
    worker = start(advantage=AdvantageConfig(kind))
    before = weights(worker)
    assert before and all(name.startswith("policy/") for name in before)
    give(worker, with_column(rows(), "prompt_id", [f"p{i // 2}" for i in range(COUNT)]))
    found = worker.update(0, CONTROLS).metrics
    assert any(not torch.equal(before[name], now) for name, now in weights(worker).items())
    assert not {"critic/vf_loss", "critic/values/mean", "critic/lr", "critic/vf_explained_var"} & found.keys()
    assert found["critic/score/mean"] == pytest.approx(rows().score.mean())
    worker.save(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "state"]
    other = start(advantage=AdvantageConfig(kind))
    other.load(str(tmp_path), 1)
    assert distance(worker, other) == 0


@pytest.mark.parametrize("loss_mean", ["response", "constant"])
def test_every_mean_of_the_loss_is_that_of_the_minibatch(start: Start, loss_mean: str) -> None:
    """Whatever the micro-batches; and it is not the mean over tokens."""
    one, other, plain = (
        start(limit, COUNT, loss_mean=mean) for limit, mean in ((64, loss_mean), (1, loss_mean), (64, "token"))
    )
    expected, found, _ = (numbers(updated(worker)) for worker in (one, other, plain))
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-4)
    # Gradients, not weights: Adam makes whole steps of what rounding leaves of a gradient of 0.
    gradient, split, of_tokens = (first_moments(worker) for worker in (one, other, plain))
    assert max(float((gradient[name] - split[name]).abs().max()) for name in gradient) < 1e-7
    assert max(float((gradient[name] - of_tokens[name]).abs().max()) for name in gradient) > 1e-5


def test_the_ratio_of_responses_starts_at_1_and_learns(start: Start) -> None:
    one, other = start(64, ratio="response", epochs=2), start(1, ratio="response", epochs=2)
    expected, found = (numbers(updated(worker)) for worker in (one, other))
    assert found["actor/first_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-3)
    assert distance(one, start(64)) > 1e-4


def test_the_average_follows_the_policy_by_hand(start: Start) -> None:
    """Two updates of one optimizer step each: average = 0.9 (0.9 w_0 + 0.1 w_1) + 0.1 w_2."""
    worker = start(minibatch_size=COUNT, ema_decay=0.9)
    seen = [weights(worker)]
    for step in range(2):
        updated(worker, step=step)
        seen.append(weights(worker))
    for name, average in worker._models.average.full():
        first, second, third = (then[f"policy/{name}"] for then in seen)
        torch.testing.assert_close(average, 0.9 * (0.9 * first + 0.1 * second) + 0.1 * third, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(tensor, seen[-1][name]) for name, tensor in weights(worker).items())  # a look moves nothing


def test_a_saved_average_goes_on_bit_by_bit(start: Start, tmp_path: Path) -> None:
    one, other = start(ema_decay=0.9), start(ema_decay=0.9)
    updated(one)
    one.save(str(tmp_path / "at1"))
    other.load(str(tmp_path / "at1"), 1)
    for worker in (one, other):
        updated(worker, step=1)
    assert distance(one, other) == 0
    own = {name: tensor.clone() for name, tensor in one._models.average.full()}
    assert all(torch.equal(own[name], tensor) for name, tensor in other._models.average.full())
    one.save(str(tmp_path / "at2"))
    saved = dict(load_policy(tmp_path / "at2" / "ema", torch.float32, "eager").named_parameters())
    assert all(torch.equal(saved[name.removeprefix("model.")].data, tensor) for name, tensor in own.items())
    policy = load_policy(tmp_path / "at2" / "policy", torch.float32, "eager")
    assert any(not torch.equal(saved[name].data, p.data) for name, p in policy.named_parameters())


def test_the_average_is_published_by_a_version_of_its_own(start: Start, tmp_path: Path) -> None:
    worker = start(ema_decay=0.5)
    updated(worker)
    average = {name: tensor.clone() for name, tensor in worker._models.average.full()}
    snapshot = worker.publish_average(2, str(tmp_path))
    assert snapshot is not None and snapshot.version == 2
    published = load_file(snapshot.path)
    assert all(torch.equal(tensor, average[f"model.{name}"]) for name, tensor in published.items())
    with pytest.raises(LearnerError, match="the policy is version 1, it cannot be published as 2"):
        worker.publish(2, str(tmp_path))
    with pytest.raises(LearnerError, match="average cannot be published as version 1: the policy is version 1"):
        worker.publish_average(1, str(tmp_path))
    with pytest.raises(LearnerError, match="no average is kept"):
        start().publish_average(1, str(tmp_path))


def test_a_minibatch_of_which_all_failed_is_passed_over(start: Start) -> None:
    """The batch runs short; the rest is trained on as if it had never been more."""
    worker = start(minibatch_size=4)
    give(worker, rows())
    plan = worker._open[0].plan.minibatches
    worker.replace(0, plan[0], [])
    found = worker.update(0, CONTROLS).metrics
    assert found["critic/score/mean"] == pytest.approx(
        np.mean([score for i, score in zip(rows().sample_id, rows().score, strict=True) if i in plan[1]])
    )
    assert np.isfinite(list(found.values())).all() and found["actor/grad_norm"] > 0


def test_a_batch_that_is_only_looked_at_moves_nothing(start: Start) -> None:
    worker, other = start(), start()
    before = weights(worker)
    found = updated(worker, Controls(0.02, learn=False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(worker).items())
    assert found["objective/kl"] == pytest.approx(updated(other)["objective/kl"])
    assert found["actor/minibatches_done"] == 0 and "actor/grad_norm" not in found
    assert moved_nothing(found)
    assert worker._version == 1


@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
def test_a_step_beyond_its_rail_is_not_taken(start: Start, action: str) -> None:
    rails = GuardrailsConfig(grad_norm=RailConfig(1e-6, action))
    worker = start(guardrails=rails)
    before = weights(worker)
    found = updated(worker)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(worker).items())
    assert found["actor/steps_skipped"] == found["critic/steps_skipped"] == 1.0
    assert found["actor/grad_norm_max"] > 1e-6
    assert moved_nothing(found)
    warned = start(guardrails=GuardrailsConfig(grad_norm=RailConfig(1e-6, "warn")))
    learnt = updated(warned)
    assert learnt["actor/steps_skipped"] == 0.0 and not moved_nothing(learnt)
    assert distance(warned, worker) > 1e-4


LORA = LoRAConfig(rank=4, alpha=8.0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_adapters_learn_and_the_rest_does_not(
    start: Start, tiny: Path, reward_model: Path, tmp_path: Path, stage: int
) -> None:
    """What is published and saved is a plain model, the start's weights with the adapters added; `peft` opens these."""
    worker = start(lora=LORA, stage=stage)
    first = worker.publish(0, str(tmp_path / "first"))
    assert first is not None
    plain, begun = dict(load_policy(tiny, None, "eager").named_parameters()), load_file(first.path)
    assert begun.keys() == plain.keys() and all(torch.equal(begun[name], plain[name].data) for name in plain)
    before = weights(worker)
    found = updated(worker)
    assert found["actor/first_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    moved = {name for name, tensor in weights(worker).items() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name or "/score." in name for name in moved)
    assert any(name.startswith("critic/") for name in moved)
    worker.save(str(tmp_path / "saved"))
    second = worker.publish(1, str(tmp_path / "second"))
    assert second is not None
    ids = torch.arange(9)[None]
    saved = load_policy(tmp_path / "saved" / "policy", None, "eager")
    published = load_file(second.path)
    assert all(torch.allclose(published[name], p.data, atol=1e-6) for name, p in saved.named_parameters())
    adapted = PeftModel.from_pretrained(load_policy(tiny, None, "eager"), tmp_path / "saved" / "adapter")
    torch.testing.assert_close(adapted(ids).logits, saved(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(saved(ids).logits, load_policy(tiny, None, "eager")(ids).logits, atol=1e-3)
    ScalarHeadModel.from_directory(tmp_path / "saved" / "critic", None, "eager")


@pytest.mark.parametrize("stage", [0, 3])
def test_adapters_are_published_alone_as_they_are_saved(start: Start, tmp_path: Path, stage: int) -> None:
    worker = start(lora=replace(LORA, publish="adapter"), stage=stage, ema_decay=0.5)
    updated(worker)
    worker.save(str(tmp_path))
    policy, average = worker.publish(1, str(tmp_path / "store")), worker.publish_average(2, str(tmp_path / "store"))
    assert policy is not None and average is not None
    published, saved = load_file(policy.path), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert published.keys() == saved.keys() and all(torch.equal(published[name], saved[name]) for name in saved)
    of_average = load_file(average.path)
    assert of_average.keys() == saved.keys()
    assert any(not torch.equal(of_average[name], saved[name]) for name in saved)
    assert json.loads((unpack(policy, "one") / "adapter_config.json").read_text())["r"] == LORA.rank


def test_adapters_go_on_bit_by_bit_with_their_average(start: Start, tmp_path: Path) -> None:
    one, other = start(lora=LORA, ema_decay=0.5), start(lora=LORA, ema_decay=0.5)
    updated(one)
    one.save(str(tmp_path))
    other.load(str(tmp_path), 1)
    for worker in (one, other):
        updated(worker, step=1)
    assert distance(one, other) == 0
    own = {name: tensor.clone() for name, tensor in one._models.average.full()}
    assert all(torch.equal(own[name], tensor) for name, tensor in other._models.average.full())


def test_a_gpt2_is_adapted_too(one_rank: Ranks, tmp_path: Path) -> None:
    """Its linear layers lie the other way round."""
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters = Adapters(model, LORA)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.1)
    ids = torch.arange(9)[None]
    expected = model(ids).logits
    found = adapters.merged(dict(model.named_parameters()))
    assert found.keys() == plain.keys()
    again = GPT2LMHeadModel(config).eval()
    again.load_state_dict(found, strict=False)
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_scores_that_are_all_alike_teach_nothing(start: Start, tiny: Path, tmp_path: Path, kind: str) -> None:
    """To the bit, where a critic foresees them or responses are compared, if only with the mean of all: there is no
    drift that could be taken for learning."""
    foreseeing = ScalarHeadModel.silent(tiny, torch.float32, "eager")
    with torch.no_grad():
        foreseeing.score.bias.fill_(3.7)
    foreseeing.save(tmp_path, load_tokenizer(tiny), torch.float32)
    worker = start(critic=tmp_path, advantage=AdvantageConfig(kind))
    before = weights(worker)
    pairs = with_column(rows(), "prompt_id", [f"p{i // 2}" for i in range(COUNT)])
    give(worker, with_column(pairs, "score", [3.7] * COUNT))
    worker.update(0, Controls(0.0))
    assert all(torch.equal(before[name], now) for name, now in weights(worker).items())


def test_a_large_penalty_holds_the_policy_at_the_reference(start: Start) -> None:
    """The reference is the policy as it starts; the same rows are learnt from again and again."""

    def gap(kl_coef: float) -> float:
        """Mean square of the log-ratio to the reference after the updates."""
        worker = start(minibatch_size=COUNT, advantage=AdvantageConfig("reinforce_plus_plus"))
        own = worker._models.evaluate(rows().prompt_ids, rows().response_ids, 0.7).logprobs
        batch = with_column(rows(), "ref_logprobs", [row.tolist() for row in own])
        for step in range(6):
            give(worker, with_column(batch, "step", [step] * COUNT))
            worker.update(step, Controls(kl_coef))
        now = worker._models.evaluate(batch.prompt_ids, batch.response_ids, 0.7).logprobs
        return float(np.mean((np.concatenate(now) - np.concatenate(own)) ** 2))

    assert gap(100.0) < gap(0.0) / 10
