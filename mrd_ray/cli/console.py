"""Where the command line prints."""

import sys

from rich.console import Console


def console_of(quiet: bool = False) -> Console:
    """Stdout, which a quiet run has nothing on but where its results are."""
    return Console(
        width=None if sys.stdout.isatty() else 120, quiet=quiet, emoji=False
    )  # a job's log has no width of its own


def say_where(what: str, path: str) -> None:
    """Print where something is, on a line of its own however long: quiet runs too."""
    Console(emoji=False).print(f"{what} {path}", soft_wrap=True, markup=False, highlight=False)
