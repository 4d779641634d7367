"""The results of a benchmark: figures with their spread and targets, printed as a table and written as JSON."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.common import machine
from mrd_ray.cli.console import console_of

Raw = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One figure of a benchmark.

    what: its name. unit: none for a ratio; only ratios are meaningful on another machine. low, high: the range of its
    repetitions. at_least, at_most: the target, if there is one; which of them it is shows if higher or lower is better.
    """

    what: str
    value: float
    unit: str = ""
    detail: str = ""
    repetitions: int = 1
    low: float | None = None
    high: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @classmethod
    def of(cls, what: str, values: Sequence[float], unit: str = "", detail: str = "", **target: float) -> "Figure":
        """A figure that is the median of repetitions."""
        return cls(what, median(values), unit, detail, len(values), min(values), max(values), **target)

    @property
    def met(self) -> bool | None:
        """Whether it meets its target; None without a target."""
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least or -math.inf) <= self.value <= (math.inf if self.at_most is None else self.at_most)

    def cells(self) -> tuple[str, str, str, str]:
        """The figure's row in a table: what, value, target and detail."""
        spread = "" if self.repetitions == 1 else f" ({self.low:.4g} .. {self.high:.4g})"
        value = f"{self.value:.4g}{f' {self.unit}' if self.unit else ''}{spread}"
        target = f">= {self.at_least:g}" if self.at_least is not None else ""
        target += f"<= {self.at_most:.4g}" if self.at_most is not None else ""
        return self.what, value, target, self.detail


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ratios of repetitions that took turns, so that changes of the machine's speed show as spread, not as a result."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _handed_on(settings: Mapping[str, object]) -> Raw:
    """The settings without the folders of files on this machine."""
    return {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in settings.items()
    }


class Results:
    """results/NAME.json, which is written again after every part, so that a killed run leaves the finished parts."""

    def __init__(self, name: str, settings: Mapping[str, object], out: str) -> None:
        self.file = Path(out) / f"{name}.json"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.console = console_of(width=150)
        self.raw: Raw = {}
        self._content: Raw = {"benchmark": name, "date": time.strftime("%Y-%m-%d"), "settings": _handed_on(settings)}
        self._content |= {"machine": machine(), "figures": [], "raw": self.raw}

    def keep(self, part: str, found: Any) -> None:
        """Keep a part of the raw measurements."""
        self.raw[part] = found
        self._write()
        self.console.log(part)

    def show(self, figures: Sequence[Figure]) -> None:
        """Print the figures, and write them with the measurements."""
        self._content["figures"] = [asdict(figure) for figure in figures]
        self._write()
        title = f"{self._content['benchmark']} on {self._content['machine']['cpu']}"
        table = Table("what", "value", "target", "detail", title=title)
        for figure in figures:
            what, value, target, detail = figure.cells()
            table.add_row(what, value, f"[{'green' if figure.met else 'red'}]{target}" if target else "", detail)
        self.console.print(table)
        self.console.print(f"Measurements and settings: {self.file}", soft_wrap=True)

    def _write(self) -> None:
        self.file.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")


def read(path: str) -> tuple[Raw, dict[str, Figure]]:
    """A result file, and its figures by name."""
    content: Raw = json.loads(Path(path).read_text(encoding="utf-8"))
    return content, {figure["what"]: Figure(**figure) for figure in content["figures"]}
