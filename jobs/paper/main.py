"""The command line of the experiments: `python -m jobs.paper fig4 --config ...`, and jobs/paper."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from jobs.paper import fig2, fig3, fig4, fig5, table7, tables
from jobs.paper.config import Fig2Config, Fig3Config, Fig4Config, Fig5Config, Table7Config, TablesConfig
from jobs.paper.findings import Findings, publish
from jobs.paper.subject import Subject
from mrd_ray.cli.console import console_of
from mrd_ray.cli.ending import DONE
from mrd_ray.cli.flags import CommandLine
from mrd_ray.config.paths import with_absolute_paths
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.workers.cluster import cluster

_EXPERIMENTS: dict[str, tuple[Any, Callable[[Any], tuple[Findings, Subject]]]] = {
    "fig2": (Fig2Config, fig2.experiment),
    "fig3": (Fig3Config, fig3.experiment),
    "fig4": (Fig4Config, fig4.experiment),
    "fig5": (Fig5Config, fig5.experiment),
    "tables": (TablesConfig, tables.experiment),
    "table7": (Table7Config, table7.experiment),
}
LINE = CommandLine(
    "python -m jobs.paper",
    "The experiments of arXiv 2504.06658.",
    {name: config for name, (config, _) in _EXPERIMENTS.items()},
    of_tasks=tuple(_EXPERIMENTS),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an experiment and print its findings. The exit code is 0 whether they agree with the paper or not."""
    return LINE.run(sys.argv[1:] if arguments is None else arguments, _call)


def _call(config: Any) -> int:
    experiment = next(run for kind, run in _EXPERIMENTS.values() if kind is type(config))
    here = with_absolute_paths(config)
    with RunDirectory(here.run.dir).locked(), cluster(log_to_driver=False):
        findings, subject = experiment(here)
    publish(findings, config, subject.run, console_of(width=200))
    return DONE
