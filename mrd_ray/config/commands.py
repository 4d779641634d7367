"""Settings of the commands that need few: compare, plan, report, status, tasks, demo."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from mrd_ray.config.base import Frozen, ModelSettings, Name, NamesFile, OutputSettings, RaySettings, RunSettings
from mrd_ray.config.data import DataSettings
from mrd_ray.config.scoring import ScoringSettings


class CompareConfig(Frozen):
    """Say how far two runs agree on the same samples, whatever their estimator, sigma, K, precision or model."""

    run_a: str = Field(description="The first run directory or scores.parquet.")
    run_b: str = Field(description="The second run directory or scores.parquet.")
    out: str = Field("compare.png", description="File of the scatter plot.")
    output: OutputSettings = Field(OutputSettings(), description=str(OutputSettings.__doc__))


class PlanConfig(Frozen):
    """Say what scoring would cost: from the architecture and the tokens alone, or after trying it for a moment."""

    model: ModelSettings
    data: DataSettings
    run: RunSettings | None = Field(
        None, description="Ignored. It is here so that `plan` accepts the settings of `score`."
    )
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
        description="Start Ray and ray.actors actors, and time them on some of the samples for about ten seconds, "
        "instead of estimating from FLOPs.",
    )
    deadline: PositiveFloat | None = Field(
        None,
        description="Most hours that the run may take. Names the cheapest estimator, micro-batch and number of actors.",
    )
    budget: PositiveFloat | None = Field(
        None, description="Most device-hours of all actors together. Names the fastest way within them."
    )
    straggling: NonNegativeFloat = Field(
        0.1, le=2, description="Standard deviation of the logarithm of the simulated actors' slowness."
    )
    losses_per_hour: NonNegativeFloat = Field(
        0.0, le=20, description="How often per hour a simulated actor is lost, for example to preemption, and replaced."
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
        description="Run directories of score, unlearn and evaluate, in the order of comparison: an evaluation before "
        "unlearning comes first.",
    )
    out: str | None = Field(None, description="File of the page. Unset: report.html in the first run directory.")
    output: OutputSettings = Field(OutputSettings(), description=str(OutputSettings.__doc__))


class StatusConfig(Frozen):
    """Say how far a run is, from its run directory alone: from any machine that can read it."""

    run: Name = Field(description="Run directory of score, unlearn, evaluate or pipeline.")
    as_json: bool = Field(False, description="Print a JSON list, with one object per stage.")


class TasksConfig(Frozen):
    """List the tasks, and say of each of their sets whether it can be read from here."""

    tasks: tuple[str, ...] = Field(
        (), description="Names of tasks, or your own YAML files. Unset: all tasks of mrd_ray."
    )
    task_data: dict[str, str] = Field(
        {}, description="Local copies of hub datasets: '{locuslab/TOFU: FOLDER}'; datasets that a "
        "task does not read are ignored."
    )  # fmt: skip


class DemoConfig(Frozen):
    """Score a bundled set of invented authors on a small real model that has memorised it, and unlearn it."""

    model: Name | None = Field(None, description="Your own model (directory or hub id). Unset: SmolLM2-135M-Instruct.")
    data: Name | None = Field(None, description="Your own forget set. Unset: 40 questions about invented authors.")
    dir: Annotated[str, NamesFile(created=True)] | None = Field(
        None, description="Run directory of the scores. Unset: a folder under runs/."
    )
    cache: str = Field("~/.cache/mrd_ray", description="Folder that keeps the demo's model between runs.")
    estimator: Literal["closed_form", "monte_carlo"] = Field(
        "closed_form",
        description="closed_form: exact scores in a minute. monte_carlo: Algorithm 1 with num_draws draws.",
    )
    unlearn: bool = Field(
        True,
        description="Also unlearn, with two workers. Only with the bundled model and set, which have a retain set.",
    )
    num_draws: PositiveInt = Field(
        24,
        description="K of monte_carlo. Few draws, because the demo is for two CPU cores: standard errors of about 17%.",
    )
    ray: RaySettings = Field(RaySettings(), description=str(RaySettings.__doc__))
    output: OutputSettings = Field(OutputSettings(), description=str(OutputSettings.__doc__))
