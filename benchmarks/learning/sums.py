"""The arithmetic task: "a+b=", both below 100, a model made from nothing, and demonstrations that are often wrong.

Data and model are made by seed alone; of the 10,000 sums some are never shown (`data.heldout_prompts`).
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_cluster.models.load import save_policy
from rlhf_cluster.models.tiny import byte_tokenizer

BELOW = 100
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LAYERS, WIDTH, CONTEXT = 4, 128, 32


def write_data(directory: Path, seed: int, demonstrations: int, wrong: float) -> None:
    """`prompts.jsonl` with every sum and its answer; `demonstrations.jsonl`, of which a share of `wrong` is wrong: a
    digit of the answer is another one."""
    rng = random.Random(seed)
    sums = [(a, b) for a in range(BELOW) for b in range(BELOW)]
    rng.shuffle(sums)
    directory.mkdir(parents=True, exist_ok=True)
    prompts = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    shown = [
        {
            "prompt": row["prompt"],
            "completion": _misprint(row["answer"], rng) if rng.random() < wrong else row["answer"],
        }
        for row in rng.sample(prompts, demonstrations)
    ]
    (directory / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))


def _misprint(answer: str, rng: random.Random) -> str:
    place = rng.randrange(len(answer))
    digit = rng.choice([d for d in "0123456789" if d != answer[place]])
    return answer[:place] + digit + answer[place + 1 :]


def write_model(directory: Path, seed: int) -> None:
    """A Llama of `LAYERS` x `WIDTH` over bytes, not trained at all."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    save_policy(config, LlamaForCausalLM(config).state_dict(), tokenizer, directory, torch.float32)
