"""Every setting, in one frozen tree per command. The descriptions here are the ones `--help` prints."""

from mrd_ray.config.base import ModelConfig, OutputConfig, RayConfig, RunConfig
from mrd_ray.config.commands import CompareConfig, DemoConfig, PlanConfig, ReportConfig, StatusConfig, TasksConfig
from mrd_ray.config.data import DataConfig, RetainConfig
from mrd_ray.config.evaluation import EvaluateConfig, EvaluatedSet, EvaluationConfig, MembershipConfig, Metric
from mrd_ray.config.pipeline import PipelineConfig
from mrd_ray.config.scoring import Measure, ScoreConfig, ScoringConfig
from mrd_ray.config.unlearning import (
    CheckpointsConfig,
    DeepSpeedConfig,
    LoraConfig,
    StoppingConfig,
    TrackingConfig,
    UnlearnConfig,
    UnlearningConfig,
    Weighting,
    WorkersConfig,
)

__all__ = [
    "CheckpointsConfig",
    "CompareConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "DemoConfig",
    "EvaluateConfig",
    "EvaluatedSet",
    "EvaluationConfig",
    "LoraConfig",
    "Measure",
    "MembershipConfig",
    "Metric",
    "ModelConfig",
    "OutputConfig",
    "PipelineConfig",
    "PlanConfig",
    "RayConfig",
    "ReportConfig",
    "RetainConfig",
    "RunConfig",
    "ScoreConfig",
    "ScoringConfig",
    "StatusConfig",
    "StoppingConfig",
    "TasksConfig",
    "TrackingConfig",
    "UnlearnConfig",
    "UnlearningConfig",
    "Weighting",
    "WorkersConfig",
]
