"""Supervised fine-tuning: the batches, and that the gradient is that of the response tokens alone, EOS among them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_cluster.algo.logprobs import logprobs_from_logits
from rlhf_cluster.config import EngineConfig, ModelConfig, OptimizerConfig, SFTConfig
from rlhf_cluster.engine.engine import TrainEngine
from rlhf_cluster.engine.ranks import Ranks
from rlhf_cluster.models import ModelError
from rlhf_cluster.models.forward import PolicyModule
from rlhf_cluster.models.load import add_residual_dropout, load_policy
from rlhf_cluster.records import Demonstrations, Pretraining
from rlhf_cluster.sft import SFTJob, gradient, train

EOS = 258


def demonstrations(count: int = 11) -> Demonstrations:
    rng = np.random.default_rng(0)
    return Demonstrations.of(
        {
            "prompt_id": [f"d{i}" for i in range(count)],
            "prompt_ids": [rng.integers(0, 256, rng.integers(1, 12)).tolist() for _ in range(count)],
            "response_ids": [[*rng.integers(0, 256, rng.integers(0, 9)).tolist(), EOS] for _ in range(count)],
        }
    )


def job(directory: Path, output: Path, packing: bool = True, epochs: int = 1, lr: float = 1e-3) -> SFTJob:
    optimizer = OptimizerConfig(lr=lr, schedule="cosine")
    cfg = SFTConfig(epochs, 3, packing, optimizer=optimizer, engine=EngineConfig(tokens_per_micro_batch=50))
    model = ModelConfig(source="tiny", dtype="float32", attention="eager", context=25)
    return SFTJob(cfg, model, seed=4, base_path=directory, demonstrations=demonstrations(), output=output)


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_has_each_demonstration_once(tmp_path: Path, packing: bool) -> None:
    work = job(tmp_path, tmp_path, packing, epochs=2)
    batches = list(work.batches())
    assert len(batches) == work.steps() == 2 * math.ceil(len(work.rows()) / 3)
    for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        assert all(1 <= len(batch) <= 3 for batch in epoch)
        assert sorted(i for batch in epoch for row in batch for i in row) == list(range(11))
    assert batches[: len(batches) // 2] != batches[len(batches) // 2 :]


def test_batches_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    """Ranks agree on a batch by computing it; the job does not know the rank that asks."""
    assert list(job(tmp_path, tmp_path).batches()) == list(job(tmp_path, tmp_path).batches())


def test_packed_rows_keep_the_context(tmp_path: Path) -> None:
    work = job(tmp_path, tmp_path)
    lengths = [
        len(p) + len(r) for p, r in zip(work.demonstrations.prompt_ids, work.demonstrations.response_ids, strict=True)
    ]
    assert all(sum(lengths[i] for i in row) <= 25 for row in work.rows())
    assert max(map(len, work.rows())) > 1


def plain_loss(model: PreTrainedModel, shown: Demonstrations, members: list[int]) -> torch.Tensor:
    """Each demonstration by itself through plain transformers: the mean over all their response tokens."""
    total, tokens = torch.zeros(()), 0
    for i in members:
        prompt, response = shown.prompt_ids[i], shown.response_ids[i]
        ids = torch.tensor([*prompt, *response])[None]
        labels = torch.tensor([-100] * len(prompt) + response.tolist())
        assert labels[-1] == EOS
        logits = model(input_ids=ids).logits[0]
        total = total + cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        tokens += len(response)
    return total / tokens


@pytest.mark.parametrize("packing", [True, False])
def test_gradient_is_that_of_separate_sequences(tiny: Path, one_rank: Ranks, tmp_path: Path, packing: bool) -> None:
    work = job(tiny, tmp_path, packing)
    rows = work.rows()[:4]
    policy, plain = (load_policy(tiny, torch.float32, "eager") for _ in range(2))
    module = PolicyModule(policy, logprobs_from_logits)
    engine = TrainEngine(module, EngineConfig(), OptimizerConfig(), torch.float32, one_rank)
    losses, padded = gradient(engine, work, rows)
    expected = plain_loss(plain, work.demonstrations, [i for row in rows for i in row])
    expected.backward()
    assert losses == {"sft/loss": pytest.approx(float(expected.detach()), abs=1e-6)}
    assert padded >= sum(len(work.demonstrations.prompt_ids[i]) for row in rows for i in row)
    for (name, ours), (_, theirs) in zip(policy.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_training_learns_and_leaves_a_plain_directory(tiny: Path, one_rank: Ranks, tmp_path: Path) -> None:
    work = job(tiny, tmp_path / "policy", epochs=4, lr=3e-3)
    reports: list[dict[str, float]] = []
    train(one_rank, work, lambda step, metrics: reports.append(dict(metrics)))
    assert len(reports) == work.steps()
    assert reports[0]["sft/lr"] == 3e-3 and reports[-1]["sft/lr"] == pytest.approx(3e-4)  # cosine to a tenth
    everything = list(range(11))
    with torch.no_grad():
        before, after = (
            float(plain_loss(load_policy(path, torch.float32, "eager"), work.demonstrations, everything))
            for path in (tiny, work.output)
        )
    assert after < before - 0.5


def test_what_bfloat16_training_leaves_is_finer_than_bfloat16(tiny: Path, one_rank: Ranks, tmp_path: Path) -> None:
    """The masters, which PPO's begin with, and not the copies that were computed with."""
    work = job(tiny, tmp_path / "policy", lr=1e-5)
    work.model.dtype = "bfloat16"
    train(one_rank, work, lambda step, metrics: None)
    before, after = (load_policy(path, None, "eager").state_dict() for path in (tiny, work.output))
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    moved = [tensor for name, tensor in after.items() if not torch.equal(tensor, before[name].float())]
    assert moved and any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in moved)


def text(count: int = 4) -> Pretraining:
    return Pretraining.of({"token_ids": np.random.default_rng(5).integers(0, 256, (count, 20)).tolist()})


def test_text_is_mixed_into_every_step_in_its_share(tmp_path: Path) -> None:
    """A quarter of a step's sequences: one beside three. Each block once before any comes again."""
    work = replace(job(tmp_path, tmp_path, epochs=3), pretraining=text())
    work.cfg.pretraining_share = 0.25
    batches = list(work.batches())
    blocks = [i - 11 for batch in batches for row in batch for i in row if i >= 11]
    assert len(blocks) == len(batches) == work.steps()
    assert all(sorted(blocks[start : start + 4]) == [0, 1, 2, 3] for start in range(0, len(blocks) - 3, 4))
    plain = list(job(tmp_path, tmp_path, epochs=3).batches())
    assert [[row for row in batch if row[0] < 11] for batch in batches] == plain  # the demonstrations are as ever


def test_text_has_its_share_of_the_loss(tiny: Path, one_rank: Ranks, tmp_path: Path) -> None:
    """However many labels it has; all of its tokens are, but the first."""
    work = replace(job(tiny, tmp_path), pretraining=text())
    work.cfg.pretraining_share = 0.1
    policy, plain = (load_policy(tiny, torch.float32, "eager") for _ in range(2))
    module = PolicyModule(policy, logprobs_from_logits)
    engine = TrainEngine(module, EngineConfig(), OptimizerConfig(), torch.float32, one_rank)
    losses, _ = gradient(engine, work, [[0, 3], [11], [12]])
    ids = torch.tensor(np.array(text().token_ids[:2]), dtype=torch.long)
    of_text = cross_entropy(plain(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    shown = plain_loss(plain, work.demonstrations, [0, 3])
    (0.9 * shown + 0.1 * of_text).backward()
    assert losses == {
        "sft/loss": pytest.approx(float(shown.detach()), abs=1e-5),
        "sft/pretraining_loss": pytest.approx(float(of_text.detach()), abs=1e-5),
    }
    for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_dropout_is_another_in_every_forward(tiny: Path) -> None:
    plain, dropped = (load_policy(tiny, torch.float32, "eager") for _ in range(2))
    add_residual_dropout(dropped, 0.5)
    ids = torch.arange(12)[None]
    torch.manual_seed(0)
    once, twice = dropped(ids).logits, dropped(ids).logits
    assert not torch.allclose(once, twice, atol=1e-3) and not torch.allclose(once, plain(ids).logits, atol=1e-3)
    many = torch.stack([dropped(ids).logits for _ in range(3)])
    assert torch.isfinite(many).all()


def test_dropout_is_on_in_training_and_not_in_what_is_left(tiny: Path, one_rank: Ranks, tmp_path: Path) -> None:
    """Without it the same job leaves the same policy; what is left has none even where it is trained further."""
    left = []
    for i, rate in enumerate([0.0, 0.0, 0.2]):
        work = job(tiny, tmp_path / str(i) / "policy")
        work.cfg.dropout = rate
        train(one_rank, work, lambda step, metrics: None)
        left.append(AutoModelForCausalLM.from_pretrained(work.output, attn_implementation="eager").train())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain, again, dropped, once_more = (left[i](ids).logits for i in (0, 1, 2, 2))
    torch.testing.assert_close(plain, again, atol=1e-5, rtol=1e-5)
    assert float((plain - dropped).abs().max()) > 1e-2
    assert torch.equal(dropped, once_more)


def test_dropout_by_hand() -> None:
    """Half of what a layer adds falls away, the rest counts twice: in the mean nothing changes."""
    model = torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"o_proj": torch.nn.Identity()})})
    add_residual_dropout(model, 0.5)
    torch.manual_seed(0)
    found = model["self_attn"]["o_proj"](torch.ones(20_000))
    assert set(found.tolist()) == {0.0, 2.0} and abs(float(found.mean()) - 1) < 0.02
    with pytest.raises(ModelError, match="Linear has no layers named self_attn"):
        add_residual_dropout(torch.nn.Linear(1, 1), 0.1)


def test_each_epoch_waits_to_be_chosen(tiny: Path, one_rank: Ranks, tmp_path: Path) -> None:
    work = job(tiny, tmp_path / "policy", epochs=3)
    work.cfg.select = "reward"
    train(one_rank, work, lambda step, metrics: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-1", "epoch-2", "epoch-3"]
    ids = torch.arange(12)[None]
    logits = [load_policy(work.epoch_output(epoch), torch.float32, "eager")(ids).logits for epoch in (1, 2, 3)]
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])
