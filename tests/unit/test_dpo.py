"""DPO, IPO and KTO: the gradient is the written-out one, the reference is the start, and rankings are learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedModel

from rlhf_cluster.algo.logprobs import logprobs_from_logits
from rlhf_cluster.config import DPOConfig, EngineConfig, ModelConfig, OptimizerConfig
from rlhf_cluster.dpo import DPOJob, evaluate, gradient, refer, train
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.models.forward import PolicyModule
from rlhf_cluster.models.load import load_policy
from rlhf_cluster.records import Comparisons

EOS = 258


def comparisons(count: int, seed: int = 0) -> Comparisons:
    """Letters are better than digits: `count` prompts with a word, a mixture and a number."""
    rng = np.random.default_rng(seed)
    letters, digits = lambda n: rng.integers(97, 123, n).tolist(), lambda n: rng.integers(48, 58, n).tolist()
    return Comparisons.of(
        {
            "prompt_id": [f"p{i}" for i in range(count)],
            "prompt_ids": [rng.integers(0, 256, rng.integers(1, 9)).tolist() for _ in range(count)],
            "responses": [
                [[*letters(5), EOS], [*letters(2), *digits(2), EOS], [*digits(4), EOS]] for _ in range(count)
            ],
            "ranks": [[1, 2, 3]] * count,
        }
    )


def job(directory: Path, output: Path, limit: int = 60, **changed: Any) -> DPOJob:
    settings = {"epochs": 1, "batch_size": 4, "beta": 0.5, **changed}
    optimizer = OptimizerConfig(lr=1e-3)
    cfg = DPOConfig(optimizer=optimizer, engine=EngineConfig(tokens_per_micro_batch=limit), **settings)
    model = ModelConfig(source="tiny", dtype="float32", attention="eager")
    return DPOJob(cfg, model, 0, directory, comparisons(10), comparisons(6, 1), output)


def engine(directory: Path, work: DPOJob, ranks: Ranks) -> TrainEngine:
    policy = load_policy(directory, None, "eager")
    module = PolicyModule(policy, logprobs_from_logits)
    return TrainEngine(module, work.cfg.engine, work.cfg.optimizer, torch.float32, ranks)


def logprob(model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    ids = torch.tensor([*prompt, *response])
    logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
    return -cross_entropy(logits, ids[len(prompt) :].long(), reduction="sum")


def test_the_reference_is_the_policy_as_it_starts(tiny: Path, one_rank: Ranks, tmp_path: Path) -> None:
    work = job(tiny, tmp_path)
    found, model = refer(engine(tiny, work, one_rank), work), load_policy(tiny, None, "eager")
    shown = work.comparisons
    for prompt, responses, own in zip(shown.prompt_ids, shown.responses, found.of_rankings, strict=True):
        expected = [float(logprob(model, prompt, response).detach()) for response in responses]
        assert own.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("limit", "share_prompts"), [(1, True), (60, True), (60, False), (1 << 20, True)])
def test_the_gradient_is_that_of_the_pairs_written_out(
    tiny: Path, one_rank: Ranks, tmp_path: Path, limit: int, share_prompts: bool
) -> None:
    """At the start all log-ratios are 0; after a step they are not. Both by plain torch, pair by pair."""
    work = job(tiny, tmp_path, limit, share_prompts=share_prompts)
    trained = engine(tiny, work, one_rank)
    reference = refer(trained, work)
    prompts = np.array([3, 0, 7])
    for _ in range(2):
        model = load_policy(tiny, None, "eager")
        own = PolicyModule.hf_names({name: t.clone() for name, t in trained.full_parameters()})
        model.load_state_dict(own, strict=False)
        losses = []
        for prompt in prompts:
            shown = work.comparisons
            h = [
                logprob(model, shown.prompt_ids[prompt], response) - float(ref)
                for response, ref in zip(shown.responses[prompt], reference.of_rankings[prompt], strict=True)
            ]
            pairs = [(0, 1), (0, 2), (1, 2)]
            losses.append(-sum(logsigmoid(0.5 * (h[better] - h[worse])) for better, worse in pairs) / 3)
        expected = torch.stack(losses).mean()
        expected.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))
        found = gradient(trained, work, prompts, reference)
        assert found["dpo/loss"] == pytest.approx(float(expected.detach()), abs=1e-4)
        assert trained.step(1e-3) == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_rankings_are_learnt_and_hold_for_prompts_never_seen(
    tiny: Path, one_rank: Ranks, tmp_path: Path, loss: str
) -> None:
    seen: list[dict[str, float]] = []
    work = job(tiny, tmp_path / "out", loss=loss, epochs=8, beta=0.1)
    train(one_rank, work, lambda step, metrics: seen.append(dict(metrics)))
    assert len(seen) == work.steps() == 24
    assert seen[0]["dpo/accuracy"] <= 0.5  # no pair is told apart at the start: all log-ratios are 0
    assert abs(seen[0]["dpo/margin"]) < 1e-3
    assert seen[-1]["dpo/heldout_accuracy"] > 0.85
    assert seen[-1]["dpo/loss"] < seen[0]["dpo/loss"]
    assert ("dpo/kl" in seen[0]) == (loss == "kto")
    load_policy(tmp_path / "out", torch.float32, "eager")
    assert "dpo/heldout_accuracy" not in seen[0]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_what_is_held_out_is_measured_by_the_loss_that_is_trained(
    tiny: Path, one_rank: Ranks, tmp_path: Path, loss: str
) -> None:
    """On rankings that are also trained on, the two are one number."""
    work = job(tiny, tmp_path, loss=loss)
    work = replace(work, heldout=work.comparisons)
    trained = engine(tiny, work, one_rank)
    reference, everything = refer(trained, work), np.arange(len(work.comparisons))
    gradient(trained, work, everything, reference)
    trained.step(1e-3)
    told = gradient(trained, work, everything, reference)
    found = evaluate(trained, work, reference.of_rankings, told.pop("dpo/kl", 0.0))
    assert found == pytest.approx(
        {name.replace("dpo/", "dpo/heldout_"): value for name, value in told.items()}, abs=1e-4
    )
    assert abs(told["dpo/margin"]) > 1e-3


def test_kto_is_measured_from_the_kl_of_mismatched_pairs(tiny: Path, one_rank: Ranks, tmp_path: Path) -> None:
    """Each prompt with a response to the next, good and bad ones in turn: 0 at the start, and never below."""
    work = job(tiny, tmp_path, loss="kto")
    trained = engine(tiny, work, one_rank)
    reference = refer(trained, work)
    shown, model = work.comparisons, load_policy(tiny, None, "eager")
    others = [(i + 1) % 10 for i in range(10)]
    others_responses = [shown.responses[other][other % len(shown.responses[other])] for other in others]
    pairs = zip(shown.prompt_ids, others_responses, strict=True)
    expected = [float(logprob(model, *pair).detach()) for pair in pairs]
    assert reference.of_mismatches.tolist() == pytest.approx(expected, abs=1e-4)
    assert gradient(trained, work, np.arange(4), reference)["dpo/kl"] == pytest.approx(0.0, abs=1e-4)
