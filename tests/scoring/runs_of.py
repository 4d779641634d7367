"""What the scoring tests share."""

from pathlib import Path

from mrd_ray import ScoreConfig


def config(model: Path, data: Path, run: Path, **settings) -> ScoreConfig:
    """Settings as dotted keys with underscores: scoring__sigma=1e-3."""
    tree: dict = {"model": {"path": str(model)}, "data": {"path": str(data)}, "run": {"dir": str(run)}}
    tree |= {"scoring": {"num_draws": 12, "micro_batch_tokens": 64}, "ray": {"actors": 1}}
    for key, value in settings.items():
        group, name = key.split("__")
        tree[group][name] = value
    return ScoreConfig.model_validate(tree)


def stamps(run: Path) -> dict[str, int]:
    """The finished units, and when each was written."""
    return {file.name: file.stat().st_mtime_ns for file in (run / "units").glob("*.parquet")}
