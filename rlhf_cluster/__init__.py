"""InstructGPT's three steps as a distributed system on Ray, vLLM and DeepSpeed. Read `ppo.py` first."""

from __future__ import annotations

__version__ = "0.1.0"
