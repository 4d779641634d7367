"""Settings of the commands that need few: compare, plan, report, status, tasks, demo."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mrd_ray.config.base import Frozen, ModelSettings, Name, NamesFile, OutputSettings, RaySettings, RunSettings
from mrd_ray.config.data import DataSettings
from mrd_ray.config.scoring import ScoringSettings


class CompareConfig(Frozen):
    """Say how far two runs agree on the same samples, whatever their estimator, sigma, K, precision or model."""

    run_a: str = Field(description="A run directory, or a scores.parquet.")
    run_b: str = Field(description="Another.")
    out: str = Field("compare.png", description="Where the scatter plot goes.")
    output: OutputSettings = Field(OutputSettings(), description=str(OutputSettings.__doc__))


class PlanConfig(Frozen):
    """Say what scoring would cost: from the architecture and the tokens alone, or after trying it for a moment."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings | None = Field(None, description="Not used; so that a configuration of `score` can be planned.")
    scoring: ScoringSettings = Field(ScoringSettings(), description=str(ScoringSettings.__doc__))
    ray: RaySettings = Field(RaySettings(actors=1), description="The cluster's shape.")
    output: OutputSettings = Field(OutputSettings(), description=str(OutputSettings.__doc__))
    tflops: PositiveFloat | None = Field(
        None,
        description="Sustained float32 TFLOP/s of one actor. Unset: measured on this machine's CPU for CPU actors; "
        "a cautious guess for GPU actors.",
    )
    probe: bool = Field(
        False,
        description="Start Ray and ray.actors actors with the model, and time them on some of the samples for about "
        "ten seconds, instead of going by FLOPs.",
    )
    deadline: PositiveFloat | None = Field(
        None, description="Hours that the run may take: name the estimator, micro-batch and actors that cost least."
    )
    budget: PositiveFloat | None = Field(
        None, description="Device-hours that all actors may take together: name the fastest way within them."
    )
    straggling: NonNegativeFloat = Field(
        0.1, le=2, description="Of simulated actors: standard deviation of the logarithm of their slowness."
    )
    losses_per_hour: NonNegativeFloat = Field(
        0.0, le=20, description="Of simulated actors: how often an hour each is lost, to preemption say, and replaced."
    )

    @model_validator(mode="after")
    def _a_probe_measures(self) -> "PlanConfig":
        if self.probe and self.tflops is not None:
            raise ValueError("tflops and probe exclude one another: give the rate, or have it measured")
        return self


class ReportConfig(Frozen):
    """Make one self-contained HTML page of finished runs: scores, unlearning, evaluations, alone or compared."""

    runs: tuple[Name, ...] = Field(
        min_length=1,
        description="Run directories of score, unlearn and evaluate, in the order in which they are to be compared; an "
        "evaluation from before unlearning comes first.",
    )
    out: str | None = Field(None, description="Where the page goes; unset, report.html in the first run directory.")
    output: OutputSettings = Field(OutputSettings(), description=str(OutputSettings.__doc__))


class StatusConfig(Frozen):
    """Say how far a run is, from its run directory alone: from any machine that can read it."""

    run: Name = Field(description="Run directory of score, unlearn, evaluate or pipeline.")
    as_json: bool = Field(False, description="Print a JSON list instead, an object for each stage.")


class TasksConfig(Frozen):
    """List the tasks, and say of each of their sets whether it can be read from here."""

    tasks: tuple[str, ...] = Field((), description="Names, or YAML files of your own; unset, all that come along.")
    task_data: dict[str, str] = Field(
        {}, description="Local copies of hub datasets: '{locuslab/TOFU: FOLDER}'; those that a task does not read are "
        "left out."
    )  # fmt: skip


class DemoConfig(Frozen):
    """Score a bundled set of invented authors on a small real model that has memorised it, and unlearn it."""

    model: str | None = Field(None, description="Your own model (directory or hub id); else SmolLM2-135M-Instruct.")
    data: str | None = Field(None, description="Your own forget set; else 40 questions about invented authors.")
    dir: Annotated[str, NamesFile(created=True)] | None = Field(
        None, description="Run directory of the scores; unset, a folder under runs/."
    )
    cache: str = Field("~/.cache/mrd_ray", description="Folder that keeps the demo's model between runs.")
    estimator: Literal["closed_form", "monte_carlo"] = Field(
        "closed_form",
        description="Exact scores in a minute, or Algorithm 1 with num_draws draws.",
    )
    unlearn: bool = Field(
        True,
        description="Go on to unlearn, on two workers; only of the bundled model and set, for want of a retain set.",
    )
    num_draws: PositiveInt = Field(
        24, description="K of monte_carlo; few, since the demo is for two CPU cores: a standard error of some 17%."
    )
    ray: RaySettings = Field(RaySettings(), description=str(RaySettings.__doc__))
    output: OutputSettings = Field(OutputSettings(), description=str(OutputSettings.__doc__))
