"""The commands of `mrd-ray`: a new one is one entry here. Imports no package, so that --help is quick."""

from collections.abc import Mapping
from dataclasses import dataclass, field

DESCRIPTION = "How hard is each sample to unlearn from a language model? (arXiv 2504.06658, on Ray)"


@dataclass(frozen=True)
class Command:
    """One command.

    help: as the first lines of --help say it. config: the class of mrd_ray.config that says what its flags are.
    call: module:function of mrd_ray.cli; takes the config and returns the exit code. of_task: it takes defaults from
    a task (`data.tasks`). positional: the fields that are no flags, with how many words each takes where it is not one.
    """

    help: str
    config: str
    call: str
    of_task: bool = False
    positional: Mapping[str, str | None] = field(default_factory=dict)


COMMANDS = {
    "score": Command(
        "Score every sample of a forget set by how hard it is to unlearn (its MRD).",
        "ScoreConfig", "main:score", of_task=True,
    ),
    "plan": Command(
        "Say what scoring would cost: from the architecture and the tokens alone, or after trying it for a moment.",
        "PlanConfig", "tables:plan", of_task=True,
    ),
    "compare": Command(
        "Say how far two runs agree on the same samples, whatever their estimator, sigma, K, precision or model.",
        "CompareConfig", "tables:compare", positional={"run_a": None, "run_b": None},
    ),
    "unlearn": Command(
        "Unlearn a forget set with MRD weights: Ray Train over DeepSpeed ZeRO, rescoring as the model changes.",
        "UnlearnConfig", "main:unlearn", of_task=True,
    ),
    "evaluate": Command(
        "Measure what a model still knows, of what it was to forget and of the rest.",
        "EvaluateConfig", "main:evaluate", of_task=True,
    ),
    "pipeline": Command(
        "Score, unlearn, evaluate before and after, and report: what each command does, in folders of one run "
        "directory.",
        "PipelineConfig", "pipeline:pipeline", of_task=True,
    ),
    "status": Command(
        "Say how far a run is, from its run directory alone: from any machine that can read it.",
        "StatusConfig", "tables:status", positional={"run": None},
    ),
    "tasks": Command(
        "List the tasks, and say of each of their sets whether it can be read from here.",
        "TasksConfig", "tables:tasks",
    ),
    "report": Command(
        "Make one self-contained HTML page of finished runs: scores, unlearning, evaluations, alone or compared.",
        "ReportConfig", "main:report", positional={"runs": "+"},
    ),
    "demo": Command(
        "Score a bundled set of invented authors on a small real model that has memorised it, and unlearn it.",
        "DemoConfig", "pipeline:demo",
    ),
}  # fmt: skip
