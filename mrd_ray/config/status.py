"""Settings of the status."""

from pydantic import Field

from mrd_ray.config.base import Frozen, Name


class StatusConfig(Frozen):
    """Say how far a run is, from its run directory alone: from any machine that can read it."""

    run: Name = Field(description="Run directory of score, unlearn, evaluate or pipeline.")
    as_json: bool = Field(False, description="Print a JSON list instead, an object for each stage.")
