"""Where the command line prints."""

import sys

from rich.console import Console


def console_of(quiet: bool = False, width: int = 120) -> Console:
    """Stdout, on which a quiet run prints only where its results are. width: of a log, which has none of its own."""
    return Console(width=None if sys.stdout.isatty() else width, quiet=quiet, emoji=False)


def say_where(what: str, path: str) -> None:
    """Print where something is, on a line of its own however long: quiet runs too."""
    Console(emoji=False).print(f"{what} {path}", soft_wrap=True, markup=False, highlight=False)
