"""Settings of the stages in a row."""

from pydantic import Field

from mrd_ray.config.base import RayConfig
from mrd_ray.config.unlearning import UnlearnConfig, WorkersConfig


class StagesRayConfig(RayConfig, WorkersConfig):
    """The actors that score and evaluate, and the workers that unlearn."""


class PipelineConfig(UnlearnConfig):
    """Score, unlearn, evaluate before and after, and report: what each command does, in folders of one run directory.

    RUN/score, RUN/unlearn, RUN/evaluate-before, RUN/evaluate-after, RUN/report.html. Starting again goes on in the
    stage that was interrupted; a finished stage is not done again.
    """

    ray: StagesRayConfig = Field(StagesRayConfig(), description=str(StagesRayConfig.__doc__))
