"""A run's configuration: ml_collections files in, frozen dataclasses out. Every default of the package lives here.

A file in `configs/` starts from `default_config()`, changes what it wants and returns the ConfigDict; `build_config` converts
it once, rejects unknown keys (naming the nearest) and impossible combinations, and nothing below reads a ConfigDict again.
"""

from deepstack_jax.config.build import build_config, default_config, differences, from_stored, on_resume, to_dict, to_stored
from deepstack_jax.config.checks import check_config
from deepstack_jax.config.data import (
    CLIP_MEAN,
    CLIP_STD,
    LIMITS,
    CardsConfig,
    DataConfig,
    DataSpec,
    ImageConfig,
    LimitsConfig,
    PackingConfig,
    SetConfig,
    SyntheticConfig,
)
from deepstack_jax.config.fields import LENGTH, MAY_CHANGE, SAME_EXAMPLES
from deepstack_jax.config.from_weights import config_from_weights, filled_in, left_open
from deepstack_jax.config.schema import (
    Config,
    DecoderConfig,
    DeepStackConfig,
    EvaluationConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    OptimizerGroup,
    ProfileConfig,
    ProjectorConfig,
    RopeConfig,
    ScheduleConfig,
    TrainConfig,
    VisionConfig,
    register_section,
)
from deepstack_jax.errors import ConfigError
