"""Makes sure that only one driver at a time works in a run directory."""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mrd_ray.errors import UserError
from mrd_ray.runs import meter
from mrd_ray.runs.directory import RunDirectory

BEAT = 10.0  # seconds between signs of life
SILENT = 6 * BEAT  # seconds without a sign of life after which a driver counts as dead
_SETTLE = 3.0  # seconds for drivers that start at the same time to notice one another
_HOLDER, _COMING = "driver.json", "drivers"


class Driver(BaseModel):
    """A driver that works in a run directory without file locks, or is about to. Times are seconds since 1970."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    key: str = Field(default_factory=lambda: f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}")
    node: str = Field(default_factory=lambda: os.uname().nodename)
    pid: int = Field(default_factory=os.getpid)
    time: float = Field(default_factory=time.time)


@contextlib.contextmanager
def held(run: RunDirectory) -> Iterator[None]:
    """Hold the directory before anything is written to it: by a file lock, or by signs of life where locks are missing.

    After a driver was killed, its last sign of life may still be recent; the next driver waits until it is old enough.
    If several drivers start within seconds on an object store, where none can lock, the first continues: each writes
    its name, waits for the others to write theirs, and compares.

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
            with contextlib.suppress(UserError):  # it expires in a minute
                run.remove(_HOLDER)


def _wait_until_cold(run: RunDirectory) -> None:
    """Wait until the previous driver counts as dead. Raises UserError if it gives another sign of life."""
    known = _read(run, _HOLDER)
    if known is None or (left := known.time + SILENT - time.time()) <= 0:
        return
    meter.console().print(
        f"Process {known.pid} on {known.node} worked in {run.uri} {SILENT - left:.0f} s ago: waiting to see whether it "
        "is still alive",
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
    """The first of the drivers that have written their names within a minute."""
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
    except (UserError, ValidationError):  # removed meanwhile, or incomplete
        return None


def _beat(run: RunDirectory, driver: Driver, patiently: bool = True) -> None:
    driver.time = time.time()
    run.write(_HOLDER, driver.model_dump_json().encode(), patiently)


def _keep_beating(run: RunDirectory, driver: Driver, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with contextlib.suppress(UserError):  # if the storage is gone, writing the next unit's result will fail
            _beat(run, driver, patiently=False)
