"""Hugging Face models: made or fetched, loaded, run over batches of ragged sequences, saved as plain directories.

Takes a `ModelConfig` or a directory, and numpy token ids; gives torch modules and tensors, and directories that any
Hugging Face tool opens. The only room that pads or packs. It refuses to know losses, optimizers, Ray, vLLM, DeepSpeed.
"""

from __future__ import annotations


class ModelError(ValueError):
    """A model, tokenizer or batch that cannot be used; its message is the one sentence that the user reads."""
