"""Settings of the demo."""

from typing import Literal

from pydantic import Field, PositiveInt

from mrd_ray.config.base import Frozen, OutputConfig, RayConfig


class DemoConfig(Frozen):
    """Score a bundled set of invented authors on a small real model that has memorised it, and unlearn it."""

    model: str | None = Field(None, description="Your own model (directory or hub id); else SmolLM2-135M-Instruct.")
    data: str | None = Field(None, description="Your own forget set; else 40 questions about invented authors.")
    dir: str | None = Field(None, description="Run directory of the scores; unset, a folder under runs/.")
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
    ray: RayConfig = Field(RayConfig(), description=str(RayConfig.__doc__))
    output: OutputConfig = Field(OutputConfig(), description=str(OutputConfig.__doc__))
