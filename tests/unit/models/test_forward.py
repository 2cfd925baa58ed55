from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MistralConfig, PreTrainedModel, Qwen2Config

from rlhf_cluster.models.batching import PackedBatch, dummy_batch, in_order, micro_batches, pack, share, singles
from rlhf_cluster.models.forward import PolicyModule, attends_to_all, hidden_states, lm_head, shared_prompt_mask
from rlhf_cluster.models.load import load_policy

TOLERANCE = 1e-5


def response_logprobs(module: PolicyModule, batches: list[PackedBatch], count: int) -> list[np.ndarray]:
    with torch.no_grad():
        parts = [batch.split(module(*batch.policy_arguments(), 0.7)[0]) for batch in batches]
    return in_order(batches, parts, count)


def largest_difference(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


@cache
def plain(directory: Path) -> PreTrainedModel:
    """As transformers itself loads it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture
def alone(directory: Path, ragged: tuple) -> list[np.ndarray]:
    """Logprobs by plain transformers: each sequence by itself, no padding, no positions given, whole logits."""
    model, rows = plain(directory), []
    for prompt, response in zip(*ragged, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        with torch.no_grad():
            logs = torch.log_softmax(model(ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0] / 0.7, -1)
        predicted = logs[len(prompt) - 1 : -1].gather(-1, ids[len(prompt) :, None])
        rows.append(predicted.squeeze(-1).numpy())
    return rows


@pytest.mark.parametrize("limit", [1, 40, 1000])
def test_padding_and_company_change_no_logprob(
    policy: PreTrainedModel, alone: list[np.ndarray], ragged: tuple, logprob_fn: Callable, limit: int
) -> None:
    batches = micro_batches(*ragged, singles(7), limit)
    found = response_logprobs(PolicyModule(policy, logprob_fn), batches, 7)
    assert largest_difference(found, alone) < TOLERANCE


@pytest.mark.parametrize("context", [19, 30, 60])
def test_packing_equals_separate_forwards(
    policy: PreTrainedModel, alone: list[np.ndarray], ragged: tuple, logprob_fn: Callable, context: int
) -> None:
    lengths = [len(prompt) + len(response) for prompt, response in zip(*ragged, strict=True)]
    rows = pack(lengths, context)
    assert max(len(row) for row in rows) > 1
    batches = micro_batches(*ragged, rows, 2 * context)
    found = response_logprobs(PolicyModule(policy, logprob_fn), batches, 7)
    assert largest_difference(found, alone) < TOLERANCE


@pytest.mark.parametrize("context", [20, 60])
def test_sharing_a_prompt_equals_separate_forwards(
    policy: PreTrainedModel, ragged: tuple, logprob_fn: Callable, context: int
) -> None:
    """Logprobs, and the gradient of a sum that weighs every token differently."""
    prompts, responses = [ragged[0][i] for i in (0, 1, 0, 3, 0, 1, 0)], ragged[1]
    module, rows = PolicyModule(policy, logprob_fn), share(prompts, responses, context)
    assert len(rows) < 6
    outcomes = []
    for plan, shared in ((singles(7), False), (rows, True)):
        policy.zero_grad()
        batches = micro_batches(prompts, responses, plan, 1000, shared)
        weights = np.cumsum([0, *map(len, responses)])
        for batch in batches:
            own = np.concatenate([np.arange(weights[s], weights[s + 1]) for s in batch.sequences])
            (module(*batch.policy_arguments(), 0.7)[0] * torch.from_numpy(np.sin(own))).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        outcomes.append((response_logprobs(module, batches, 7), gradient))
    (alone, expected), (together, gradient) = outcomes
    assert largest_difference(together, alone) < TOLERANCE
    assert float((gradient - expected).norm() / expected.norm()) < TOLERANCE


def test_a_response_sees_its_prompt_and_itself_by_hand() -> None:
    """A prompt of one token, a response of two and one of one."""
    mask = shared_prompt_mask(torch.tensor([[0, 1, 1, 2]]), torch.float32)
    assert (mask == 0).int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]]]
    assert mask.min() == torch.finfo(torch.float32).min


def test_models_that_do_not_see_all_share_no_prompt(policy: PreTrainedModel) -> None:
    assert attends_to_all(policy)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    windowed = Qwen2Config(vocab_size=9, use_sliding_window=True, sliding_window=4, max_window_layers=1, **shape)
    everywhere = MistralConfig(vocab_size=9, sliding_window=4, num_key_value_heads=2, **shape)
    recurrent = MambaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, state_size=2)
    for config in (windowed, everywhere, recurrent):
        assert not attends_to_all(AutoModelForCausalLM.from_config(config))
    whole = MistralConfig(vocab_size=9, sliding_window=None, num_key_value_heads=2, **shape)
    assert attends_to_all(AutoModelForCausalLM.from_config(whole))


def test_what_follows_a_row_is_never_read(policy: PreTrainedModel, ragged: tuple, logprob_fn: Callable) -> None:
    module = PolicyModule(policy, logprob_fn)
    (batch,) = micro_batches(*ragged, singles(7), 1000)
    before, _ = module(*batch.policy_arguments(), 1.0)
    filled = batch.input_ids.clone()
    for row, last in enumerate(batch.last_positions().tolist()):
        filled[row, last - row * filled.shape[1] + 1 :] = 258
    assert not torch.equal(filled, batch.input_ids)
    after, _ = module(filled, *batch.policy_arguments()[1:], 1.0)
    assert torch.equal(before, after)


def test_gpt2_positions_count_from_the_first_token(directories: dict[str, Path], logprob_fn: Callable) -> None:
    policy = load_policy(directories["gpt2"], torch.float32, "eager")
    module = PolicyModule(policy, logprob_fn)
    prompt, response = np.array([3, 1], np.int32), np.array([4, 1], np.int32)
    (batch,) = micro_batches([prompt], [response], singles(1), 10)
    right, _ = module(*batch.policy_arguments(), 1.0)
    shifted, _ = module(batch.input_ids, batch.position_ids + 1, *batch.policy_arguments()[2:], 1.0)
    assert (right - shifted).abs().max() > 1e-3  # absolute positions matter, so the tests above would have seen them


def test_chunks_change_neither_logprobs_nor_gradients(
    policy: PreTrainedModel, ragged: tuple, logprob_fn: Callable
) -> None:
    (batch,) = micro_batches(*ragged, singles(7), 1000)
    outcomes = []
    for chunk in (1000, 5):
        policy.zero_grad()
        logprobs, entropies = PolicyModule(policy, logprob_fn, chunk)(*batch.policy_arguments(), 0.7)
        (logprobs.sum() + 0.3 * entropies.sum()).backward()
        gradients = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        outcomes.append((logprobs.detach(), gradients))
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=1e-4, rtol=1e-4)


def test_several_chunks_are_recomputed_rather_than_kept(
    policy: PreTrainedModel, ragged: tuple, logprob_fn: Callable
) -> None:
    sizes: list[int] = []

    def recorded(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(logits))
        return logprob_fn(logits, ids, temperature)

    (batch,) = micro_batches(*ragged, singles(7), 1000)  # 34 response tokens
    for chunk, forward, again in ((15, [15, 15, 4], [4, 15, 15]), (34, [34], [])):
        sizes.clear()
        logprobs, _ = PolicyModule(policy, recorded, chunk)(*batch.policy_arguments(), 1.0)
        assert sizes == forward
        logprobs.sum().backward()
        assert sorted(sizes[len(forward) :]) == again


def test_head_is_the_models_own(policy: PreTrainedModel, ragged: tuple) -> None:
    (batch,) = micro_batches(*ragged, singles(7), 1000)
    weight, bias = lm_head(policy)
    assert bias is None
    with torch.no_grad():
        ours = hidden_states(policy, batch.input_ids, batch.position_ids) @ weight.T
        theirs = policy(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs.flatten(0, 1), atol=TOLERANCE, rtol=TOLERANCE)


def test_wrapped_parameters_are_the_models_each_once(policy: PreTrainedModel, logprob_fn: Callable) -> None:
    module = PolicyModule(policy, logprob_fn)
    wrapped = {name.removeprefix("model."): parameter for name, parameter in module.named_parameters()}
    plain = dict(policy.named_parameters())
    assert wrapped.keys() == plain.keys()
    assert all(wrapped[name] is plain[name] for name in plain)


def test_head_is_called_once_whatever_the_number_of_tokens(policy: PreTrainedModel, logprob_fn: Callable) -> None:
    """ZeRO-3 gathers at each module call: ranks with different numbers of tokens must make the same calls."""
    module = PolicyModule(policy, logprob_fn, chunk=2)
    calls: list[str] = []
    for name, child in module.named_modules():
        child.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    module(*dummy_batch().policy_arguments(), 1.0)
    few, calls[:] = list(calls), []
    (batch,) = micro_batches([np.arange(3)], [np.arange(9)], singles(1), 100)
    module(*batch.policy_arguments(), 1.0)
    assert calls == few
    assert calls.count("head") == 1
