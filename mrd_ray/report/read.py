"""Run directories -> what the page is made of."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mrd_ray.errors import UserError
from mrd_ray.runs import RunDirectory

_SCORE_COLUMNS = {
    "sample_id", "mrd", "mrd_se", "mean_abs", "num_draws", "sigma", "estimator", "num_tokens", "log_prob", "error",
}  # fmt: skip
_LINE_COLUMNS = {"set", "sample_id", "metric", "value", "tokens", "error"}


@dataclass(frozen=True)
class About:
    """Which run: its short name (unique in a report), where it is, what made it ("score", ...) and its manifest."""

    name: str
    uri: str
    command: str
    manifest: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The settings it was last started with."""
        found: dict[str, Any] = self.manifest["invocations"][-1]["config"]
        return found

    def setting(self, key: str) -> Any:
        """The setting named so, as "group.name"; None where this kind of run has no such setting."""
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
    log: list[dict[str, Any]]
    refreshes: dict[int, pa.Table]
    evaluations: dict[int, pa.Table]

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Those of one event."""
        return [line for line in self.log if line["event"] == event]

    @property
    def outcome(self) -> dict[str, Any] | None:
        """Why it stopped and which step the result is of; None while it has not ended."""
        found: dict[str, Any] | None = self.about.manifest.get("outcome")
        # that of fewer steps stays in the manifest while a run is continued
        return None if found is None or found["config"] != self.about.config else found

    @property
    def before(self) -> dict[str, Any] | None:
        """The evaluation of the initial model."""
        return next(iter(self.lines("evaluation")), None)

    @property
    def after(self) -> dict[str, Any] | None:
        """The evaluation of the result, or the latest one of an unfinished run."""
        evaluations = self.lines("evaluation")
        if self.outcome is None:
            found = evaluations[1:]
        else:
            found = [line for line in evaluations if line["step"] == self.outcome["step"]]
        return found[-1] if found else None


@dataclass(frozen=True)
class Evaluation:
    """An evaluate run. figures, answers and lines: rows of figures.parquet, answers.parquet and evaluation.parquet."""

    about: About
    figures: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    lines: list[dict[str, Any]]


Run = Scores | Unlearning | Evaluation


def read(uris: Sequence[str]) -> list[Run]:
    """Read runs of any kind. Raises UserError: a directory with nothing to report, or a damaged file."""
    return [_read(uri, name) for uri, name in zip(uris, _names(uris), strict=True)]


def _names(uris: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
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
    manifest = run.manifest()
    last = manifest["invocations"][-1] if manifest["invocations"] else {}
    if absent := {"time", "command", "versions", "hardware", "config"} - set(last):
        raise UserError(
            f"{run.path('manifest.json')} is damaged (no {', '.join(sorted(absent))} of its last invocation); start "
            "the run's command again, which adds one"
        )
    if run.exists("metrics.jsonl"):
        refreshes = _by_step(run, "scores", _SCORE_COLUMNS)
        evaluations = _by_step(run, "evaluations", _LINE_COLUMNS)
        return Unlearning(About(name, uri, "unlearn", manifest), _log(run), refreshes, evaluations)
    if run.exists("figures.parquet"):
        figures = _table(run, "figures.parquet", {"set", "metric", "value", "se", "rows"})
        answers = _table(run, "answers.parquet", {"set", "sample_id", "prompt", "answer", "generated"})
        lines = _table(run, "evaluation.parquet", _LINE_COLUMNS)
        rows = (table.to_pylist() for table in (figures, answers, lines))
        return Evaluation(About(name, uri, "evaluate", manifest), *rows)
    if run.exists("scores.parquet"):
        samples = _table(run, "samples.parquet", {"sample_id", "text"})
        texts = dict(zip(samples["sample_id"].to_pylist(), samples["text"].to_pylist(), strict=True))
        return Scores(About(name, uri, "score", manifest), _table(run, "scores.parquet", _SCORE_COLUMNS), texts)
    raise UserError(
        f"{uri}: nothing to report yet: no scores.parquet, metrics.jsonl or figures.parquet in it. Start its command "
        "again, so that it finishes"
    )


def _table(run: RunDirectory, name: str, columns: set[str]) -> pa.Table:
    if not run.exists(name):
        raise UserError(f"{run.path(name)} is missing; start the run's command again, which makes it")
    table = run.read_table(name)
    if absent := columns - set(table.column_names):
        raise UserError(
            f"{run.path(name)} is damaged (no column {', '.join(sorted(absent))}); delete it and start the run's "
            "command again"
        )
    return table


def _by_step(run: RunDirectory, folder: str, columns: set[str]) -> dict[int, pa.Table]:
    """The tables step-NNNNNN.parquet of a folder."""
    files = [file for file in run.names(folder) if re.fullmatch(r"step-\d+\.parquet", file)]
    return {int(re.sub(r"\D", "", file)): _table(run, f"{folder}/{file}", columns) for file in files}


def _log(run: RunDirectory) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(run.read("metrics.jsonl").splitlines(), 1):
        try:
            entry = json.loads(line)
            found.append({name: _finite(value) for name, value in entry.items()} | {"step": int(entry["step"])})
            found[-1]["event"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{run.path('metrics.jsonl')} is damaged: line {number} is not a line of the log; start the run's "
                "command again, which writes it from the last checkpoint"
            ) from None
    return found


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
