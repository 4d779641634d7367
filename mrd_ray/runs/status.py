"""`mrd-ray status`: how far a run is, read only from its run directory."""

import time
from dataclasses import dataclass
from typing import Any

from mrd_ray.config.pipeline import FOLDERS
from mrd_ray.errors import UserError
from mrd_ray.runs import hold, journal
from mrd_ray.runs.directory import EVENTS, PROGRESS, RunDirectory
from mrd_ray.runs.journal import Event, Progress

_EVENTS = 5


@dataclass(frozen=True)
class Status:
    """How far a run, or a stage of a pipeline, is.

    silent: seconds since the last sign of life if the run says that it is running, else None. events: the last ones,
    without those of finished units.
    """

    directory: str
    progress: Progress
    silent: float | None
    events: list[Event]

    @property
    def state(self) -> str:
        """The state in progress.json, or "silent" if that is running but there has been no sign of life for long."""
        return "silent" if self.silent is not None and self.silent > hold.SILENT else self.progress.state

    def plain(self) -> dict[str, Any]:
        """The same as a dict for JSON."""
        events = [event.model_dump(exclude_none=True) for event in self.events]
        own = {"directory": self.directory, "silent": self.silent, "events": events}
        return self.progress.model_dump(exclude_none=True) | own | {"state": self.state}


def status(uri: str) -> list[Status]:
    """How far the run in a directory is, or each stage of a pipeline in it.

    Raises:
        UserError: it is not a run directory, or is damaged.
    """
    stages = [f"{uri.rstrip('/')}/{folder}" for folder in FOLDERS]
    try:
        claimed = [stage for stage in stages if RunDirectory.is_one(stage)]
    except (ImportError, ValueError, OSError) as problem:
        raise UserError(f"run: cannot open {uri}: {problem}") from None
    begun = [stage for stage in claimed if RunDirectory.existing(stage, "run").exists(PROGRESS)]
    return [_of(one) for one in begun or claimed or [uri]]


def _of(uri: str) -> Status:
    run = RunDirectory.existing(uri, "run")
    if absent := [name for name in (PROGRESS, EVENTS) if not run.exists(name)]:
        raise UserError(
            f"run: {uri} has no {absent[0]}. The command has not started, or this is not the directory of a "
            "score, unlearn or evaluate run"
        )
    try:
        progress = Progress.model_validate_json(run.read(PROGRESS))
        events = [Event.model_validate_json(line) for line in journal.lines_of(run.read(EVENTS))]
    except ValueError as problem:
        raise UserError(
            f"{run.path(PROGRESS)} or {EVENTS} is damaged ({problem}); start the run's command "
            "again, which rewrites both"
        ) from None
    return Status(uri, progress, progress.silent, [event for event in events if event.event != "unit_done"][-_EVENTS:])


def rows(found: Status) -> list[tuple[str, str]]:
    """The status in words: pairs of a label and a text."""
    it, silent = found.progress, found.silent or 0.0
    resumes = "the same command resumes from there"
    states = {
        "running": f"running; last sign of life {silent:.0f} s ago",
        "silent": f"no sign of life for {_span(silent)}: killed, or its node is gone; {resumes}",
        "done": "done",
        "failed": f"failed: {it.message}",
        "interrupted": f"interrupted; {resumes}",
    }
    told = [
        ("run", f"{found.directory} ({it.run})"),
        ("command", f"{it.command}, started {_moment(it.started)} on {it.node}, process {it.pid}"),
        ("state", states[found.state]),
    ]
    if it.units_done is not None:
        lost = f", {it.units_failed} lost with their actor and repeated" if it.units_failed else ""
        told.append(("units", f"{it.units_done} done since this start, {it.units_left or 0} left{lost}"))
    if it.samples_draws_per_second is not None:
        told.append(
            ("rate", f"{it.samples_draws_per_second:.3g} {'rows' if it.command == 'evaluate' else 'samples x draws'}/s")
        )
    if it.actor_restarts:
        told.append(("actor restarts", str(it.actor_restarts)))
    if it.nodes_set_aside:
        told.append(("nodes set aside", ", ".join(it.nodes_set_aside)))
    if it.steps is not None:
        told.append(("steps", f"{it.step or 0} of {it.steps}"))
    if it.samples is not None:
        told.append(("samples", f"{it.samples:,}, {it.sample_errors or 0:,} with an error"))
    return told + [(_moment(event.time), event.message or event.event) for event in found.events]


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.0f} min"
