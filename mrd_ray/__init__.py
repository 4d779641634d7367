"""Memory Removal Difficulty (arXiv 2504.06658) on Ray: how hard each sample is to unlearn from a language model."""

from importlib.metadata import version

from mrd_ray.config import DataConfig, ModelConfig, PlanConfig, RayConfig, RunConfig, ScoreConfig, ScoringConfig
from mrd_ray.errors import UserError
from mrd_ray.scoring.estimate import Estimate, plan
from mrd_ray.scoring.score import ScoreRun, score

__version__ = version("mrd-ray")

__all__ = [
    "DataConfig",
    "Estimate",
    "ModelConfig",
    "PlanConfig",
    "RayConfig",
    "RunConfig",
    "ScoreConfig",
    "ScoreRun",
    "ScoringConfig",
    "UserError",
    "plan",
    "score",
]
