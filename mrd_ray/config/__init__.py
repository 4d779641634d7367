"""Every setting, in one frozen tree per command. The descriptions here are the ones `--help` prints."""

from mrd_ray.config.base import ModelSettings, OutputSettings, RaySettings, RunSettings
from mrd_ray.config.commands import CompareConfig, DemoConfig, PlanConfig, ReportConfig, StatusConfig, TasksConfig
from mrd_ray.config.data import DataSettings, RetainSettings
from mrd_ray.config.evaluation import EvaluateConfig, EvaluatedSet, EvaluationSettings, MembershipSettings, Metric
from mrd_ray.config.pipeline import PipelineConfig
from mrd_ray.config.scoring import Measure, ScoreConfig, ScoringSettings
from mrd_ray.config.unlearning import (
    CheckpointsSettings,
    DeepSpeedSettings,
    LoraSettings,
    StoppingSettings,
    TrackingSettings,
    UnlearnConfig,
    UnlearningSettings,
    Weighting,
    WorkersSettings,
)

__all__ = [
    "CheckpointsSettings",
    "CompareConfig",
    "DataSettings",
    "DeepSpeedSettings",
    "DemoConfig",
    "EvaluateConfig",
    "EvaluatedSet",
    "EvaluationSettings",
    "LoraSettings",
    "Measure",
    "MembershipSettings",
    "Metric",
    "ModelSettings",
    "OutputSettings",
    "PipelineConfig",
    "PlanConfig",
    "RaySettings",
    "ReportConfig",
    "RetainSettings",
    "RunSettings",
    "ScoreConfig",
    "ScoringSettings",
    "StatusConfig",
    "StoppingSettings",
    "TasksConfig",
    "TrackingSettings",
    "UnlearnConfig",
    "UnlearningSettings",
    "Weighting",
    "WorkersSettings",
]
