"""What operators see of a run: events.jsonl, progress.json with a sign of life, and Ray metrics."""

import contextlib
import os
import threading
import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mrd_ray.config import OutputSettings
from mrd_ray.config.credentials import recordable
from mrd_ray.errors import UserError, whole_traceback
from mrd_ray.runs import meter
from mrd_ray.runs.directory import EVENTS, PROGRESS, TRACEBACK, RunDirectory
from mrd_ray.runs.gauges import GAUGES, Gauges
from mrd_ray.runs.hold import BEAT

_OFTEN = 1 << 20  # bytes of events.jsonl up to which it is rewritten at every beat; if larger, less often


def _printable(text: str) -> str:
    """Without control characters, which a terminal would obey: a run directory may be somebody else's."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


T = TypeVar("T")
Text = Annotated[str, AfterValidator(_printable)]
Moment = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]  # seconds since 1970
Amount = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Progress(BaseModel):
    """progress.json: how far one start of a command is. Times are seconds since 1970; None means not reported."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, hide_input_in_errors=True)

    state: Literal["running", "done", "failed", "interrupted"] = "running"
    command: Text
    run: Text
    node: Text = Field(default_factory=lambda: os.uname().nodename)
    pid: Count = Field(default_factory=os.getpid)
    started: Moment = Field(default_factory=time.time)
    time: Moment = Field(default_factory=time.time, description="When the last sign of life was written.")
    message: Text | None = Field(None, description="Why it failed.")
    units_done: Count | None = Field(None, description="Units done since this start.")
    units_left: Count | None = None
    units_failed: Count | None = None
    samples_draws_per_second: Amount | None = None
    tokens_per_second: Amount | None = None
    actor_restarts: Count | None = None
    nodes_set_aside: list[Text] | None = None
    step: Count | None = None
    steps: Count | None = None
    samples: Count | None = None
    sample_errors: Count | None = None

    @property
    def silent(self) -> float | None:
        """Seconds since the last sign of life if the run says that it is running, else None."""
        return time.time() - self.time if self.state == "running" else None


class Event(BaseModel):
    """A line of events.jsonl: something that happened in this start of the command or an earlier one."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    time: Moment
    run: Text
    event: Text
    message: Text | None = None


def lines_of(content: bytes) -> list[bytes]:
    """The lines of events.jsonl. Not `splitlines`, which also splits at other characters in texts."""
    return [line for line in content.split(b"\n") if line]


class Journal:
    """The record of one start of a command in a claimed run directory, kept by the driver: see Progress and Event."""

    def __init__(self, run: RunDirectory, command: str, output: OutputSettings | None = None) -> None:
        self._run, self.console = run, meter.console(output or OutputSettings())
        self.run_id = str(run.manifest()["run_id"])
        self._progress = Progress(command=command, run=self.run_id)
        self._events = _earlier(run)
        self.gauges = Gauges(self.run_id, self._progress.started)
        self._within = contextlib.ExitStack()
        self._due, self._over, self._adding = 0.0, threading.Event(), threading.Lock()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Journal":
        self.event("started", command=self._progress.command, node=self._progress.node)
        self._write()
        self._beating.start()
        self.gauges.start()
        return self

    def within(self, context: contextlib.AbstractContextManager[T]) -> T:
        """Enter a context, for example a cluster, that is left only after the final state has been reported there."""
        return self._within.enter_context(context)

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> None:
        state = "done" if problem is None else "failed" if isinstance(problem, Exception) else "interrupted"
        message = None
        if problem is not None:  # our own text, or only the class of another exception, whose text may quote anything
            message = problem.without_quote if isinstance(problem, UserError) else type(problem).__name__
        with self._within:
            self.gauges.stop(state)
        self._over.set()
        self._beating.join()
        if isinstance(problem, Exception):
            self._keep_traceback(problem)
        self._progress = self._progress.model_copy(update={"state": state, "message": message})
        self.event(state, reason=message)
        self._due = 0.0
        try:
            self._write(patiently=problem is None)
        except UserError:
            if problem is None:
                raise  # otherwise the disk may be the cause of the problem

    def _keep_traceback(self, problem: Exception) -> None:
        """Write the traceback to the run directory, and add a note to the exception that says where."""
        with contextlib.suppress(UserError):  # the disk may be the cause of the problem
            lines = whole_traceback(problem).split("\n")  # they may quote a URI with credentials
            kept = "\n".join(" ".join(recordable(line.split(" "))) for line in lines)
            self._run.write(TRACEBACK, kept.encode(errors="replace"))
            problem.add_note(f"The traceback is in {self._run.path(TRACEBACK)}")

    def tell(self, **figures: Any) -> None:
        """Set figures of Progress for progress.json and, if named in GAUGES, for Ray's metrics."""
        for name, value in figures.items():
            setattr(self._progress, name, value)
            if name in GAUGES:
                self.gauges.tell(name, value)

    def event(self, event: str, say: str | None = None, **fields: object) -> None:
        """Record an event, written with the next sign of life. say: a message for people, also for the console."""
        if say is not None:
            self.console.print(say, soft_wrap=True, highlight=False, markup=False)
        line = Event(time=round(time.time(), 3), run=self.run_id, event=event, message=say, **fields)
        with self._adding:
            self._events.append(line.model_dump_json(exclude_none=True))

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(UserError):  # if the storage is gone, writing the next unit's result will fail
                self._write(patiently=False)

    def _write(self, patiently: bool = True) -> None:
        self._progress.time = time.time()
        self._run.write(PROGRESS, self._progress.model_dump_json(indent=1).encode(), patiently)
        if time.monotonic() < self._due:
            return
        with self._adding:
            content = "".join(f"{line}\n" for line in self._events).encode()
        self._run.write(EVENTS, content, patiently)
        self._due = time.monotonic() + BEAT * len(content) / _OFTEN


def _earlier(run: RunDirectory) -> list[str]:
    """The events of earlier starts. Anything else, for example half a line, is left out."""
    found = []
    for line in lines_of(run.read(EVENTS)) if run.exists(EVENTS) else []:
        try:
            found.append(Event.model_validate_json(line).model_dump_json(exclude_none=True))
        except ValidationError:
            continue
    return found
