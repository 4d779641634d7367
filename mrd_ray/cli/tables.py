"""Results that are a table on the terminal: of plans, comparisons, runs and tasks."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mrd_ray.cli.console import console_of, say_where
from mrd_ray.cli.ending import DONE, SOME_WITHOUT_SCORE
from mrd_ray.config import CompareConfig, PlanConfig, StatusConfig, TasksConfig
from mrd_ray.errors import UserError


def compare(config: CompareConfig) -> int:
    """How far two runs agree, and the samples on which they least do."""
    from mrd_ray.runs.meter import short
    from mrd_ray.scoring.compare import compare as comparison
    from mrd_ray.scoring.compare import figure

    found = comparison(config)
    try:
        Path(config.out).write_bytes(figure(found, config))
    except OSError as problem:
        raise UserError(f"out: cannot write {config.out}: {problem.strerror}") from None
    console = console_of(config.output.quiet)
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
    texts = config.output.texts
    head = ["a", "b", "apart", "sample", *(["text"] if texts else [])]
    worst = Table(*head, title="Those that disagree most", title_justify="left")
    for row in found.rows[:10]:
        text = [escape(short(row["text"] or "", 200))] if texts else []
        worst.add_row(f"{row['a']:.3g}", f"{row['b']:.3g}", found.how_far(row), escape(row["sample_id"]), *text)
    console.print(worst)
    say_where("Scatter plot:", config.out)
    return DONE


def plan(config: PlanConfig) -> int:
    """What scoring would cost."""
    from mrd_ray.api import plan as estimate
    from mrd_ray.scoring import summary

    found = estimate(config)
    console = console_of()
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
    return SOME_WITHOUT_SCORE if found.reasons else DONE


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


def status(config: StatusConfig) -> int:
    """How far a run is."""
    from mrd_ray.runs.status import rows
    from mrd_ray.runs.status import status as read

    found = read(config.run)
    if config.as_json:
        print(json.dumps([one.plain() for one in found], indent=1))
        return DONE
    console = console_of()
    for one in found:
        table = Table(show_header=False)
        for row in rows(one):
            table.add_row(*map(escape, row))
        console.print(table)
    return DONE


def tasks(config: TasksConfig) -> int:
    """The tasks and their sets."""
    from mrd_ray.data import tasks as known

    console = console_of()
    for task in config.tasks or known.names():
        description, sources = known.sources(task, config.task_data)
        title = escape(f"{task}: {description}")
        table = Table("set", "read from", "from here", title=title, title_justify="left")
        for source in sources:
            table.add_row(source.name, escape(source.path), "yes" if source.problem is None else escape(source.problem))
        console.print(table)
    return DONE
