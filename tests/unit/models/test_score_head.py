from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from rlhf_cluster.models import ModelError
from rlhf_cluster.models.batching import in_order, micro_batches, pack, singles
from rlhf_cluster.models.score_head import ScalarHeadModel
from rlhf_cluster.models.tiny import byte_tokenizer


@cache
def loaded(directory: Path, attention: str) -> ScalarHeadModel:
    return ScalarHeadModel.from_policy(directory, torch.float32, attention, seed=3)


@pytest.fixture(params=["eager", "sdpa"])
def scorer(request: pytest.FixtureRequest, directory: Path) -> ScalarHeadModel:
    model = copy.deepcopy(loaded(directory, request.param))
    with torch.no_grad():
        model.score.bias.fill_(0.5)
    return model


def scores(model: ScalarHeadModel, ragged: tuple, limit: int, rows: list[list[int]]) -> np.ndarray:
    found = np.zeros(len(ragged[0]), np.float32)
    for batch in micro_batches(*ragged, rows, limit):
        with torch.no_grad():
            found[batch.sequences] = model(*batch.score_arguments()).numpy()
    return found


def test_score_is_the_head_at_the_true_last_token(scorer: ScalarHeadModel, directory: Path, ragged: tuple) -> None:
    body = AutoModelForCausalLM.from_pretrained(directory).eval().base_model
    expected = []
    for prompt, response in zip(*ragged, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.no_grad():
            last = body(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, -1]
        expected.append((last @ scorer.score.weight[0].detach() + 0.5).item())
    for limit, rows in ((1, singles(7)), (40, singles(7)), (1000, singles(7)), (60, pack([20] * 7, 60))):
        np.testing.assert_allclose(scores(scorer, ragged, limit, rows), expected, atol=1e-5)


def test_score_does_not_depend_on_what_follows(scorer: ScalarHeadModel, ragged: tuple) -> None:
    (batch,) = micro_batches(*ragged, singles(7), 1000)
    before = scorer(*batch.score_arguments())
    for filling in (258, 7):
        filled = batch.input_ids.clone()
        for row, last in enumerate(batch.last_positions().tolist()):
            filled[row, last - row * filled.shape[1] + 1 :] = filling
        assert torch.equal(scorer(filled, *batch.score_arguments()[1:]), before)


def test_values_precede_response_tokens(scorer: ScalarHeadModel, ragged: tuple) -> None:
    """The value before token t is the score of prompt + response[:t]: the same head one position earlier."""
    batches = micro_batches(*ragged, singles(7), 40)
    with torch.no_grad():
        values = in_order(batches, [batch.split(scorer(*batch.value_arguments())) for batch in batches], 7)
    prompts, responses = ragged
    cut = [
        np.array([scores(scorer, ([p], [r[:t]]), 99, [[0]])[0] for t in range(len(r))])
        for p, r in zip(prompts, responses, strict=True)
    ]
    assert [len(row) for row in values] == [len(response) for response in responses]
    assert max(float(np.abs(a - b).max()) for a, b in zip(values, cut, strict=True)) < 1e-5


def test_round_trip_gives_the_same_scores(scorer: ScalarHeadModel, ragged: tuple, tmp_path: Path) -> None:
    scorer.save(tmp_path, byte_tokenizer(), torch.float32)
    again = ScalarHeadModel.from_directory(tmp_path, torch.float32, scorer.config._attn_implementation)
    assert np.array_equal(scores(again, ragged, 40, singles(7)), scores(scorer, ragged, 40, singles(7)))
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is type(scorer.body)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(body).__name__]


def test_head_is_float32_under_a_bfloat16_body(directories: dict[str, Path], tmp_path: Path) -> None:
    model = ScalarHeadModel.from_policy(directories["llama"], torch.bfloat16, "eager", seed=0)
    with torch.no_grad():
        model.score.bias.fill_(1.0009765625)  # 1 + 2**-10, which bfloat16 does not have
    model.save(tmp_path, byte_tokenizer(), torch.bfloat16)
    again = ScalarHeadModel.from_directory(tmp_path, torch.bfloat16, "eager")
    assert again.score.bias.item() == 1.0009765625
    (batch,) = micro_batches([np.arange(3)], [np.arange(4)], singles(1), 10)
    assert again(*batch.score_arguments()).dtype is torch.float32


def test_new_head_is_drawn_as_the_paper_says(directories: dict[str, Path]) -> None:
    draws = [ScalarHeadModel.from_policy(directories["llama"], torch.float32, "eager", seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0].score.weight, draws[1].score.weight)
    assert not torch.equal(draws[0].score.weight, draws[2].score.weight)
    assert draws[0].score.bias.item() == 0.0
    expected = torch.randn(32, generator=torch.Generator().manual_seed(0)) / 33**0.5
    torch.testing.assert_close(draws[0].score.weight[0].detach(), expected)


def test_a_policy_is_not_a_reward_model(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a reward model or critic: it holds no score_head\.safetensors"):
        ScalarHeadModel.from_directory(directory, torch.float32, "eager")


def test_a_head_of_another_body_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    ScalarHeadModel.from_policy(directories["gpt2"], torch.float32, "eager", 0).save(
        tmp_path, byte_tokenizer(), torch.float32
    )
    (tmp_path / "score_head.json").write_text('{"format": 1, "hidden_size": 768}')
    with pytest.raises(ModelError, match=r"the body beside it needs .*'hidden_size': 32"):
        ScalarHeadModel.from_directory(tmp_path, torch.float32, "eager")
