"""The `mrd-ray` command: parse, call one function, print where the results went."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mrd_ray.config import (
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    PlanConfig,
    ReportConfig,
    ScoreConfig,
    TasksConfig,
    UnlearnConfig,
)
from mrd_ray.errors import UserError

# exit codes; argparse itself ends with 2 on a bad command line
_DONE, _FAILED, _SOME_WITHOUT_SCORE, _STOPPED_EARLY, _INTERRUPTED = 0, 1, 3, 4, 130


def parser(task: Mapping[str, Any] | None = None) -> ArgumentParser:
    """The command line, made from the config classes. task: settings by section, for defaults (see `data.tasks`)."""
    top = ArgumentParser(
        prog="mrd-ray",
        description="How hard is each sample to unlearn from a language model? (arXiv 2504.06658, on Ray)",
        allow_abbrev=False,
    )
    commands = top.add_subcommands(required=True, dest="command")
    config: Any  # a class of config.py
    for name, config in COMMANDS.items():
        command = ArgumentParser(description=config.__doc__, allow_abbrev=False)
        command.add_argument("--config", action="config", help="YAML file of these settings; flags go over it.")
        if name in _OF_TASKS:
            command.add_argument("--task", type=str, help="A task of `mrd-ray tasks`, or a YAML file of your own.")
            command.add_argument("--task_data", type=dict[str, str], default={}, help=_TASK_DATA)
        positional = _POSITIONAL.get(config, {})
        for field, how_many in positional.items():
            more: dict[str, Any] = {"nargs": how_many} if how_many else {}
            command.add_argument(field, type=str, help=config.model_fields[field].description, **more)
        command.add_class_arguments(config, as_group=False, skip=set(positional))
        for section, settings in (task or {}).items():
            if name in _OF_TASKS and section in config.model_fields:
                command.set_defaults({f"{section}.{setting}": value for setting, value in settings.items()})
        commands.add_subcommand(name, command, help=(config.__doc__ or "").strip().splitlines()[0])
    return top


COMMANDS = {
    "score": ScoreConfig,
    "plan": PlanConfig,
    "compare": CompareConfig,
    "unlearn": UnlearnConfig,
    "evaluate": EvaluateConfig,
    "tasks": TasksConfig,
    "report": ReportConfig,
    "demo": DemoConfig,
}
_POSITIONAL: dict[Any, dict[str, str | None]] = {  # with how many words each takes, where it is not one
    CompareConfig: {"run_a": None, "run_b": None},
    ReportConfig: {"runs": "+"},
}
_OF_TASKS = ("score", "plan", "unlearn", "evaluate")
_TASK_DATA = "Local copies of the task's hub datasets: '{locuslab/TOFU: FOLDER}'."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code says whether every sample has a score (0) or not (3)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        line = parser(_task(arguments))
    except UserError as problem:
        return _failed(problem)
    try:
        config = settings(line, arguments)
    except ValidationError as problem:  # settings that are each in range but contradict one another
        line.error("; ".join(_named(problem.title, error) for error in problem.errors()))
    try:
        match config:
            case ScoreConfig():
                return _score(config)
            case PlanConfig():
                return _plan(config)
            case CompareConfig():
                return _compare(config)
            case UnlearnConfig():
                return _unlearn(config)
            case EvaluateConfig():
                return _evaluate(config)
            case TasksConfig():
                return _tasks(config)
            case ReportConfig():
                return _report(config)
            case DemoConfig():
                return _demo(config)
    except UserError as problem:
        return _failed(problem)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return _INTERRUPTED
    return _FAILED


def settings(line: ArgumentParser, arguments: Sequence[str]) -> Any:
    """The config of the command that the arguments name. Raises pydantic.ValidationError."""
    parsed = line.parse_args(arguments)
    values = line.instantiate(parsed)[parsed.command]
    others = {"config", "__path__"}
    if parsed.command in _OF_TASKS:  # their settings have become defaults
        others |= {"task", "task_data"}
    ours = {key: value for key, value in values.items() if key not in others}
    return COMMANDS[parsed.command](**ours)


def _failed(problem: UserError) -> int:
    Console(stderr=True).print(f"error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    return _FAILED


def _task(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings of the task that the command line names, which must be known before it can be parsed."""
    from mrd_ray.data import tasks

    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--task")
    flags.add_argument("--task_data", type=yaml.safe_load, default={})
    flags.add_argument("--unlearning.method", dest="method")
    known, _ = flags.parse_known_args(arguments)
    copies = known.task_data if isinstance(known.task_data, dict) else {}  # the real parser refuses what is none
    return {} if known.task is None else tasks.load(known.task, copies, known.method)


def _named(model: str, error: Any) -> str:
    """A message of pydantic's that names the setting: ours do by themselves."""
    message = str(error["msg"])
    if message.startswith("Value error, "):
        return message.removeprefix("Value error, ")
    group = model.removesuffix("Config").lower()
    return ".".join([group, *map(str, error["loc"])]) + f": {message}, not {error['input']!r}"


def _score(config: ScoreConfig) -> int:
    from mrd_ray.scoring import summary
    from mrd_ray.scoring.score import score

    started = time.monotonic()
    finished = score(config)
    console = Console() if sys.stdout.isatty() else Console(width=120)  # a job's log has no width of its own
    summary.show(console, finished.scores, finished.samples, config)
    console.print(f"\nScores:  {finished.run.path('scores.parquet')}", soft_wrap=True)
    console.print(f"Summary: {finished.run.path('summary.png')}", soft_wrap=True)
    console.print(f"Took {time.monotonic() - started:.0f} s")
    return _SOME_WITHOUT_SCORE if finished.num_errors else _DONE


def _unlearn(config: UnlearnConfig) -> int:
    from mrd_ray.evaluation.in_training import unlearn
    from mrd_ray.unlearning import summary

    started = time.monotonic()
    finished = unlearn(config)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    summary.show(console, finished)
    console.print(f"\nModel:   {finished.run.path('model')}", soft_wrap=True)
    console.print(f"Log:     {finished.run.path('metrics.jsonl')}", soft_wrap=True)
    console.print(f"Took {time.monotonic() - started:.0f} s")
    return _STOPPED_EARLY if finished.failed else _DONE


def _evaluate(config: EvaluateConfig) -> int:
    from mrd_ray.evaluation import summary
    from mrd_ray.evaluation.evaluate import evaluate

    started = time.monotonic()
    finished = evaluate(config)
    summary.show(Console() if sys.stdout.isatty() else Console(width=120), finished)
    Console().print(f"\nFigures: {finished.run.path('figures.json')}", soft_wrap=True)
    Console().print(f"Rows:    {finished.run.path('evaluation.parquet')}", soft_wrap=True)
    Console().print(f"Took {time.monotonic() - started:.0f} s")
    return _SOME_WITHOUT_SCORE if finished.num_errors else _DONE


def _tasks(config: TasksConfig) -> int:
    from mrd_ray.data import tasks

    console = Console() if sys.stdout.isatty() else Console(width=120)
    for task in config.tasks or tasks.names():
        description, sources = tasks.sources(task, config.task_data)
        title = escape(f"{task}: {description}")
        table = Table("set", "read from", "from here", title=title, title_justify="left")
        for source in sources:
            table.add_row(source.name, escape(source.path), "yes" if source.problem is None else escape(source.problem))
        console.print(table)
    return _DONE


def _demo(config: DemoConfig) -> int:
    from mrd_ray.demo import demo
    from mrd_ray.evaluation import summary
    from mrd_ray.evaluation.evaluate import evaluate
    from mrd_ray.report.report import write_report

    scoring = demo.scoring(config)
    code = _score(scoring)
    if not config.unlearn or (config.model, config.data) != (None, None):
        return code
    print()
    unlearning = demo.unlearning(scoring)
    code = _unlearn(unlearning)
    models = {"before": unlearning.model.path, "after": f"{unlearning.run.dir}/model"}
    runs = {when: evaluate(demo.evaluation(unlearning, model, when)) for when, model in models.items()}
    summary.show_beside(Console(width=None if sys.stdout.isatty() else 120), runs)
    of_all = (scoring.run.dir, unlearning.run.dir, *(run.config.run.dir for run in runs.values()))
    print(f"\nReport of all this, for a browser: {write_report(ReportConfig(runs=of_all))}")
    return code


def _compare(config: CompareConfig) -> int:
    from mrd_ray.scoring import compare
    from mrd_ray.scoring.summary import short

    found = compare.compare(config)
    try:
        Path(config.out).write_bytes(compare.figure(found, config))
    except OSError as problem:
        raise UserError(f"out: cannot write {config.out}: {problem.strerror}") from None
    console = Console() if sys.stdout.isatty() else Console(width=120)
    table = Table(show_header=False)
    table.add_row("a", f"{config.run_a}: {found.settings[0]}")
    table.add_row("b", f"{config.run_b}: {found.settings[1]}")
    table.add_row("samples compared", f"{found.compared:,} (a alone scores {found.only_a:,}, b alone {found.only_b:,})")
    table.add_row("Spearman correlation", f"{found.spearman:.4f}")
    table.add_row("Kendall correlation", f"{found.kendall:.4f}")
    table.add_row("median of b / a", f"{found.median_ratio:.4g}")
    apart = "no standard errors to go by" if found.apart is None else f"{found.apart:.1%}"
    table.add_row("over 3 standard errors apart", apart)
    console.print(table)
    worst = Table("a", "b", "apart", "sample", "text", title="Those that disagree most", title_justify="left")
    for row in found.rows[:10]:
        apart = f"{row['b'] / row['a'] - 1:+.1%}" if found.apart is None else f"{row['z']:+.1f} s.e."
        text = short(row["text"] or "", 200)
        worst.add_row(f"{row['a']:.3g}", f"{row['b']:.3g}", apart, escape(row["sample_id"]), escape(text))
    console.print(worst)
    console.print(f"Scatter plot: {config.out}", soft_wrap=True)
    return _DONE


def _report(config: ReportConfig) -> int:
    from mrd_ray.report.report import write_report

    Console().print(f"Report: {write_report(config)}", soft_wrap=True, markup=False, highlight=False)
    return _DONE


def _plan(config: PlanConfig) -> int:
    from mrd_ray.scoring.estimate import plan

    found = plan(config)
    table = Table(show_header=False)
    table.add_row("samples", f"{found.samples:,} ({found.unscorable:,} cannot be scored)")
    table.add_row("tokens, padding included", f"{found.padded_tokens:,} in {found.micro_batches:,} micro-batches")
    table.add_row("work units", f"{found.units:,} for {found.actors:,} actor(s)")
    table.add_row("model", f"{found.parameters / 1e6:,.1f} M parameters")
    table.add_row("memory for weights", f"{found.weight_bytes_per_actor / 2**30:,.2f} GiB per actor")
    table.add_row("forwards", f"{found.forward_flops:.3g} FLOPs")
    table.add_row("perturbations", f"{found.perturbation_bytes:.3g} bytes read and written")
    table.add_row("rate", f"{found.tflops_per_actor:.3g} TFLOP/s per actor ({found.tflops_source})")
    table.add_row("duration", _duration(found.seconds))
    Console().print(table)
    return _DONE


def _duration(seconds: float) -> str:
    if seconds >= 7200:
        return f"about {seconds / 3600:,.1f} h"
    return f"about {seconds / 60:.0f} min" if seconds >= 120 else f"about {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
