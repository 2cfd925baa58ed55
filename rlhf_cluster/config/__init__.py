"""The configuration of a run: its typed tree, how it is composed from `conf/`, and what is refused before it starts.

Nothing else knows Hydra or OmegaConf: what `load` returns is plain dataclasses, treated as constant from then on.
"""

from rlhf_cluster.config.loading import conf_directory, differences, load, load_file, to_yaml
from rlhf_cluster.config.tree import (
    AdvantageConfig,
    ClusterConfig,
    ConfigError,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    GenerationConfig,
    KLConfig,
    LearnerConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PTXConfig,
    RankingConfig,
    ReferenceConfig,
    Resources,
    RewardConfig,
    RMConfig,
    RunConfig,
    SFTConfig,
    WeightsConfig,
    roles,
)
from rlhf_cluster.config.validation import validate

__all__ = [
    "AdvantageConfig",
    "ClusterConfig",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "KLConfig",
    "LearnerConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PTXConfig",
    "RMConfig",
    "RankingConfig",
    "ReferenceConfig",
    "Resources",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "WeightsConfig",
    "conf_directory",
    "differences",
    "load",
    "load_file",
    "roles",
    "to_yaml",
    "validate",
]
