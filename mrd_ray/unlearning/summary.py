"""What a person looks at when a run has ended: why, and what the model knew before and knows now."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mrd_ray.errors import UserError
from mrd_ray.unlearning import log
from mrd_ray.unlearning.stopping import TITLES
from mrd_ray.unlearning.unlearn import UnlearnRun


def show(console: Console, finished: UnlearnRun) -> None:
    """Print the summary."""
    evaluations = log.evaluations(finished.log)
    if not evaluations:
        raise UserError(f"{finished.run.path('metrics.jsonl')} has no evaluation; use another directory")
    before = evaluations[0]
    after = next(line for line in reversed(evaluations) if line["step"] == finished.step)
    unlearning = finished.config.unlearning
    console.print(
        f"[bold]{escape(unlearning.method)}, weighting {unlearning.weighting}[/]: stopped after "
        f"{finished.log[-1]['step']} steps, {escape(finished.reason)}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if finished.failed:
        which = "last good" if finished.config.checkpoints.best_by == "last" else "best"
        console.print(f"[red]The result is the {which} state, of step {finished.step}", highlight=False)
        if finished.step == 0:
            console.print("[red]That is the model as it was: nothing has been unlearned", highlight=False)
    elif finished.log[-1]["step"] != finished.step:
        console.print(f"The result is the state of step {finished.step}, the best", highlight=False)
    table = Table("", "before", "after", title_justify="left")
    for name, title in TITLES.items():
        if before[name] is not None:
            table.add_row(title, *(f"{line[name]:.4g}" for line in (before, after)))
    console.print(table)
