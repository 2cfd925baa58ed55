"""The reward model: pairs and their statistics by hand, whole prompts, the gradient of eq. (1), and centred scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from rlhf_cluster.config import EngineConfig, ModelConfig, OptimizerConfig, RMConfig
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.models.batching import Layout, micro_batches, singles
from rlhf_cluster.models.rankings import whole_prompts
from rlhf_cluster.models.score_head import ScalarHeadModel
from rlhf_cluster.records import Comparisons, Demonstrations
from rlhf_cluster.rm import RMJob, evaluate, gradient, pair_margins, read_evaluation, summarize, train

EOS = 258


def comparisons(count: int, seed: int = 0) -> Comparisons:
    """`count` prompts with 2 to 5 responses of different lengths; the last response ties with the one before it."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 6, count)
    ranks = [[*range(1, size), size - 1] if size > 2 else [2, 1] for size in sizes]
    return Comparisons.of(
        {
            "prompt_id": [f"p{i}" for i in range(count)],
            "prompt_ids": [rng.integers(0, 256, rng.integers(1, 9)).tolist() for _ in range(count)],
            "responses": [
                [[*rng.integers(0, 256, rng.integers(1, 12)).tolist(), EOS] for _ in range(n)] for n in sizes
            ],
            "ranks": ranks,
        }
    )


DEMONSTRATIONS = Demonstrations.of(
    {
        "prompt_id": ["d", "e", "f"],
        "prompt_ids": [[1, 2], [3], [4, 5, 6]],
        "response_ids": [[7, EOS], [8, 9, EOS], [EOS]],
    }
)


def job(directory: Path, output: Path, share_prompts: bool = True, **changed: Any) -> RMJob:
    engine = EngineConfig(tokens_per_micro_batch=60)
    cfg = RMConfig(batch_size=3, share_prompts=share_prompts, optimizer=OptimizerConfig(lr=1e-3), engine=engine)
    model = ModelConfig(source="tiny", dtype="float32", attention="eager")
    fields = {"comparisons": comparisons(7), "heldout": comparisons(4, 1), "demonstrations": DEMONSTRATIONS, **changed}
    return RMJob(cfg, model, seed=0, policy_path=directory, output=output, **fields)


def test_margins_of_pairs_by_hand() -> None:
    scores, ranks = np.array([3.0, 1.0, 2.0]), np.array([1, 2, 2])
    assert pair_margins(scores, ranks).tolist() == [2.0, 1.0]  # the tie of the last two says nothing
    assert pair_margins(scores, np.array([2, 1, 3])).tolist() == [1.0, -2.0, -1.0]
    assert pair_margins(scores, np.array([1, 1, 1])).size == 0


def test_summary_by_hand() -> None:
    """Two prompts: 3 pairs with 2 right, 1 pair that ties and counts as half. Accuracy 2.5 / 4.

    Residuals c_i - 0.625 n_i are 2 - 1.875 = 0.125 and 0.5 - 0.625 = -0.125; the standard error is
    sqrt(sum of squares * n / (n - 1)) / pairs = sqrt(0.03125 * 2) / 4 = 0.0625.
    """
    found = summarize([np.array([1.0, 2.0, -1.0]), np.array([0.0])], [np.array([3, -1, 0]), np.array([-2])])
    assert (found.accuracy, found.accuracy_se) == pytest.approx((0.625, 0.0625))
    assert (found.shorter_accuracy, found.margin, found.prompts, found.pairs) == (1.5 / 4, 0.5, 2, 4)
    assert found.margins == [1.0, 2.0, -1.0, 0.0]


def test_length_controlled_by_hand() -> None:
    """The preferred one is shorter in 4 pairs, of which 3 are right, and longer in 2, of which 1 is: (3/4 + 1/2) / 2;
    equal lengths are in neither. All 4 and 2 in one prompt each: residuals 0 and 0. Else, of prompts with pairs
    (right, shorter) + (wrong, longer) and (right, shorter) + (right, longer) + (wrong, shorter) + (right, shorter):
    (1/4 / 4 - 1/2 / 2) / 2 and (-1/4 / 4 + 1/2 / 2) / 2, which is -+ 3/32."""
    margins = [np.array([1.0, -1.0, 5.0]), np.array([1.0, 1.0, -1.0, 1.0])]
    found = summarize(margins, [np.array([2, -3, 0]), np.array([1, -1, 1, 4])])
    assert found.length_controlled_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found.length_controlled_accuracy_se == pytest.approx(math.sqrt(2 * (3 / 32) ** 2 * 2))
    by_length = summarize([np.array([3.0, -2.0, -7.0])], [np.array([3.0, -2.0, -7.0])])
    assert by_length.shorter_accuracy == pytest.approx(1 / 3) and by_length.length_controlled_accuracy == 0.5
    one_sided = summarize([np.array([1.0])], [np.array([1.0])])
    assert math.isnan(one_sided.length_controlled_accuracy) and one_sided.accuracy == 1.0
    assert math.isnan(one_sided.length_controlled_accuracy_se)
    assert not any("length_controlled" in name for name in one_sided.metrics())
    assert one_sided.metrics()["rm/heldout_accuracy"] == 1.0 and summarize([], []).metrics() == {}


def test_summary_of_one_pair_per_prompt_is_the_binomial_one() -> None:
    margins = [np.array([1.0])] * 30 + [np.array([-1.0])] * 10
    assert summarize(margins, margins).accuracy_se == pytest.approx(math.sqrt(0.75 * 0.25 / 39))


def test_summary_of_nothing_is_not_a_number() -> None:
    assert math.isnan(summarize([], []).accuracy) and summarize([], []).pairs == 0


@pytest.mark.parametrize("context", [0, 20, 512])
@pytest.mark.parametrize("limit", [1, 60, 100, 1000, 1 << 20])
def test_whole_prompts_part_no_prompt_and_keep_the_limit(limit: int, context: int) -> None:
    shown = comparisons(12)
    asked = [9, 2, 4, 0, 11, 7]
    seen: list[tuple[list[list[int]], list[int]]] = []
    for batch, ranked in whole_prompts(shown, asked, Layout(limit, context), "cpu"):
        assert batch.padded_tokens <= limit or len(ranked) == 1
        prompts = [shown.prompt_ids[own.prompt] for own in ranked for _ in own.ranks]
        places = np.argsort(np.concatenate([own.rows for own in ranked]))
        read = zip((prompts[i] for i in places), batch.split(batch.response_targets()), strict=True)
        sequences = [[*prompt.tolist(), *map(int, response)] for prompt, response in read]
        seen += [([sequences[place] for place in own.rows.tolist()], own.ranks.tolist()) for own in ranked]
        assert all(shown.ranks[own.prompt].tolist() == own.ranks.tolist() for own in ranked)
    expected = [
        ([[*shown.prompt_ids[p], *response] for response in shown.responses[p]], shown.ranks[p].tolist()) for p in asked
    ]
    assert sorted(seen) == sorted(expected)


def plain_loss(model: ScalarHeadModel, shown: Comparisons, prompts: list[int]) -> torch.Tensor:
    """Eq. (1) as it is written: pair by pair, each sequence by itself; the mean over prompts of the mean over pairs."""
    losses = []
    for p in prompts:
        scores = []
        for response in shown.responses[p]:
            (alone,) = micro_batches([shown.prompt_ids[p]], [response], singles(1), 1 << 20)
            scores.append(model(*alone.score_arguments())[0])
        ranks = shown.ranks[p]
        pairs = [(w, x) for w in range(len(ranks)) for x in range(len(ranks)) if ranks[w] < ranks[x]]
        losses.append(torch.stack([-logsigmoid(scores[w] - scores[x]) for w, x in pairs]).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("share_prompts", [True, False])
def test_gradient_is_that_of_the_equation(tiny: Path, one_rank: Ranks, tmp_path: Path, share_prompts: bool) -> None:
    work = job(tiny, tmp_path, share_prompts)
    model, plain = (ScalarHeadModel.from_policy(tiny, torch.float32, "eager", seed=0) for _ in range(2))
    engine = TrainEngine(model, EngineConfig(), OptimizerConfig(), torch.float32, one_rank)
    found = gradient(engine, work, np.array([5, 0, 3, 6]))
    loss = plain_loss(plain, work.comparisons, [5, 0, 3, 6])
    loss.backward()
    assert found["rm/loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    for (name, ours), (_, theirs) in zip(engine.module.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_batches_are_the_same_on_all_ranks_and_have_every_prompt_once(tmp_path: Path) -> None:
    first, again = ([batch.tolist() for batch in job(tmp_path, tmp_path).batches()] for _ in range(2))
    assert first == again
    assert [len(batch) for batch in first] == [3, 3, 1]
    assert sorted(prompt for batch in first for prompt in batch) == list(range(7))
    assert job(tmp_path, tmp_path).steps() == 3


def test_training_leaves_a_centred_model_and_its_evaluation(tiny: Path, one_rank: Ranks, tmp_path: Path) -> None:
    work = job(tiny, tmp_path / "reward_model")
    reports: list[tuple[int, dict[str, float]]] = []
    train(one_rank, work, lambda step, metrics: reports.append((step, dict(metrics))))
    assert [step for step, _ in reports] == [0, 1, 2]
    model = ScalarHeadModel.from_directory(work.output, torch.float32, "eager")
    (batch,) = micro_batches(DEMONSTRATIONS.prompt_ids, DEMONSTRATIONS.response_ids, singles(3), 1 << 20)
    with torch.no_grad():
        assert float(model(*batch.score_arguments()).mean()) == pytest.approx(0.0, abs=1e-5)
    # Centring shifts every score alike, so what was said of the held-out pairs holds for the saved model.
    engine = TrainEngine(model, EngineConfig(), OptimizerConfig(), torch.float32, one_rank)
    kept, anew = read_evaluation(work.output), evaluate(engine, work)
    assert anew.margins == pytest.approx(kept.margins, abs=1e-5)
    assert (kept.prompts, kept.pairs) == (anew.prompts, anew.pairs) == (4, len(kept.margins))
    assert kept.metrics()["rm/heldout_accuracy"] == anew.accuracy
    shorter = [
        (len(worse) > len(better)) + 0.5 * (len(worse) == len(better))
        for ranked, ranks in zip(work.heldout.responses, work.heldout.ranks, strict=True)
        for better, r in zip(ranked, ranks, strict=True)
        for worse, s in zip(ranked, ranks, strict=True)
        if r < s
    ]
    assert kept.shorter_accuracy == pytest.approx(np.mean(shorter)) and 0 < np.mean(shorter) < 1
