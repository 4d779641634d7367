"""Settings of the list of tasks."""

from pydantic import Field

from mrd_ray.config.base import Frozen


class TasksConfig(Frozen):
    """List the tasks, and say of each of their sets whether it can be read from here."""

    tasks: tuple[str, ...] = Field((), description="Names, or YAML files of your own; unset, all that come along.")
    task_data: dict[str, str] = Field(
        {}, description="Local copies of hub datasets: '{locuslab/TOFU: FOLDER}'; those that a task does not read are "
        "left out."
    )  # fmt: skip
