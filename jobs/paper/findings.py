"""An experiment's findings beside the paper's claim: on the terminal, as JSON and as a picture."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.paper.config import ExperimentConfig
from jobs.paper.statistics import Interval
from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.scoring.summary import png

Cell = str | int | float | None | Interval


@dataclass(frozen=True)
class Findings:
    """name: of the files. claim: the paper's, in words. rows: ours, all with the same columns. found: sentences."""

    name: str
    title: str
    claim: str
    rows: list[dict[str, Cell]]
    found: list[str]
    page: matplotlib.figure.Figure


def publish(findings: Findings, config: ExperimentConfig, run: RunDirectory, console: Console) -> None:
    """Print the findings; write RUN/findings.json and findings.png, and copies into `config.results`."""
    console.print(f"[bold]{escape(findings.title)}", highlight=False)
    sides = Table("the paper (arXiv 2504.06658)", "found here", show_lines=True)
    sides.add_row(escape(findings.claim), escape("\n".join(findings.found)))
    console.print(sides)
    table = Table(*(escape(column) for column in findings.rows[0]))
    for row in findings.rows:
        table.add_row(*(escape(_text(cell)) for cell in row.values()))
    console.print(table)
    console.print("In brackets: 95% confidence intervals.", highlight=False)
    content = {
        "title": findings.title,
        "paper": findings.claim,
        "found": findings.found,
        "rows": [{name: _json(cell) for name, cell in row.items()} for row in findings.rows],
        "config": config.model_dump(mode="json", exclude={"run", "results"}),
        **{key: run.manifest()["invocations"][-1][key] for key in ("time", "versions", "hardware")},
    }
    text = json.dumps(content, indent=1).replace(f"{Path.home()}/", "~/")  # findings are handed on
    files = {".json": text.encode(), ".png": png(findings.page)}
    for suffix, data in files.items():
        run.write(f"findings{suffix}", data)
        if config.results is not None:
            target = Path(config.results) / f"{findings.name}{suffix}"
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            except OSError as problem:
                raise UserError(f"results: cannot write {target}: {problem.strerror or problem}") from None
    console.print(f"\nFindings: {run.path('findings.json')}", soft_wrap=True, highlight=False)
    console.print(f"Picture:  {run.path('findings.png')}", soft_wrap=True, highlight=False)


def _text(cell: Cell) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _json(cell: Cell) -> object:
    if isinstance(cell, Interval):
        return {"value": _json(cell.value), "low": _json(cell.low), "high": _json(cell.high)}
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell
