"""Shows progress so that it reads well on a terminal and in a job's log."""

import textwrap
import time
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from mrd_ray.config import OutputSettings

WITHHELD = "left out, since a reason may quote the sample"
_LOG_EVERY = 15.0  # seconds between lines where there is no terminal


def console(output: OutputSettings | None = None) -> Console:
    """The console for progress and notices, which prints nothing in a quiet run."""
    return Console(stderr=True, quiet=output is not None and output.quiet, emoji=False)


def short(text: str, width: int) -> str:
    """A text shortened to one line of at most `width` characters, without control characters."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return textwrap.shorten(text, width, placeholder=" ...")


class Meter:
    """A progress bar on a terminal; elsewhere a line every 15 seconds, and one at the end.

    Args:
        title: what is being done.
        total: amount of work, in any unit that is proportional to time.
    """

    def __init__(self, title: str, total: float, on: Console | None = None) -> None:
        self._title, self._total, self._done, self._skipped = title, total, 0.0, 0.0
        self._console = on or console()
        self._started = self._working_since = self._last_line = time.monotonic()
        self._bar = rich.progress.Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(), TextColumn("elapsed"),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=total, detail="starting")

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def working_since(self, seconds_ago: float) -> None:
        """Set when work began, if that was after the start. Rates and the time left ignore the time before."""
        self._working_since = max(self._started, time.monotonic() - seconds_ago)

    def skip(self, work: float) -> None:
        """Count `work` as done before this start."""
        self._done += work
        self._skipped += work

    @property
    def working_seconds(self) -> float:
        """Seconds since work began."""
        return time.monotonic() - self._working_since

    def advance(self, work: float, detail: str) -> None:
        """Count `work` as done. `detail` is shown next to it."""
        self._done += work
        own = self._done - self._skipped
        left = self.working_seconds * (self._total - self._done) / own if own else float("nan")
        detail = f"{detail}, {left:.0f} s left" if own else detail
        self._bar.update(self._task, completed=self._done, detail=detail)
        due = time.monotonic() - self._last_line >= _LOG_EVERY
        if not self._console.is_terminal and (due or not self._done or self._done >= self._total):
            self._last_line = time.monotonic()
            share, elapsed = self._done / self._total, self._last_line - self._started
            self._console.print(
                f"{self._title}: {share:.0%}, {detail}, {elapsed:.0f} s elapsed", soft_wrap=True, highlight=False
            )

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class Tally:
    """Shows a count of work whose total is unknown: live on a terminal; elsewhere a line every 15 seconds."""

    def __init__(self, title: str, what: str, console: Console) -> None:
        self._title, self._what, self._console, self._done = title, what, console, 0
        self._started = self._last_line = time.monotonic()
        self._status = console.status(title) if console.is_terminal else None

    def __enter__(self) -> "Tally":
        if self._status is not None:
            self._status.start()
        return self

    def advance(self, count: int) -> None:
        """Add `count` to the count."""
        self._done += count
        now = time.monotonic()
        text = f"{self._title}: {self._done:,} {self._what}, {now - self._started:.0f} s elapsed"
        if self._status is not None:
            self._status.update(text)
        elif now - self._last_line >= _LOG_EVERY:
            self._last_line = now
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
