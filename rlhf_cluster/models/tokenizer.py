"""Tokenizers: loaded with a chat template and a pad token, whatever the directory says of either.

Takes a plain Hugging Face directory; gives a tokenizer that renders conversations and ends them with EOS. It refuses to
make masks: no code of ours reads the pad token.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_cluster.models import ModelError
from rlhf_cluster.models.load import load_config, quietly

# For tokenizers without a template of their own (GPT-2). A turn's text starts on a line of its own, since byte-pair
# vocabularies write a word after a space and at the start of a line differently; so prompt and response may be
# tokenized apart:
#
#     User:
#     What is the capital of France?
#
#     Assistant:
#     Paris.<EOS>
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ 'Assistant:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
QUESTION = "<the question>"


def load_tokenizer(path: Path, chat_template: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer of a directory; `chat_template` (Jinja) overrides its own, PLAIN_TEMPLATE stands in for none.

    Where it has no pad token, EOS is set as one, without a change to the vocabulary, so that libraries are content.
    Raises ModelError without an EOS token or with a template that does not render.
    """
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} holds no tokenizer that transformers can load") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {path} has no EOS token; responses could never end: set eos_token in it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = chat_template or tokenizer.chat_template or PLAIN_TEMPLATE
    _check_template(tokenizer, path)
    return tokenizer


def _check_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    try:
        text = _rendered(tokenizer, QUESTION)
    except (TemplateError, ValueError, TypeError) as error:
        raise ModelError(f"the chat template for {path} does not render a user message: {error}") from error
    if QUESTION not in text:
        raise ModelError(f"the chat template for {path} leaves the user's message out; it renders {text!r}")


def around_question(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts before and behind a user's only turn, up to where the answer begins."""
    before, _, behind = _rendered(tokenizer, QUESTION).partition(QUESTION)
    return before, behind


def _rendered(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def context_length(path: Path) -> int:
    """Tokens that the model of a directory can attend to (`max_position_embeddings`, `n_positions` in GPT-2)."""
    config = load_config(path)
    length = getattr(config, "max_position_embeddings", None)
    if not length:
        raise ModelError(f"{path}/config.json does not say how many positions the model has (max_position_embeddings)")
    return int(length)
