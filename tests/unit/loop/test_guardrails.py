"""Which limits a batch or an update passes, in which words, and what is due then."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest

from rlhf_cluster.loop.guardrails import ACTIONS, Alarm, Guardrails, Rail, gravest
from rlhf_cluster.records import ReferencedRollouts, ScoredRollouts


def batch(logprobs: list[list[float]], apart: float = 0.0, scores: Sequence[float] = ()) -> ReferencedRollouts:
    """Each token `apart` nats from the reference."""
    count = len(logprobs)
    return ReferencedRollouts.of(
        {
            "prompt_id": ["p"] * count,
            "prompt_ids": [[1]] * count,
            "step": [0] * count,
            "sample_index": list(range(count)),
            "sample_id": [f"0/p/{i}" for i in range(count)],
            "seed": [0] * count,
            "response_ids": [[2] * len(own) for own in logprobs],
            "rollout_logprobs": logprobs,
            "weight_versions": [[0] * len(own) for own in logprobs],
            "finish_reason": ["stop"] * count,
            "temperature": [1.0] * count,
            "incarnation": ["test"] * count,
            "score": scores or [0.0] * count,
            "failure": [""] * count,
            "ref_logprobs": [[value - apart for value in own] for own in logprobs],
        }
    )


def named(alarms: list[Alarm]) -> dict[str, tuple[str, str]]:
    return {alarm.name: (alarm.action, alarm.sentence) for alarm in alarms}


def test_nothing_is_watched_by_default() -> None:
    rails = Guardrails({})
    assert rails.before(batch([[-9.0] * 50], apart=99.0)) == []
    assert rails.after({"actor/pg_clipfrac_max": 1.0, "actor/grad_norm_max": 1e9}) == []


def test_kl_by_hand() -> None:
    """Two responses of 3 and 1 tokens, 2 nats apart at each: 8 nats over 2."""
    rails = Guardrails({"kl": Rail(3.9, "stop")})
    found = named(rails.before(batch([[-1.0] * 3, [-1.0]], apart=2.0)))
    assert found == {"kl": ("stop", "4 nats per response from the reference; the limit is 3.9")}
    assert Guardrails({"kl": Rail(4.0)}).before(batch([[-1.0] * 3, [-1.0]], apart=2.0)) == []


def test_without_a_reference_there_is_no_kl() -> None:
    rows = ScoredRollouts(batch([[-1.0]], apart=5.0).table.drop_columns(["ref_logprobs"]))
    assert Guardrails({"kl": Rail(0.1)}).before(rows) == []


def test_versions_of_the_same_weights_are_known_by_the_first_also_after_a_restart() -> None:
    rails = Guardrails({})
    rails.note_same(5, 3)
    rails.note_same(6, 5)
    again = Guardrails({})
    again.restore(json.loads(json.dumps(rails.state())))
    assert [again.first_of(version) for version in (3, 4, 5, 6, 7)] == [3, 4, 3, 3, 7]


def test_entropy_by_hand() -> None:
    """Tokens, not responses: -(-1 - 1 - 1 - 3) / 4 = 1.5."""
    rows = batch([[-1.0] * 3, [-3.0]])
    found = named(Guardrails({"entropy": Rail(2.0)}).before(rows))
    assert found == {"entropy": ("warn", "1.5 nats per token of the policy's entropy; the least is 2")}
    assert Guardrails({"entropy": Rail(1.5)}).before(rows) == []


@pytest.mark.parametrize("length", [1, 9])
def test_lengths_drift_either_way_from_the_first_also_after_a_restart(length: int) -> None:
    rails = Guardrails({"length": Rail(2.0, "skip")})
    assert rails.before(batch([[-1.0] * 3])) == []
    assert rails.before(batch([[-1.0] * 6])) == []
    again = Guardrails({"length": Rail(2.0, "skip")})
    again.restore(rails.state())
    found = named(again.before(batch([[-1.0] * length])))
    assert found == {
        "length": ("skip", f"3 times off the first length: {length:.1f} tokens, at first 3.0; the limit is 2")
    }


@pytest.mark.parametrize(("mean", "apart"), [(1.0, 0.5), (3.5, 3.0), (-1.0, 1.5)])
def test_scores_by_hand_either_way_also_after_a_restart(mean: float, apart: float) -> None:
    """Two batches of scores 0 and 1: mean 0.5, standard deviation 0.5 - and 1 where the scores do not vary."""
    rails = Guardrails({"score": Rail(1.2, "skip")})
    rows = [[-1.0], [-1.0]]
    assert rails.before(batch(rows, scores=[0.0, 1.0])) == rails.before(batch(rows, scores=[1.0, 0.0])) == []
    again = Guardrails({"score": Rail(1.2, "skip")})
    again.restore(json.loads(json.dumps(rails.state())))
    found = named(again.before(batch(rows, scores=[mean, mean])))
    told = f"{2 * apart:g} standard deviations is the mean score of {mean:g} from that of all before, 0.5"
    assert found == ({"score": ("skip", f"{told}; the limit is 1.2")} if 2 * apart > 1.2 else {})


def test_what_the_update_says_of_itself() -> None:
    rails = Guardrails({"clipfrac": Rail(0.3), "grad_norm": Rail(5.0, "rollback")})
    assert rails.after({"actor/pg_clipfrac_max": 0.3, "actor/grad_norm_max": 5.0, "critic/grad_norm_max": 1.0}) == []
    found = named(rails.after({"actor/pg_clipfrac_max": 0.4, "actor/grad_norm_max": 1.0, "critic/grad_norm_max": 7.0}))
    assert found["clipfrac"] == ("warn", "0.4 of a minibatch's tokens were clipped; the limit is 0.3")
    assert found["grad_norm"] == ("rollback", "7 is the largest gradient norm of a step; the limit is 5")


def test_what_is_not_a_number_has_passed_every_limit() -> None:
    (alarm,) = Guardrails({"clipfrac": Rail(0.3)}).after({"actor/pg_clipfrac_max": math.nan})
    assert alarm.sentence[:3] == "nan" and math.isnan(alarm.value)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_gradient_that_is_not_finite(action: str) -> None:
    """Is an alarm of its own, and beyond every limit of the norm; its value is the share of such steps."""
    rails = Guardrails({"grad_norm": Rail(5.0, "warn")}, action)
    found = rails.after({"actor/grad_norm_max": 1.0, "actor/not_finite": 0.25, "critic/not_finite": 0.0})
    assert [(alarm.name, alarm.action) for alarm in found] == [("grad_norm", "warn"), ("not_finite", action)]
    assert (found[0].value, found[1].value) == (math.inf, 0.25)
    assert found[1].sentence.startswith("the gradients of 25% of the optimizer's steps were NaN or infinite")
    assert rails.after({"actor/grad_norm_max": 1.0, "actor/not_finite": 0.0}) == []


def test_the_gravest_action_is_due() -> None:
    alarms = [Alarm("a", "skip", "", 1.0), Alarm("b", "rollback", "", 1.0), Alarm("c", "warn", "", 1.0)]
    assert gravest(alarms) == "rollback" and gravest([]) == ""
    assert ACTIONS == ("warn", "skip", "rollback", "stop")


def test_after_so_many_skips_in_a_row_it_is_time_to_stop() -> None:
    """For samples (no minibatch was done) or for gradients: no step of the policy was taken, whatever the critic does,
    or none of the critic while that learns alone."""
    rails, again = Guardrails({}, max_skips=3), Guardrails({}, max_skips=3)
    skipped, left_out, moved = (
        {"actor/minibatches_done": 0.0},
        {"actor/minibatches_done": 1.0, "actor/steps_skipped": 1.0},
        {"actor/minibatches_done": 1.0, "actor/steps_skipped": 0.5},
    )
    critic_learns = left_out | {"critic/steps_skipped": 0.0}
    critic_alone = {"actor/minibatches_done": 1.0, "critic/steps_skipped": 1.0}
    policy_learns = moved | {"critic/steps_skipped": 1.0}
    assert not any(rails.after(told) for told in (skipped, left_out, moved, skipped, critic_alone, policy_learns))
    assert not any(rails.after(told) for told in (critic_learns, skipped))
    again.restore(rails.state())
    (skips,) = again.after(left_out)
    assert (skips.name, skips.action, skips.value) == ("max_skips", "stop", 3.0)
    assert skips.sentence.startswith("3 updates in a row moved no weight")
