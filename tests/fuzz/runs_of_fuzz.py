"""Settings of the runs that are mangled."""

from pathlib import Path

from mrd_ray import EvaluateConfig, ScoreConfig


def settings(kind: str, model: Path, data: Path, run: Path) -> ScoreConfig | EvaluateConfig:
    """Of a run in this directory."""
    common = {"model": {"path": str(model)}, "run": {"dir": str(run)}, "ray": {"actors": 1}}
    if kind == "score":
        scoring = {"num_draws": 4, "measures": ["entropy"]}
        return ScoreConfig(data={"path": str(data), "max_samples": 6}, scoring=scoring, **common)
    metrics = ["probability", "rouge_l", "truth_ratio"]
    asked = {"path": str(data), "metrics": metrics, "max_samples": 4, "wrong": "wrong"}
    evaluation = {"sets": {"forget": asked}, "forget": "forget", "max_new_tokens": 4}
    return EvaluateConfig(evaluation=evaluation, **common)
