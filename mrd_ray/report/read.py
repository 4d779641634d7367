"""Reads run directories for the page."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, Field

from mrd_ray.config import EvaluateConfig, ScoreConfig, UnlearnConfig
from mrd_ray.config.renamed import same_settings
from mrd_ray.data import samples
from mrd_ray.errors import UserError
from mrd_ray.evaluation import table as evaluation
from mrd_ray.evaluation.aggregate import Figure
from mrd_ray.evaluation.evaluate import ANSWERS, Answer
from mrd_ray.runs.directory import REMAKE, RunDirectory, refuse_other_shape
from mrd_ray.scoring import table
from mrd_ray.unlearning import log
from mrd_ray.unlearning.log import EvaluationLine, Line

_SCORES = pa.schema([*table.SCHEMA, *table.MEASURES.values()])
_SCORE_COLUMNS = {
    "sample_id", "mrd", "mrd_se", "mean_abs", "num_draws", "sigma", "estimator", "num_tokens", "log_prob", "error",
}  # fmt: skip
_CONFIGS: dict[str, Any] = {"score": ScoreConfig, "unlearn": UnlearnConfig, "evaluate": EvaluateConfig}


class _Invocation(BaseModel):
    """What the page shows of each start of a run."""

    time: str
    command: list[str]
    versions: dict[str, str | None]
    hardware: dict[str, Any]
    config: dict[str, Any]


class _Outcome(BaseModel):
    reason: str | None
    step: int = Field(ge=0)
    config: dict[str, Any]


class _Recorded(BaseModel):
    """The part of a manifest that is read."""

    invocations: list[_Invocation] = Field(min_length=1)
    outcome: _Outcome | None = None


@dataclass(frozen=True)
class About:
    """A run: its short name (unique in a report), where it is, its command ("score", ...) and its manifest.

    config: the settings of its last start.
    """

    name: str
    uri: str
    command: str
    manifest: dict[str, Any]
    config: dict[str, Any]

    def setting(self, key: str) -> Any:
        """The setting "group.name"; None if this kind of run has no such setting."""
        group, name = key.split(".")
        return (self.config.get(group) or {}).get(name)


@dataclass(frozen=True)
class Scores:
    """A score run. scores: of scoring.table.SCHEMA. texts: by sample_id."""

    about: About
    scores: pa.Table
    texts: dict[str, str | None]


@dataclass(frozen=True)
class Unlearning:
    """An unlearn run, finished or not.

    log: the lines of metrics.jsonl. refreshes: scores by step. evaluations: lines of the evaluation by step, if any.
    """

    about: About
    log: list[Line]
    refreshes: dict[int, pa.Table]
    evaluations: dict[int, pa.Table]

    @property
    def outcome(self) -> dict[str, Any] | None:
        """Why it stopped, and the result's step; None if it has not finished."""
        saved: dict[str, Any] | None = self.about.manifest.get("outcome")
        # while a run is extended to more steps, the manifest still has the earlier outcome
        now = self.about.manifest["invocations"][-1]["config"]
        return saved if saved is not None and same_settings(saved["config"], now) else None

    @property
    def before(self) -> EvaluationLine | None:
        """The evaluation of the initial model."""
        return next(iter(log.evaluations(self.log)), None)

    @property
    def after(self) -> EvaluationLine | None:
        """The evaluation of the result, or the latest one of an unfinished run."""
        evaluations = log.evaluations(self.log)
        if self.outcome is None:
            of_result = evaluations[1:]
        else:
            of_result = [line for line in evaluations if line["step"] == self.outcome["step"]]
        return of_result[-1] if of_result else None


@dataclass(frozen=True)
class Evaluation:
    """An evaluate run. figures, answers and lines: rows of figures.parquet, answers.parquet and evaluation.parquet."""

    about: About
    figures: list[Figure]
    answers: list[Answer]
    lines: list[evaluation.Line]


Run = Scores | Unlearning | Evaluation


def read(uris: Sequence[str]) -> list[Run]:
    """Read runs of any kind. Raises UserError for a directory with nothing to report, or a damaged file."""
    return [_read(uri, name) for uri, name in zip(uris, _names(uris), strict=True)]


def _names(uris: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    places = [uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().resolve()) for uri in uris]
    if twice := [place for place in places if places.count(place) > 1]:
        raise UserError(f"runs: {twice[0]} is named twice; name each run directory once")
    parts = [place.split("/") for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return places


def _read(uri: str, name: str) -> Run:
    run = RunDirectory.existing(uri, "runs")
    if run.exists("metrics.jsonl"):
        about = _about(run, name, "unlearn")
        refreshes = _by_step(run, "scores", _SCORES, _SCORE_COLUMNS)
        evaluations = _by_step(run, "evaluations", evaluation.SCHEMA, evaluation.REQUIRED)
        for step, lines in evaluations.items():
            _refuse_impossible(run.path(f"evaluations/step-{step:06d}.parquet"), lines)
        return Unlearning(about, log.read(run), refreshes, evaluations)
    if run.exists("figures.parquet"):
        about = _about(run, name, "evaluate")
        figures = run.read_table("figures.parquet", evaluation.FIGURES)
        answers = run.read_table("answers.parquet", ANSWERS)
        lines = run.read_table("evaluation.parquet", evaluation.SCHEMA, evaluation.REQUIRED)
        known = [row for row in figures.select(evaluation.FIGURES.names).to_pylist() if row["value"] is not None]
        return Evaluation(about, [Figure(**row) for row in known], answers.to_pylist(), lines.to_pylist())
    if run.exists("scores.parquet"):
        about = _about(run, name, "score")
        of_samples = run.read_table("samples.parquet", samples.SCHEMA, {"sample_id", "text"})
        texts = dict(zip(of_samples["sample_id"].to_pylist(), of_samples["text"].to_pylist(), strict=True))
        return Scores(about, run.read_table("scores.parquet", _SCORES, _SCORE_COLUMNS), texts)
    run.manifest()
    raise UserError(
        f"{uri}: nothing to report yet: no scores.parquet, metrics.jsonl or figures.parquet in it. Run its command "
        "again, so that it finishes"
    )


def _about(run: RunDirectory, name: str, command: str) -> About:
    manifest, where = run.manifest(), run.path("manifest.json")
    remedy = "run its command again, which records its settings"
    refuse_other_shape(where, _Recorded, manifest, remedy)
    config, shape = manifest["invocations"][-1]["config"], _CONFIGS[command]
    refuse_other_shape(where, shape, config, remedy)
    if absent := sorted(shape.model_fields.keys() - config.keys() - {"output"}):
        raise UserError(f"{where} is damaged (no {', '.join(absent)} in its settings); {remedy}")
    whole = shape.model_validate(config).model_dump(mode="json")  # adds settings that are newer than the run
    return About(name, run.uri, command, manifest, whole)


def _refuse_impossible(where: str, lines: pa.Table) -> None:
    """Raises UserError if a value has no metric or no tokens, or is impossible for its metric."""
    for line in lines.select(["sample_id", "metric", "value", "tokens"]).to_pylist():
        value, metric = line["value"], line["metric"]
        if value is not None and (
            metric is None or line["tokens"] is None or (metric == "perplexity" and not value > 0)
        ):
            raise UserError(f"{where} is damaged ({line['sample_id']}: {metric} of {value}); {REMAKE}")


def _by_step(
    run: RunDirectory, folder: str, schema: pa.Schema, required: Collection[str] | None = None
) -> dict[int, pa.Table]:
    """The tables step-NNNNNN.parquet of a folder."""
    files = [file for file in run.names(folder) if re.fullmatch(r"step-\d{1,15}\.parquet", file)]
    return {int(re.sub(r"\D", "", file)): run.read_table(f"{folder}/{file}", schema, required) for file in files}
