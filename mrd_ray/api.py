"""The public functions. Each imports what it needs when it is called, so that importing this module is quick."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrd_ray.config import CompareConfig, EvaluateConfig, PlanConfig, ReportConfig, ScoreConfig, UnlearnConfig
    from mrd_ray.evaluation.evaluate import EvaluateRun
    from mrd_ray.planning.estimate import Estimate
    from mrd_ray.scoring.compare import Comparison
    from mrd_ray.scoring.score import ScoreRun
    from mrd_ray.unlearning.sampler import MRDSampler as MRDSampler
    from mrd_ray.unlearning.unlearn import UnlearnRun

__all__ = ["MRDSampler", "compare", "evaluate", "plan", "score", "unlearn", "write_report"]


def score(config: "ScoreConfig") -> "ScoreRun":
    """Score every sample of a forget set; resume if the run directory holds this run already.

    Raises:
        UserError: bad input or settings, or a run directory of another run.
    """
    from mrd_ray.scoring.score import score

    return score(config)


def plan(config: "PlanConfig") -> "Estimate":
    """Estimate what scoring would cost. Raises UserError as `score` does."""
    from mrd_ray.planning.estimate import plan

    return plan(config)


def unlearn(config: "UnlearnConfig") -> "UnlearnRun":
    """Unlearn a forget set; resume if the run directory holds this run already.

    Raises:
        UserError: bad input or settings, a run directory of another run, or workers that failed too often.
    """
    from mrd_ray.unlearning.unlearn import unlearn

    return unlearn(config)


def evaluate(config: "EvaluateConfig") -> "EvaluateRun":
    """Measure what a model still knows; resume if the run directory holds this run already.

    Raises:
        UserError: bad input or settings, or a run directory of another run.
    """
    from mrd_ray.evaluation.evaluate import evaluate

    return evaluate(config)


def compare(config: "CompareConfig") -> "Comparison":
    """Compare the scores of two runs, sample by sample. Raises UserError if they cannot be compared."""
    from mrd_ray.scoring.compare import compare

    return compare(config)


def write_report(config: "ReportConfig") -> str:
    """Write an HTML page about runs. Returns its path. Raises UserError if a run cannot be read."""
    from mrd_ray.report.report import write_report

    return write_report(config)


def __getattr__(name: str) -> Any:
    if name == "MRDSampler":
        from mrd_ray.unlearning.sampler import MRDSampler

        return MRDSampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
