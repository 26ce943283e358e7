"""The whole configuration schema, and how a YAML file plus ``key=value`` overrides become one.

Every key has one place and one meaning; unknown keys are refused with the nearest valid one.
"""

from imgshared.config.load import dump, keys, load, validate
from imgshared.config.methods import (
    ApolloConfig,
    CutConfig,
    CycleGanConfig,
    LinearConfig,
    MethodConfig,
    MvaeConfig,
    Pix2pixConfig,
    RegressionConfig,
    TranslatorConfig,
    TranslatorWeights,
)
from imgshared.config.schema import (
    AugmentConfig,
    EvaluateConfig,
    Experiment,
    ExportConfig,
    NormaliseConfig,
    PredictConfig,
    PrepareConfig,
    SegmentConfig,
    SimulateConfig,
    SlideConfig,
    SplitConfig,
    TrainConfig,
)

__all__ = [
    "ApolloConfig",
    "AugmentConfig",
    "CutConfig",
    "CycleGanConfig",
    "EvaluateConfig",
    "Experiment",
    "ExportConfig",
    "LinearConfig",
    "MethodConfig",
    "MvaeConfig",
    "NormaliseConfig",
    "Pix2pixConfig",
    "PredictConfig",
    "PrepareConfig",
    "RegressionConfig",
    "SegmentConfig",
    "SimulateConfig",
    "SlideConfig",
    "SplitConfig",
    "TrainConfig",
    "TranslatorConfig",
    "TranslatorWeights",
    "dump",
    "keys",
    "load",
    "validate",
]
