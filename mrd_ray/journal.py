"""What operators see of a run: events.jsonl, progress.json with a sign of life, and Ray metrics."""

import os
import threading
import time
from typing import Any, Literal

import ray
import ray.util.metrics
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from mrd_ray.errors import UserError
from mrd_ray.runs import RunDirectory

PROGRESS, EVENTS = "progress.json", "events.jsonl"
BEAT = 10.0  # seconds between two signs of life
_GAUGES = {
    "units_done": "Work units whose results are on disk",
    "units_left": "Work units still to do",
    "units_failed": "Attempts at work units that were lost with their actor, and are made again",
    "samples_draws_per_second": "Samples times draws scored per second, or rows evaluated",
    "tokens_per_second": "Tokens through forwards per second, draws and padding included",
    "actor_restarts": "Actors that were started anew after their end",
}


class Progress(BaseModel):
    """progress.json: how far one start of a command is. Times are seconds since 1970; of a figure, None is not told."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    state: Literal["running", "done", "failed", "interrupted"] = "running"
    command: str
    run: str
    node: str = Field(default_factory=lambda: os.uname().nodename)
    pid: int = Field(default_factory=os.getpid)
    started: float = Field(default_factory=time.time)
    time: float = Field(default_factory=time.time, description="Of the last sign of life.")
    message: str | None = Field(None, description="Why it failed.")
    units_done: int | None = Field(None, description="Since this start.")
    units_left: int | None = None
    units_failed: int | None = None
    samples_draws_per_second: float | None = None
    tokens_per_second: float | None = None
    actor_restarts: int | None = None
    step: int | None = None
    steps: int | None = None
    samples: int | None = None
    sample_errors: int | None = None


class Event(BaseModel):
    """A line of events.jsonl: something that happened in this start of the command or an earlier one."""

    model_config = ConfigDict(extra="allow")

    time: float
    run: str
    event: str
    message: str | None = None


class Journal:
    """The record of one start of a command on a claimed run directory, kept by its driver: see Progress and Event."""

    def __init__(self, run: RunDirectory, command: str) -> None:
        self._run, self.console = run, Console(stderr=True)
        self.run_id = str(run.manifest()["run_id"])
        self._progress = Progress(command=command, run=self.run_id)
        self._events = run.read(EVENTS).decode(errors="replace").splitlines() if run.exists(EVENTS) else []
        self._gauges: dict[str, ray.util.metrics.Gauge] = {}
        self._changed, self._over, self._writing = True, threading.Event(), threading.Lock()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Journal":
        self.event("started", command=self._progress.command, node=self._progress.node)
        self._write()
        self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: Any) -> None:
        state = "done" if problem is None else "failed" if isinstance(problem, Exception) else "interrupted"
        message = None
        if problem is not None:  # a text of ours, or the kind of a defect, whose own words may quote anything
            message = str(problem) if isinstance(problem, UserError) else type(problem).__name__
        self._over.set()
        self._beating.join()
        self._progress = self._progress.model_copy(update={"state": state, "message": message})
        self.event(state, reason=message)
        try:
            self._write()
        except UserError:
            if problem is None:
                raise  # else the disk may be what the problem is about

    def tell(self, **figures: float) -> None:
        """Figures of Progress, into progress.json and, those named in _GAUGES, Ray's metrics."""
        for name, value in figures.items():
            setattr(self._progress, name, value)
        if not ray.is_initialized():
            return
        for name in figures.keys() & _GAUGES:
            if name not in self._gauges:
                self._gauges[name] = ray.util.metrics.Gauge(f"mrd_ray_{name}", _GAUGES[name], tag_keys=("run",))
                self._gauges[name].set_default_tags({"run": self.run_id})
            self._gauges[name].set(figures[name])

    def event(self, event: str, say: str | None = None, **fields: Any) -> None:
        """Something that happened, to be written with the next sign of life. say: for a person, on the console too."""
        if say is not None:
            self.console.print(say, soft_wrap=True, highlight=False, markup=False)
        line = Event(time=round(time.time(), 3), run=self.run_id, event=event, message=say, **fields)
        with self._writing:
            self._events.append(line.model_dump_json(exclude_none=True))
            self._changed = True

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._write()
            except UserError as problem:  # the next unit's result will say so too, and end the run
                self.console.print(str(problem), style="red", markup=False)

    def _write(self) -> None:
        with self._writing:
            self._progress.time = time.time()
            self._run.write(PROGRESS, self._progress.model_dump_json(indent=1).encode())
            if self._changed:
                self._run.write(EVENTS, "".join(f"{line}\n" for line in self._events).encode())
                self._changed = False
