"""GRPO by TRL's `GRPOTrainer` with Hugging Face's generation, as its documentation has it: what `grpo.py` is beside.
Nothing of the package is used, on purpose."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def trl_seconds(
    policy: Path, work: Path, prompts: Sequence[str], settings: dict[str, Any], threads: int
) -> list[float]:
    """Seconds of each step. `settings`: prompts and samples of a step, tokens of a response, steps, learning rate."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    torch.set_num_threads(threads)
    seconds: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    responses = settings["prompts"] * settings["samples"]
    args = GRPOConfig(
        output_dir=str(work),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": torch.bfloat16, "attn_implementation": "sdpa"},
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        per_device_train_batch_size=responses,
        gradient_accumulation_steps=1,
        num_generations=settings["samples"],
        max_completion_length=settings["tokens"],
        generation_kwargs={"min_new_tokens": settings["tokens"]},
        temperature=1.0,
        beta=0.0,
        max_steps=settings["steps"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        gradient_checkpointing=False,
    )

    def reward(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 97) / 97 for text in completions]

    trainer = GRPOTrainer(
        model=str(policy),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        callbacks=[Watch()],
    )
    trainer.train()
    return seconds
