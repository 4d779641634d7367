"""How a command ends: its exit code, and what is printed of an error."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from mrd_ray.cli.missing import missing_module, what_to_do
from mrd_ray.config import OutputSettings
from mrd_ray.errors import SettingsError, UserError, whole_traceback

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit codes
SOME_WITHOUT_SCORE, STOPPED_EARLY = 3, 4
DEBUG = "--debug"


def called(config: Any, command: str, call: Callable[[Any], int], debug: bool) -> int:
    """Call with the config, and return the exit code; what goes wrong is printed as a sentence."""
    texts = getattr(config, "output", OutputSettings()).texts
    try:
        with _terminable():
            return call(config)
    except UserError as problem:
        return failed(problem, REFUSED if isinstance(problem, SettingsError) else FAILED, debug, texts)
    except Exception as problem:  # a defect, or what a library did not foresee
        if isinstance(problem, BrokenPipeError) and _nobody_reads():
            return FAILED
        return failed(_unforeseen(command, problem), FAILED, debug, texts)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from here", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, by `ray job stop` or a node that goes away, is as ctrl-C. Ray's own handler exits with its number."""
    of_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number)) if of_main else None
    try:
        yield
    except SystemExit as stop:
        if stop.code == signal.SIGTERM:
            raise KeyboardInterrupt from None
        raise
    finally:
        if of_main:
            signal.signal(signal.SIGTERM, before)


def _nobody_reads() -> bool:
    """Whether the reader of stdout has gone, as of `mrd-ray status RUN | head -1`: other pipes break too."""
    try:
        sys.stdout.flush()
        return False
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return True


def _unforeseen(command: str, problem: Exception) -> UserError:
    """An exception that is not ours, as a sentence."""
    if module := missing_module(problem):
        found = UserError(what_to_do(module))
        found.__cause__ = problem
        return found
    inner: BaseException = problem
    while type(inner).__module__.startswith("ray.") and (of := getattr(inner, "cause", None) or inner.__cause__):
        inner = of  # what a worker raised
    reason = (str(inner).strip().splitlines() or ["no reason given"])[0].rstrip(".")
    where = "".join(f" {note}." for note in getattr(problem, "__notes__", []))
    quote = f": {reason}"  # which may be of a row
    found = UserError(
        f"`{command}` was stopped by {type(inner).__name__}{quote}. This is no setting of yours that mrd_ray knows "
        f"to be wrong.{where} {DEBUG} prints the traceback; with it, please report this",
        quote,
    )
    found.__cause__ = problem
    return found


def failed(problem: UserError, code: int, debug: bool = False, texts: bool = True) -> int:
    """Print the error, and return the exit code. texts: whether it may quote rows."""
    if debug:
        print(whole_traceback(problem), file=sys.stderr, end="")
    told = problem if texts else problem.without_quote
    Console(stderr=True, emoji=False).print(
        f"error: {told}", style="red", markup=False, highlight=False, soft_wrap=True
    )
    return code
