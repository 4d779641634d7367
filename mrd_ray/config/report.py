"""Settings of the report."""

from pydantic import Field

from mrd_ray.config.base import Frozen, Name, OutputConfig


class ReportConfig(Frozen):
    """Make one self-contained HTML page of finished runs: scores, unlearning, evaluations, alone or compared."""

    runs: tuple[Name, ...] = Field(
        min_length=1,
        description="Run directories of score, unlearn and evaluate, in the order in which they are to be compared; an "
        "evaluation from before unlearning comes first.",
    )
    out: str | None = Field(None, description="Where the page goes; unset, report.html in the first run directory.")
    output: OutputConfig = Field(OutputConfig(), description=str(OutputConfig.__doc__))
