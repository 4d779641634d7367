"""The command line of the experiments: `python -m mrd_ray.paper fig4 --config ...`, and jobs/paper."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mrd_ray.command_line import DONE, CommandLine
from mrd_ray.config.paper import Fig2Config, Fig3Config, Fig4Config, Fig5Config, Table7Config, TablesConfig
from mrd_ray.paper import fig2, fig3, fig4, fig5, table7, tables
from mrd_ray.paper.findings import Findings, publish
from mrd_ray.paper.subject import Subject
from mrd_ray.runs import RunDirectory
from mrd_ray.scoring import pipeline

_EXPERIMENTS: dict[str, tuple[Any, Callable[[Any], tuple[Findings, Subject]]]] = {
    "fig2": (Fig2Config, fig2.experiment),
    "fig3": (Fig3Config, fig3.experiment),
    "fig4": (Fig4Config, fig4.experiment),
    "fig5": (Fig5Config, fig5.experiment),
    "tables": (TablesConfig, tables.experiment),
    "table7": (Table7Config, table7.experiment),
}
_PATHS = {"path", "tokenizer", "dir", "reference", "corpus", "refusals", "embedding_model", "toxicity_model"}
_PATHS |= {"zero_shot_tasks", "config"}  # settings that may name a file or folder
LINE = CommandLine(
    "python -m mrd_ray.paper",
    "The experiments of arXiv 2504.06658.",
    {name: config for name, (config, _) in _EXPERIMENTS.items()},
    of_tasks=tuple(_EXPERIMENTS),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an experiment and print what it found; the exit code is 0 whether it agrees with the paper or not."""
    return LINE.run(sys.argv[1:] if arguments is None else arguments, _call)


def with_absolute_paths(config: Any) -> Any:
    """The same settings for tasks, which have a working directory of their own."""

    def absolute(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: absolute(of, str(key)) for key, of in value.items()}
        if isinstance(value, str) and name in _PATHS and "://" not in value:
            there = Path(value).expanduser()
            return str(there.absolute()) if there.exists() or name == "dir" else value
        return value

    return type(config)(**absolute(config.model_dump(exclude_unset=True)))


def _call(config: Any) -> int:
    experiment = next(run for kind, run in _EXPERIMENTS.values() if kind is type(config))
    here = with_absolute_paths(config)
    with RunDirectory(here.run.dir).locked(), pipeline.cluster(log_to_driver=False):
        findings, subject = experiment(here)
    publish(findings, config, subject.run, Console(width=None if sys.stdout.isatty() else 200))
    return DONE
