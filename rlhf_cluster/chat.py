"""Talking to a policy in the terminal, with history."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import TextStreamer

from rlhf_cluster.config import ConfigError
from rlhf_cluster.models.load import load_policy, resolve_attention, resolve_dtype
from rlhf_cluster.models.tokenizer import context_length, load_tokenizer
from rlhf_cluster.telemetry.comparison import printable


def chat(policy: Path, max_tokens: int, temperature: float) -> None:
    """Reads turns until an empty line or end of input; the oldest turns fall out where the context ends."""
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"--temperature {temperature}: it must be 0 (always the likeliest token) or above")
    tokenizer = load_tokenizer(policy)
    limit = context_length(policy) - max_tokens
    if max_tokens < 1 or limit < 1:
        raise ConfigError(
            f"--max-tokens {max_tokens}: it must be from 1 to {limit + max_tokens - 1}, since the model reads "
            f"{limit + max_tokens} tokens at most"
        )
    model = load_policy(policy, resolve_dtype("auto"), resolve_attention("auto"))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    messages: list[dict[str, str]] = []
    print("an empty line ends the talk")
    while text := _asked():
        messages.append({"role": "user", "content": text})
        ids = _prompt(tokenizer, messages, limit)
        streamer = _Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        output = model.generate(
            torch.tensor([ids], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            max_new_tokens=max_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer,
            use_cache=True,
            **sampling,
        )
        messages.append(
            {"role": "assistant", "content": tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)}
        )


class _Shown(TextStreamer):
    """Prints what is sampled as it comes, without what could steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


def _asked() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _prompt(tokenizer, messages: list[dict[str, str]], limit: int) -> list[int]:  # type: ignore[no-untyped-def]
    """The conversation as tokens, without its oldest turns where it would not fit."""
    while True:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(encoded) <= limit or len(messages) == 1:
            return list(encoded[-limit:])
        del messages[:2]
