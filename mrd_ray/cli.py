"""The `mrd-ray` command: parse, call one function, print where the results went."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mrd_ray.command_line import DONE, FAILED, CommandLine
from mrd_ray.config import (
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    PipelineConfig,
    PlanConfig,
    ReportConfig,
    ScoreConfig,
    StatusConfig,
    TasksConfig,
    UnlearnConfig,
)
from mrd_ray.errors import UserError

_SOME_WITHOUT_SCORE, _STOPPED_EARLY = 3, 4  # exit codes beside those of command_line

LINE = CommandLine(
    "mrd-ray",
    "How hard is each sample to unlearn from a language model? (arXiv 2504.06658, on Ray)",
    {
        "score": ScoreConfig,
        "plan": PlanConfig,
        "compare": CompareConfig,
        "unlearn": UnlearnConfig,
        "evaluate": EvaluateConfig,
        "pipeline": PipelineConfig,
        "status": StatusConfig,
        "tasks": TasksConfig,
        "report": ReportConfig,
        "demo": DemoConfig,
    },
    of_tasks=("score", "plan", "unlearn", "evaluate", "pipeline"),
    positional={"compare": {"run_a": None, "run_b": None}, "report": {"runs": "+"}, "status": {"run": None}},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code says whether every sample has a score (0) or not (3)."""
    return LINE.run(sys.argv[1:] if arguments is None else arguments, _call)


def _call(config: Any) -> int:
    match config:
        case ScoreConfig():
            return _score(config)
        case PlanConfig():
            return _plan(config)
        case CompareConfig():
            return _compare(config)
        case PipelineConfig():  # before UnlearnConfig, which it extends
            return _pipeline(config)
        case UnlearnConfig():
            return _unlearn(config)
        case EvaluateConfig():
            return _evaluate(config)
        case StatusConfig():
            return _status(config)
        case TasksConfig():
            return _tasks(config)
        case ReportConfig():
            return _report(config)
        case DemoConfig():
            return _demo(config)
    return FAILED


def _console(quiet: bool = False) -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, quiet=quiet)  # a job's log has no width of its own


def _say_where(what: str, path: str) -> None:
    Console().print(f"{what} {path}", soft_wrap=True, markup=False, highlight=False)


def _score(config: ScoreConfig) -> int:
    from mrd_ray.scoring import summary
    from mrd_ray.scoring.score import score

    started = time.monotonic()
    finished = score(config)
    console = _console(config.output.quiet)
    summary.show(console, finished.scores, finished.samples, config)
    console.print()
    _say_where("Scores: ", finished.run.path("scores.parquet"))
    _say_where("Summary:", finished.run.path("summary.png"))
    console.print(f"Took {time.monotonic() - started:.0f} s")
    return _SOME_WITHOUT_SCORE if finished.num_errors else DONE


def _unlearn(config: UnlearnConfig) -> int:
    from mrd_ray.evaluation.in_training import unlearn
    from mrd_ray.unlearning import summary

    started = time.monotonic()
    finished = unlearn(config)
    console = _console(config.output.quiet)
    summary.show(console, finished)
    console.print()
    _say_where("Model:  ", finished.run.path("model"))
    _say_where("Log:    ", finished.run.path("metrics.jsonl"))
    console.print(f"Took {time.monotonic() - started:.0f} s")
    return _STOPPED_EARLY if finished.failed else DONE


def _evaluate(config: EvaluateConfig) -> int:
    from mrd_ray.evaluation import summary
    from mrd_ray.evaluation.evaluate import evaluate

    started = time.monotonic()
    finished = evaluate(config)
    console = _console(config.output.quiet)
    summary.show(console, finished)
    console.print()
    _say_where("Figures:", finished.run.path("figures.json"))
    _say_where("Rows:   ", finished.run.path("evaluation.parquet"))
    console.print(f"Took {time.monotonic() - started:.0f} s")
    return _SOME_WITHOUT_SCORE if finished.num_errors else DONE


def _status(config: StatusConfig) -> int:
    from mrd_ray.status import rows, status

    found = status(config.run)
    if config.as_json:
        print(json.dumps([one.plain() for one in found], indent=1))
        return DONE
    console = _console()
    for one in found:
        table = Table(show_header=False)
        for row in rows(one):
            table.add_row(*map(escape, row))
        console.print(table)
    return DONE


def _tasks(config: TasksConfig) -> int:
    from mrd_ray.data import tasks

    console = _console()
    for task in config.tasks or tasks.names():
        description, sources = tasks.sources(task, config.task_data)
        title = escape(f"{task}: {description}")
        table = Table("set", "read from", "from here", title=title, title_justify="left")
        for source in sources:
            table.add_row(source.name, escape(source.path), "yes" if source.problem is None else escape(source.problem))
        console.print(table)
    return DONE


def _pipeline(config: PipelineConfig) -> int:
    from mrd_ray.evaluation import summary
    from mrd_ray.evaluation.evaluate import evaluate
    from mrd_ray.runs import RunDirectory
    from mrd_ray.stages import Stages

    RunDirectory(config.run.dir)  # the owner's alone: the report in it holds texts
    stages = Stages.of(config)
    console = _console(config.output.quiet)
    code = _score(stages.score)
    console.print()
    code = max(code, _unlearn(stages.unlearn))
    runs = {when: evaluate(one) for when, one in stages.evaluations.items()}
    if runs:
        summary.show_beside(console, runs)
        code = max(code, *(_SOME_WITHOUT_SCORE if run.num_errors else DONE for run in runs.values()))
    console.print()
    _report(stages.report)
    return code


def _demo(config: DemoConfig) -> int:
    from mrd_ray.demo import demo

    scoring = demo.scoring(config)
    if not config.unlearn or (config.model, config.data) != (None, None):
        return _score(scoring)
    return _pipeline(demo.pipeline(scoring))


def _compare(config: CompareConfig) -> int:
    from mrd_ray.scoring import compare
    from mrd_ray.scoring.summary import short

    found = compare.compare(config)
    try:
        Path(config.out).write_bytes(compare.figure(found, config))
    except OSError as problem:
        raise UserError(f"out: cannot write {config.out}: {problem.strerror}") from None
    console = _console(config.output.quiet)
    table = Table(show_header=False)
    table.add_row("a", escape(f"{config.run_a}: {found.settings[0]}"))
    table.add_row("b", escape(f"{config.run_b}: {found.settings[1]}"))
    table.add_row("samples compared", f"{found.compared:,} (a alone scores {found.only_a:,}, b alone {found.only_b:,})")
    table.add_row("Spearman correlation", f"{found.spearman:.4f}")
    table.add_row("Kendall correlation", f"{found.kendall:.4f}")
    table.add_row("median of b / a", f"{found.median_ratio:.4g}")
    table.add_row("over 3 standard errors apart", found.share_apart)
    table.add_row("standard errors of differences", found.draws)
    console.print(table)
    texts = ["text"] if config.output.texts else []
    worst = Table("a", "b", "apart", "sample", *texts, title="Those that disagree most", title_justify="left")
    for row in found.rows[:10]:
        text = [escape(short(row[name] or "", 200)) for name in texts]
        worst.add_row(f"{row['a']:.3g}", f"{row['b']:.3g}", found.how_far(row), escape(row["sample_id"]), *text)
    console.print(worst)
    _say_where("Scatter plot:", config.out)
    return DONE


def _report(config: ReportConfig) -> int:
    from mrd_ray.report.report import write_report

    _say_where("Report:", write_report(config))
    return DONE


def _plan(config: PlanConfig) -> int:
    from mrd_ray.scoring import summary
    from mrd_ray.scoring.estimate import plan

    found = plan(config)
    console = _console()
    table = Table(show_header=False)
    table.add_row("samples", f"{found.samples:,} ({found.reasons.total():,} cannot be scored)")
    waste = 1 - found.tokens / found.padded_tokens if found.padded_tokens else 0.0
    padding = f"{found.padded_tokens:,} ({waste:.1%} padding) in {found.micro_batches:,} micro-batches"
    table.add_row("tokens", padding)
    table.add_row("work units", f"{found.units:,} for {found.actors:,} actor(s)")
    table.add_row("model", f"{found.parameters / 1e6:,.1f} M parameters")
    table.add_row("memory for weights", f"{found.weight_bytes_per_actor / 2**30:,.2f} GiB per actor")
    table.add_row("forwards", f"{found.forward_flops:.3g} FLOPs")
    table.add_row("perturbations", f"{found.perturbation_bytes:.3g} bytes read and written")
    table.add_row("rate", found.rates.source)
    if config.probe:
        of_token = f"{1e6 * found.rates.forward:.3g} us a token, {found.rates.perturb:.3g} s a perturbation"
        table.add_row("measured", f"{found.rates.start_up:.0f} s to start, {of_token}")
    around = f", {_duration(found.around)} of it before and after the actors" if config.probe else ""
    whole = _duration(found.seconds + found.around)
    table.add_row("duration", f"{whole}{around}, {found.device_hours:.3g} device-hours")
    console.print(table)
    _show_fleets(console, config, found)
    summary.show_errors(console, found.reasons, config.output.texts)
    return _SOME_WITHOUT_SCORE if found.reasons else DONE


def _show_fleets(console: Console, config: PlanConfig, found: Any) -> None:
    hazards = f"slowness spread by {config.straggling:g}, each lost {config.losses_per_hour:g} times an hour"
    table = Table("actors", "duration", "device-hours", "efficiency", title=f"Simulated actors: {hazards}")
    for one in found.fleets:
        table.add_row(f"{one.actors:,}", _duration(one.seconds), f"{one.device_hours:.3g}", f"{one.efficiency:.0%}")
    console.print(table)
    if stops := [one.actors for one in found.fleets if one.efficiency < 0.5]:
        console.print(f"Scaling stops: of {stops[0]:,} actors more than half would wait", highlight=False)
    if found.choice is not None:
        way, course = found.choice, found.choice.course
        verdict = "Choose" if way.met else "Nothing tried stays within that; nearest:"
        console.print(
            f"{verdict} scoring.estimator {way.estimator}, scoring.micro_batch_tokens {way.micro_batch_tokens}, "
            f"ray.actors {course.actors}: {_duration(course.seconds)}, {course.device_hours:.3g} device-hours",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _duration(seconds: float) -> str:
    if seconds >= 7200:
        return f"about {seconds / 3600:,.1f} h"
    return f"about {seconds / 60:.0f} min" if seconds >= 120 else f"about {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
