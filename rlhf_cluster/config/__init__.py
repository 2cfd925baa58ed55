"""The configuration of a run: its typed tree, how it is composed from `conf/`, and what is refused before it starts.

Nothing else knows Hydra or OmegaConf: what `load` returns is plain dataclasses, treated as constant from then on.
"""

from rlhf_cluster.config.loading import conf_directory, differences, load, load_file, to_yaml
from rlhf_cluster.config.refusal import ConfigError
from rlhf_cluster.config.stages import (
    ADVANTAGES,
    GROUP_ADVANTAGES,
    AdvantageConfig,
    DPOConfig,
    GuardrailsConfig,
    KLConfig,
    PPOConfig,
    PTXConfig,
    RailConfig,
    RankingConfig,
    RMConfig,
    SFTConfig,
)
from rlhf_cluster.config.tree import (
    ClusterConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    RunConfig,
    part_names,
    reward_budget_s,
    roles,
)
from rlhf_cluster.config.validation import validate
from rlhf_cluster.config.workers import (
    COMPUTED_REWARDS,
    EngineConfig,
    GenerationConfig,
    LearnerConfig,
    LoRAConfig,
    OptimizerConfig,
    ReferenceConfig,
    Resources,
    RewardConfig,
    RewardPart,
    WeightsConfig,
)

__all__ = [
    "ADVANTAGES",
    "COMPUTED_REWARDS",
    "GROUP_ADVANTAGES",
    "AdvantageConfig",
    "ClusterConfig",
    "ConfigError",
    "DPOConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "GuardrailsConfig",
    "KLConfig",
    "LearnerConfig",
    "LoRAConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PTXConfig",
    "RMConfig",
    "RailConfig",
    "RankingConfig",
    "ReferenceConfig",
    "Resources",
    "RewardConfig",
    "RewardPart",
    "RunConfig",
    "SFTConfig",
    "WeightsConfig",
    "conf_directory",
    "differences",
    "load",
    "load_file",
    "part_names",
    "reward_budget_s",
    "roles",
    "to_yaml",
    "validate",
]
