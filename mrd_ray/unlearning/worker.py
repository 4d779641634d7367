"""One worker of the Ray Train job: loads the model, resumes from the newest checkpoint, runs the loop, reports."""

import hashlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
import transformers
from transformers import PreTrainedModel

from mrd_ray.config import UnlearnConfig
from mrd_ray.errors import UserError
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.scoring.estimators import refuse_wrong_rules
from mrd_ray.unlearning import model as trained
from mrd_ray.unlearning.engine import Engine
from mrd_ray.unlearning.log import Log
from mrd_ray.unlearning.loop import Kept, Loop
from mrd_ray.unlearning.state import State
from mrd_ray.workers.ranks import Ranks
from mrd_ray.workers.replica import refuse_not_causal, refuse_other_model


@dataclass(frozen=True)
class Job:
    """What a round of training is given.

    sets: a reference to `Sets` in Ray's object store. deepspeed: of `engine.configuration`. until, scores: with
    refreshes by actors, the step to stop at, and the step of which there are scores, these, and the seconds they took.
    measure: a reference to a function of the live engine that gives a table every `evaluation_every` steps, or None.
    """

    config: UnlearnConfig
    deepspeed: dict[str, Any]
    sets: ray.ObjectRef
    files_digest: str
    until: int | None = None
    scores: tuple[int, pa.Table, float] | None = None
    measure: ray.ObjectRef | None = None


RANKED_BY = "ranked_by"  # among what is reported with each checkpoint


def work(settings: dict[str, Job]) -> dict[str, Any]:
    """Ray Train's loop per worker: {"reason": why it stopped, or None at `until`}, or {"fatal": what is wrong}.

    Args:
        settings: the job, under "job", since Ray Train passes workers a dictionary.

    What is wrong with settings or data is given back, since an exception would be tried again.
    """
    job = settings["job"]
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(1, int(job.config.ray.cpus_per_process)))
    ranks = Ranks.of_process_group()
    try:
        return {"reason": _train(job, ranks)}
    except UserError as problem:
        return {"fatal": str(problem)}


def _train(job: Job, ranks: Ranks) -> str | None:
    config = job.config
    run = RunDirectory.of(config.run)
    for left in Path(tempfile.gettempdir()).glob(f"{_prefix(config, ranks)}*"):  # by a worker that was killed
        shutil.rmtree(left, ignore_errors=True)
    engine = Engine(ranks.agree(lambda: _model(job)), config, job.deepspeed, ranks)
    state = State()
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            engine.load(Path(folder))
            state = State.load(Path(folder))
    log = ranks.agree(lambda: Log(run, config, state.log) if ranks.rank == 0 else None)

    def keep_scores(step: int, scores: pa.Table) -> None:
        run.write_table(f"scores/step-{step:06d}.parquet", scores)

    def measure(step: int, engine: Engine) -> None:
        table = ray.get(job.measure)(engine)
        if ranks.rank == 0:
            _alone(run.write_table)(f"evaluations/step-{step:06d}.parquet", table)

    loop = Loop(
        config,
        ray.get(job.sets),
        engine,
        state,
        until=job.until,
        log=_alone(log or (lambda line: None)),
        keep_scores=_alone(keep_scores),
        checkpoint=lambda metrics, write: _report(metrics, write, config, ranks),
        measure=measure if job.measure is not None else None,
    )
    if job.scores is not None and state.scored_at < job.scores[0] == state.step:
        loop.adopt(*job.scores[1:])
    reason = loop.run()
    if log is not None:
        log.close()
    return reason


def _alone(write: Callable[..., None]) -> Callable[..., None]:
    """What only rank 0 does: a failure there must end the worker, since the other ranks would wait for it."""

    def checked(*args: Any) -> None:
        try:
            write(*args)
        except UserError as problem:
            raise RuntimeError(str(problem)) from None

    return checked


def _model(job: Job) -> PreTrainedModel:
    config = job.config
    refuse_other_model(config.model, job.files_digest)
    model = trained.load(config, ray.train.torch.get_device())
    refuse_not_causal(model)
    if config.unlearning.weighting != "uniform" and config.unlearning.refresh == "in_place":
        refuse_wrong_rules(model, config.scoring)
    return model


def _rank_of(metrics: Kept, config: UnlearnConfig) -> float:
    """What the best checkpoint has least of. The model as it was is no result, and makes room for others."""
    best_by = config.checkpoints.best_by
    if best_by == "last":
        return 0.0
    value = metrics[best_by]
    return value if metrics["step"] and value is not None else sys.float_info.max


def _prefix(config: UnlearnConfig, ranks: Ranks) -> str:
    """Of the folders where this rank writes its part of a checkpoint: the run's own."""
    return f"mrd_ray-checkpoint-{hashlib.sha256(config.run.dir.encode()).hexdigest()[:16]}-{ranks.rank}-"


def _report(metrics: Kept, write: Callable[[Path], None], config: UnlearnConfig, ranks: Ranks) -> None:
    """Write this rank's part of a checkpoint, and let Ray Train bring it to the run directory meanwhile."""
    folder = Path(tempfile.mkdtemp(prefix=_prefix(config, ranks)))
    write(folder)
    ray.train.report(
        {**metrics, "workers": ranks.size, RANKED_BY: _rank_of(metrics, config)},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step-{metrics['step']:06d}",
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
    )
