"""Memory Removal Difficulty (arXiv 2504.06658) on Ray: how hard each sample is to unlearn from a language model."""

import importlib
from typing import TYPE_CHECKING, Any

from mrd_ray.api import compare, evaluate, plan, score, unlearn, write_report

if TYPE_CHECKING:
    from mrd_ray.config import (
        CompareConfig,
        DataSettings,
        EvaluateConfig,
        ModelSettings,
        PlanConfig,
        RaySettings,
        ReportConfig,
        RunSettings,
        ScoreConfig,
        ScoringSettings,
        UnlearnConfig,
    )
    from mrd_ray.errors import UserError
    from mrd_ray.evaluation.evaluate import EvaluateRun
    from mrd_ray.planning.estimate import Estimate
    from mrd_ray.scoring.compare import Comparison
    from mrd_ray.scoring.score import ScoreRun
    from mrd_ray.unlearning.sampler import MRDSampler
    from mrd_ray.unlearning.unlearn import UnlearnRun

__all__ = [
    "CompareConfig",
    "Comparison",
    "DataSettings",
    "Estimate",
    "EvaluateConfig",
    "EvaluateRun",
    "MRDSampler",
    "ModelSettings",
    "PlanConfig",
    "RaySettings",
    "ReportConfig",
    "RunSettings",
    "ScoreConfig",
    "ScoreRun",
    "ScoringSettings",
    "UnlearnConfig",
    "UnlearnRun",
    "UserError",
    "compare",
    "evaluate",
    "plan",
    "score",
    "unlearn",
    "write_report",
]

# Imported when first used, settings among them: --help needs none.
_LAZY = {  # but for settings, which are in mrd_ray.config
    "UserError": "mrd_ray.errors",
    "Comparison": "mrd_ray.scoring.compare",
    "Estimate": "mrd_ray.planning.estimate",
    "EvaluateRun": "mrd_ray.evaluation.evaluate",
    "ScoreRun": "mrd_ray.scoring.score",
    "MRDSampler": "mrd_ray.unlearning.sampler",
    "UnlearnRun": "mrd_ray.unlearning.unlearn",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY.get(name, "mrd_ray.config")), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mrd-ray")
    except PackageNotFoundError:  # a copy in the working directory of a job
        return "unknown"
