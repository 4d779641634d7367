"""The `mrd-ray` command: parse, call one function, print where the results went."""

import importlib
import sys
import time
from collections.abc import Sequence

from mrd_ray import config
from mrd_ray.cli.commands import COMMANDS, DESCRIPTION
from mrd_ray.cli.console import console_of, say_where
from mrd_ray.cli.ending import DONE, SOME_WITHOUT_SCORE, STOPPED_EARLY
from mrd_ray.cli.flags import CommandLine
from mrd_ray.config import EvaluateConfig, ReportConfig, ScoreConfig, UnlearnConfig

LINE = CommandLine(
    "mrd-ray",
    DESCRIPTION,
    {name: getattr(config, command.config) for name, command in COMMANDS.items()},
    of_tasks=[name for name, command in COMMANDS.items() if command.of_task],
    positional={name: command.positional for name, command in COMMANDS.items()},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code says whether every sample has a score (0) or not (3)."""
    return LINE.run(sys.argv[1:] if arguments is None else arguments, _call)


def _call(settings: object) -> int:
    command = next(command for command in COMMANDS.values() if command.config == type(settings).__name__)
    module, _, name = command.call.partition(":")
    code: int = getattr(importlib.import_module(f"mrd_ray.cli.{module}"), name)(settings)
    return code


def score(config: ScoreConfig) -> int:
    """Score, and show the summary."""
    from mrd_ray.api import score as run
    from mrd_ray.scoring import summary

    started = time.monotonic()
    finished = run(config)
    console = console_of(config.output.quiet)
    summary.show(console, finished.scores, finished.samples, config)
    console.print()
    say_where("Scores: ", finished.run.path("scores.parquet"))
    say_where("Summary:", finished.run.path("summary.png"))
    console.print(f"Took {time.monotonic() - started:.0f} s")
    return SOME_WITHOUT_SCORE if finished.num_errors else DONE


def unlearn(config: UnlearnConfig) -> int:
    """Unlearn, and show what the model knew and knows."""
    from mrd_ray.api import unlearn as run
    from mrd_ray.unlearning import summary

    started = time.monotonic()
    finished = run(config)
    console = console_of(config.output.quiet)
    summary.show(console, finished)
    console.print()
    say_where("Model:  ", finished.run.path("model"))
    say_where("Log:    ", finished.run.path("metrics.jsonl"))
    console.print(f"Took {time.monotonic() - started:.0f} s")
    return STOPPED_EARLY if finished.failed else DONE


def evaluate(config: EvaluateConfig) -> int:
    """Evaluate, and show the figures."""
    from mrd_ray.api import evaluate as run
    from mrd_ray.evaluation import summary

    started = time.monotonic()
    finished = run(config)
    console = console_of(config.output.quiet)
    summary.show(console, finished)
    console.print()
    say_where("Figures:", finished.run.path("figures.json"))
    say_where("Rows:   ", finished.run.path("evaluation.parquet"))
    console.print(f"Took {time.monotonic() - started:.0f} s")
    return SOME_WITHOUT_SCORE if finished.num_errors else DONE


def report(config: ReportConfig) -> int:
    """Write the page."""
    from mrd_ray.report.report import write_report

    say_where("Report:", write_report(config))
    return DONE
