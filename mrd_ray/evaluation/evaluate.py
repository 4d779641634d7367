"""`mrd-ray evaluate`, start to end."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import pyarrow as pa
from rich.console import Console

from mrd_ray.config import EvaluateConfig, EvaluationSettings
from mrd_ray.data.tokens import Limits
from mrd_ray.errors import UserError
from mrd_ray.evaluation import judges, sets, table, zero_shot
from mrd_ray.evaluation.actor import RESULT_SCHEMA, EvaluationActor, EvaluationSetup
from mrd_ray.evaluation.aggregate import Figure
from mrd_ray.evaluation.measure import Record
from mrd_ray.models import load
from mrd_ray.models.files import model_digest
from mrd_ray.runs import meter
from mrd_ray.runs.directory import RunDirectory
from mrd_ray.runs.hold import held
from mrd_ray.runs.journal import Journal
from mrd_ray.workers.cluster import cluster
from mrd_ray.workers.run_units import Load, pool_of, work_off

_OWNS = ("units", "evaluation.parquet", "answers.parquet", "figures.parquet", "figures.json")
_IDENTITY = [
    "extraction_n",
    "extraction_stride",
    "micro_batch_tokens",
    "generation_batch",
    "stop",
    "toxicity_label",
    "zero_shot_limit",
]
ANSWERS = pa.schema(
    [
        pa.field("set", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("generated", pa.string()),
    ]
)


class Answer(TypedDict):
    """A row of ANSWERS."""

    set: str
    sample_id: str
    prompt: str | None
    answer: str | None
    generated: str | None


@dataclass(frozen=True)
class EvaluateRun:
    """What a finished run left.

    lines: of table.SCHEMA, as evaluation.parquet. answers: set, sample_id, prompt, answer, generated. figures: of sets
    and of the model, as figures.parquet and figures.json.
    """

    run: RunDirectory
    config: EvaluateConfig
    lines: pa.Table
    answers: pa.Table
    figures: list[Figure]

    @property
    def num_errors(self) -> int:
        """Rows that could not be evaluated."""
        return len(self.lines) - self.lines["error"].null_count


def evaluate(config: EvaluateConfig) -> EvaluateRun:
    """Evaluate a model on all sets; resume if the run directory already holds such a run.

    Raises:
        UserError: bad input or settings, or a run directory of something else.
    """
    console = meter.console(config.output)
    run = RunDirectory.of(config.run)
    with held(run):
        files_digest = model_digest(config.model)
        zero_shot.require(config)
        tokenizer = load.load_tokenizer(config.model, console)
        skeleton = load.skeleton(config.model)
        unused = load.unused_weights(config.model)
        tables = sets.build_all(config.evaluation, tokenizer, Limits.of(skeleton), console)
        of_sets = {f"evaluation.sets.{name}": sets.digest(rows) for name, rows in tables.items()}
        reference = None
        if config.evaluation.reference is not None:
            reference = _reference(config.evaluation.reference, str(config.evaluation.forget), run, of_sets)
        _warn_of_overlap(tables, config.evaluation, console)
        identity = {"model": files_digest, "tokenizer": load.tokenizer_identity(tokenizer, config.model)}
        run.claim(identity | of_sets | _identity(config), config, _OWNS)
        run.record("unused_weights", unused)
        with Journal(run, "evaluate", config.output) as journal:
            work = _Work(config, run, tables, files_digest, journal)
            records = work.off()
            suites = zero_shot.figures(config, run, files_digest, journal)
            finished = _finish(config, run, tables, records, reference, suites)
            journal.tell(samples=sum(map(len, tables.values())), sample_errors=finished.num_errors)
    return finished


def _identity(config: EvaluateConfig) -> dict[str, Any]:
    evaluation = config.evaluation
    named = {name: getattr(evaluation, name) for name in _IDENTITY}
    named |= {name: judges.identity(getattr(evaluation, name)) for name in ("embedding_model", "toxicity_model")}
    named["zero_shot_tasks"] = zero_shot.tasks_digest(evaluation.zero_shot_tasks)
    of_model = {"dtype": config.model.dtype} | load.ending_ids(config.model)
    return {f"evaluation.{name}": value for name, value in named.items()} | {
        f"model.{name}": value for name, value in of_model.items()
    }


def _reference(uri: str, forget: str, run: RunDirectory, of_sets: Mapping[str, str]) -> pa.Table:
    """The lines of another run, on the same rows of the forget set. of_sets: digests of this run's sets."""
    reference = RunDirectory(uri, "evaluation.reference", make=False)
    if reference.path("") == run.path(""):
        raise UserError(f"evaluation.reference: {uri} is run.dir; name the run of a model that never saw the set")
    if not all(reference.exists(name) for name in ("manifest.json", "evaluation.parquet")):
        raise UserError(f"evaluation.reference: {uri} holds no finished evaluation; evaluate the reference model first")
    if reference.manifest()["identity"].get(name := f"evaluation.sets.{forget}") != of_sets[name]:
        raise UserError(
            f"evaluation.reference: {uri} was asked something else of {forget!r}, so that the two cannot be compared; "
            "evaluate the reference model with this tokenizer and these settings, in another directory"
        )
    lines = reference.read_table("evaluation.parquet", table.SCHEMA, table.REQUIRED)
    if not table.Lines(lines).values(forget, "truth_ratio"):
        raise UserError(f"evaluation.reference: {uri} has no truth_ratio of a set named {forget!r}")
    return lines


def _warn_of_overlap(tables: Mapping[str, pa.Table], evaluation: EvaluationSettings, console: Console) -> None:
    if evaluation.forget is None:
        return
    members = evaluation.membership.members if evaluation.membership is not None else None
    for name, rows in tables.items():
        if name in (evaluation.forget, members):
            continue
        if shared := sets.shared_rows(tables[evaluation.forget], rows):
            console.print(
                f"{shared} of {len(tables[evaluation.forget])} rows of the forget set stand in {name} too",
                style="red", markup=False,
            )  # fmt: skip


@dataclass
class _Work:
    """Units, each a few rows of one set, which depend only on the rows, and the actors that process them."""

    config: EvaluateConfig
    run: RunDirectory
    tables: Mapping[str, pa.Table]
    files_digest: str
    journal: Journal

    def off(self) -> dict[str, dict[str, Record]]:
        """Measure what is missing, and give the records of each set by sample_id."""
        units = [unit for name, rows in self.tables.items() for unit in sets.units(name, rows)]
        there = set(self.run.names("units"))
        missing = [(unit_id, rows) for unit_id, rows in units if f"{unit_id}.parquet" not in there]
        if missing:
            self._measure(missing, self.journal.within(cluster(log_to_driver=not self.config.output.quiet)))
        records: dict[str, dict[str, Record]] = {name: {} for name in self.tables}
        for unit_id, rows in units:
            for record in self._result(unit_id, rows):
                records[unit_id.rsplit(".", 1)[0]][record["sample_id"]] = record
        return records

    def _measure(self, units: list[tuple[str, list[sets.EvaluatedRow]]], grows: bool) -> None:
        """Work off these units; each one's result is on disk before it counts as done."""
        config = self.config
        pool = pool_of(config.ray, grows, self.journal)
        task = EvaluationSetup(config.model, config.evaluation, self.files_digest, pool.threads, pool.gpus > 0)
        loads = {unit_id: Load(i, sum(map(sets.cost, rows)), len(rows)) for i, (unit_id, rows) in enumerate(units)}
        blocks = (pa.Table.from_pylist(rows, pa.schema(list(sets.EVALUATED_ROW))) for _, rows in units)
        work_off(
            "Evaluating", loads, blocks, EvaluationActor, task, pool, self.run, self.journal, config.ray, items="rows"
        )

    def _result(self, unit_id: str, rows: list[sets.EvaluatedRow]) -> list[Record]:
        name = f"units/{unit_id}.parquet"
        result = self.run.read_table(name, RESULT_SCHEMA)
        records: list[Record] = result["records"].combine_chunks().flatten().to_pylist()
        ids = [record["sample_id"] for record in records]
        if result["unit_id"].to_pylist() != [unit_id] or ids != [row["sample_id"] for row in rows]:
            raise UserError(
                f"{self.run.path(name)} is not that unit's result; delete it and start the same command again"
            )
        return records


def _finish(
    config: EvaluateConfig,
    run: RunDirectory,
    tables: Mapping[str, pa.Table],
    records: Mapping[str, Mapping[str, Record]],
    reference: pa.Table | None,
    suites: list[Figure],
) -> EvaluateRun:
    """From records to metrics and figures, all written."""
    lines, answers = [], []
    for name, rows in tables.items():
        lines.append(table.lines(name, config.evaluation.sets[name], config.evaluation, rows, records[name]))
        answers += [
            {"set": name, "answer": row["response"], "generated": record["generated"], **row}
            for row in rows.select(["sample_id", "prompt", "response"]).to_pylist()
            if (record := records[name].get(row["sample_id"])) is not None and record["generated"] is not None
        ]
    of_all = pa.concat_tables(lines)
    figures = table.figures(of_all, config.evaluation, reference) + suites
    finished = EvaluateRun(run, config, of_all, pa.Table.from_pylist(answers, ANSWERS), figures)
    run.write_table("evaluation.parquet", of_all)
    run.write_table("answers.parquet", finished.answers)
    plain = [figure.plain() for figure in figures]
    run.write_table("figures.parquet", pa.Table.from_pylist(plain, table.FIGURES))
    run.write("figures.json", json.dumps(plain, indent=1, allow_nan=False).encode())
    return finished
