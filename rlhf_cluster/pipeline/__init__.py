"""The three stages as one run: SFT -> reward model -> PPO, each stage's output the next one's input.

A finished stage is never run again: a run that was cut off goes on from its last finished stage, and in PPO from its
last checkpoint. This room wires; what is learnt stands in `sft.py`, `rm.py`, `dpo.py` and `ppo.py`.
"""

from rlhf_cluster.pipeline.runner import roles_at_once, run

__all__ = ["roles_at_once", "run"]
