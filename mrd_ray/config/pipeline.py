"""Settings of the stages in a row, and of each stage."""

from dataclasses import dataclass

from pydantic import Field

from mrd_ray.config.base import RaySettings, RunSettings
from mrd_ray.config.commands import ReportConfig
from mrd_ray.config.evaluation import EvaluateConfig
from mrd_ray.config.scoring import ScoreConfig
from mrd_ray.config.unlearning import UnlearnConfig, WorkersSettings

FOLDERS = ("score", "unlearn", "evaluate-before", "evaluate-after")


class StagesRaySettings(RaySettings, WorkersSettings):
    """The actors that score and evaluate, and the workers that unlearn."""


class PipelineConfig(UnlearnConfig):
    """Score, unlearn, evaluate before and after, and report: what each command does, in folders of one run directory.

    RUN/score, RUN/unlearn, RUN/evaluate-before, RUN/evaluate-after, RUN/report.html. Starting again goes on in the
    stage that was interrupted; a finished stage is not done again.
    """

    ray: StagesRaySettings = Field(StagesRaySettings(), description=str(StagesRaySettings.__doc__))


@dataclass(frozen=True)
class Stages:
    """In their order. evaluations: "before" and "after", or none where nothing is to be evaluated."""

    score: ScoreConfig
    unlearn: UnlearnConfig
    evaluations: dict[str, EvaluateConfig]
    report: ReportConfig

    @classmethod
    def of(cls, config: PipelineConfig) -> "Stages":
        """Each stage in a folder of run.dir."""

        def folder(name: str) -> RunSettings:
            return RunSettings(dir=f"{config.run.dir.rstrip('/')}/{name}")

        actors = RaySettings(**{name: getattr(config.ray, name) for name in RaySettings.model_fields})
        score = ScoreConfig(
            model=config.model,
            data=config.data,
            run=folder("score"),
            scoring=config.scoring,
            ray=actors,
            output=config.output,
        )
        own = {name: getattr(config, name) for name in UnlearnConfig.model_fields}
        unlearn = UnlearnConfig(**own | {"run": folder("unlearn")})
        result = unlearn.result(f"{unlearn.run.dir}/model")
        models = {"before": config.model, "after": result}
        evaluations = {}
        if config.evaluation.sets or config.evaluation.zero_shot:
            evaluations = {
                when: EvaluateConfig(
                    model=model,
                    evaluation=config.evaluation,
                    run=folder(f"evaluate-{when}"),
                    ray=actors,
                    output=config.output,
                )
                for when, model in models.items()
            }
        runs = [score.run.dir, unlearn.run.dir, *(one.run.dir for one in evaluations.values())]
        out = f"{config.run.dir.rstrip('/')}/report.html"
        return cls(score, unlearn, evaluations, ReportConfig(runs=runs, out=out, output=config.output))
