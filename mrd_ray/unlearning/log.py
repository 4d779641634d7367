"""What a user watches: metrics.jsonl, and on request TensorBoard and Weights & Biases; Ray's own metrics."""

import hashlib
import importlib
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, TypedDict, cast

import ray.util.metrics
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from mrd_ray.config import TrackingSettings, UnlearnConfig
from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory, parsed_json
from mrd_ray.unlearning.stopping import Measures, perplexity

NAME, START = "metrics.jsonl", "start.json"
_FLUSH_EVERY = 2.0  # seconds
_OF_RUN = ("run",)  # tags of metrics


class StepLine(TypedDict):
    """An optimiser step. Losses are means over the samples of the step; null where they are not finite, or unused."""

    step: int
    of: int
    event: Literal["step"]
    forget_loss: float | None
    retain_loss: float | None
    grad_norm: float | None
    tokens: int
    seconds: float


class RefreshLine(TypedDict):
    """A scoring of the forget set."""

    step: int
    of: int
    event: Literal["refresh"]
    mrd_median: float | None
    doubts: int
    seconds: float


class EvaluationLine(Measures):
    """What the model knows before the first step, and at each evaluation."""

    step: int
    of: int
    event: Literal["evaluation"]
    seconds: float


class StopLine(TypedDict):
    """Why it stopped."""

    step: int
    of: int
    event: Literal["stop"]
    reason: str


Line = StepLine | RefreshLine | EvaluationLine | StopLine


def evaluations(lines: Iterable[Line]) -> list[EvaluationLine]:
    """The evaluations among the lines of a log."""
    return [line for line in lines if line["event"] == "evaluation"]


def current(line: dict[str, JsonValue]) -> Line:
    """A line as this version writes it: earlier ones logged the retain loss, in nats, at evaluations."""
    if line.get("event") == "evaluation" and "retain_loss" in line:
        loss = cast("float | None", line["retain_loss"])
        kept = {name: value for name, value in line.items() if name != "retain_loss"}
        line = {**kept, "retain_perplexity": None if loss is None else perplexity(loss)}
    return cast("Line", line)


def require(tracking: TrackingSettings, run_dir: str) -> None:
    """Raises UserError if something asked for is not installed; TensorBoard writes to a URI by a library of its own."""
    wanted = ["wandb"] if tracking.wandb_project is not None else []
    if tracking.tensorboard:
        writer = {"s3": "boto3", "gs": "gcsfs", "gcs": "gcsfs"}.get(run_dir.split("://")[0])
        wanted += ["tensorboard"] if writer is None else ["tensorboard", writer]
    for library in wanted:
        try:
            importlib.import_module(library)
        except ImportError:
            raise UserError(f"tracking: {library} is not installed: pip install {library}") from None


class Log:
    """The log of a run, on rank 0. metrics.jsonl holds exactly the steps that led to the present state.

    Args:
        lines: those of the checkpoint that the run resumes from; what an interrupted attempt wrote after it goes.
    """

    def __init__(self, run: RunDirectory, config: UnlearnConfig, lines: Sequence[Line]) -> None:
        self._run = run
        self._lines = [_json(line) for line in lines]
        self._flushed = 0.0
        self._tensorboard = self._wandb = None
        if config.tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = f"{run.uri}/tensorboard" if "://" in run.uri else run.path("tensorboard")
            self._tensorboard = SummaryWriter(folder, purge_step=lines[-1]["step"] if lines else None)
        if config.tracking.wandb_project is not None:
            wandb = importlib.import_module("wandb")
            self._wandb = wandb.init(
                project=config.tracking.wandb_project,
                config=config.model_dump(),
                id=hashlib.sha256(run.uri.encode()).hexdigest()[:16],  # a resumed run continues the same one
                resume="allow",
            )
        self._steps = ray.util.metrics.Counter("mrd_ray_unlearning_steps_total", "Optimiser steps taken", _OF_RUN)
        self._tokens = ray.util.metrics.Counter("mrd_ray_unlearning_tokens_total", "Tokens trained on", _OF_RUN)
        for metric in (self._steps, self._tokens):
            metric.set_default_tags({"run": str(run.manifest()["run_id"])})
        self.flush()
        run.write(START, json.dumps({"node": os.uname().nodename, "pid": os.getpid(), "time": time.time()}).encode())

    def __call__(self, line: Line) -> None:
        """Take in a line."""
        self._lines.append(_json(line))
        numbers = {
            f"{line['event']}/{name}": value
            for name, value in line.items()
            if name not in ("step", "of") and isinstance(value, int | float)
        }
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, line["step"])
        if self._wandb is not None:
            self._wandb.log({"step": line["step"], **numbers})
        if line["event"] == "step":
            self._steps.inc()
            self._tokens.inc(line["tokens"])
        if line["event"] != "step" or time.monotonic() - self._flushed > _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Put all lines on disk. Raises UserError where it cannot."""
        self._run.write(NAME, "".join(line + "\n" for line in self._lines).encode())
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush everything."""
        self.flush()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _json(line: Line) -> str:
    """JSON has no word for a loss that is not finite: it becomes null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()})


class _Line(BaseModel):
    """A line of the log: beside these, numbers, none of them beyond all measure."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, Annotated[float, Field(ge=-1e100, le=1e100)] | None]

    step: int = Field(ge=0, lt=2**53)
    of: int = Field(ge=0, lt=2**53)
    event: str
    reason: str = ""


def start(run: RunDirectory) -> bytes:
    """What tells one start of the workers from another; nothing before the first."""
    return run.read(START) if run.exists(START) else b""


def node_of(start: bytes) -> str:
    """The node of rank 0, as `start` records it."""
    try:
        return str(json.loads(start)["node"])
    except (ValueError, LookupError, TypeError):
        return "no node yet"


def read(run: RunDirectory) -> list[Line]:
    """The lines so far; none before a run has begun. Raises UserError if they are damaged."""
    if not run.exists(NAME):
        return []
    remedy = "start the run's command again, which writes it from the last checkpoint"
    return [
        current(parsed_json(f"{run.path(NAME)}, line {number},", line, _Line, remedy))
        for number, line in enumerate(run.read(NAME).splitlines(), 1)
    ]
