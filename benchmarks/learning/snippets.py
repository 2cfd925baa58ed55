"""The sentiment task: going on with a review of which the first words are given, a small model made from nothing.

The reviews are the snippets that come with VADER (Hutto and Gilbert 2014): a folder with
`movieReviewSnippets_GroundTruth.txt` and `amazonReviewSnippets_GroundTruth.txt`, tab separated (id, rating, text).
People's ratings in them are not used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import small
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FILES = ("movieReviewSnippets_GroundTruth.txt", "amazonReviewSnippets_GroundTruth.txt")
FIRST_WORDS, LEAST_WORDS, VOCABULARY = 6, 10, 2048
CONTEXT = 256
PAD, EOS = "<|pad|>", "<|end|>"


def write_data(source: Path, directory: Path) -> None:
    """`demonstrations.jsonl`: the first words of each snippet as its prompt, the rest as its completion;
    `prompts.jsonl`: each beginning once."""
    directory.mkdir(parents=True, exist_ok=True)
    split = [(" ".join(words[:FIRST_WORDS]), " " + " ".join(words[FIRST_WORDS:])) for words in _snippets(source)]
    lines = [json.dumps({"prompt": prompt, "completion": rest}) + "\n" for prompt, rest in split]
    (directory / "demonstrations.jsonl").write_text("".join(lines))
    beginnings = dict.fromkeys(prompt for prompt, _ in split)
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in beginnings))


def _snippets(source: Path) -> Iterator[list[str]]:
    for name in FILES:
        for line in (source / name).read_text(encoding="latin-1").splitlines():
            words = line.split("\t")[-1].split()
            if len(words) >= LEAST_WORDS:
                yield words


def write_model(source: Path, directory: Path, seed: int) -> None:
    """A small Llama, and a byte-level BPE of `VOCABULARY` tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((" ".join(words) for words in _snippets(source)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=EOS, eos_token=EOS, pad_token=PAD)
    small.write_model(tokenizer, directory, CONTEXT, seed)
