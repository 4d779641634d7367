"""`mrd-ray unlearn`, start to end."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from pydantic import BaseModel, ValidationError
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, Result, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from mrd_ray.config import RaySettings, RunSettings, ScoreConfig, UnlearnConfig
from mrd_ray.config.paths import with_absolute_paths
from mrd_ray.config.renamed import same_settings
from mrd_ray.data import samples as samples_table
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError
from mrd_ray.evaluation import sets as evaluated_sets
from mrd_ray.models import load, saving
from mrd_ray.models.files import model_digest
from mrd_ray.mrd.noise import NOISE_VERSION
from mrd_ray.runs import meter, storage
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.hold import held
from mrd_ray.runs.journal import Journal
from mrd_ray.scoring.estimators import refuse_uncovered
from mrd_ray.scoring.score import score
from mrd_ray.unlearning import engine, log, sets
from mrd_ray.unlearning import model as trained
from mrd_ray.unlearning.engine import Engine
from mrd_ray.unlearning.in_training import InTraining
from mrd_ray.unlearning.loop import Sets, last_step
from mrd_ray.unlearning.watch import Watch
from mrd_ray.unlearning.worker import RANKED_BY, Job, work
from mrd_ray.workers.cluster import cluster
from mrd_ray.workers.pool import Pool
from mrd_ray.workers.run_units import pool_of

_CHECKPOINTS = "checkpoints"
_OWNS = ("model", _CHECKPOINTS, "scores", "refreshes", "evaluations", "tensorboard", log.NAME, log.START)


class _Outcome(BaseModel):
    """Of a finished run, in its manifest: why it stopped, the result's step, and the settings, as JSON."""

    reason: str
    step: int
    config: dict[str, Any]


@dataclass(frozen=True)
class UnlearnRun:
    """What a finished run left: its directory and settings, why it stopped, metrics.jsonl, and the result's step.

    The result, a Hugging Face directory, is in model/. step: optimiser steps that made it; fewer than were taken where
    a later state diverged or fell below the utility floor, or an earlier one was best.
    """

    run: RunDirectory
    config: UnlearnConfig
    reason: str
    step: int
    log: list[log.Line]

    @property
    def failed(self) -> bool:
        """Whether the model diverged or fell below the utility floor, or the result is the model as it was."""
        return self.step == 0 or self.reason.startswith(("diverged", "utility floor"))


def unlearn(config: UnlearnConfig) -> UnlearnRun:
    """Unlearn a forget set; resume, if the run directory holds such a run already.

    If `evaluation_every` is set, RUN/evaluations/step-NNNNNN.parquet are as the evaluation.parquet of `mrd-ray
    evaluate` on that step's model.

    Args:
        config: all settings.

    Raises:
        UserError: bad input or settings, a run directory of something else, or workers that failed too often.
    """
    console = meter.console(config.output)
    config = with_absolute_paths(config)
    run = RunDirectory.of(config.run)
    with held(run):
        trained.refuse(config)
        skeleton = load.skeleton(config.model)
        saving.refuse_loss(config.model, unused := load.unused_weights(config.model))
        if config.lora.rank:
            trained.add_lora(skeleton, config)
        if config.unlearning.weighting != "uniform":
            refuse_uncovered(skeleton, config.scoring)
        log.require(config.tracking, config.run.dir)
        tokenizer = load.load_tokenizer(config.model, console)
        limits = Limits.of(skeleton)
        of_run = sets.build(config, tokenizer, limits, console)
        measure = None
        if config.evaluation_every is not None:
            measure = InTraining(config, evaluated_sets.build_all(config.evaluation, tokenizer, limits, console))
        if of_run.retain is None:
            console.print("Without a retain set nothing watches what else the model loses (retain.path)", style="red")
        run.claim(_identity(config, load.tokenizer_identity(tokenizer, config.model), of_run), config, _OWNS)
        run.record("unused_weights", unused)
        done = _outcome(run)
        settings = config.model_dump(mode="json", exclude={"output"})
        if done is None or not same_settings(done.config, settings):
            # what matters is in the log; the rest is libraries' chatter
            with Journal(run, "unlearn", config.output) as journal:
                grows = journal.within(cluster(log_to_driver=False))
                rounds = _TrainingRounds(config, run, of_run, model_digest(config.model), measure, journal)
                done = _Outcome(**rounds.work_off(grows), config=settings)
                run.record("outcome", done.model_dump())
    return UnlearnRun(run, config, done.reason, done.step, log.read(run))


def _outcome(run: RunDirectory) -> _Outcome | None:
    """Of a run that has ended and whose files are there; what of them is damaged can be made from its checkpoints."""
    try:
        log.read(run)
        return _Outcome.model_validate(run.manifest().get("outcome")) if run.exists("model") else None
    except (UserError, ValidationError):
        return None


def _identity(config: UnlearnConfig, tokenizer: str, of_run: Sets) -> dict[str, Any]:
    """What the trajectory depends on, but for its length."""
    tables = {"samples": of_run.forget, "retain samples": of_run.retain, "refusals": of_run.refusals}
    groups: dict[str, Any] = {
        "unlearning": config.unlearning.model_dump(exclude={"epochs", "steps", "refusals"}),
        "lora": config.lora.model_dump(),
        "deepspeed": config.deepspeed.model_dump() | {"config": engine.user_json(config.deepspeed.config)},
        "stopping": config.stopping.model_dump(include={"extraction_n", "extraction_stride", "retain_samples"}),
    }
    if config.unlearning.weighting != "uniform":
        groups["scoring"] = config.scoring.model_dump(mode="json", exclude={"activation_gib"})
    settings = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
    return settings | {
        "model": model_digest(config.model),
        "model.dtype": config.model.dtype,
        "tokenizer": tokenizer,
        "noise version": NOISE_VERSION,
        **{name: samples_table.digest(table) for name, table in tables.items() if table is not None},
    }


@dataclass
class _TrainingRounds:
    """Training, in one round, or in one from each refresh to the next where actors do the scoring."""

    config: UnlearnConfig
    run: RunDirectory
    sets: Sets
    files_digest: str
    measure: Callable[[Engine], pa.Table] | None
    journal: Journal

    def work_off(self, grows: bool) -> dict[str, Any]:
        """Train until there is a reason to stop, put the result in place, and say which it is."""
        config = self.config
        pool = self._pool(grows)
        deepspeed = engine.configuration(config, pool.actors)
        self._refuse_newest(pool.actors)
        reference = ray.put(self.sets)
        measure = None if self.measure is None else ray.put(self.measure)
        by_actors = config.unlearning.refresh == "actors" and config.unlearning.weighting != "uniform"
        with Watch(self.run, last_step(config, len(self.sets.forget)), self.journal, config.ray.stall_after):
            while True:
                until, scores = self._round() if by_actors else (None, None)
                job = Job(config, deepspeed, reference, self.files_digest, until, scores, measure)
                result = self._fit(job, pool)
                if (fatal := result.return_value.get("fatal")) is not None:
                    kept = " Checkpoints are in the run directory, each with a model/." if self._newest() else ""
                    raise UserError(f"{fatal.rstrip('.')}.{kept}")
                if (reason := result.return_value["reason"]) is not None:
                    break
        return {"reason": reason, "step": self._export(result)}

    def _pool(self, grows: bool) -> Pool:
        wanted = self.config.ray
        workers = wanted.workers or max(1, int(ray.cluster_resources().get("GPU", 0)))
        shape = RaySettings(
            actors=workers,
            cpus_per_process=wanted.cpus_per_process,
            gpus_per_actor=wanted.gpus_per_worker,
            start_timeout=wanted.start_timeout,
        )
        return pool_of(shape, grows and wanted.workers is not None, self.journal, all_at_once=True, word="worker")

    def _newest(self) -> tuple[ray.train.Checkpoint, dict[str, Any]] | None:
        """The checkpoint that a fit would resume from."""
        if not self.run.exists(f"{_CHECKPOINTS}/checkpoint_manager_snapshot.json"):
            return None
        try:
            result = Result.from_path(storage.for_arrow(f"{self.run.uri}/{_CHECKPOINTS}"))
        except (RuntimeError, ValueError, OSError) as problem:
            raise UserError(
                f"{self.run.path(_CHECKPOINTS)} is damaged ({problem}); start anew in another directory, from the "
                "model/ of one of its checkpoints if need be"
            ) from None
        return None if result.checkpoint is None else (result.checkpoint, result.metrics)

    def _refuse_newest(self, workers: int) -> None:
        """Raises UserError if the run cannot resume from the newest checkpoint."""
        if (newest := self._newest()) is None:
            return
        if (was := newest[1]["workers"]) != workers:
            raise UserError(
                f"ray.workers: {workers}, but the checkpoints in {self.run.uri} are of {was}; start the same command "
                f"with ray.workers: {was}, or start anew in another directory"
            )
        if (last := last_step(self.config, len(self.sets.forget))) < (step := newest[1]["step"]):
            raise UserError(
                f"unlearning.steps (or epochs): {last}, but {self.run.uri} holds a checkpoint of step {step} already; "
                "use another directory for fewer"
            )

    def _round(self) -> tuple[int, tuple[int, pa.Table, float] | None]:
        """Where the coming round ends, and what `Job.scores` is, if it begins with a refresh."""
        newest = self._newest()
        step = 0 if newest is None else int(newest[1]["step"])
        epoch = -(-len(self.sets.forget) // self.config.unlearning.batch_size)
        every = self.config.unlearning.refresh_every or epoch
        until = step - step % every + every
        if newest is None and self.config.lora.rank:
            return 0, None  # a checkpoint, since the factors to score are made by the workers
        if step % every:
            return until, None
        started = time.monotonic()
        model, shape = self.config.model, self.config.ray
        if newest is not None:
            model = self.config.result(f"{newest[0].path}/model")
        finished = score(
            ScoreConfig(
                model=model,
                data=self.config.data,
                run=RunSettings(dir=f"{self.run.uri}/refreshes/step-{step:06d}"),
                scoring=self.config.scoring,
                ray=RaySettings(
                    cpus_per_process=shape.cpus_per_process,
                    gpus_per_actor=shape.gpus_per_worker,
                    start_timeout=shape.start_timeout,
                    stall_after=shape.stall_after,
                ),
                output=self.config.output,
            )
        )
        finished.refuse_other_samples(self.sets.forget)  # whose weights they become, by place
        self.run.write_table(f"scores/step-{step:06d}.parquet", finished.scores)
        return until, (step, finished.scores, time.monotonic() - started)

    def _fit(self, job: Job, pool: Pool) -> Result:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        keep, best_by = self.config.checkpoints.keep, self.config.checkpoints.best_by
        trainer = TorchTrainer(
            work,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=pool.actors,
                use_gpu=pool.gpus > 0,
                resources_per_worker={"CPU": pool.cpus} | ({"GPU": pool.gpus} if pool.gpus else {}),
            ),
            run_config=TrainRunConfig(
                name=_CHECKPOINTS,
                storage_path=storage.for_arrow(self.run.uri),
                logging_config=LoggingConfig("ERROR"),
                failure_config=FailureConfig(max_failures=self.config.ray.max_failures),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=keep,
                    checkpoint_score_attribute=None if best_by == "last" else RANKED_BY,
                    checkpoint_score_order="min",
                ),
            ),
            torch_config=TorchConfig(backend="nccl" if pool.gpus else "gloo"),
        )
        try:
            return trainer.fit()
        except SystemExit:  # Ray's way to answer ctrl-C
            raise KeyboardInterrupt from None
        except ray.train.TrainingFailedError as problem:
            raise UserError(
                f"the workers failed {self.config.ray.max_failures + 1} time(s) (ray.max_failures); the same command "
                f"resumes from the last checkpoint. {problem}"
            ) from None

    def _export(self, result: Result) -> int:
        """Copy the result's model to model/; the step that it is of."""
        if result.checkpoint is None:
            raise UserError("no checkpoint was left: the model gives no finite probabilities to begin with")
        chosen, metrics = result.checkpoint, result.metrics
        best_by = self.config.checkpoints.best_by
        if best_by != "last":
            unlearned = [pair for pair in result.best_checkpoints if pair[1]["step"]] or result.best_checkpoints
            chosen, metrics = min(unlearned, key=lambda pair: (pair[1][best_by], pair[1]["step"]))
        with chosen.as_directory() as folder:
            self.run.record("outcome", None)  # model/ may be half of each while it is being replaced
            self.run.put("model", Path(folder) / "model")
        return int(metrics["step"])
