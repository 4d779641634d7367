"""Who works in a run directory: one driver at a time."""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory

BEAT = 10.0  # seconds between two signs of life
SILENT = 6 * BEAT  # seconds without one after which a driver is taken for dead
_SETTLE = 3.0  # seconds in which drivers that start together see one another
_HOLDER, _COMING = "driver.json", "drivers"


class Driver(BaseModel):
    """A driver at work on a storage without locks, or about to be. Times are seconds since 1970."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    key: str = Field(default_factory=lambda: f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}")
    node: str = Field(default_factory=lambda: os.uname().nodename)
    pid: int = Field(default_factory=os.getpid)
    time: float = Field(default_factory=time.time)


@contextlib.contextmanager
def held(run: RunDirectory) -> Iterator[None]:
    """Hold the directory, before anything is written to it: by its lock, or by signs of life where there is none.

    A driver that was killed leaves signs that are still warm: they are waited for until they are cold. Of drivers that
    start within seconds on an object store, which none of them may lock, the first goes on: each leaves its name, lets
    the others leave theirs, and looks.

    Raises UserError if another driver is at work there.
    """
    with run.locked():
        if run.locks:
            yield
            return
        driver, over = Driver(), threading.Event()
        _wait_until_cold(run)
        coming = f"{_COMING}/{driver.key}.json"
        run.write(coming, driver.model_dump_json().encode())
        try:
            time.sleep(_SETTLE)
            if (other := _read(run, _HOLDER)) is not None and time.time() - other.time < SILENT:
                raise _refusal(run, other)
            if (first := _first_of_the_coming(run, driver)).key != driver.key:
                raise _refusal(run, first)
            _beat(run, driver)
        finally:
            run.remove(coming)
        beating = threading.Thread(target=_keep_beating, args=(run, driver, over), daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()
            with contextlib.suppress(UserError):  # it is cold in a minute
                run.remove(_HOLDER)


def _wait_until_cold(run: RunDirectory) -> None:
    """Raises UserError if the driver that was there gives another sign of life."""
    known = _read(run, _HOLDER)
    if known is None or (left := known.time + SILENT - time.time()) <= 0:
        return
    Console(stderr=True).print(
        f"{run.uri} was worked in {SILENT - left:.0f} s ago, by process {known.pid} on {known.node}: waiting to see if "
        "it still is",
        markup=False, soft_wrap=True,
    )  # fmt: skip
    while (left := known.time + SILENT - time.time()) > 0:
        time.sleep(min(left, BEAT / 4))
        now = _read(run, _HOLDER)
        if now is None:
            return
        if (now.key, now.time) != (known.key, known.time):
            raise _refusal(run, now)


def _first_of_the_coming(run: RunDirectory, own: Driver) -> Driver:
    """Of those that have left their names within a minute."""
    named = [_read(run, f"{_COMING}/{name}") for name in run.names(_COMING)]
    fresh = [one for one in named if one is not None and abs(own.time - one.time) < SILENT]
    return min([own, *fresh], key=lambda one: one.key)


def _refusal(run: RunDirectory, other: Driver) -> UserError:
    return UserError(
        f"run.dir: process {other.pid} on {other.node} is working in {run.uri}; wait for it, or use another directory"
    )


def _read(run: RunDirectory, name: str) -> Driver | None:
    try:
        return Driver.model_validate_json(run.read(name)) if run.exists(name) else None
    except (UserError, ValidationError):  # gone meanwhile, or half of one
        return None


def _beat(run: RunDirectory, driver: Driver, patiently: bool = True) -> None:
    driver.time = time.time()
    run.write(_HOLDER, driver.model_dump_json().encode(), patiently)


def _keep_beating(run: RunDirectory, driver: Driver, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with contextlib.suppress(UserError):  # the next unit's result will tell
            _beat(run, driver, patiently=False)
