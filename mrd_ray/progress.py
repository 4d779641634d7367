"""Progress that reads well on a terminal and in a job's log."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LOG_EVERY = 15.0  # seconds between lines where there is no terminal


class Meter:
    """A bar on a terminal; elsewhere a line at the start, then one every so often, then one at the end.

    Args:
        title: what is being done.
        total: amount of work, in any unit that time is proportional to.
    """

    def __init__(self, title: str, total: float, console: Console | None = None) -> None:
        self._title, self._total, self._done, self._detail = title, total, 0.0, ""
        self._console = console or Console(stderr=True)
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=total, detail="")

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def advance(self, work: float, detail: str) -> None:
        """Count `work` as done; `detail` says the rest in words."""
        self._done, self._detail = self._done + work, detail
        self._bar.update(self._task, completed=self._done, detail=detail)
        if time.monotonic() - self._last_line >= _LOG_EVERY:
            self._line()

    def _line(self) -> None:
        if self._console.is_terminal:
            return
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._started
        left = elapsed * (self._total - self._done) / self._done if self._done else float("nan")
        share = self._done / self._total if self._total else 1.0
        self._console.print(
            f"{self._title}: {share:.0%}, {self._detail}, {elapsed:.0f} s elapsed, {left:.0f} s left", soft_wrap=True
        )

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._done:
            self._line()
